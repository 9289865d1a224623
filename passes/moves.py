"""Data movement on integers, and Q/DQ pairs compared: what passes over pairs share."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import DTypeLike

from onnxq.model import values_of
from onnxq.passes.ops import pads_zero

# The first opset in which the operator takes 8-bit integers; the others always did.
INTEGERS_SINCE = {"MaxPool": 12, "Resize": 10, "Pad": 11}
# Operators that take integers of 8 bits only: MaxPool by ONNX, others by ONNX Runtime's kernels.
BYTES_ONLY = ("MaxPool", "Resize", "Pad", "DepthToSpace", "SpaceToDepth")


def why_not_on_integers(move: gs.Node, dtype: DTypeLike, opset: int) -> str | None:
    """Why a node that moves data cannot move integers of a type in place of floats; None: it can.

    A Pad then has to fill with the integer that stands for 0.0 (`pad_with`).
    """
    if INTEGERS_SINCE.get(move.op, 0) > opset:
        return f"{move.op} takes no integers before opset {INTEGERS_SINCE[move.op]}"
    if move.op in BYTES_ONLY and np.dtype(dtype).itemsize > 1:
        return f"{move.op} takes integers of 8 bits only"
    if move.op == "Pad" and not pads_zero(move):
        return "it pads with something else than zero"
    if move.op == "Resize" and move.attrs.get("mode", "nearest") != "nearest":
        return "it computes new values: kernels of integers do not round them as Q does"
    return None


def pad_with(move: gs.Node, zero_point: gs.Tensor) -> None:
    """Let a Pad fill with the integer that stands for 0.0; other nodes stay as they are."""
    if move.op == "Pad" and move.attrs.get("mode", "constant") == "constant":
        set_input(move, 2, zero_point)


def set_input(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Replace the input, or add it behind the last one."""
    if index < len(node.inputs):
        node.inputs[index] = tensor
    else:
        node.inputs.append(tensor)


def same_params(a: gs.Node, b: gs.Node) -> bool:
    """Whether two Q or DQ nodes have equal constant scale, zero point and axis."""
    if len(a.inputs) != len(b.inputs) or _attrs(a) != _attrs(b):
        return False
    for x, y in zip(a.inputs[1:], b.inputs[1:], strict=True):
        if x is y:
            continue
        left, right = values_of(x), values_of(y)
        if left is None or right is None or left.dtype != right.dtype:
            return False
        if not np.array_equal(left, right):
            return False
    return True


def _attrs(node: gs.Node) -> dict[str, Any]:
    return {"axis": 1, "block_size": 0} | dict(node.attrs)
