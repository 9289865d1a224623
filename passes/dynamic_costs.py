"""Which matrix products a layer makes: what a dynamic kernel costs depends on nothing else.

MatMul, Gemm    [.., M, K] x [K, N]: one, M counts all rows
LSTM            for each direction [T B, I] x [I, 4H], and T times [B, H] x [H, 4H]

with K the products that are summed into one value, T steps, B sequences, I inputs, H hidden values.
"""

from __future__ import annotations

from math import prod

import onnx_graphsurgeon as gs

from onnxq.passes.ops import weight_input
from onnxq.passes.work import Shapes
from onnxq.targets.dynamic import Product

# Integers have to be that much faster by the measured paces, whose error is about a tenth.
WORTH = 0.9


def products(node: gs.Node, shapes: Shapes) -> list[Product]:
    """The products of a layer that has a constant weight; sizes that nobody knows count as 1."""
    if node.op == "LSTM":
        return _lstm(node, shapes)
    index = weight_input(node)
    weight = node.inputs[index or 0]
    if node.op == "Conv":
        columns = weight.shape[0] / node.attrs.get("group", 1)
        depth = prod(weight.shape[1:])
        return [Product(_size(node.outputs[0], shapes) / columns, depth, columns)]
    turned = index == 0 or (node.op == "Gemm" and node.attrs.get("transB", 0))
    depth, columns = reversed(weight.shape) if turned else weight.shape
    data = node.inputs[1 - (index or 0)]
    return [Product(max(1.0, _size(data, shapes) / depth), depth, columns)]


def _lstm(node: gs.Node, shapes: Shapes) -> list[Product]:
    directions, gates, inputs = node.inputs[1].shape
    hidden = node.inputs[2].shape[2]
    steps, batch = [*_known(node.inputs[0], shapes), 1, 1][:2]
    return [
        Product(steps * batch, inputs, gates, directions),
        Product(batch, hidden, gates, directions * steps),
    ]


def _known(tensor: gs.Tensor, shapes: Shapes) -> list[int]:
    shape = shapes.get(tensor.name) or tensor.shape or ()
    return [d if isinstance(d, int) and d > 0 else 1 for d in shape]


def _size(tensor: gs.Tensor, shapes: Shapes) -> float:
    return float(prod(_known(tensor, shapes)))
