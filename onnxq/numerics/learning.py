"""Codebooks of single values fitted to rows with scales: one codebook a tensor.

The squared error of the weight is sum m s^2 (t - c)^2 with t = x / s, so a value has the mass m s^2
(m: its importance). Masses are gathered in bins of sign(t) sqrt(|t|), fine near zero and fine
enough at the ends whatever the extremes; where values are few, each is a point of its own. Of
shapes (`codebooks`) the one that suits these points best is chosen; k-means codebooks are made for
them (`kmeans`). Then the scales are improved, and the codebook and they again.

First scales have the sign of the value of greatest magnitude, so that this one is at +1 and the
codebook needs no entry at -1: 0.5 dB less error in groups of 32 than the magnitude alone, in
MiniLM's weights, of 2 and of 3 bits; root mean squares do worse. The search of scales gives 0.4 dB,
all but 0.02 dB of it in the first turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnxq.numerics.codebooks import Codebook, geometric
from onnxq.numerics.kmeans import Points, clusters, lloyd, squared_error
from onnxq.numerics.scaling import Rows, Scale, improved, relative_squares

BINS = 1 << 14
DISTINCT = 1 << 14  # values up to which each is a point of its own
MERGED = 1024  # points by which shapes are compared
ZEROS = 0.01  # share of exact zeros from which a codebook of k-means has one too
FACTORS = (0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2)  # of scales
COARSE = tuple(0.85**i for i in range(-2, 24))  # of all scales at once, for a shape


def fit_shape(rows: Rows, shapes: Sequence[Codebook]) -> tuple[Codebook, Scale]:
    """The codebook of least squared error among those given, and its scales."""
    scale = rows.start(signed=True)
    points = points_of(rows, scale).merged(MERGED)
    if not len(points.x):
        return shapes[0], scale
    tried = [
        (squared_error(points, book * np.float64(factor)), factor, i)
        for i, book in enumerate(shapes)
        for factor in COARSE
    ]
    _, factor, i = min(tried)
    return shapes[i], improved(rows, shapes[i], scale, [factor, *(factor * f for f in FACTORS)])


def fit_kmeans(rows: Rows, entries: int) -> tuple[Codebook, Scale]:
    """The codebook (ascending) and the scales of about the least squared error.

    Where 1 % of the values are exactly 0 (pruned weights), rows of zeros apart, one entry is 0.
    """
    hold = entries > 2 and _share_of_zeros(rows) >= ZEROS
    # Two entries begin as one for each sign: heavy tails would put one of them on the tail.
    scale = rows.start(signed=True) if entries > 2 else fit_shape(rows, geometric(1, 2))[1]
    if scale.size == 1:  # the codebook has any scale: a power of two leaves its values exact
        scale = np.ldexp(np.float32(1), np.frexp(np.abs(scale))[1] - 1) * (scale != 0)
    points = points_of(rows, scale)
    centres = clusters(points, entries, hold_zero=hold)
    if scale.size == 1 or squared_error(points, centres) == 0:
        return codebook_of(centres, entries), scale
    for factors in (FACTORS, ()):
        scale = improved(rows, codebook_of(centres, entries), scale, factors)
        centres = lloyd(points_of(rows, scale), centres, hold_zero=hold)
    return codebook_of(centres, entries), scale


def points_of(rows: Rows, scale: Scale) -> Points:
    """The values over their scales as weighted points; those of no importance are left out."""
    relative = relative_squares(scale)
    distinct = _distinct(rows, scale)
    greatest = max((float(np.abs(t).max()) for _, t, _ in rows.scaled(scale)), default=0) or 1
    half = np.float32(BINS // 2)
    count = BINS + 1 if distinct is None else len(distinct)
    mass, first = np.zeros((2, count))
    for block, t, m in rows.scaled(scale):
        if distinct is None:
            u = np.sqrt(np.abs(t) / np.float32(greatest))
            u *= half
            bins = (np.copysign(u, t, out=u) + half).astype(np.intp).reshape(-1)
        else:
            bins = np.searchsorted(distinct, t).reshape(-1)
        weight = np.broadcast_to(block.params(relative), t.shape)
        weight = (weight if m is None else weight * m).reshape(-1)
        mass += np.bincount(bins, weight, count)
        first += np.bincount(bins, weight * t.reshape(-1), count)
    if distinct is None:
        return Points.of_sums(mass, first)
    return Points(distinct[mass > 0].astype(np.float64), mass[mass > 0])


def _distinct(rows: Rows, scale: Scale) -> NDArray[np.float32] | None:
    """All distinct values over their scales, ascending, if they are few."""
    found = np.empty(0, np.float32)
    for _, t, _ in rows.scaled(scale):
        found = np.union1d(found, t + np.float32(0))  # no -0.0
        if len(found) > DISTINCT:
            return None
    return found


def _share_of_zeros(rows: Rows) -> float:
    """The share of exact zeros among values that share a scale with others."""
    zeros, count = np.zeros((2, *rows.sharing.shape))
    for block in rows.sharing.blocks():
        x = block.of(rows.values)
        block.merge(np.add, zeros, (x == 0).sum(2, dtype=np.float64))
        block.merge(np.add, count, np.full(x.shape[:2], x.shape[2], np.float64))
    alive = zeros < count
    return float(zeros[alive].sum() / max(1.0, count[alive].sum()))


def codebook_of(centres: NDArray[np.float64], entries: int) -> Codebook:
    """Centres as a codebook of so many entries: the last one fills it up."""
    book = centres.astype(np.float32) if len(centres) else np.zeros(1, np.float32)
    return np.append(book, np.full(entries - len(book), book[-1])).astype(np.float32)
