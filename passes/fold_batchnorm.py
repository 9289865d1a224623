"""Fold an inference BatchNormalization into the linear layer before it, or the one after it.

    y = BN(x W + b; g, beta, mu, var)    =>    y = x W' + b'

with  s = g / sqrt(var + eps),  W' = s W (per output channel),  b' = s (b - mu) + beta;

    y = BN(x) W + b    =>    y = x W' + b'

with  t = beta - s mu,  W' = s W (per input channel),  b' = b + sum of t W. With padding that is
legal only for t = 0, since padded zeros are not shifted.

What it knew of the distribution of its result, or of its input, is kept in `Model.moments`.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Skip, rewrites
from onnxq.model import Model
from onnxq.passes.linear import (
    bias_of,
    constant,
    layer_before,
    only_reader,
    outputs_of,
    pads,
    rank_of,
    rewrite,
    scaled,
    take_over,
)

Vector = NDArray[np.float64]


@rewrites("BatchNormalization")
def fold_batchnorm(model: Model, bn: gs.Node) -> str | None:
    """Fold into the layer before if there is one, else into the one after."""
    before = layer_before(bn.inputs[0])
    after = bn.outputs[0].outputs[0] if len(bn.outputs[0].outputs) == 1 else None
    if before is None and (after is None or after.op not in ("Conv", "Gemm", "MatMul")):
        return None
    if bn.attrs.get("training_mode", 0) or any(t.name and t.outputs for t in bn.outputs[1:]):
        raise Skip("it is in training mode")
    scale, shift = affine_of(bn)
    if before is not None:
        return into_before(model, before, bn, scale, shift)
    assert after is not None
    return into_after(model, bn, after, scale, shift)


def affine_of(bn: gs.Node) -> tuple[Vector, Vector]:
    """The normalisation as y = scale x + shift, each [channels]."""
    gamma, beta, mean, variance = (constant(bn, i).astype(np.float64) for i in range(1, 5))
    scale = gamma / np.sqrt(variance + bn.attrs.get("epsilon", 1e-5))
    if not np.isfinite(scale).all():
        raise Skip("its scale is not finite")
    return scale, beta - scale * mean


def into_before(model: Model, layer: gs.Node, bn: gs.Node, scale: Vector, shift: Vector) -> str:
    """Scale the output channels of the layer before."""
    only_reader(model, bn.inputs[0], bn)
    if layer.op == "MatMul" and any(shift):
        raise Skip("a MatMul has no bias to take the shift")
    if layer.op in ("Gemm", "MatMul") and rank_of(layer) != 2:
        raise Skip("its channels are not the layer's output features")
    if outputs_of(layer) != scale.size:
        raise Skip("its channels are not the layer's output channels")
    weight, bias = constant(layer, 1), bias_of(layer)
    made = None
    if layer.op != "MatMul":
        made = shift if bias is None else shift + scale * bias
    rewrite(model, layer, scaled(layer, weight, scale), made)
    gamma, beta = constant(bn, 1), constant(bn, 2)
    take_over(layer, bn)
    model.moments[layer.outputs[0].name] = beta, np.abs(gamma)
    return f"into {layer.op} {layer.name}"


def into_after(model: Model, bn: gs.Node, layer: gs.Node, scale: Vector, shift: Vector) -> str:
    """Scale the input channels of the layer after, and move the shift into its bias."""
    only_reader(model, bn.outputs[0], layer)
    if layer.inputs[0] is not bn.outputs[0]:
        raise Skip(f"it is not the data that {layer.name} reads")
    weight, bias = constant(layer, 1), bias_of(layer)
    if layer.op == "Conv":
        if any(shift) and pads(layer):
            raise Skip(f"{layer.name} pads with zeros, which a shift would change")
        group = layer.attrs.get("group", 1)
        if weight.shape[1] * group != scale.size:
            raise Skip("its channels are not the layer's input channels")
        rows = (group, weight.shape[0] // group, *weight.shape[1:])
        factor = (group, 1, -1, *[1] * (weight.ndim - 2))
        split = weight.astype(np.float64).reshape(rows)
        wide = (split * scale.reshape(factor)).reshape(weight.shape)
        moved = (split * shift.reshape(factor)).reshape(weight.shape[0], -1).sum(1)
    else:
        if weight.ndim != 2 or bn.inputs[0].shape is None or len(bn.inputs[0].shape) != 2:
            raise Skip("its channels are not the layer's input features")
        if layer.attrs.get("transA", 0) or (layer.op == "MatMul" and any(shift)):
            raise Skip("the layer cannot take the shift")
        matrix = weight.astype(np.float64)
        is_transposed = bool(layer.attrs.get("transB", 0))
        wide = matrix * (scale if is_transposed else scale[:, None])
        moved = layer.attrs.get("alpha", 1.0) * (
            matrix @ shift if is_transposed else shift @ matrix
        )
    total = moved if bias is None else bias + moved
    rewrite(
        model, layer, wide.astype(weight.dtype), total if any(shift) or bias is not None else None
    )
    source = bn.inputs[0]
    model.moments[source.name] = constant(bn, 3), np.sqrt(constant(bn, 4))
    layer.inputs[0] = source
    bn.outputs.clear()
    bn.inputs.clear()
    return f"into {layer.op} {layer.name} after it"
