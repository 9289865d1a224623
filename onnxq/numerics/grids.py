"""The grid of numbers that a quantized tensor may hold, and rounding to it.

    integers    q in [qmin, qmax] with zero point z:   x' = (q - z) * scale
    float8      q one of the format's finite values:   x' = q * scale

Float formats have no zero point and are saturated, as ONNX QuantizeLinear does (saturate=1). Layout
of float8: the ONNX specification, "Float stored in 8 bits" (Micikevicius et al. 2022,
arXiv:2209.05433).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALLEST_SCALE = np.finfo(np.float32).tiny  # the least normal number: kernels may flush less to 0

# dtypes that numpy itself does not know, by the name under which they are registered with it
SMALL_INTEGERS = {"int2": (-2, 1), "uint2": (0, 3), "int4": (-8, 7), "uint4": (0, 15)}
# the greatest value, bits of the mantissa, exponent of the least normal number
FLOATS = {"float8_e4m3fn": (448.0, 3, -6), "float8_e5m2": (57344.0, 2, -14)}


def limits(dtype: np.dtype[Any]) -> tuple[float, float]:
    """The least and the greatest finite number of an integer or float8 dtype."""
    if dtype.name in FLOATS:
        greatest = FLOATS[dtype.name][0]
        return -greatest, greatest
    if dtype.name in SMALL_INTEGERS:
        return SMALL_INTEGERS[dtype.name]
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


LEANING = 256  # levels from which the one more is not worth a negative scale


@dataclass(frozen=True, slots=True)
class Grid:
    """Numbers from qmin to qmax of a dtype; where zero is (symmetric: in the middle)."""

    dtype: np.dtype[Any]
    qmin: float
    qmax: float
    symmetric: bool = True
    power_of_two: bool = False

    @classmethod
    def of(cls, dtype: np.dtype[Any]) -> Grid:
        """All numbers of a dtype, any zero point."""
        return cls(dtype, *limits(dtype), symmetric=False)

    @property
    def is_float(self) -> bool:
        """Whether steps grow with the values."""
        return self.dtype.name in FLOATS

    @property
    def middle(self) -> float:
        """The zero point of symmetric ranges: 0 for signed numbers."""
        return 0.0 if self.is_float else (self.qmin + self.qmax + 1) // 2

    @property
    def leans(self) -> bool:
        """Whether a symmetric grid of few levels has one more of them below its middle.

        To use that level for the greatest extreme, scales may be negative.
        """
        return (
            self.symmetric
            and not (self.is_float or self.power_of_two)
            and self.levels < LEANING
            and self.qmin + self.qmax < 2 * self.middle
        )

    @property
    def levels(self) -> int:
        """How many integers there are."""
        return int(self.qmax - self.qmin) + 1

    def snap(
        self, t: NDArray[Any], zero_point: NDArray[Any], rng: np.random.Generator | None = None
    ) -> NDArray[Any]:
        """Round t = x / scale in place to what the grid holds of it, q - zero_point.

        zero_point: floats that broadcast. rng: round up with the probability of the part that is
        rounded off, so that the expected value is t (only within the range); None: half to even.
        """
        if self.is_float:
            return self._snap_float(t, rng)
        if rng is None:
            np.rint(t, out=t)
        else:
            t += rng.random(t.shape, np.float32)
            np.floor(t, out=t)
        if self.symmetric:  # one zero point: bounds that are numbers are faster
            return np.clip(t, self.qmin - self.middle, self.qmax - self.middle, out=t)
        np.maximum(t, self.qmin - zero_point, out=t)
        np.minimum(t, self.qmax - zero_point, out=t)
        return t

    def _snap_float(self, t: NDArray[Any], rng: np.random.Generator | None) -> NDArray[Any]:
        np.clip(t, self.qmin, self.qmax, out=t)
        if rng is None:
            t[...] = t.astype(self.dtype)
            return t
        _, mantissa, least = FLOATS[self.dtype.name]
        exponent = np.maximum(np.frexp(t)[1] - 1, least) - mantissa  # of the step at t
        t[...] = np.ldexp(t, -exponent)
        t += rng.random(t.shape, np.float32)
        t[...] = np.ldexp(np.floor(t), exponent)
        return np.clip(t, self.qmin, self.qmax, out=t)

    def stored(self, k: NDArray[Any], zero_point: NDArray[Any]) -> NDArray[Any]:
        """What `snap` returned, as numbers of the dtype; k is overwritten."""
        if not self.is_float:
            k += zero_point
        return k.astype(self.dtype)
