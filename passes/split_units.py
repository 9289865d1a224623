"""Take a small tensor apart by one Split.

    a = Reshape(x[:, 0:1, :, 0:1])  b = Reshape(x[:, 0:1, :, 1:2])  ..
        =>    a, b, .. = Split(Reshape(Transpose(x)))

Streaming models keep the states of all their layers in one tensor, and cut each out by a Slice and
a Reshape. In small tensors the number of nodes is what costs: 8 of them take about 9 us, the three
in their place 3 (dtln_1, whose float run takes 73).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Skip, rewrites
from onnxq.model import Model, producer, values_of

# Where copying it once more costs less than a node.
LARGEST = 16_384
# Slices that are not worth a Transpose, a Reshape and a Split.
FEW = 2
SPLIT_HAS_INPUT = 13  # the opset from which Split's sizes are an input


@dataclass(frozen=True, slots=True)
class _Part:
    """A Slice of one element of some axes, and the Reshape behind it; indices: axis -> element."""

    indices: dict[int, int]
    reshape: gs.Node
    target: tuple[int, ...]


@rewrites("Slice")
def split_units(model: Model, node: gs.Node) -> str | None:
    """All Slices of the tensor that the first of them cuts; the others are gone then."""
    source = node.inputs[0]
    slices = [n for n in source.outputs if n.op == "Slice" and n.inputs[0] is source]
    if node.domain or slices[0] is not node or len(slices) <= FEW or len(node.inputs) < 3:
        return None
    shape = source.shape
    if not shape or not all(isinstance(d, int) and d > 0 for d in shape):
        return None
    parts = [_part(model, n, shape) for n in slices]
    found = [part for part in parts if part is not None]
    axes = sorted(found[0].indices) if found else []
    if not axes or len(found) < len(slices):
        return None
    grid = [tuple(part.indices.get(axis, -1) for axis in axes) for part in found]
    alike = {(tuple(sorted(part.indices)), part.target) for part in found}
    count = prod(shape[axis] for axis in axes)
    if len(alike) > 1 or len(set(grid)) < count or len(grid) != count:
        return None
    if found[0].target[0] != 1:
        raise Skip("the parts are not given a leading axis of one element")
    if prod(shape) > LARGEST:
        raise Skip(f"{source.name} is large: copying it costs more than the nodes")
    _split(model, source, axes, [part for _, part in sorted(zip(grid, found, strict=True),
                                                            key=lambda pair: pair[0])])  # fmt: skip
    return f"{count} parts of {source.name} by one Split"


def _part(model: Model, node: gs.Node, shape: list[int]) -> _Part | None:
    """None where it is more than elements of some axes, or read in another way."""
    bounds = [values_of(tensor) if tensor.name else None for tensor in node.inputs[1:]]
    bounds += [None] * (4 - len(bounds))
    starts, ends, axes, steps = bounds
    given = [t for t in node.inputs[3:] if t.name]
    if starts is None or ends is None or len(given) > sum(b is not None for b in bounds[2:]):
        return None
    if steps is not None and (steps != 1).any():
        return None
    indices = {}
    for i, axis in enumerate(range(len(starts)) if axes is None else axes.tolist()):
        size = shape[axis]
        start, end, _ = slice(int(starts[i]), int(ends[i])).indices(size)
        if end - start == 1 and size > 1:
            indices[axis % len(shape)] = start
        elif (start, end) != (0, size):
            return None
    result = node.outputs[0]
    if model.is_output(result) or [n.op for n in result.outputs] != ["Reshape"]:
        return None
    reshape = result.outputs[0]
    target = values_of(reshape.inputs[1]) if len(reshape.inputs) > 1 else None
    is_here = model.graph_of(reshape) is model.graph_of(node)
    if target is None or not target.size or (target < 1).any() or not is_here:
        return None
    if producer(result) is not node or model.is_output(reshape.outputs[0]):
        return None
    return _Part(indices, reshape, tuple(int(t) for t in target))


def _split(model: Model, source: gs.Tensor, axes: list[int], parts: list[_Part]) -> None:
    """The axes first; then all parts below each other, as they are wanted."""
    first, rest = parts[0], [i for i in range(len(source.shape)) if i not in axes]
    at, name, count = first.reshape, source.name, len(parts)
    order = [*axes, *rest]
    turned = model.emit(
        "Transpose", source, name=f"{name}_turned", dtype=source.dtype, at=at, perm=order,
        shape=[source.shape[i] for i in order],
    )  # fmt: skip
    stacked = [count, *first.target[1:]]
    target = model.constant(f"{name}_parts_shape", np.array(stacked, np.int64))
    below = model.emit(
        "Reshape", turned, target, name=f"{name}_parts", dtype=source.dtype, at=at, shape=stacked
    )
    sizes = np.ones(count, np.int64)
    if model.opset < SPLIT_HAS_INPUT:
        inputs = [below]
        attrs: dict[str, Any] = {"split": sizes.tolist()}
    else:
        inputs, attrs = [below, model.constant(f"{name}_parts_sizes", sizes)], {}
    made = model.emit("Split", *inputs, name=f"{name}_part", like=below, at=at, axis=0, **attrs)
    outputs = [part.reshape.outputs[0] for part in parts]
    for part in parts:
        part.reshape.outputs.clear()
        part.reshape.inputs.clear()
    made.inputs[0].outputs = outputs
