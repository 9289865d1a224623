"""How much of a model is quantized: share of multiply-accumulates and of weight bytes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import onnx_graphsurgeon as gs

from onnxq.model import Model, producer
from onnxq.passes.ops import OPS
from onnxq.passes.packed_weights import FLOATS, shape_of, stored_weights
from onnxq.passes.work import RECURRENT, Shapes, macs


@dataclass(frozen=True, slots=True)
class Coverage:
    """What of a model runs on, and is stored as, integers.

    macs: multiply-accumulates of one forward pass (an unknown dimension counts as 1). weight_bytes:
    as float32, whatever they are stored in; indices into codebooks count as integers, 16-bit floats
    as floats. float_layers: (node, operator, share of all multiply-accumulates) of each layer that
    computes in floats.
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
    floats_kept, packed = _weight_values(model)
    return Coverage(
        macs=total,
        quantized_macs=sum(work[key] for key in integer),
        weight_bytes=4 * (floats_kept + packed),
        quantized_weight_bytes=4 * packed,
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


def _weight_values(model: Model) -> tuple[int, int]:
    """How many values are kept in floats, and how many layers read from integers.

    Scales, zero points and codebooks are neither.
    """
    packed, parts = 0, set[int]()
    for node, tensor, stands in stored_weights(model):
        if stands.form != "float":
            packed += prod(shape_of(node, tensor, stands))
            parts |= {id(c) for c in (stands.numbers, *stands.beside)}
    constants = {
        id(t): t for g in model.graphs() for t in g.tensors().values() if isinstance(t, gs.Constant)
    }
    kept = [t for key, t in constants.items() if key not in parts and str(t.dtype) in FLOATS]
    return sum(prod(t.shape) for t in kept), packed
