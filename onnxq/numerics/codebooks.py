"""Codebooks of given shapes, and the entry nearest to a value.

NormalFloat: 4-bit NormalFloat of Dettmers et al., "QLoRA", 2023 (arXiv:2305.14314), appendix E:
means of neighbouring quantiles of the normal distribution, zero exact, ends at -1 and 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Codebook = NDArray[np.float32]

NF4: tuple[float, ...] = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

FEW = 32  # entries up to which comparing with each is the fastest
STEPS = 4  # comparisons after the table's look-up; more: binary search is as fast


class Nearest:
    """Finds the index of the nearest entry; exact, a tie goes to the smaller entry.

    codebook: ascending, at most 256 entries. The index is the count of midpoints below the value.
    Of many entries, a table by the upper 16 bits of the float32 pattern says how many midpoints
    are below all values of that pattern; the few that are within it are compared one by one.
    """

    def __init__(self, codebook: Codebook) -> None:
        wide = codebook.astype(np.float64)
        middles = (wide[1:] + wide[:-1]) / 2
        floor = middles.astype(np.float32)
        # Rounded down: then x > floor exactly if x > middle, for all x of float32.
        floor = np.where(floor > middles, np.nextafter(floor, np.float32(-np.inf)), floor)
        self.middles = np.append(floor, np.float32(np.inf)).astype(np.float32)
        self.table: NDArray[np.uint8] | None = None
        self.steps = 0
        if len(codebook) > FEW:
            self._make_table(floor)

    def _make_table(self, middles: Codebook) -> None:
        high = np.arange(1 << 16, dtype=np.uint32) << 16
        ends = np.stack([high, high | 0xFFFF]).view(np.float32)
        ends = np.sort(np.where(np.isnan(ends), np.copysign(np.float32(np.inf), ends), ends), 0)
        below, above = np.searchsorted(middles, ends)
        self.steps = int((above - below).max())
        if self.steps <= STEPS:
            self.table = below.astype(np.uint8)

    def __call__(self, t: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Indices of float32 values of any shape, no NaN."""
        if len(self.middles) <= FEW:
            index = np.zeros(t.shape, np.uint8)
            above = np.empty(t.shape, np.bool_)
            for middle in self.middles[:-1]:
                np.greater(t, middle, out=above)
                index += above.view(np.uint8)
            return index
        if self.table is None:
            return np.searchsorted(self.middles[:-1], t).astype(np.uint8)
        t = np.ascontiguousarray(t)
        index = self.table.take(t.view(np.uint32) >> 16)
        for _ in range(self.steps):
            index += t > self.middles.take(index)
        return index


def take(codebook: NDArray[np.float32], index: NDArray[np.uint8]) -> NDArray[Any]:
    """The entries of indices: several times as fast as indexing with uint8."""
    return codebook.take(index, axis=0)
