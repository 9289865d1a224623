"""Histograms over the upper 16 bits of the float32 pattern (that is, of bfloat16 truncation).

65,536 bins, 128 in every octave of either sign: no range is needed beforehand, one pass counts,
and histograms of different data add exactly. Bins are numbered in order of value: bin k holds the
values from edge(k) to edge(k + 1); 0.0 (and -0.0) is in bin 32768. A bin is at most 0.8 % of its
value wide. Only occupied bins are kept: some 3,000 for a real activation.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

ZERO = 0x8000  # the bin of 0.0, and the pattern of -0.0
ZERO_WIDTH = 2.0**-133  # the right edge of that bin: 0x0001 as a pattern, a subnormal
UPPER = 1 if sys.byteorder == "little" else 0

Counts = tuple[NDArray[np.uint16], NDArray[np.uint64]]  # ascending bins, how often each occurs
NONE: Counts = (np.empty(0, np.uint16), np.empty(0, np.uint64))


def halves_of(x: NDArray[Any]) -> NDArray[np.uint16]:
    """Take the upper 16 bits of each value's float32 pattern, flat; x of any float dtype."""
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is not counted
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    return flat.view(np.uint16)[UPPER::2].copy()


def count(halves: NDArray[np.uint16]) -> tuple[Counts, int]:
    """Count the values in each occupied bin; and those that are not finite, in no bin."""
    by_pattern = np.bincount(halves, minlength=1 << 16)
    by_pattern[0] += by_pattern[ZERO]  # -0.0 is 0.0
    by_pattern[ZERO] = 0
    (patterns,) = np.nonzero(by_pattern)
    # Patterns of negative values follow those of positive ones, and grow away from zero.
    sign = int(np.searchsorted(patterns, ZERO))
    positive, negative = patterns[:sign], patterns[sign:][::-1]
    patterns = np.concatenate([negative, positive])
    bins = np.concatenate([0xFFFF - negative, positive + ZERO])
    finite = (bins >= 0x80) & (bins < (1 << 16) - 0x80)  # the largest exponent: infinity and NaN
    counts = by_pattern[patterns[finite]].astype(np.uint64)
    return (bins[finite].astype(np.uint16), counts), halves.size - int(counts.sum())


def add(a: Counts, b: Counts) -> Counts:
    """Add two histograms."""
    bins = np.union1d(a[0], b[0])
    counts = np.zeros(bins.size, np.uint64)
    for some_bins, some_counts in (a, b):
        counts[np.searchsorted(bins, some_bins)] += some_counts
    return bins, counts


def edges_of(bins: NDArray[np.uint16]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the left and right edge (float64) of each bin."""
    k = bins.astype(np.int64)
    return _edge(k), _edge(k + 1)


def _edge(k: NDArray[np.int64]) -> NDArray[np.float64]:
    magnitude = (np.abs(k - ZERO) << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    magnitude = np.minimum(magnitude, float(np.finfo(np.float32).max))  # where infinity begins
    return np.where(k < ZERO, -magnitude, magnitude)
