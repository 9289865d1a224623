"""Range search: which (lo, hi) an affine grid should span, from a histogram.

    minmax      the extremes: nothing is clipped
    percentile  all but 0.01 % of the values, half of that cut at either end
    mse         least expected squared error, rounding and clipping together
    careful     the same with the clipping error counted three times
    entropy     least Kullback-Leibler divergence between the clipped values' distribution and the
                piecewise constant one that the grid can tell apart

Rounding error (mse): s^2 / 12 for a value between grid points s apart (Bennett 1948), x^2 for
|x| < s / 2, which becomes 0: after a ReLU much of the mass is there. Clipping error: (|x| - T)^2.
Rounding errors go both ways and cancel in the sums of the next layer; what is clipped is always
lost, which `careful` allows for. (A factor of 3: 0.03 to 0.9 dB more than mse, on six nets.)

Divergence (entropy), after S. Migacz, "8-bit Inference with TensorRT", GTC 2017: P is the reference
with what lies outside added to the outermost cell, Q spreads each cell's mass evenly over the cell,
without what was clipped. Differences to the talk: bins of constant relative width in place of 2,048
linear ones (one outlier would put everything into a single one), both ends are searched, cells are
those of the real grid, and exact zeros, which every grid represents, are left out. With masses p
and widths w of bins b, masses P and widths s of cells c, mass m clipped off the outermost cell e:

    KL = sum_b p log(p / w) - sum_c P log(P / s) + sum_e (P + m) log((P + m) / P) + log(1 - sum m)

The first sum is a prefix sum over bins, the second differences of the cumulative mass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.numerics import histograms

Array = NDArray[np.float64]

TAILS = 1e-4  # the share of values that `percentile` clips, both ends together
COARSE, FINE = 40, 13  # candidates for an end: over the whole range, then between two of those
CELLS = 256  # the divergence is that of an 8-bit grid at most: beyond, it is all but zero


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """The values of one sign, by magnitude: cumulative sums at the edges of bins, from 0 on."""

    edges: Array  # ascending: left, right, left, right, ...
    mass: Array
    first: Array  # sum of |x|
    second: Array  # sum of x^2
    plogp: Array  # sum of p log(p / w), exact zeros left out

    @classmethod
    def of(cls, left: Array, right: Array, mass: Array) -> Side:
        """From bins, ascending in magnitude; mass is spread evenly in each."""
        width = np.maximum(right - left, right * 2.0**-24)
        plogp = np.zeros_like(mass)
        some = (mass > 0) & (right > histograms.ZERO_WIDTH)
        plogp[some] = mass[some] * np.log(mass[some] / width[some])
        sums = (
            mass,
            mass * (left + right) / 2,
            mass * (left * left + left * right + right * right) / 3,
            plogp,
        )
        edges = np.stack([left, right], axis=1).reshape(-1)
        return cls(np.append(0.0, edges), *(_cumulative(s) for s in sums))

    @property
    def end(self) -> float:
        """The greatest magnitude."""
        return float(self.edges[-1])

    def upto(self, sums: Array, t: Array) -> Array:
        """Interpolate a cumulative sum at magnitudes t."""
        return np.interp(t, self.edges, sums)

    def clipping(self, t: Array) -> Array:
        """Sum (|x| - t)^2 over |x| > t."""
        n, s1, s2 = (c[-1] - self.upto(c, t) for c in (self.mass, self.first, self.second))
        return np.asarray(np.maximum(s2 - 2 * t * s1 + t * t * n, 0))

    def quantile(self, share: float) -> float:
        """Find the magnitude below which this share of the side's mass lies."""
        return float(np.interp(share * self.mass[-1], self.mass, self.edges))


def _cumulative(values: Array) -> Array:
    """0, then at each bin's left edge the sum before it and at its right edge the sum with it."""
    total = np.cumsum(values)
    before = np.append(0.0, total[:-1]) if total.size else total
    return np.append(0.0, np.stack([before, total], axis=1).reshape(-1))


@dataclass(frozen=True, slots=True, eq=False)
class Density:
    """A distribution of finite values, exact extremes beside."""

    negative: Side
    positive: Side
    lo: float
    hi: float

    @classmethod
    def of_counts(cls, counts: histograms.Counts, lo: float, hi: float) -> Density:
        """From a histogram whose values lie in [lo, hi]. Raises ValueError when it is empty."""
        bins, mass = counts[0], counts[1].astype(np.float64)
        if not lo <= hi:
            raise ValueError("no finite value was observed: there is no range")
        left, right = (np.clip(edges, lo, hi) for edges in histograms.edges_of(bins))
        sign = int(np.searchsorted(bins, histograms.ZERO))
        negative = Side.of(-right[:sign][::-1], -left[:sign][::-1], mass[:sign][::-1])
        positive = Side.of(np.maximum(left[sign:], 0), np.maximum(right[sign:], 0), mass[sign:])
        return cls(negative, positive, lo, hi)

    @classmethod
    def of(cls, x: NDArray[Any]) -> Density:
        """From an array of any shape."""
        counts, _ = histograms.count(histograms.halves_of(x))
        finite = x[np.isfinite(x)]
        return cls.of_counts(counts, float(finite.min()), float(finite.max()))


Loss = Callable[[Density, Array, Array, Array], Array]  # of -lo, hi and the grid's step


def search(
    density: Density, method: str | float, *, bits: int = 8, symmetric: bool = False
) -> tuple[float, float]:
    """Find the range (lo, hi) for a grid of `bits` bits by a named method.

    A number: least squared error where clipping counts so much. lo <= 0 <= hi, inside of the
    extremes; symmetric: lo == -hi. Raises ValueError for an unknown method.
    """
    if not isinstance(method, str):
        return priced(density, bits, symmetric, method)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: one of {', '.join(METHODS)}")
    return METHODS[method](density, bits, symmetric)


def minmax(density: Density, bits: int, symmetric: bool) -> tuple[float, float]:
    """Take the extremes, and 0."""
    return _both(max(0.0, -density.lo), max(0.0, density.hi), symmetric)


def percentile(density: Density, bits: int, symmetric: bool) -> tuple[float, float]:
    """All but the share TAILS of the values; symmetric: of the magnitudes."""
    sides = density.negative, density.positive
    total = sum(side.mass[-1] for side in sides)
    if symmetric:
        edges = np.unique(np.concatenate([side.edges for side in sides]))
        mass = sum(side.upto(side.mass, edges) for side in sides)
        end = float(edges[np.searchsorted(mass, (1 - TAILS) * total)])
        return _both(end, end, symmetric)
    ends = [
        side.quantile(1 - min(TAILS / 2 * total / side.mass[-1], 1.0)) if side.mass[-1] else 0.0
        for side in sides
    ]
    return _both(ends[0], ends[1], symmetric)


def mse(density: Density, bits: int, symmetric: bool) -> tuple[float, float]:
    """Least expected squared error."""
    return _least(density, _squared_error, bits, symmetric)


def careful(density: Density, bits: int, symmetric: bool) -> tuple[float, float]:
    """Least expected squared error where clipping counts CLIPPED times."""
    return priced(density, bits, symmetric, CLIPPED)


def priced(density: Density, bits: int, symmetric: bool, price: float) -> tuple[float, float]:
    """Least expected squared error where clipping counts `price` times."""

    def loss(density: Density, negative: Array, positive: Array, step: Array) -> Array:
        return _squared_error(density, negative, positive, step, price)

    return _least(density, loss, bits, symmetric)


CLIPPED = 3.0
FEW = 64  # values a cell, zeros not counted, below which a divergence is mostly noise


def entropy(density: Density, bits: int, symmetric: bool) -> tuple[float, float]:
    """Least Kullback-Leibler divergence; min-max for so few values that cells would be empty."""
    values = density.negative.mass[-1] + density.positive.mass[-1] - _zeros(density)
    if values < FEW * 2**bits:
        return minmax(density, bits, symmetric)
    return _least(density, _divergence, min(bits, CELLS.bit_length() - 1), symmetric)


METHODS: dict[str, Callable[[Density, int, bool], tuple[float, float]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "careful": careful,
    "entropy": entropy,
}


def _both(negative: float, positive: float, symmetric: bool) -> tuple[float, float]:
    if symmetric:
        negative = positive = max(negative, positive)
    return 0.0 - negative, positive  # 0.0 - 0.0 is 0.0, not -0.0


def _least(density: Density, loss: Loss, bits: int, symmetric: bool) -> tuple[float, float]:
    """Try geometric candidates for both ends at once, then for each end given the other.

    Candidates run from the extreme down to the median magnitude; the widest of equals wins.
    """
    ends = max(0.0, -density.lo), max(0.0, density.hi)
    top = max(ends)
    if top == 0:
        return 0.0, 0.0
    steps = (2**bits - 2) / 2 if symmetric else 2**bits - 1

    def best(negative: Array, positive: Array) -> int:
        span = positive if symmetric else negative + positive
        return int(np.argmin(loss(density, negative, positive, span / steps)))

    zeros = _zeros(density)
    medians = [
        density.negative.quantile(0.5),
        density.positive.quantile(0.5 + 0.5 * zeros / max(density.positive.mass[-1], 1.0)),
    ]
    bottom = min(max(medians), top)
    coarse = np.geomspace(top, max(bottom, top * 2.0**-40), COARSE)
    ratio = coarse[1] / coarse[0]
    fine = ratio ** np.linspace(-1, 1, FINE)
    if symmetric:
        end = coarse[best(coarse, coarse)]
        near = np.minimum(end * fine[::-1], top)[::-1]
        end = float(near[best(near, near)])
        return -end, end
    negative, positive = (np.minimum(coarse, end) for end in ends)
    i = best(negative, positive)
    low, high = negative[i : i + 1], positive[i : i + 1]
    for offsets in (coarse / top, fine):
        for is_high in (True, False):
            old, end = (high, ends[1]) if is_high else (low, ends[0])
            new = np.minimum((end if offsets is not fine else old) * offsets, end)
            new = np.append(old, new)
            other = np.broadcast_to(low if is_high else high, new.shape)
            j = best(other, new) if is_high else best(new, other)
            if is_high:
                high = new[j : j + 1]
            else:
                low = new[j : j + 1]
    return 0.0 - float(low[0]), float(high[0])


def _squared_error(
    density: Density, negative: Array, positive: Array, step: Array, clipped: float = 1.0
) -> Array:
    """Sum squared errors of grids that span [-negative, positive] in steps of `step`."""
    error = np.zeros_like(step)
    for side, end in ((density.negative, negative), (density.positive, positive)):
        dead = np.minimum(step / 2, end)
        rounded = side.upto(side.mass, end) - side.upto(side.mass, dead)
        error += side.upto(side.second, dead) + rounded * step**2 / 12
        error += clipped * side.clipping(end)
    return error


def _divergence(density: Density, negative: Array, positive: Array, step: Array) -> Array:
    """Compute the divergence of the module's docstring, over values that are not exactly 0."""
    sides = (density.negative, negative), (density.positive, positive)
    total = sum(side.mass[-1] for side, _ in sides) - _zeros(density)
    if total <= 0:
        return np.zeros_like(step)
    kl, clipped = np.zeros_like(step), np.zeros_like(step)
    centre, centre_width = np.zeros_like(step) - _zeros(density), np.zeros_like(step)
    for side, end in sides:
        # The outermost cell represents its mass, a spike at the end say, as well as any: no loss.
        inside = np.maximum(end - step, 0)
        cells = int(np.ceil(np.max(end / step))) + 1
        edges = np.minimum((np.arange(cells) + 0.5)[:, None] * step, inside)
        mass = side.upto(side.mass, edges)
        losses = _plogp(np.diff(mass, axis=0), np.diff(edges, axis=0)).sum(axis=0)
        kl += side.upto(side.plogp, inside) - losses
        centre += mass[0]
        centre_width += edges[0]
        outside = side.mass[-1] - side.upto(side.mass, end)
        outermost = np.maximum(side.upto(side.mass, end) - mass[-1], 1.0)
        kl += (outermost + outside) * np.log((outermost + outside) / outermost)
        clipped += outside
    kl -= _plogp(np.maximum(centre, 0), centre_width)
    result: Array = kl / total + np.log(np.maximum(1 - clipped / total, 1 / total))
    return result


def _zeros(density: Density) -> float:
    """Return the mass of the bin of 0.0."""
    positive = density.positive
    if positive.edges.size > 2 and positive.edges[2] <= histograms.ZERO_WIDTH:
        return float(positive.mass[2])
    return 0.0


def _plogp(mass: Array, width: Array) -> Array:
    """Mass * log(mass / width), 0 where there is none."""
    some = (mass > 0) & (width > 0)
    ratio = np.divide(mass, width, out=np.ones_like(mass), where=some)
    result: Array = mass * np.log(ratio)
    return result
