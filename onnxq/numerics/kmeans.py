"""Optimal k-means in one dimension, and Lloyd's iteration, on weighted points.

In one dimension clusters are intervals, and the best division of the first j points into k of them
follows from those into k - 1 (Wang and Song, "Ckmeans.1d.dp", The R Journal 3(2), 2011). The cost
of points [i, j) is sum(w x^2) - (sum w x)^2 / sum(w): the first term is the same for all divisions,
so the second, here the gain, is maximised. The best i never falls as j grows (the cost is concave
Monge: Wu, "Optimal quantization by matrix searching", J. Algorithms 12, 1991). So those of every
second j bound those between, level by level, each in one numpy step: k n log n in all.

With an entry held at 0, points below and above it are divided on their own; what neither side wants
is put on 0 and gains nothing; how many entries each side gets is chosen. This is optimal too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

POINTS = 1024  # of which divisions are searched, or so many for each entry if that is more:
POINTS_PER_ENTRY = 8
ITERATIONS = 100  # of Lloyd's, at most: it stops where nothing changes


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """Points x, ascending, with masses > 0."""

    x: Floats
    mass: Floats

    @classmethod
    def of_sums(cls, mass: Floats, first: Floats) -> Points:
        """Points from bins in ascending order: their masses, and their sums of mass * x."""
        used = mass > 0
        return cls(np.maximum.accumulate(first[used] / mass[used]), mass[used])

    def sums(self) -> tuple[Floats, Floats]:
        """Sums of the masses and of mass * x over the first 0, 1, ... points."""
        mass = np.concatenate([[0.0], np.cumsum(self.mass)])
        return mass, np.concatenate([[0.0], np.cumsum(self.mass * self.x)])

    def side(self, sign: float) -> Points:
        """The points of one sign, farthest from zero first, as negative x."""
        keep = self.x * sign > 0
        x, mass = self.x[keep] * -sign, self.mass[keep]
        return Points(x, mass) if sign < 0 else Points(x[::-1], mass[::-1])

    def merged(self, limit: int) -> Points:
        """At most about `limit` points, neighbours merged, with their masses and means.

        Half of them by mass, so that heavy points stay alone; half by density^(1/3), as the
        entries of a fine quantizer are spread (Panter and Dite, 1951).
        """
        if len(self.x) <= limit:
            return self
        gaps = np.gradient(self.x)
        share = np.cbrt(self.mass * gaps * gaps)
        rank = np.cumsum(self.mass / self.mass.sum() + share / max(share.sum(), 1e-300)) / 2
        label = np.minimum(rank * limit, limit - 1).astype(np.intp)
        starts = np.flatnonzero(np.diff(label, prepend=-1))
        mass = np.add.reduceat(self.mass, starts)
        return Points.of_sums(mass, np.add.reduceat(self.mass * self.x, starts))


def clusters(points: Points, entries: int, *, hold_zero: bool = False) -> Floats:
    """The entries of least squared error, ascending: of many points nearly, of few exactly.

    At most `entries`; hold_zero: one of them is 0.
    """
    if len(points.x) <= entries - (hold_zero and not (points.x == 0).any()):
        return np.union1d(points.x, [0.0]) if hold_zero else points.x
    limit = max(POINTS, POINTS_PER_ENTRY * entries)
    few = points.merged(limit)
    if not hold_zero:
        return lloyd(points, _centres(few, Divisions.of(few, entries), len(few.x), entries))
    below, above = few.side(-1), few.side(1)
    left, right = (Divisions.of(side, entries - 1) for side in (below, above))
    gains = left.gain.max(1) + right.gain.max(1)[::-1]
    n = int(gains.argmax())
    low = _centres(below, left, int(left.gain[n].argmax()), n)
    n = entries - 1 - n
    high = _centres(above, right, int(right.gain[n].argmax()), n)
    return lloyd(points, np.concatenate([low, [0.0], -high[::-1]]), hold_zero=True)


def lloyd(points: Points, centres: Floats, *, hold_zero: bool = False) -> Floats:
    """Move centres (ascending) to the means of the points nearest to them, until they stay."""
    mass, first = points.sums()
    held = centres == 0 if hold_zero else np.zeros(centres.shape, np.bool_)
    for _ in range(ITERATIONS):
        cuts = np.searchsorted(points.x, (centres[1:] + centres[:-1]) / 2, side="right")
        edges = np.concatenate([[0], cuts, [len(points.x)]])
        m, s = np.diff(mass[edges]), np.diff(first[edges])
        moved = np.where(held, 0.0, np.divide(s, m, out=centres.copy(), where=m > 0))
        if np.array_equal(moved, centres):
            break
        centres = np.sort(moved)
    return centres


def squared_error(points: Points, centres: Floats) -> float:
    """The sum of mass * (x - nearest centre)^2."""
    index = np.searchsorted((centres[1:] + centres[:-1]) / 2, points.x)
    return float(points.mass @ (points.x - centres[index]) ** 2)


@dataclass(frozen=True, slots=True, eq=False)
class Divisions:
    """For k = 0, 1, ... and the first 0, 1, ... points: the gain, and where the last part begins.

    Parts may be empty. gain: [k + 1, points + 1]; start: as gain.
    """

    gain: Floats
    start: Ints

    @classmethod
    def of(cls, points: Points, entries: int) -> Divisions:
        """The best divisions of points into up to `entries` parts."""
        mass, first = points.sums()
        gain = np.zeros((entries + 1, len(mass)))
        start = np.zeros(gain.shape, np.intp)
        gain[1:2, 1:] = first[1:] ** 2 / mass[1:]
        for k in range(2, entries + 1):
            _divide(gain[k - 1], mass, first, gain[k], start[k])
        return cls(gain, start)


def _divide(before: Floats, mass: Floats, first: Floats, gain: Floats, start: Ints) -> None:
    """Fill gain and start of one part more than `before` has."""
    last = len(mass) - 1
    step = 1 << max(last.bit_length() - 1, 0)
    while step and last:
        at = np.arange(step, last + 1, 2 * step)
        low, after = start[at - step], at + step
        high = np.minimum(np.where(after <= last, start[np.minimum(after, last)], last), at)
        counts = high - low + 1
        ends = np.cumsum(counts)
        begins = ends - counts
        which = np.repeat(np.arange(len(at)), counts)
        i = np.arange(ends[-1]) + (low - begins)[which]
        m = mass[at][which] - mass[i]
        value = first[at][which] - first[i]
        value *= value
        value /= np.where(m > 0, m, 1)
        value += before[i]
        best = np.maximum.reduceat(value, begins)
        hits = np.flatnonzero(value == best[which])[::-1]
        gain[at] = best
        start[at[which[hits]]] = i[hits]  # the first of equals: written last
        step //= 2


def _centres(points: Points, divisions: Divisions, count: int, parts: int) -> Floats:
    """Means of the parts of the first `count` points; empty ones are left out."""
    mass, first = points.sums()
    edges = [count]
    for k in range(parts, 0, -1):
        edges.append(int(divisions.start[k, edges[-1]]))
    cut = np.unique(edges)
    return np.asarray(np.diff(first[cut]) / np.diff(mass[cut]))
