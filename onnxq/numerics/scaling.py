"""Scales of rows that have a codebook: first ones, and the search for better ones.

Errors are those of t = x / scale against the nearest entry c, times scale^2: neither overflows.
For given entries the squared error of s sum m (t - c)^2 is least where the scale is multiplied by

    sum(m t c) / sum(m c^2) = 1 + sum(m (t - c) c) / sum(m c^2)

(least squares; m is the importance). Nearest entries for scales, scales for entries, in turn: none
of these steps raises the error, as in Lloyd's iteration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxq.numerics.codebooks import Codebook, Nearest
from onnxq.numerics.grids import SMALLEST_SCALE
from onnxq.numerics.sharing import Block, Sharing

Values = NDArray[np.float32]
Sums = NDArray[np.float64]
Scale = NDArray[np.float32]  # of Sharing.shape

LARGEST = float(np.finfo(np.float32).max)
ROUNDS = 3  # of least squares, after the candidates


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows [channels, values], which of them share scales, and how much each value matters.

    importance: in [0, 1], a view of the rows' shape; None: all matter alike.
    """

    values: Values
    sharing: Sharing
    importance: Values | None = None

    def parts(self) -> Iterator[tuple[slice, Rows]]:
        """Rows whose scales concern nobody else, as many at a time as fit a cache."""
        for at, sharing in self.sharing.parts():
            m = None if self.importance is None else self.importance[at]
            yield at, Rows(self.values[at], sharing, m)

    def scaled(self, scale: Scale) -> Iterator[tuple[Block, Values, Values | None]]:
        """Blocks, their values over their scales (a copy), and their importance; 0 divides as 1."""
        divisor = np.where(scale == 0, np.float32(1), scale)
        for block in self.sharing.blocks():
            t = block.of(self.values) / block.params(divisor)
            yield block, t, None if self.importance is None else block.of(self.importance)

    def start(self, *, signed: bool) -> Scale:
        """The greatest magnitude of what shares a scale; signed: with that value's sign."""
        high, low = np.zeros((2, *self.sharing.shape), np.float32)
        for block in self.sharing.blocks():
            x = block.of(self.values)
            block.merge(np.maximum, high, x.max(2))
            block.merge(np.minimum, low, x.min(2))
        return allowed(np.where(signed & (high < -low), low, np.maximum(high, -low)))


def allowed(scale: NDArray[np.floating], largest: float = LARGEST) -> Scale:
    """Scales as float32, neither subnormal nor greater than the largest; 0 where all is 0."""
    size = np.clip(np.abs(scale), SMALLEST_SCALE, largest).astype(np.float32)
    return np.asarray(np.where(scale == 0, 0, np.copysign(size, scale)), np.float32)


def relative_squares(scale: Scale) -> Sums:
    """What a squared error of x / scale weighs: scale^2, the greatest of them as 1."""
    wide = np.abs(scale.astype(np.float64))
    return np.asarray((wide / (wide.max(initial=0) or 1)) ** 2)


def assess(rows: Rows, codebook: Codebook, nearest: Nearest, scale: Scale) -> tuple[Sums, Sums]:
    """The squared error of what shares a scale, and the scale of least squares for its entries."""
    error, slope, weight = np.zeros((3, *rows.sharing.shape))
    for block, t, m in rows.scaled(scale):
        c = codebook.take(nearest(t))
        t -= c
        mc = c if m is None else c * m
        block.merge(np.add, slope, (t * mc).sum(2))
        c *= mc
        block.merge(np.add, weight, c.sum(2))
        t *= t
        if m is not None:
            t *= m
        block.merge(np.add, error, t.sum(2))
    wide = scale.astype(np.float64)
    factor = 1 + np.divide(slope, weight, out=np.zeros_like(slope), where=weight > 0)
    return error * wide**2, np.where(factor > 0, wide * factor, wide)


def improved(rows: Rows, codebook: Codebook, scale: Scale, factors: Sequence[float] = ()) -> Scale:
    """Scales of no greater squared error: the best of scale * factor, then least squares."""
    nearest, best = Nearest(codebook), scale.copy()
    # Products stay finite.
    largest = LARGEST / max(1.0, float(np.abs(codebook).max(initial=0)))
    for at, part in rows.parts():
        at = slice(None) if rows.sharing.whole else at
        best[at] = _improved_part(part, codebook, nearest, scale[at], factors, largest)
    return best


def _improved_part(
    rows: Rows,
    codebook: Codebook,
    nearest: Nearest,
    scale: Scale,
    factors: Sequence[float],
    largest: float,
) -> Scale:
    best = scale
    error, follow = assess(rows, codebook, nearest, best)
    for step in range(len(factors) + ROUNDS):
        searching = step < len(factors)
        candidate = allowed(scale * np.float64(factors[step]) if searching else follow, largest)
        tried, then = assess(rows, codebook, nearest, candidate)
        better = tried < error
        if not searching and not better.any():
            break
        error, follow = np.where(better, tried, error), np.where(better, then, follow)
        best = np.asarray(np.where(better, candidate, best), np.float32)
    return best


def indices(rows: Rows, codebook: Codebook, scale: Scale) -> NDArray[np.uint8]:
    """The index of the entry nearest to each value, of the rows' shape."""
    out, nearest = np.empty(rows.values.shape, np.uint8), Nearest(codebook)
    for block, t, _ in rows.scaled(scale):
        block.of(out)[...] = nearest(t)
    return out
