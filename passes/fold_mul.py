"""Fold multiplication and division by constants into the linear layer before or after.

y = (x W + b) c    =>    y = x (c W) + c b        c one value a channel, or one for all
y = (x c) W + b    =>    y = x (c W) + b          c one value for all
y = x 1            =>    y = x
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Skip, rewrites
from onnxq.model import Model, values_of
from onnxq.passes.activations import is_part_of_activation
from onnxq.passes.linear import (
    LINEAR,
    bias_of,
    constant,
    layer_before,
    only_reader,
    per_channel,
    rank_of,
    rewrite,
    scaled,
    take_over,
)


@rewrites("Mul", "Div")
def fold_mul(model: Model, node: gs.Node) -> str | None:
    """Into the layer before if there is one, else into the one after, else nothing but ones go."""
    at = 1 if values_of(node.inputs[1]) is not None else 0
    if values_of(node.inputs[at]) is None or (node.op == "Div" and at == 0):
        return None
    data, factor = node.inputs[1 - at], node.inputs[at]
    if is_part_of_activation(model, node):
        raise Skip("it is part of a Gelu, which runtimes know as one operator")
    before = layer_before(data)
    after = node.outputs[0].outputs[0] if len(node.outputs[0].outputs) == 1 else None
    if before is not None and values_of(before.inputs[1]) is not None:
        only_reader(model, data, node)
        values = per_channel(_factor(node, at), before, rank_of(before))
        weight, bias = constant(before, 1), bias_of(before)
        rewrite(
            model, before, scaled(before, weight, values), None if bias is None else bias * values
        )
        known = model.moments.get(data.name)
        if known is not None:
            mean, deviation = known
            model.moments[node.outputs[0].name] = mean * values, deviation * np.abs(values)
        take_over(before, node)
        return f"into {before.op} {before.name}"
    if after is not None and after.op in LINEAR and after.inputs[0] is node.outputs[0]:
        if factor.shape is None or len(factor.shape) > 1 or not _is_scalar(factor):
            raise Skip(f"{factor.name} is not one value for all channels")
        if data.shape is None or len(data.shape) < 1:
            raise Skip("the rank of its input is not known")
        only_reader(model, node.outputs[0], after)
        weight, bias = constant(after, 1), bias_of(after)
        values = _factor(node, at).astype(np.float64).reshape(())
        rewrite(model, after, scaled(after, weight, values), bias)
        after.inputs[0] = data
        node.outputs.clear()
        node.inputs.clear()
        return f"into {after.op} {after.name} after it"
    return None


def _is_scalar(tensor: gs.Tensor) -> bool:
    return int(np.prod(tensor.shape)) == 1


def _factor(node: gs.Node, at: int) -> np.ndarray:
    values = constant(node, at)
    with np.errstate(divide="ignore"):
        factor = 1 / values.astype(np.float64) if node.op == "Div" else values
    if not np.isfinite(factor).all():
        raise Skip("the factor is not finite")
    return factor
