"""Fold addition and subtraction of constants into the bias of the linear layer before.

    y = (x W + b) + c    =>    y = x W + (b + c)       c one value a channel, or one for all

A MatMul of matrices becomes a Gemm, which has a bias (and an integer kernel that takes it).
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Skip, rewrites
from onnxq.model import Model, values_of
from onnxq.passes.linear import (
    bias_of,
    constant,
    layer_before,
    only_reader,
    outputs_of,
    per_channel,
    rank_of,
    rewrite,
    take_over,
)


@rewrites("Add", "Sub")
def fold_add(model: Model, node: gs.Node) -> str | None:
    """Into the layer before."""
    at = 1 if values_of(node.inputs[1]) is not None else 0
    if values_of(node.inputs[at]) is None or (node.op == "Sub" and at == 0):
        return None
    layer = layer_before(node.inputs[1 - at])
    if layer is None or values_of(layer.inputs[1]) is None:
        return None
    if layer.op == "MatMul" and not _is_matrix_product(layer):
        return None  # a Gemm takes matrices only
    only_reader(model, node.inputs[1 - at], node)
    shift = per_channel(constant(node, at), layer, rank_of(layer)) * (-1 if node.op == "Sub" else 1)
    weight, bias = constant(layer, 1), bias_of(layer)
    if bias is not None and bias.size not in (1, outputs_of(layer)):
        raise Skip("its bias is not one value a channel")
    flat = np.zeros(1) if bias is None else bias.reshape(-1)
    total = np.broadcast_to(flat + shift, (outputs_of(layer),)).copy()
    if layer.op == "MatMul":
        layer.op = "Gemm"
    rewrite(model, layer, weight, total)
    take_over(layer, node)
    return f"into {layer.op} {layer.name}"


def _is_matrix_product(node: gs.Node) -> bool:
    return all(t.shape is not None and len(t.shape) == 2 for t in node.inputs)
