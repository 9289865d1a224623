"""What a report says of pruning: zeros and where they went, work that is saved, sensitivity."""

from __future__ import annotations

from collections.abc import Sequence

from onnxq.core import Note
from onnxq.passes.masks import PrunedLayer

SENSITIVE = 3  # layers that people see


def pruning_rows(
    pruned: Sequence[PrunedLayer], macs: tuple[float, float] | None, notes: Sequence[Note]
) -> list[tuple[str, str]]:
    """Rows of a report's text; none where nothing was pruned."""
    rows = []
    if macs is not None:
        before, after = macs
        text = f"{before:,.0f} -> {after:,.0f} multiply-accumulates   {after / max(1, before):.2f}x"
        rows.append(("work", text))
    if pruned:
        rows.append(("pruned", _zeros(pruned)))
    if curves := [note for note in notes if note.curve]:
        rows.append(("sensitivity", _sensitivity(curves)))
    return rows


def lost_zeros(pruned: Sequence[PrunedLayer]) -> list[str]:
    """A warning where zeros that pruning made are none in the result."""
    short = [layer for layer in pruned if layer.kept is not None and layer.kept < layer.zeros]
    if not short:
        return []
    gone = sum(layer.zeros - (layer.kept or 0) for layer in short)
    names = ", ".join(layer.node for layer in short[:SENSITIVE])
    return [f"{gone} weights that were pruned are not zero in the result, in {names}"]


def _zeros(pruned: Sequence[PrunedLayer]) -> str:
    zeros, weights = sum(p.zeros for p in pruned), sum(p.weights for p in pruned)
    layers = f"{len(pruned)} layer{'s' * (len(pruned) > 1)}"
    text = f"{layers}, {zeros / max(1, weights):.1%} of their weights are zero; "
    unknown = [layer for layer in pruned if layer.kept is None]
    kept = sum(layer.kept or 0 for layer in pruned)
    if unknown:
        seen = zeros - sum(layer.zeros for layer in unknown)
        return text + f"{kept} of {seen} still are, {len(unknown)} layers cannot be read any more"
    return text + (
        "all still are in the result" if kept == zeros else f"{kept} of {zeros} still are"
    )


def _sensitivity(notes: Sequence[Note]) -> str:
    """The layers whose outputs suffer most from the largest amount that was tried."""
    ends = sorted((note.curve[-1][1], note.curve[-1][0], note.node) for note in notes)
    told = [f"{node} ({db:.1f} dB at {amount:.0%})" for db, amount, node in ends[:SENSITIVE]]
    return f"curves of {len(notes)} layers (--json); most sensitive: {', '.join(told)}"
