"""Reports: what was done and what that cost, as text for people and JSON for machines."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from onnxq.choosing import NOISE, Candidate
from onnxq.core import Note
from onnxq.coverage import Coverage
from onnxq.passes.masks import PrunedLayer
from onnxq.pruning_rows import pruning_rows
from onnxq.recipes import NARROWING, Recipe
from onnxq.runtime import Latency
from onnxq.validation import Fidelity, LayerError
from onnxq.weight_table import StoredWeight, print_largest, print_totals

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
ASIDE = ("prune_weights", "prune_channels", "sparsify_storage", "factorize_weights")
"""Passes whose declines do not say why a layer computes in floats."""
SHOWN = 8  # entries of a long list that people see; machines get all


@dataclass(frozen=True, slots=True)
class Report:
    """All that is known of one run of `optimize`.

    plan: the recipe that made the result: what `recipe` chose, or that itself. candidates: what was
    tried where it chose. notes: what each pass did and declined. coverage: of the result. fidelity,
    latency: None where validation was not asked for, latency also where the target runs elsewhere.
    seconds: of each stage. also_written: files beside the output. stored: what each weight of the
    result is stored in. pruned: layers that were pruned, and what is left of their zeros. macs:
    multiply-accumulates before and after, where channels went or weights were factorized.
    """

    model: str
    output: str | None
    recipe: str
    plan: Recipe
    target: str
    samples: str
    validated_on: str
    size_bytes: tuple[int, int]
    nodes: tuple[int, int]
    opset: tuple[int, int]
    notes: tuple[Note, ...]
    coverage: Coverage
    fidelity: Fidelity | None
    latency: Latency | None
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]
    environment: Mapping[str, str]
    also_written: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    stored: tuple[StoredWeight, ...] = ()
    pruned: tuple[PrunedLayer, ...] = ()
    macs: tuple[float, float] | None = None

    @property
    def is_slower(self) -> bool:
        """Whether the result is slower than the original, beyond noise."""
        return self.latency is not None and self.latency.ratio > NOISE

    def to_json(self) -> str:
        """The report for machines. `schema` grows when a field changes its meaning or goes."""
        return to_json({"schema": SCHEMA, **_plain(self), "float_layers": self.float_layers()})

    def float_layers(self) -> list[dict[str, Any]]:
        """Each layer that computes in floats: node, op, share of the work, reason."""
        reasons = {n.node: n.text for n in self.notes if n.rule.startswith(NARROWING)}
        reasons |= {n.node: n.text for n in self.notes if not n.changed and n.rule not in ASIDE}
        found = {
            n: text.removeprefix(f"{op}: ")
            for n, op, _ in self.coverage.float_layers
            if (text := reasons.get(n))
        }
        return [
            {"node": node, "op": op, "share": share, "reason": found.get(node, "")}
            for node, op, share in self.coverage.float_layers
        ]

    def text(self, width: int = 100) -> str:
        """The report for people."""
        return rendered(self.print_to, width)

    def print_to(self, console: Console) -> None:
        """Print the report for people."""
        if self.is_slower and self.latency is not None:
            console.print(
                f"SLOWER than the original: {self.latency.ratio:.2f}x its time", style="bold red"
            )
        console.print(
            f"{self.model} -> {self.output or '(not written)'}"
            f"   recipe {self._recipe()}, target {self.target}"
        )
        if self.also_written:
            console.print(f"also written: {', '.join(self.also_written)}")
        for warning in self.warnings:
            console.print(f"warning: {warning}", style="yellow")
        self._print_figures(console)
        print_totals(console, self.stored)
        self._print_notes(console)
        self._print_floats(console)
        self._print_candidates(console)

    def _print_figures(self, console: Console) -> None:
        before, after = self.size_bytes
        rows = [
            ("size", f"{_bytes(before)} -> {_bytes(after)}   {after / max(1, before):.2f}x"),
            (
                "nodes",
                f"{self.nodes[0]} -> {self.nodes[1]}, opset {self.opset[0]} -> {self.opset[1]}",
            ),
            (
                "coverage",
                f"{self.coverage.macs_share:.1%} of multiply-accumulates run in integers, "
                f"{self.coverage.weight_share:.1%} of weight bytes are stored in them",
            ),
            ("samples", self.samples),
        ]
        rows += pruning_rows(self.pruned, self.macs, self.notes)
        rows += [(n.node, n.text) for n in self.notes if n.changed and n.rule == "integer_io"]
        if self.latency is not None:
            a, b = self.latency.original_ms, self.latency.result_ms
            rows.append(
                ("latency", f"{a:.3g} ms -> {b:.3g} ms, one thread   {self.latency.ratio:.2f}x")
            )
        if self.fidelity is not None:
            rows += fidelity_rows(self.fidelity, self.validated_on)
        print_rows(console, rows)

    def _recipe(self) -> str:
        chose = self.plan.name != self.recipe
        return f"{self.recipe} (chose {self.plan.name})" if chose else self.recipe

    def _print_candidates(self, console: Console) -> None:
        if not self.candidates:
            return
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("tried", "size", "SQNR", "time", ""):
            table.add_column(name, overflow="fold")
        for c in self.candidates:
            size = (
                "" if c.size_bytes is None else f"{c.size_bytes / max(1, self.size_bytes[0]):.2f}x"
            )
            loss = "" if c.sqnr_db is None else _db(c.sqnr_db)
            time = "" if c.time_ratio is None else f"{c.time_ratio:.2f}x"
            table.add_row(c.recipe, size, loss, time, c.verdict)
        console.print(table)

    def _print_notes(self, console: Console) -> None:
        done = Counter(note.rule for note in self.notes if note.changed)
        listed = ", ".join(f"{rule} {count}" for rule, count in done.items())
        print_rows(console, [("passes", listed or "nothing was changed")])

    @property
    def _stays_float(self) -> bool:
        """Whether the recipe prunes or factorizes, and means to stay in floats."""
        plan = self.plan
        return not plan.is_quantizing and (plan.is_pruning or plan.changes_work)

    def _print_floats(self, console: Console) -> None:
        layers = sorted(self.float_layers(), key=lambda layer: -layer["share"])
        if not layers or self._stays_float:
            return  # a recipe that stays in floats
        console.print(f"layers that compute in floats: {len(layers)}")
        for layer in layers[:SHOWN]:
            reason = layer["reason"] or "no pass takes it: it has few weights, or none"
            console.print(f"  {layer['share']:6.1%}  {layer['op']} {layer['node']}: {reason}")
        _more(console, len(layers))


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` finds: the model as it is, and what a target could do with it."""

    model: str
    target: str
    ir_version: int
    opset: Mapping[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: Mapping[str, int]
    functions: tuple[str, ...]
    parameters: int
    bytes_by_type: Mapping[str, int]
    coverage: Coverage
    stored: tuple[StoredWeight, ...]
    quantizable: tuple[str, ...]
    notes: tuple[Note, ...]

    def to_json(self) -> str:
        """The inspection for machines."""
        return to_json({"schema": SCHEMA, **_plain(self)})

    def print_to(self, console: Console) -> None:
        """Print the inspection for people."""
        opsets = ", ".join(
            f"{domain or 'ai.onnx'} {version}" for domain, version in self.opset.items()
        )
        sizes = ", ".join(f"{dtype} {_bytes(size)}" for dtype, size in self.bytes_by_type.items())
        rows = [
            ("format", f"IR {self.ir_version}, opset {opsets}"),
            ("inputs", "; ".join(self.inputs)),
            ("outputs", "; ".join(self.outputs)),
            ("operators", ", ".join(f"{op} {count}" for op, count in self.ops.items())),
            ("parameters", f"{self.parameters:,}"),
            ("weights", sizes or "none"),
            ("work", f"{self.coverage.macs:,.0f} multiply-accumulates (free axes count as 1)"),
        ]
        if self.functions:
            rows.append(("functions", ", ".join(self.functions)))
        console.print(self.model)
        print_rows(console, rows)
        print_totals(console, self.stored)
        print_largest(console, self.stored)
        _more(console, len(self.stored))
        console.print(f"{self.target} could run {len(self.quantizable)} nodes in integers")
        for note in self.notes[:SHOWN]:
            console.print(f"  float: {note.node}: {note.text}")
        _more(console, len(self.notes))


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` finds: fidelity of outputs and of layers, worst layers first."""

    original: str
    result: str
    fidelity: Fidelity
    layers: tuple[LayerError, ...]

    def to_json(self) -> str:
        """The comparison for machines."""
        return to_json({"schema": SCHEMA, **_plain(self)})

    def print_to(self, console: Console) -> None:
        """Print the comparison for people."""
        console.print(f"{self.original} against {self.result}")
        print_rows(console, fidelity_rows(self.fidelity, f"{self.fidelity.samples} samples"))
        if self.layers:
            console.print("layers, worst first (signal to noise)")
        for layer in self.layers[:SHOWN]:
            console.print(f"  {_db(layer.sqnr_db)}  {layer.op} {layer.name}")
        _more(console, len(self.layers))


def fidelity_rows(fidelity: Fidelity, on: str) -> list[tuple[str, str]]:
    """A row an output, and accuracy where there are labels."""
    rows = []
    for output in fidelity.outputs[:SHOWN]:
        text = (
            f"SQNR {_db(output.sqnr_db)}, cosine {output.cosine:.6f}, max abs {output.max_abs:.3g}"
        )
        if output.top1_agreement is not None:
            text += f", top-1 agreement {output.top1_agreement:.1%}"
        if not output.is_finite:
            text += ", NOT FINITE"
        rows.append((f"output {output.name}", text))
    if len(fidelity.outputs) > SHOWN:
        rows.append(("", f"... and {len(fidelity.outputs) - SHOWN} more outputs: --json has all"))
    if fidelity.original_accuracy is not None and fidelity.result_accuracy is not None:
        text = f"top-1 {fidelity.original_accuracy:.4f} -> {fidelity.result_accuracy:.4f}"
        rows.append(("accuracy", text))
    rows.append(("compared on", on))
    return rows


def rendered(print_to: Any, width: int = 100) -> str:
    """What a `print_to` prints, as text."""
    from rich.console import Console

    stream = StringIO()
    print_to(Console(file=stream, width=width, highlight=False, markup=False))
    return stream.getvalue()


def print_rows(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Print names and what belongs to them, in two columns."""
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(style="bold", no_wrap=True, max_width=28)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _more(console: Console, total: int) -> None:
    if total > SHOWN:
        console.print(f"  ... and {total - SHOWN} more: --json has all")


def _db(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f} dB"


def _bytes(size: int) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.4g} GB"


def _plain(value: Any) -> dict[str, Any]:
    return asdict(value)


def to_json(value: Any) -> str:
    """JSON that every parser takes: infinities become strings, NaN null."""
    return json.dumps(_jsonable(value), indent=1, allow_nan=False)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else str(value)
    return value
