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

# Integers have to be that much faster by the measured paces, which are typically off by a tenth.
WORTH = 0.9


def products(node: gs.Node, shapes: Shapes, free: int = 1) -> list[Product]:
    """The products of a layer that has a constant weight.

    Sizes that nobody knows count as 1 where a batch is (the first axis; the second of an LSTM's
    input) and as `free` elsewhere.
    """
    if node.op == "LSTM":
        return _lstm(node, shapes, free)
    index = weight_input(node)
    weight = node.inputs[index or 0]
    if node.op == "Conv":
        columns = weight.shape[0] / node.attrs.get("group", 1)
        outputs = prod(_known(node.outputs[0], shapes, free))
        return [Product(outputs / columns, prod(weight.shape[1:]), columns)]
    turned = index == 0 or (node.op == "Gemm" and node.attrs.get("transB", 0))
    depth, columns = reversed(weight.shape) if turned else weight.shape
    inputs = prod(_known(node.inputs[1 - (index or 0)], shapes, free))
    return [Product(max(1.0, inputs / depth), depth, columns)]


def _lstm(node: gs.Node, shapes: Shapes, free: int) -> list[Product]:
    directions, gates, inputs = node.inputs[1].shape
    hidden = node.inputs[2].shape[2]
    steps, batch = [*_known(node.inputs[0], shapes, free, batch=1), free, 1][:2]
    return [
        Product(steps * batch, inputs, gates, directions),
        Product(batch, hidden, gates, directions * steps),
    ]


def _known(tensor: gs.Tensor, shapes: Shapes, free: int, *, batch: int = 0) -> list[int]:
    shape = shapes.get(tensor.name) or tensor.shape or ()
    return [
        d if isinstance(d, int) and d > 0 else 1 if axis == batch else free
        for axis, d in enumerate(shape)
    ]
