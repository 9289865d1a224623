"""Number formats, granularity, and the affine parameters of a quantized tensor.

Semantics are those of ONNX QuantizeLinear/DequantizeLinear: q = saturate(round_half_even(x / scale)
+ zero_point), x' = (q - zero_point) * scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.numerics.affine import dequantize, quantize


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
    """One scale for each index of `axis`; None: the axis that the operator calls its output channels."""

    axis: int | None = None


Granularity = PerTensor | PerChannel


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How a tensor is quantized: number format, granularity, symmetric or not.

    Symmetric: the zero point is 0 for signed formats (range [-qmax, qmax]: the least value is not
    used) and the middle of the range (128 for uint8) for unsigned ones.
    """

    format: str = "int8"
    granularity: Granularity = PerTensor()
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}: one of {', '.join(FORMATS)}")

    @property
    def numbers(self) -> IntFormat:
        """The number format itself."""
        return FORMATS[self.format]


@dataclass(frozen=True, slots=True, eq=False)
class QParams:
    """Scale (float32) and zero point (of the quantized dtype): scalars, or 1-D along `axis`."""

    scale: NDArray[np.float32]
    zero_point: NDArray[Any]
    axis: int | None = None

    def quantize(self, x: NDArray[Any]) -> NDArray[Any]:
        """x as integers, dtype of the zero point, same shape."""
        return quantize(x, self.scale, self.zero_point, axis=self.axis)

    def dequantize(self, q: NDArray[Any]) -> NDArray[np.float32]:
        """Integers as float32, same shape."""
        return dequantize(q, self.scale, self.zero_point, axis=self.axis)
