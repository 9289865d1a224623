"""Range search (first version)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.numerics import histograms


@dataclass(frozen=True, slots=True, eq=False)
class Density:
    """Mass spread evenly inside each of some ascending, disjoint bins."""

    left: NDArray[np.float64]
    right: NDArray[np.float64]
    mass: NDArray[np.float64]
    lo: float
    hi: float

    @classmethod
    def of_bins(
        cls, bins: NDArray[np.uint16], counts: NDArray[Any], lo: float, hi: float
    ) -> Density:
        """From a histogram over the upper 16 bits; lo and hi are the exact extremes."""
        left, right = histograms.edges_of(bins)
        return cls(np.clip(left, lo, hi), np.clip(right, lo, hi), counts.astype(np.float64), lo, hi)


def search(
    density: Density, method: str, *, bits: int = 8, symmetric: bool = False
) -> tuple[float, float]:
    """The range by a named method."""
    return density.lo, density.hi
