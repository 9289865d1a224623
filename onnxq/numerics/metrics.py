"""How far an output is from its reference: sums that merge, so that it can be streamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """Sums in float64 over pairs of reference r and output y; `merge` adds those of other pairs.

    Elements that are NaN or infinite alike in both are no error and add nothing; those that are
    so in one only make `noise` and `max_abs` infinite.
    """

    count: int = 0
    signal: float = 0.0  # sum of r^2
    noise: float = 0.0  # sum of (y - r)^2
    output: float = 0.0  # sum of y^2
    product: float = 0.0  # sum of r y
    max_abs: float = 0.0  # max |y - r|

    @classmethod
    def of(cls, reference: NDArray[Any], output: NDArray[Any]) -> ErrorSums:
        """Of two arrays of one shape. Raises ValueError when the shapes differ."""
        if np.shape(reference) != np.shape(output):
            raise ValueError(f"shapes {np.shape(reference)} and {np.shape(output)} differ")
        r, y = (np.asarray(a, np.float64).reshape(-1) for a in (reference, output))
        broken = False
        finite = np.isfinite(r) & np.isfinite(y)
        if not finite.all():
            broken = not np.array_equal(r[~finite], y[~finite], equal_nan=True)
            r, y = r[finite], y[finite]
        d = y - r
        return cls(
            finite.size,
            float(r @ r),
            np.inf if broken else float(d @ d),
            float(y @ y),
            float(r @ y),
            np.inf if broken else float(np.abs(d).max(initial=0)),
        )

    def merge(self, other: ErrorSums) -> ErrorSums:
        """Return the sums over the pairs of both."""
        return ErrorSums(
            self.count + other.count,
            self.signal + other.signal,
            self.noise + other.noise,
            self.output + other.output,
            self.product + other.product,
            max(self.max_abs, other.max_abs),
        )

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal / noise): inf without noise, -inf for noise without signal."""
        if self.noise == 0:
            return np.inf
        if self.signal == 0 or np.isinf(self.noise):
            return -np.inf
        return float(10 * (np.log10(self.signal) - np.log10(self.noise)))

    @property
    def cosine(self) -> float:
        """The cosine of the angle between r and y: 1 if both are zero, 0 if one is."""
        if self.signal == 0 or self.output == 0:
            return float(self.signal == self.output)
        cosine = self.product / (np.sqrt(self.signal) * np.sqrt(self.output))
        return float(np.clip(cosine, -1, 1))


def sqnr_db(reference: NDArray[Any], output: NDArray[Any]) -> float:
    """Signal to quantization noise ratio of two arrays of one shape, in dB."""
    return ErrorSums.of(reference, output).sqnr_db


def cosine(reference: NDArray[Any], output: NDArray[Any]) -> float:
    """Cosine similarity of two arrays of one shape."""
    return ErrorSums.of(reference, output).cosine


def max_abs(reference: NDArray[Any], output: NDArray[Any]) -> float:
    """Find the largest absolute difference of two arrays of one shape."""
    return ErrorSums.of(reference, output).max_abs
