"""Quantized tensors as they stand in a model: what a Q or DQ node says, in one form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.model import Model, producer, readers, values_of
from onnxq.passes.ops import OPS, conv_rows, is_constant
from onnxq.schemes import QParams

# Operators on activations that are quantized at run time: where their weights end.
DYNAMIC = {
    "MatMulInteger": 2,
    "ConvInteger": 2,
    "DynamicQuantizeMatMul": 2,
    "DynamicQuantizeLSTM": 3,
}


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """A tensor in integers: format, parameters and, if they are constant, its values.

    params: None where they are computed at run time. tensor: what holds the integers (None: not
    asked for). blocked: scales belong to blocks.
    """

    node: gs.Node
    format: str
    params: QParams | None
    tensor: gs.Tensor | None = None
    blocked: bool = False

    @property
    def is_constant(self) -> bool:
        """Whether it has values."""
        return self.tensor is not None and is_constant(_narrow(self.tensor))

    @property
    def values(self) -> NDArray[Any] | None:
        """Constant integers, also those that a Cast widens at load; read at each call."""
        if self.tensor is None or not self.is_constant:
            return None
        values = values_of(_narrow(self.tensor))
        widened = values is not None and _narrow(self.tensor) is not self.tensor
        return values.astype(self.tensor.dtype) if widened and values is not None else values

    def has_params(self, other: Operand) -> bool:
        """Whether scales and zero points are the same, and known."""
        a, b = self.params, other.params
        return (
            a is not None
            and b is not None
            and np.array_equal(a.scale, b.scale)
            and np.array_equal(a.zero_point, b.zero_point)
        )


def dequantized(tensor: gs.Tensor) -> Operand | None:
    """What a tensor behind DequantizeLinear was in integers; None for other tensors."""
    node = producer(tensor)
    if node is None or node.op != "DequantizeLinear":
        return None
    return operand(node, node.inputs[0].dtype)


def quantizers(tensor: gs.Tensor) -> list[Operand]:
    """What becomes of a tensor in the QuantizeLinear nodes that read it."""
    nodes = [node for node, i in readers(tensor) if node.op == "QuantizeLinear" and i == 0]
    return [operand(node, node.outputs[0].dtype) for node in nodes]


def operand(node: gs.Node, dtype: Any) -> Operand:
    """What a QuantizeLinear or DequantizeLinear says of its integers."""
    params = parameters(node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None, node)
    if params is not None and len(node.inputs) > 2:
        dtype = params.zero_point.dtype
    tensor = node.inputs[0] if node.op == "DequantizeLinear" else None
    blocked = bool(node.attrs.get("block_size", 0))
    return Operand(node, str(np.dtype(dtype) if dtype else np.uint8), params, tensor, blocked)


def _narrow(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor, or what a Cast makes it of."""
    cast = producer(tensor)
    return cast.inputs[0] if cast is not None and cast.op == "Cast" else tensor


def parameters(scale: gs.Tensor, zero: gs.Tensor | None, node: gs.Node) -> QParams | None:
    """Constant scale and zero point; a vector of one counts as a scalar."""
    s = values_of(scale)
    if s is None:
        return None
    z = np.zeros(s.shape, np.uint8) if zero is None or not zero.name else values_of(zero)
    if z is None or s.ndim > 1 or s.shape != z.shape:
        return None
    if s.size == 1:
        return QParams(s.reshape(()), z.reshape(()))
    rank = len(node.inputs[0].shape or ()) or None
    axis = int(node.attrs.get("axis", 1))
    return QParams(s, z, axis % rank if rank else axis)


def clamp_behind(node: gs.Node) -> gs.Node | None:
    """The Relu or Clip that alone reads the node's result."""
    out = node.outputs[0]
    if len(out.outputs) != 1:
        return None
    clamp = out.outputs[0]
    known = clamp.op in OPS and OPS[clamp.op].role == "absorb" and clamp.inputs[0] is out
    return clamp if known else None


def results(model: Model, node: gs.Node) -> list[Operand] | None:
    """The integers that a node's results become, a clamp between left out; None: floats."""
    found: list[Operand] = []
    for source in (node, clamp_behind(node)):
        if source is None:
            break
        found = []
        for tensor in source.outputs:
            if not tensor.name or not tensor.outputs:
                continue
            made = quantizers(tensor)
            if model.is_output(tensor) or len(made) < sum(1 for _ in readers(tensor)):
                break
            found += made
        else:
            if found:
                return found
    return None


def roles(node: gs.Node) -> Iterator[tuple[str, gs.Node, int]]:
    """How a dequantized constant is used: (role, reader, input) for each reader.

    Roles: weights, bias; constant: an operand that is neither.
    """
    for reader, i in readers(node.outputs[0]):
        spec = OPS.get(reader.op)
        if spec is None or spec.weight is None:
            yield "constant", reader, i
        elif spec.bias == i:
            yield "bias", reader, i
        else:
            is_weight = i == spec.weight or (reader.op == "MatMul" and i < 2)
            yield "weights" if is_weight else "constant", reader, i


def dynamic_rows(node: gs.Node) -> Iterator[NDArray[Any]]:
    """The int8 weights that uint8 activations of run time are multiplied with, as [K, N]."""
    for tensor in node.inputs[1 : DYNAMIC[node.op]]:
        values = values_of(tensor)
        if values is None or values.dtype != np.int8:
            continue
        if node.op == "ConvInteger":
            yield from conv_rows(values, node.attrs.get("group", 1))
        else:
            yield from values.reshape(-1, *values.shape[-2:])
