"""Histograms over the upper 16 bits of the float32 pattern (that is, of bfloat16 truncation).

65,536 bins, 128 in every octave of either sign: no range is needed beforehand, one pass counts,
and histograms of different data add exactly. Bins are numbered in order of value: bin k holds
[edge(k), edge(k + 1)), 0.0 is the first value of bin 32768. A bin is at most 0.8 % of its value wide.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 1 << 16


def bins_of(x: NDArray[Any]) -> NDArray[np.uint16]:
    """The bin (uint16) of each finite value, flat; x is float32 or narrower."""
    flat = np.ascontiguousarray(x, np.float32).reshape(-1) + np.float32(0)  # -0.0 becomes 0.0
    bits = (flat.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    # Negative patterns grow away from zero: invert them; positive ones follow after.
    return np.where(bits & 0x8000, ~bits, bits | 0x8000).astype(np.uint16)


def edges_of(bins: NDArray[np.uint16]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The left and right edge (float64) of each bin."""
    k = bins.astype(np.int64)
    return _edge(k), _edge(k + 1)


def _edge(k: NDArray[np.int64]) -> NDArray[np.float64]:
    magnitude = (np.abs(k - 0x8000) << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    return np.where(k < 0x8000, -magnitude, magnitude)


def count(bins: NDArray[np.uint16]) -> tuple[NDArray[np.uint16], NDArray[np.uint64]]:
    """The distinct bins in order, and how often each occurs."""
    if not bins.size:
        return np.empty(0, np.uint16), np.empty(0, np.uint64)
    first = int(bins.min())
    dense = np.bincount(bins.astype(np.intp) - first)
    (occupied,) = np.nonzero(dense)
    return (occupied + first).astype(np.uint16), dense[occupied].astype(np.uint64)


def add(
    a: tuple[NDArray[np.uint16], NDArray[np.uint64]],
    b: tuple[NDArray[np.uint16], NDArray[np.uint64]],
) -> tuple[NDArray[np.uint16], NDArray[np.uint64]]:
    """The sum of two sparse histograms (bins, counts)."""
    bins = np.union1d(a[0], b[0])
    counts = np.zeros(bins.size, np.uint64)
    for some_bins, some_counts in (a, b):
        counts[np.searchsorted(bins, some_bins)] += some_counts
    return bins, counts
