"""What is common to passes between 16-bit floats and float32: types, tensors, attributes.

float16 has 11 significant bits and holds values from 6e-8 to 65504, those below 6.1e-5 with fewer
bits; bfloat16 has 8 significant bits and the exponents of float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.graphs import DEFAULT_DOMAIN
from onnxq.model import Model
from onnxq.weights import dtype_of

Half = Literal["float16", "bfloat16"]
FLOAT32 = np.dtype(np.float32)
HALVES = {kind: dtype_of(kind) for kind in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)}
# Attributes that name a type of floats.
TYPES = ("to", "dtype", "output_dtype", "output_datatype")


@dataclass(frozen=True, slots=True)
class HalfType:
    """A format of 16 bits. least: the smallest value that has all significant bits.

    whole: up to there all integers are exact.
    """

    name: Half
    kind: int
    dtype: np.dtype[Any]
    largest: float
    least: float
    whole: float

    def rounded(self, values: NDArray[Any]) -> NDArray[Any]:
        """The values in the format, half to even; too large ones become infinite."""
        with np.errstate(over="ignore"):
            return np.asarray(values).astype(self.dtype)


HALF_TYPES: dict[Half, HalfType] = {
    "float16": HalfType(
        "float16", onnx.TensorProto.FLOAT16, np.dtype(np.float16), 65504.0, 2.0**-14, 2.0**11
    ),
    "bfloat16": HalfType(
        "bfloat16", onnx.TensorProto.BFLOAT16, np.dtype(HALVES[onnx.TensorProto.BFLOAT16]),
        (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**8,
    ),
}  # fmt: skip


def is_half(tensor: gs.Tensor) -> bool:
    """Whether the tensor is of 16-bit floats."""
    return tensor.dtype is not None and np.dtype(tensor.dtype) in HALVES.values()


def is_float32(tensor: gs.Tensor) -> bool:
    """Whether it is a tensor of float32: neither an omitted one, nor a sequence of such."""
    is_tensor = getattr(tensor, "type", None) in (None, "tensor_type")
    return bool(tensor.name and is_tensor and tensor.dtype == FLOAT32)


def tensors_of(model: Model) -> list[gs.Tensor]:
    """All tensors of the model, bodies included, each once."""
    found: dict[int, gs.Tensor] = {}
    for graph in model.graphs():
        inner = chain.from_iterable((*node.inputs, *node.outputs) for node in graph.nodes)
        found |= {id(t): t for t in chain(graph.inputs, graph.outputs, inner)}
    return list(found.values())


def retype(node: gs.Node, source: frozenset[Any], to: np.dtype[Any]) -> None:
    """Let attributes that name a type of `source`, or hold values of it, be of the type `to`."""
    if node.domain not in DEFAULT_DOMAIN:
        return
    kind = onnx.helper.np_dtype_to_tensor_dtype(to)
    for key, value in node.attrs.items():
        if key in TYPES and not isinstance(value, list):
            node.attrs[key] = _type(value, source, to, kind)
        elif isinstance(value, gs.Constant) and value.dtype in source:
            value.values = value.values.astype(to)
        elif isinstance(value, np.ndarray) and value.dtype in source:
            node.attrs[key] = value.astype(to)


def _type(value: Any, source: frozenset[Any], to: np.dtype[Any], kind: int) -> Any:
    if isinstance(value, (np.dtype, type)):
        return to if np.dtype(value) in source else value
    return kind if dtype_of(value) in source else value


CHUNK = 1 << 22
LEAST_DB = 60.0  # of a weight's values in float16; without small ones they have some 75


def why_unfit(values: NDArray[Any], half: HalfType) -> str | None:
    """Why a constant should not be stored in the format; None: it may.

    Infinities may; values that become infinite may not. Values below the least normal one lose
    digits: that is judged by their share of the tensor's energy.
    """
    flat = np.asarray(values).reshape(-1)
    error = energy = 0.0
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK]
        size = np.abs(part)
        if np.isnan(part).any():
            return "it has NaN values"
        finite = size[size < np.inf]
        if finite.size and np.isinf(half.rounded(finite.max())):
            return f"it has values of {finite.max():.3g}: {half.name} ends at {half.largest:.5g}"
        small = finite[finite < half.least].astype(np.float64)
        error += float(np.square(small - half.rounded(small).astype(np.float64)).sum())
        energy += float(np.square(finite, dtype=np.float64).sum())
    if error > energy * 10 ** (-LEAST_DB / 10):
        db = 10 * np.log10(energy / error)
        return f"most of it is too small for {half.name}: {db:.0f} dB of it would be left"
    return None
