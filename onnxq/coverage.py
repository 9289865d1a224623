"""How much of a model is quantized: share of multiply-accumulates and of weight bytes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.layers import is_lookup, unpacked
from onnxq.model import Model, producer
from onnxq.passes.ops import OPS
from onnxq.passes.work import INTEGER, RECURRENT, Shapes, macs

# What reads integers that a Cast has made of others.
UNPACKING = ("Mul", "Sub", "DequantizeLinear")


@dataclass(frozen=True, slots=True)
class Coverage:
    """What of a model runs on, and is stored as, integers.

    macs: multiply-accumulates of one forward pass (an unknown dimension counts as 1). weight_bytes:
    as float32, whatever they are stored in. float_layers: (node, operator, share of all
    multiply-accumulates) of each layer that computes in floats.
    """

    macs: float
    quantized_macs: float
    weight_bytes: int
    quantized_weight_bytes: int
    float_layers: tuple[tuple[str, str, float], ...]

    @property
    def macs_share(self) -> float:
        """Share of multiply-accumulates in integers, 0 to 1."""
        return self.quantized_macs / self.macs if self.macs else 0.0

    @property
    def weight_share(self) -> float:
        """Share of weight bytes in integers, 0 to 1."""
        return self.quantized_weight_bytes / self.weight_bytes if self.weight_bytes else 0.0


def coverage(model: Model, shapes: Shapes | None = None) -> Coverage:
    """Measure a model as it is, quantized or not; bodies of control flow included.

    shapes: as for `macs`.
    """
    work = macs(model, shapes)
    layers = [node for node in model.nodes() if id(node) in work]
    integer = {id(node) for node in layers if is_integer(node)}
    total = sum(work.values())
    floats = tuple(
        (node.name, node.op, work[id(node)] / total if total else 0.0)
        for node in layers
        if id(node) not in integer
    )
    stored = [0, 0]
    for graph in model.graphs():
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Constant) and (kind := _stored(tensor)) is not None:
                stored[kind] += 4 * prod(unpacked(tensor).shape if kind else tensor.shape)
    return Coverage(
        macs=total,
        quantized_macs=sum(work[key] for key in integer),
        weight_bytes=sum(stored),
        quantized_weight_bytes=stored[True],
        float_layers=floats,
    )


def is_integer(node: gs.Node) -> bool:
    """Whether a layer's operands all come from DequantizeLinear, or the layer is an integer one."""
    if node.op not in OPS:
        return node.op not in RECURRENT
    operands = node.inputs[: 1 if node.op in RECURRENT else 2]
    return all(
        (source := producer(t)) is not None and source.op == "DequantizeLinear" for t in operands
    )


def _stored(tensor: gs.Constant) -> bool | None:
    """True: integers or float8 that are dequantized; False: floats; None: neither is a weight."""
    name = str(tensor.dtype)
    if "float" in name and not name.startswith("float8"):
        return False
    if "int" not in name and "float8" not in name:
        return None
    todo = list(tensor.outputs)
    while todo:
        node = todo.pop()
        if node.op == "DequantizeLinear" and node.inputs[0].dtype == tensor.dtype:
            return True
        if node.op in INTEGER or node.op.startswith("QLinear"):
            return True
        if node.op == "Cast" and any(
            r.op in UNPACKING and (r.op != "Sub" or r.inputs[0] is node.outputs[0])
            for r in node.outputs[0].outputs
        ):
            return True
        if is_lookup(node) and node.outputs[0].dtype == np.float32:  # in a codebook
            return True
        if node.op in ("Gather", "Transpose", "Reshape", "Cast", "Div", "Mod", "Slice"):
            todo += [reader for out in node.outputs for reader in out.outputs]
    return None
