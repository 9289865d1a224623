"""Zeros that pruning has made, and whether the result still has them.

Passes that prune `remember` where a layer's zeros are; `survived` looks for them in the result,
whatever its weights are stored in: a value is zero where its integer is its zero point. Layers are
found again by name, or by what they compute; weights may be transposed by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Note
from onnxq.model import Model
from onnxq.passes.packed_weights import Stands, shape_of, stored_weights
from onnxq.pruned import Pruned
from onnxq.weights import values_in


@dataclass(frozen=True, slots=True)
class PrunedLayer:
    """A pruned layer: its weights, how many are zero, and how many of these the result has.

    kept: None where the result has no such layer, or one whose numbers cannot be read.
    """

    node: str
    weights: int
    zeros: int
    kept: int | None


def zeros_of(stands: Stands) -> NDArray[np.bool_] | None:
    """Which of a weight's values are zero, in its shape; None where that cannot be read."""
    if stands.form == "float":
        return np.asarray(values_in(stands.numbers) == 0)
    if stands.read is None:
        return None
    grid = stands.read()
    if grid.table is not None:
        return np.asarray((grid.table == 0)[grid.numbers.astype(np.int64)])
    wide = grid.numbers.astype(np.int32) if grid.numbers.dtype.kind not in "iuf" else grid.numbers
    if grid.zero is None:
        return np.asarray(wide == 0)
    zero = grid.zero if grid.zero.dtype.kind in "iuf" else grid.zero.astype(np.int32)
    return np.asarray(wide == zero)


def remember(model: Model, notes: Iterable[Note]) -> None:
    """Keep where the zeros are of layers that were pruned, as changed notes say, in the model."""
    names = {note.node for note in notes if note.changed}
    for name, (node, masks) in _masks(model, names).items():
        model.pruned[name] = Pruned(
            output=node.outputs[0].name,
            weights=sum(mask.size for mask in masks),
            zeros=sum(int(np.count_nonzero(mask)) for mask in masks),
            masks=tuple((mask.shape, np.packbits(mask)) for mask in masks),
        )


def survived(model: Model) -> tuple[PrunedLayer, ...]:
    """What has become of the zeros that a model remembers."""
    outputs = {layer.output: name for name, layer in model.pruned.items()}
    found = _masks(model, set(model.pruned), outputs) if model.pruned else {}
    rows = []
    for name, layer in model.pruned.items():
        masks = found[name][1] if name in found else None
        kept = None if masks is None else _kept(layer, masks)
        rows.append(PrunedLayer(name, layer.weights, layer.zeros, kept))
    return tuple(rows)


def _masks(
    model: Model, names: set[str], outputs: dict[str, str] | None = None
) -> dict[str, tuple[gs.Node, list[NDArray[np.bool_]]]]:
    """The zeros of layers, by their names; a layer with a weight that cannot be read has none."""
    found: dict[str, tuple[gs.Node, list[NDArray[np.bool_]]]] = {}
    unread = set[str]()
    for node, tensor, stands in stored_weights(model):
        name = node.name if node.name in names else (outputs or {}).get(node.outputs[0].name)
        if name is None or len(shape_of(node, tensor, stands)) < 2:
            continue
        mask = zeros_of(stands)
        if mask is None:
            unread.add(name)
        else:
            found.setdefault(name, (node, []))[1].append(mask)
    return {name: pair for name, pair in found.items() if name not in unread}


def _kept(layer: Pruned, masks: Sequence[NDArray[np.bool_]]) -> int:
    """How many zeros are where they were; where shapes have changed, how many there are."""
    if len(masks) != len(layer.masks):
        return min(layer.zeros, sum(int(np.count_nonzero(mask)) for mask in masks))
    return sum(_common(before, mask) for before, mask in zip(_unpacked(layer), masks, strict=True))


def _unpacked(layer: Pruned) -> Iterator[NDArray[np.bool_]]:
    for shape, bits in layer.masks:
        count = int(np.prod(shape))
        yield np.unpackbits(bits, count=count).view(bool).reshape(shape)


def _common(before: NDArray[np.bool_], mask: NDArray[np.bool_]) -> int:
    """A weight may be transposed; one that is filled up, or regrouped, is counted."""
    fitting = [one for one in (before, before.swapaxes(-1, -2)) if one.shape == mask.shape]
    if not fitting:
        return min(int(np.count_nonzero(before)), int(np.count_nonzero(mask)))
    return max(int(np.count_nonzero(one & mask)) for one in fitting)
