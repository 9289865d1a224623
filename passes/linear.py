"""What folding passes know of linear layers: read, scale and shift weights and biases.

A layer computes y = x W + b. Folding never edits a constant in place: other nodes may use it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Skip
from onnxq.model import Model, producer, values_of

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
Values = NDArray[Any]


def only_reader(model: Model, tensor: gs.Tensor, reader: gs.Node) -> None:
    """Raise Skip unless `reader` alone reads the tensor, in the graph that makes it."""
    if model.is_output(tensor) or len(tensor.outputs) != 1 or tensor.outputs[0] is not reader:
        raise Skip(f"{tensor.name} is also used elsewhere")
    if model.home(tensor) is not model.graph_of(reader):
        raise Skip(f"{tensor.name} is read in a body, and made outside of it")


def constant(node: gs.Node, index: int) -> Values:
    """The constant at an input; raises Skip when it is not one, or not finite floats."""
    values = values_of(node.inputs[index])
    if values is None:
        raise Skip(f"{node.inputs[index].name} is not constant")
    if values.dtype.kind != "f":
        raise Skip(f"{node.inputs[index].name} is {values.dtype}, not float")
    return values


def layer_before(tensor: gs.Tensor) -> gs.Node | None:
    """The linear layer that makes the tensor, if one does."""
    node = producer(tensor)
    return node if node is not None and node.op in LINEAR and not node.domain else None


def outputs_of(node: gs.Node) -> int:
    """Number of output channels. Raises Skip for a weight that is not constant or a scalar."""
    weight = constant(node, 1)
    if node.op == "Conv":
        return int(weight.shape[0])
    if node.op == "ConvTranspose":
        return int(weight.shape[1] * node.attrs.get("group", 1))
    if weight.ndim < 1:
        raise Skip("its weight is a scalar")
    return int(weight.shape[0 if node.op == "Gemm" and node.attrs.get("transB", 0) else -1])


def scaled(node: gs.Node, weight: Values, scale: NDArray[np.float64]) -> Values:
    """The weight with each output channel multiplied; scale is [channels] or a scalar."""
    factor = np.atleast_1d(scale)
    wide = weight.astype(np.float64)
    if factor.size == 1:
        return np.asarray((wide * factor.reshape(())).astype(weight.dtype))
    if node.op == "Conv":
        wide = wide * factor.reshape(-1, *[1] * (weight.ndim - 1))
    elif node.op == "ConvTranspose":  # [inputs, outputs / group, ...]: groups are along the inputs
        group = node.attrs.get("group", 1)
        split = wide.reshape(group, weight.shape[0] // group, *weight.shape[1:])
        wide = (split * factor.reshape(group, 1, -1, *[1] * (weight.ndim - 2))).reshape(
            weight.shape
        )
    elif node.op == "Gemm" and node.attrs.get("transB", 0):
        wide = wide * factor[:, None]
    else:
        wide = wide * factor
    return np.asarray(wide.astype(weight.dtype))


def pads(conv: gs.Node) -> bool:
    """Whether a convolution pads its input with zeros."""
    padding = conv.attrs.get("auto_pad", "NOTSET")
    return any(conv.attrs.get("pads", ())) or padding not in ("NOTSET", "VALID")


def bias_of(node: gs.Node) -> NDArray[np.float64] | None:
    """The bias, beta applied; None without. Raises Skip when it is not constant, or misshapen."""
    if node.op == "MatMul" or len(node.inputs) < 3 or not node.inputs[2].name:
        return None
    if node.op != "Gemm" and constant(node, 2).shape != (outputs_of(node),):
        raise Skip(f"its bias {node.inputs[2].name} is not one value a channel")
    beta = float(node.attrs.get("beta", 1.0))
    return np.asarray(constant(node, 2).astype(np.float64) * beta)


def rewrite(model: Model, node: gs.Node, weight: Values, bias: Values | None) -> None:
    """Give the layer new constants of its own; a bias has beta applied already.

    A weight that is as it was stays: it may remember its integers.
    """
    if not np.array_equal(weight, constant(node, 1)):
        node.inputs[1] = model.constant(f"{node.inputs[1].name}_folded", weight)
    if bias is None:
        return
    made = model.constant(f"{node.name}_bias", bias.astype(weight.dtype))
    while len(node.inputs) < 3:
        node.inputs.append(made)
    node.inputs[2] = made
    node.attrs.pop("beta", None)


def take_over(node: gs.Node, follower: gs.Node) -> None:
    """The layer makes what its follower made; the follower goes."""
    out = follower.outputs[0]
    follower.outputs.clear()
    follower.inputs.clear()
    node.outputs[0] = out


def per_channel(values: Values, node: gs.Node, rank: int | None) -> NDArray[np.float64]:
    """A constant operand as one value a channel ([channels]) or one for all (scalar).

    The channel axis is 1 for convolutions and the last for Gemm and MatMul. Raises Skip where the
    constant is neither, or would make the result larger.
    """
    if values.size == 1 and (rank is None or values.ndim <= rank):
        return np.asarray(values.astype(np.float64).reshape(()))
    channels = outputs_of(node)
    if rank is None:
        raise Skip("the rank of the layer's result is not known")
    if values.ndim > rank:
        raise Skip("the constant has more axes than the layer's result")
    shape = [1] * (rank - values.ndim) + list(values.shape)
    axis = 1 if node.op in ("Conv", "ConvTranspose") else rank - 1
    if shape != [channels if i == axis else 1 for i in range(rank)]:
        raise Skip(f"the constant {list(values.shape)} is not one value a channel")
    return np.asarray(values.astype(np.float64).reshape(-1))


def rank_of(node: gs.Node) -> int | None:
    """Rank of the layer's result; convolutions have their weight's."""
    if node.op in ("Conv", "ConvTranspose"):
        return len(node.inputs[1].shape)
    if node.op == "Gemm":
        return 2
    return None if node.outputs[0].shape is None else len(node.outputs[0].shape)
