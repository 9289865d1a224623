"""Codebooks of given shapes, and the entry nearest to a value.

Powers: Miyashita et al., "Convolutional neural networks using logarithmic data representation",
2016 (arXiv:1603.01025); Zhou et al., "Incremental network quantization", 2017 (arXiv:1702.03044).
They round the logarithm; here the nearest entry is taken, which has the least squared error.

NormalFloat: 4-bit NormalFloat of Dettmers et al., "QLoRA", 2023 (arXiv:2305.14314), appendix E:
means of neighbouring quantiles of the normal distribution, zero exact, ends at -1 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

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
LEAST = 2.0**-30  # the least power worth an entry
CURVES = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
STEPS = 4  # comparisons after the table's look-up; more: binary search is as fast


class Nearest:
    """Finds the index of the nearest entry; exact, a tie goes to the smaller entry.

    codebook: ascending, at most 256 entries. The index is the count of midpoints below the value.
    Of many entries, a table by the upper 16 bits of the float32 pattern says how many midpoints
    are below all values of that pattern; the few that are within it are compared one by one.
    """

    def __init__(self, codebook: Codebook) -> None:
        fills = np.searchsorted(codebook, codebook[-1:])[0]  # equals of the last: never needed
        codebook = codebook[: fills + 1]
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


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A codebook, ascending, as a grid of numbers that a weight may hold; there are no zero points.

    As `onnxq.numerics.grids.Grid`, what is snapped to stands for numbers: here the entries.
    """

    entries: Codebook
    nearest: Nearest
    dtype: ClassVar[np.dtype[np.uint8]] = np.dtype(np.uint8)
    power_of_two: ClassVar[bool] = False

    @classmethod
    def of(cls, entries: Codebook) -> Table:
        """Make what finds entries."""
        return cls(entries, Nearest(entries))

    def snap(self, t: NDArray[Any], zero_point: NDArray[Any]) -> Codebook:
        """The entries nearest to values."""
        return self.entries.take(self.nearest(np.asarray(t, np.float32)))

    def stored(self, k: Codebook, zero_point: NDArray[Any]) -> NDArray[np.uint8]:
        """Indices of entries."""
        return self.nearest(k)


def geometric(bits: int, base: float) -> list[Codebook]:
    """Codebooks of 0 and +-base^-j, j from 0: base 2 has the powers of two.

    2^bits entries are 0, n = 2^(bits - 1) - 1 pairs and one more, positive: below the others, or
    (the second codebook) above them: a scale with the sign of the extreme value puts it there.
    Powers below 2^-30 are left out. 1 bit: -1 and 1.
    """
    n = (1 << (bits - 1)) - 1
    powers = float(base) ** -np.arange(n + 1.0)
    powers = powers[powers >= LEAST]
    sides = [powers[:n], powers[1:]] if n else [powers]
    return [_filled(np.concatenate([-side, [0.0] * (n > 0), powers]), bits) for side in sides]


def logarithmic(bits: int) -> list[Codebook]:
    """Candidates: base = (r_max / r_min)^(1 / (q_max - q_min)), exponents -q from 0 to n.

    The range r_max / r_min, from the greatest to the least magnitude, is one of 2^0.5 to 2^14.
    """
    steps = max(1, (1 << (bits - 1)) - 1)
    found = [geometric(bits, ratio ** (1 / steps)) for ratio in 2 ** np.arange(0.5, 14.5, 0.5)]
    return [book for books in found for book in books]


def exponential(bits: int) -> list[Codebook]:
    """Candidates: +-(e^(a t) - 1) / (e^a - 1), t = 0, 1/n ... 1, n = 2^(bits - 1); a from 0 to 8.

    The linear t for a = 0. There is no -1: 2^bits entries with 0 have one more positive one.
    """
    if bits == 1:
        return geometric(1, 2.0)
    n = 1 << (bits - 1)
    t = np.arange(1, n + 1) / n
    found = [np.expm1(a * t) / np.expm1(a) if a else t for a in CURVES]
    return [_filled(np.concatenate([-side[:-1], [0.0], side]), bits) for side in found]


def _filled(entries: NDArray[np.float64], bits: int) -> Codebook:
    """Ascending entries as a codebook of 2^bits: the last one fills it up."""
    book = np.sort(entries).astype(np.float32)
    return np.append(book, np.full((1 << bits) - len(book), book[-1])).astype(np.float32)
