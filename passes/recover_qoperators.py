"""Operators on integers with scales of their own (QLinearConv, QGemm ...), done in floats again.

    q = QLinearConv(x, s_x, z_x, w, s_w, z_w, s_y, z_y, b)   =>   y = Conv((x - z_x) s_x, W, B)

with W = (w - z_w) s_w and B = b s_x s_w. Operators and their inputs are rows of a table (onnx
Operators.md; ONNX Runtime's docs/ContribOperators.md for com.microsoft).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Skip
from onnxq.model import values_of
from onnxq.packed import Grid
from onnxq.passes.packed_weights import weights_of
from onnxq.passes.recovery import FLOAT, Recovery, activation_params, drop

Attributes = Callable[[Recovery, gs.Node], dict[str, Any]]


def _same(recovery: Recovery, node: gs.Node) -> dict[str, Any]:
    return {k: v for k, v in node.attrs.items() if k not in ("channels_last", "opset")}


@dataclass(frozen=True, slots=True)
class Form:
    """How an operator on integers is done in floats.

    operands: inputs (tensor, scale, zero point). result: inputs with the result's scale and zero
    point. plain: inputs that are no integers, which come first. bias: input of int32 in the scale
    of the first two operands' product.
    """

    op: str
    operands: tuple[tuple[int, int, int], ...]
    result: tuple[int, int]
    plain: tuple[int, ...] = ()
    bias: int | None = None
    attributes: Attributes = _same


def _softmax(recovery: Recovery, node: gs.Node) -> dict[str, Any]:
    """Its meaning changed with opset 13; the attribute says which one is meant."""
    meant, own = int(node.attrs.get("opset", 13)), recovery.model.opset
    if (meant < 13) != (own < 13):
        raise Skip(f"it is a Softmax of opset {meant}, the model's opset is {own}")
    return {"axis": int(node.attrs.get("axis", -1 if own >= 13 else 1))}


_ONE, _TWO = ((0, 1, 2),), ((0, 1, 2), (3, 4, 5))
FORMS: dict[str, Form] = {
    "QLinearConv": Form("Conv", _TWO, (6, 7), bias=8),
    "QLinearMatMul": Form("MatMul", _TWO, (6, 7)),
    "QGemm": Form("Gemm", _TWO, (7, 8), bias=6),
    "QLinearAdd": Form("Add", _TWO, (6, 7)),
    "QLinearMul": Form("Mul", _TWO, (6, 7)),
    "QLinearAveragePool": Form("AveragePool", _ONE, (3, 4)),
    "QLinearGlobalAveragePool": Form("GlobalAveragePool", _ONE, (3, 4)),
    "QLinearLeakyRelu": Form("LeakyRelu", _ONE, (3, 4)),
    "QLinearSigmoid": Form("Sigmoid", _ONE, (3, 4)),
    "QLinearSoftmax": Form("Softmax", _ONE, (3, 4), attributes=_softmax),
    "QLinearWhere": Form("Where", ((1, 2, 3), (4, 5, 6)), (7, 8), plain=(0,)),
}


def recover_qoperator(recovery: Recovery, node: gs.Node) -> str | None:
    """Do the node in floats; None where it is none of these. Raises Skip before any edit."""
    if node.op == "QLinearConcat":
        return _concat(recovery, node)
    form = FORMS.get(node.op.rpartition("::")[2])
    if form is None:
        return None
    if node.attrs.get("channels_last", 0):
        raise Skip("its channels are last, which no standard operator has")
    attributes = form.attributes(recovery, node)
    ends = [_at(node, i) for i in form.result]
    if ends[0] is not None and activation_params(ends[0], ends[1], np.uint8) is None:
        raise Skip("the scale of its result is not one constant")
    scales = [node.inputs[scale] for _, scale, _ in form.operands]
    if any(scale.dtype not in (None, FLOAT) for scale in scales):
        raise Skip(f"its scales are {scales[0].dtype}: what it computes in floats is not known")
    inputs = [node.inputs[i] for i in form.plain]
    known = dict(weights_of(node))
    for tensor, scale, zero in form.operands:
        inputs.append(_operand(recovery, node, (tensor, scale, zero), known.get(tensor)))
    if form.bias is not None and (bias := _at(node, form.bias)) is not None:
        inputs.append(_bias(recovery, node, bias, form))
    out = node.outputs[0]
    made = recovery.model.emit(
        form.op, *inputs, name=f"{out.name}_float", dtype=FLOAT, shape=out.shape, at=node,
        **attributes,
    )  # fmt: skip
    _finish(recovery, node, made, ends)
    return f"{node.op}: now {form.op} in floats"


def _finish(
    recovery: Recovery, node: gs.Node, made: gs.Tensor, ends: list[gs.Tensor | None]
) -> None:
    if ends[0] is None:  # QGemm may return floats
        recovery.replace(node.outputs[0], made)
        drop(node)
    else:
        recovery.result(node, made, ends[0], ends[1])


def _at(node: gs.Node, index: int) -> gs.Tensor | None:
    there = index < len(node.inputs) and node.inputs[index].name
    return node.inputs[index] if there else None


def _operand(recovery: Recovery, node: gs.Node, place: tuple[int, int, int], stands: Any) -> Any:
    tensor, scale, zero = node.inputs[place[0]], node.inputs[place[1]], _at(node, place[2])
    if stands is not None and stands.read is not None:
        return recovery.weight(stands, tensor.shape, tensor.name, FLOAT)
    return recovery.floats(tensor, scale, zero, node)


def _bias(recovery: Recovery, node: gs.Node, bias: gs.Tensor, form: Form) -> gs.Tensor:
    """int32 in the scale of the products; QGemm's may be a matrix, scales are of its columns."""
    scales = [values_of(node.inputs[scale]) for _, scale, _ in form.operands]
    values = values_of(bias)
    if values is None or scales[0] is None or scales[1] is None:
        raise Skip("its bias is not constant")
    alpha = np.float32(node.attrs.get("alpha", 1.0))
    scale = (scales[0].reshape(()) * scales[1] * alpha).astype(np.float32)

    def read() -> Grid:
        numbers = values_of(bias)
        assert numbers is not None
        return Grid.of(numbers, scale, None, axis=-1)

    return recovery.constant(bias, read, bias.name, values.shape)


def _concat(recovery: Recovery, node: gs.Node) -> str:
    """QLinearConcat(s_y, z_y, x, s_x, z_x, ...)."""
    if activation_params(node.inputs[0], node.inputs[1], np.uint8) is None:
        raise Skip("the scale of its result is not one constant")
    parts = [
        recovery.floats(node.inputs[i], node.inputs[i + 1], node.inputs[i + 2], node)
        for i in range(2, len(node.inputs), 3)
    ]
    out = node.outputs[0]
    made = recovery.model.emit(
        "Concat", *parts, name=f"{out.name}_float", dtype=FLOAT, shape=out.shape, at=node,
        axis=node.attrs["axis"],
    )  # fmt: skip
    recovery.result(node, made, node.inputs[0], node.inputs[1])
    return "QLinearConcat: now Concat in floats"
