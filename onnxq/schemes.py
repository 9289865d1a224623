"""Number formats, granularity, and the affine parameters of a quantized tensor.

Semantics are those of ONNX QuantizeLinear/DequantizeLinear: q = saturate(round_half_even(x / scale)
+ zero_point), x' = (q - zero_point) * scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnxq.numerics.affine import affine_params, dequantize, quantize
from onnxq.numerics.ranges import weight_range


@dataclass(frozen=True, slots=True)
class IntFormat:
    """An integer number format: its width in bits, whether it has a sign."""

    name: str
    bits: int
    signed: bool

    @property
    def qmin(self) -> int:
        """The smallest representable integer."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest representable integer."""
        return (1 << (self.bits - self.signed)) - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype of the format."""
        return np.dtype(self.name)


FORMATS = {
    f.name: f
    for f in (
        IntFormat("int8", 8, signed=True),
        IntFormat("uint8", 8, signed=False),
        IntFormat("int16", 16, signed=True),
        IntFormat("uint16", 16, signed=False),
        IntFormat("int32", 32, signed=True),
    )
}


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale for each index of `axis`; None: the operator's output channels."""

    axis: int | None = None


Granularity = PerTensor | PerChannel


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How a tensor is quantized: number format, granularity, symmetric or not.

    Symmetric: the zero point is 0 for signed formats (range [-qmax, qmax]: the least value is not
    used) and the middle of the range (128 for uint8) for unsigned ones. power_of_two: scales are
    rounded up to 2^k, so that nothing is clipped that was not before.
    """

    format: str = "int8"
    granularity: Granularity = PerTensor()
    symmetric: bool = True
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}: one of {', '.join(FORMATS)}")
        if self.format == "int32" and not self.symmetric:
            raise ValueError("int32 (biases, accumulators) has zero point 0: use symmetric=True")

    @property
    def numbers(self) -> IntFormat:
        """The number format itself."""
        return FORMATS[self.format]

    def params(self, lo: ArrayLike, hi: ArrayLike, axis: int | None = None) -> QParams:
        """Return the parameters that cover [lo, hi]: scalars, or for PerChannel 1-D.

        axis: where the granularity leaves it to the operator. Raises ValueError when lo and hi do
        not have the granularity's shape, are not finite, or lo > hi; or when axis is missing.
        """
        axis = self._axis(axis)
        if not np.ndim(lo) == np.ndim(hi) == (0 if axis is None else 1):
            raise ValueError(f"a range of {np.ndim(lo)} dimensions does not fit {self.granularity}")
        numbers = self.numbers
        scale, zero_point = affine_params(
            lo,
            hi,
            qmin=numbers.qmin,
            qmax=numbers.qmax,
            dtype=numbers.dtype,
            symmetric=self.symmetric,
            power_of_two=self.power_of_two,
        )
        return QParams(scale, zero_point, axis)

    def _axis(self, axis: int | None) -> int | None:
        """Choose the axis, given the operator's; None for PerTensor."""
        if isinstance(self.granularity, PerTensor):
            return None
        axis = self.granularity.axis if self.granularity.axis is not None else axis
        if axis is None:
            raise ValueError("per-channel needs an axis: PerChannel(axis) or the operator's")
        return axis


@dataclass(frozen=True, slots=True, eq=False)
class QParams:
    """Scale (float32) and zero point (of the quantized dtype): scalars, or 1-D along `axis`."""

    scale: NDArray[np.float32]
    zero_point: NDArray[Any]
    axis: int | None = None

    def __post_init__(self) -> None:
        if np.shape(self.scale) != np.shape(self.zero_point):
            raise ValueError("scale and zero point must have one shape")
        if np.ndim(self.scale) != (0 if self.axis is None else 1):
            raise ValueError("scale and zero point are scalars, or 1-D along an axis")

    def quantize(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return x as integers, dtype of the zero point, same shape."""
        return quantize(x, self.scale, self.zero_point, axis=self.axis)

    def dequantize(self, q: NDArray[Any]) -> NDArray[np.float32]:
        """Return integers as float32, same shape."""
        return dequantize(q, self.scale, self.zero_point, axis=self.axis)


def quantize_weight(
    w: NDArray[Any],
    scheme: QuantScheme,
    axis: int | None = None,
    method: Literal["minmax", "mse"] = "minmax",
) -> tuple[NDArray[Any], QParams]:
    """Quantize a weight: integers of the same shape, and the parameters.

    axis: the operator's output channels, used when the granularity does not name one. method: see
    `onnxq.numerics.ranges.weight_range`. Raises ValueError for NaN or infinities in the weight.
    """
    axis = scheme._axis(axis)
    bits = scheme.numbers.bits
    lo, hi = weight_range(w, axis, method, bits=bits, symmetric=scheme.symmetric)
    params = scheme.params(lo, hi, axis)
    return integers(w, scheme, params), params


def integers(w: NDArray[Any], scheme: QuantScheme, params: QParams) -> NDArray[Any]:
    """A weight with given parameters; what is clipped stays in [-qmax, qmax] if symmetric."""
    q = params.quantize(w)
    if scheme.symmetric and scheme.numbers.signed:
        np.maximum(q, -scheme.numbers.qmax, out=q)
    return q
