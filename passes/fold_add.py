"""Fold addition and subtraction of constants into the bias of the linear layer before or after.

    y = (x W + b) + c    =>    y = x W + (b + c)       c one value a channel, or one for all
    y = (x + c) W + b    =>    y = x W + (b + c W)     c one value for all, and no padding

A MatMul with a constant matrix becomes a Gemm, which has a bias, and an integer kernel that takes
it. If it multiplies a stack of matrices of known shape, Reshapes go round it: ONNX Runtime does
the same to floats, but not in time for its integer kernels.
"""

from __future__ import annotations

from math import prod

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
    pads,
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
        return _into_after(model, node, at)
    if layer.op == "MatMul" and not _can_be_gemm(layer):
        return None
    only_reader(model, node.inputs[1 - at], node)
    shift = per_channel(constant(node, at), layer, rank_of(layer)) * (-1 if node.op == "Sub" else 1)
    weight, bias = constant(layer, 1), bias_of(layer)
    if bias is not None and bias.size not in (1, outputs_of(layer)):
        raise Skip("its bias is not one value a channel")
    flat = np.zeros(1) if bias is None else bias.reshape(-1)
    total = np.broadcast_to(flat + shift, (outputs_of(layer),)).copy()
    rows = layer.inputs[0]
    if layer.op == "MatMul":
        layer.op = "Gemm"
    rewrite(model, layer, weight, total)
    take_over(layer, node)
    if layer.op == "Gemm" and len(rows.shape or ()) > 2:
        _put_reshapes_round(model, layer)
    return f"into {layer.op} {layer.name}"


def _into_after(model: Model, node: gs.Node, at: int) -> str | None:
    """Into the bias of the Conv or Gemm after."""
    data, out = node.inputs[1 - at], node.outputs[0]
    layer = out.outputs[0] if len(out.outputs) == 1 else None
    if layer is None or layer.op not in ("Conv", "Gemm") or layer.inputs[0] is not out:
        return None
    if values_of(layer.inputs[1]) is None or prod(node.inputs[at].shape) != 1:
        return None
    if data.shape is None or len(node.inputs[at].shape) > len(data.shape):
        raise Skip("the rank of its input is not known")
    only_reader(model, out, layer)
    if layer.op == "Conv" and pads(layer):
        raise Skip(f"{layer.name} pads with zeros, which a shift would change")
    shift = float(constant(node, at).reshape(())) * (-1 if node.op == "Sub" else 1)
    weight, bias = constant(layer, 1), bias_of(layer)
    summed = weight.astype(np.float64)
    if layer.op == "Conv":
        moved = shift * summed.reshape(weight.shape[0], -1).sum(1)
    else:
        axis = 1 if layer.attrs.get("transB", 0) else 0
        moved = shift * layer.attrs.get("alpha", 1.0) * summed.sum(axis)
    rewrite(model, layer, weight, moved if bias is None else moved + bias)
    layer.inputs[0] = data
    node.outputs.clear()
    node.inputs.clear()
    return f"into {layer.op} {layer.name} after it"


def _can_be_gemm(node: gs.Node) -> bool:
    """Whether a MatMul multiplies a matrix, or a stack of known shape, with a matrix."""
    data, weight = node.inputs
    if data.shape is None or len(weight.shape) != 2:
        return False
    return len(data.shape) == 2 or (
        len(data.shape) > 2 and all(isinstance(d, int) and d > 0 for d in data.shape)
    )


def _put_reshapes_round(model: Model, gemm: gs.Node) -> None:
    data, out = gemm.inputs[0], gemm.outputs[0]
    count, inner = prod(data.shape[:-1]), data.shape[-1]
    shape = model.constant(f"{data.name}_rows", np.array([count, inner], np.int64))
    gemm.inputs[0] = model.emit(
        "Reshape", data, shape,
        name=f"{data.name}_as_rows", dtype=data.dtype, shape=[count, inner], at=gemm,
    )  # fmt: skip
    columns = outputs_of(gemm)
    flat = gs.Variable(model.unique(f"{out.name}_as_rows"), out.dtype, [count, columns])
    gemm.outputs[0] = flat
    shape = model.constant(f"{out.name}_shape", np.array([*data.shape[:-1], columns], np.int64))
    made = model.emit("Reshape", flat, shape, name=f"{out.name}_stacked", like=out, at=gemm)
    made.inputs[0].outputs[0] = out
