"""Merge a Slice of a Slice along other axes.

    y = Slice(Slice(x, axis 2), axis 3)    =>    y = Slice(x, axes 2 and 3)

All Slices that read the first one are merged with it, so that it goes.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Skip, rewrites
from onnxq.model import Model, producer, values_of

Bounds = dict[int, tuple[int, int, int]]  # axis -> start, end, step


@rewrites("Slice")
def merge_slices(model: Model, node: gs.Node) -> str | None:
    """All Slices that read a Slice, so that it goes."""
    middle = node.inputs[0]
    before = producer(middle)
    if node.domain or before is None or before.op != "Slice" or model.opset < 10:
        return None
    readers = list(middle.outputs)
    if model.is_output(middle) or any(
        r.op != "Slice" or r.inputs[0] is not middle for r in readers
    ):
        raise Skip(f"{middle.name} is also used elsewhere")
    first, others = _bounds(before), [_bounds(reader) for reader in readers]
    if any(set(first) & set(other) for other in others):
        raise Skip(f"{before.name} cuts the same axis")
    for reader, other in zip(readers, others, strict=True):
        merged = sorted((first | other).items())
        rows = zip(*((start, end, axis, step) for axis, (start, end, step) in merged), strict=True)
        reader.inputs = [
            before.inputs[0],
            *(
                model.constant(f"{reader.name}_{what}", np.array(row, np.int64))
                for what, row in zip(("starts", "ends", "axes", "steps"), rows, strict=True)
            ),
        ]
    return f"with {before.name}"


def _bounds(node: gs.Node) -> Bounds:
    shape = node.inputs[0].shape
    if shape is None:
        raise Skip("the rank of its input is not known")
    found = [values_of(t) if t.name else None for t in node.inputs[1:]]
    if len(found) < 2 or any(
        v is None for v, t in zip(found, node.inputs[1:], strict=True) if t.name
    ):
        raise Skip(f"the bounds of {node.name} are not constant")
    starts, ends = (v.tolist() for v in found[:2] if v is not None)
    axes = found[2].tolist() if len(found) > 2 and found[2] is not None else range(len(starts))
    steps = found[3].tolist() if len(found) > 3 and found[3] is not None else [1] * len(starts)
    return {
        axis % len(shape): (start, end, step)
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True)
    }
