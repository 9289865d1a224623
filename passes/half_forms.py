"""Which tensors of a node may be of 16-bit floats, by the type constraints of the ONNX standard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from onnxq.graphs import DEFAULT_DOMAIN, bodies_of
from onnxq.passes.halves import HalfType, is_float32

CONTROL = ("If", "Loop", "Scan")
SCAN_SINCE = 9  # before, Scan has batches and a first input of lengths
RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial",
          "Bernoulli")  # fmt: skip
# Values from a formula of int inputs: few, and rounded once they are read.
GENERATORS = ("BlackmanWindow", "HammingWindow", "HannWindow", "MelWeightMatrix")


@dataclass(frozen=True, slots=True)
class Form:
    """The inputs and outputs, by index, that change type with the node; other floats do not."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def form_of(node: gs.Node, opset: int, half: HalfType) -> Form | str | None:
    """The node's form in 16 bits; why it has none; None if it has no float32 at all.

    Of If, Loop and Scan the bodies decide: their types are not the node's.
    """
    touched = [t for t in (*node.inputs, *node.outputs) if is_float32(t)]
    if not touched:
        return None
    if node.domain not in DEFAULT_DOMAIN:
        return f"{node.domain} may not have it in {half.name}"
    if node.op in RANDOM:
        return "other random numbers would be drawn"
    if node.op in GENERATORS or any(bodies_of(node)):
        return "its values are made in float32"
    if node.op == "BitCast":
        return "it reads bits, not values"
    if any(is_holder(t) for t in (*node.inputs, *node.outputs)):
        return "sequences and optionals stay float32"
    if any(t.name and t.dtype is None for t in (*node.inputs, *node.outputs)):
        return "types around it are not known"
    signature = _signature(node.op, opset)
    if signature is None:
        return f"not in the standard's opset {opset}"
    inputs = _following(node.inputs, signature.inputs, signature, half)
    outputs = _following(node.outputs, signature.outputs, signature, half)
    if not inputs and not outputs:
        return f"it has no {half.name} in opset {opset}"
    if not outputs and any(is_float32(t) for t in node.outputs):
        return f"its result has no {half.name} in opset {opset}"
    return Form(frozenset(inputs), frozenset(outputs))


def is_holder(tensor: gs.Tensor) -> bool:
    """Whether it is a sequence, an optional or a map."""
    return getattr(tensor, "type", None) not in (None, "tensor_type")


@dataclass(frozen=True, slots=True)
class _Signature:
    """Type of each formal input and output, the last of which may stand for several."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    allowed: dict[str, frozenset[str]]


@lru_cache(maxsize=1024)
def _signature(op: str, opset: int) -> _Signature | None:
    try:
        schema: Any = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None
    return _Signature(
        tuple(i.type_str for i in schema.inputs),
        tuple(o.type_str for o in schema.outputs),
        {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints},
    )


def _following(
    tensors: Sequence[gs.Tensor], formal: tuple[str, ...], signature: _Signature, half: HalfType
) -> list[int]:
    """Where float32 may be the 16-bit type instead: a concrete type, or one without it, may not."""
    return [
        i
        for i, tensor in enumerate(tensors)
        if is_float32(tensor)
        and formal
        and f"tensor({half.name})" in signature.allowed.get(formal[min(i, len(formal) - 1)], ())
    ]
