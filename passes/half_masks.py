"""Bring the large negative constants of attention masks into the range of float16.

    Softmax(Add(scores, Where(mask, 0, -1e9)))    =>    ... -16000

exp of either is 0 beside scores of some thousands, so that nothing changes. -infinity would make
NaN of rows that are masked whole, and -65504 becomes that once a score of -16 is added.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import Model, producer, readers, values_of
from onnxq.passes.half_regions import MOVES
from onnxq.passes.halves import HalfType, is_float32
from onnxq.passes.ops import is_constant

FLOOR = -16000.0


def clamp_masks(model: Model, half: HalfType) -> int:
    """Replace mask constants that nothing but scores of Softmax are made of; how many there were.

    A factor is one if the other operand holds whole numbers: it makes 0, or less than any score.
    """
    if half.name != "float16":
        return 0
    count = 0
    for node in model.nodes("Add", "Where", "Mul"):
        for index, tensor in enumerate(node.inputs):
            if not is_float32(tensor) or not is_constant(tensor):
                continue
            values = np.asarray(values_of(tensor))
            large = np.isfinite(values) & (np.abs(values) > half.largest)
            if not large.any() or (values[large] > 0).any():
                continue
            if node.op == "Mul" and not (large.all() and _is_whole(node.inputs[1 - index])):
                continue
            if _is_score(model, node.outputs[0], set()):
                kept = np.where(large, np.float32(FLOOR), values).astype(np.float32)
                node.inputs[index] = model.constant(tensor.name, kept)
                count += 1
    return count


def _is_score(model: Model, tensor: gs.Tensor, seen: set[int]) -> bool:
    """Whether all that reads the tensor adds it to the scores of a Softmax, or moves it there."""
    if id(tensor) in seen:
        return True
    seen.add(id(tensor))
    uses = list(readers(tensor))
    if not uses or model.is_output(tensor):
        return False
    return all(
        node.op == "Softmax"
        or (
            (node.op in ("Add", "Where") or (node.op in MOVES and index == 0))
            and _is_score(model, node.outputs[0], seen)
        )
        for node, index in uses
    )


def _is_whole(tensor: gs.Tensor) -> bool:
    """Whether a tensor holds whole numbers: integers, or sums and products of such."""
    values = values_of(tensor)
    if values is not None:
        return bool((np.round(values) == values).all())
    node = producer(tensor)
    if node is None:
        return False
    if node.op == "Cast":
        return node.inputs[0].dtype is not None and np.dtype(node.inputs[0].dtype).kind in "iub"
    if node.op in MOVES and node.inputs:
        return _is_whole(node.inputs[0])
    return node.op in ("Add", "Sub", "Mul") and all(_is_whole(t) for t in node.inputs)
