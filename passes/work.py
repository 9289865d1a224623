"""How much work a layer is: multiply-accumulates, from shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import onnx_graphsurgeon as gs

from onnxq.model import Model
from onnxq.passes.ops import OPS

Shapes = Mapping[str, Sequence[int]]
RECURRENT = ("LSTM", "GRU", "RNN")


def macs(model: Model, shapes: Shapes | None = None) -> dict[int, float]:
    """Multiply-accumulates of each layer, by node id.

    shapes: of tensors by name, where they are better known than to the model (for one sample);
    sizes that nobody knows count as 1.
    """
    known = shapes or {}
    return {
        id(node): _size(_shape(node.outputs[0], known)) * products(node, known)
        for node in model.nodes()
        if node.op in RECURRENT or (node.op in OPS and OPS[node.op].role == "linear")
    }


def products(node: gs.Node, shapes: Shapes) -> float:
    """Multiply-accumulates for each element of the layer's (first) output."""
    weight = _shape(node.inputs[1], shapes)
    if node.op in RECURRENT:  # W is [directions, gates, inputs], R is [directions, gates, hidden]
        recurrence = _shape(node.inputs[2], shapes)
        hidden = _size(recurrence[-1:])
        return (_size(weight[1:]) + _size(recurrence[1:])) / hidden
    if node.op == "Conv":
        return _size(weight[1:])
    if node.op == "ConvTranspose":
        pixels = _size(_shape(node.inputs[0], shapes)[2:]) / _size(
            _shape(node.outputs[0], shapes)[2:]
        )
        return _size(weight[:1] + weight[2:]) / float(node.attrs.get("group", 1)) * pixels
    left = _shape(node.inputs[0], shapes)
    if not left:
        return 1.0
    return _size([left[0] if node.op == "Gemm" and node.attrs.get("transA", 0) else left[-1]])


def _shape(tensor: gs.Tensor, shapes: Shapes) -> list[int | str]:
    return list(shapes.get(tensor.name) or tensor.shape or ())


def _size(shape: Sequence[int | str]) -> float:
    return float(prod(d if isinstance(d, int) and d > 0 else 1 for d in shape))
