"""How much work a layer is: multiply-accumulates, from shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import onnx_graphsurgeon as gs

from onnxq.model import Model
from onnxq.passes.ops import OPS

Shapes = Mapping[str, Sequence[int]]
RECURRENT = ("LSTM", "GRU", "RNN")
# Operators on integers, and the float layers that they stand for.
INTEGER = {
    "ConvInteger": "Conv",
    "DynamicQuantizeLSTM": "LSTM",
    "MatMulInteger": "MatMul",
    "QLinearConv": "Conv",
    "QLinearMatMul": "MatMul",
}


def macs(model: Model, shapes: Shapes | None = None) -> dict[int, float]:
    """Multiply-accumulates of each layer, by node id.

    shapes: of tensors by name, where they are better known than to the model (for one sample);
    sizes that nobody knows count as 1.
    """
    known = shapes or {}
    return {
        id(node): _work(node, known)
        for node in model.nodes()
        if node.op in (*RECURRENT, *INTEGER) or (node.op in OPS and OPS[node.op].role == "linear")
    }


def _work(node: gs.Node, shapes: Shapes) -> float:
    if INTEGER.get(node.op, node.op) in RECURRENT:  # each weight once a step and sequence
        weights = sum(_size(_shape(tensor, shapes)) for tensor in node.inputs[1:3])
        return _size(_shape(node.inputs[0], shapes)[:2]) * weights
    return _size(_shape(node.outputs[0], shapes)) * products(node, shapes)


def products(node: gs.Node, shapes: Shapes) -> float:
    """Multiply-accumulates for each element of the layer's output."""
    op = INTEGER.get(node.op, node.op)
    weight = _shape(node.inputs[3 if node.op.startswith("QLinear") else 1], shapes)
    if op == "Conv":
        return _size(weight[1:])
    if op == "ConvTranspose":
        pixels = _size(_shape(node.inputs[0], shapes)[2:]) / _size(
            _shape(node.outputs[0], shapes)[2:]
        )
        return _size(weight[:1] + weight[2:]) / float(node.attrs.get("group", 1)) * pixels
    left = _shape(node.inputs[0], shapes)
    if not left:
        return 1.0
    return _size([left[0] if op == "Gemm" and node.attrs.get("transA", 0) else left[-1]])


def _shape(tensor: gs.Tensor, shapes: Shapes) -> list[int | str]:
    return list(shapes.get(tensor.name) or tensor.shape or ())


def _size(shape: Sequence[int | str]) -> float:
    return float(prod(d if isinstance(d, int) and d > 0 else 1 for d in shape))
