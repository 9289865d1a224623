"""Scales and zero points of a weight, row by row: what the methods share.

A row is what has one scale (`grouping`). Rows are divided by a power of two that brings their
extreme to [1/2, 1), so that squares neither overflow nor vanish; scales are then multiplied by it,
exactly. Methods go over the values in pieces, for all rows of a piece at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from onnxq.numerics.affine import affine_params, next_power_of_two
from onnxq.numerics.grids import SMALLEST_SCALE, Grid
from onnxq.numerics.grouping import Rows, Space

Values = NDArray[np.float32]
Sums = NDArray[np.float64]
Piece = tuple[Values, Values | None]  # values, and their importance


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A scale and a zero point (whole, as a float) for each row; they broadcast on a piece."""

    scale: Values
    zero: Values

    def where(self, chosen: NDArray[np.bool_], other: Fit) -> Fit:
        """Take these parameters in the rows chosen, the other ones in the rest."""
        scale = np.where(chosen, self.scale, other.scale)
        return Fit(scale, np.where(chosen, self.zero, other.zero))


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Rows to be put on a grid, their extremes (0 included), and the fit that covers these."""

    grid: Grid
    rows: Rows
    values: NDArray[np.float32]  # a view as of `Layout.views`
    importance: NDArray[np.float32] | None
    factor: Values  # by which the values are multiplied
    low: Values
    high: Values
    cover: Fit
    held: tuple[Piece, ...] | None = None  # where one piece is all
    space: Space = field(default_factory=Space)

    def kept(self) -> Problem:
        """The problem with its values at hand, if they are one piece."""
        if len(self.rows.pieces) != 1:
            return self
        (box,) = self.rows.pieces
        m = None if self.importance is None else self.rows.read(self.importance, box)
        x = self.rows.read(self.values, box, self.space)
        x *= self.factor
        return replace(self, held=((x, m),))

    def without_importance(self) -> Problem:
        """The problem of the plain squared error."""
        held = self.held and tuple((x, None) for x, _ in self.held)
        return replace(self, importance=None, held=held)

    def pieces(self) -> Iterator[Piece]:
        """The values, each piece with its importance; not to be written into."""
        if self.held is not None:
            yield from self.held
            return
        for box in self.rows.pieces:
            m = None if self.importance is None else self.rows.read(self.importance, box)
            x = self.rows.read(self.values, box)
            x *= self.factor
            yield x, m

    def total(self, count: int, f: Callable[[Values, Values | None], tuple[Values, ...]]) -> Sums:
        """Sums over each row of `count` arrays that f makes of a piece: count x row."""
        out = np.zeros((count, *self.rows.params_shape))
        for x, m in self.pieces():
            for i, terms in enumerate(f(x, m)):
                out[i] += terms.sum(self.rows.axis, keepdims=True)
        return out

    def error(self, fit: Fit) -> Sums:
        """The sum of squared errors of each row, weighted by importance if there is one."""

        def squares(x: Values, m: Values | None) -> tuple[Values]:
            r = self.snapped(x, fit)
            r *= fit.scale
            r -= x
            r *= r
            if m is not None:
                r *= m
            return (r,)

        return np.asarray(self.total(1, squares)[0])

    def snapped(self, x: Values, fit: Fit) -> Values:
        """What the grid holds of x / scale, q - zero point."""
        return np.asarray(self.grid.snap(x / fit.scale, fit.zero))

    def covering(self, low: Sums | Values, high: Sums | Values) -> Fit:
        """The fit that covers ranges."""
        return covering(self.grid, low, high)

    def scaled(self, fit: Fit, factor: float | Values) -> Fit:
        """The fit with a scale multiplied."""
        return Fit(self.allowed(fit.scale * np.asarray(factor, np.float32)), fit.zero)

    def allowed(self, scale: Values) -> Values:
        """The scale as the grid may have it."""
        return next_power_of_two(scale) if self.grid.power_of_two else scale


class Best:
    """The best fit of each row so far, by one error."""

    def __init__(self, problem: Problem, fit: Fit) -> None:
        self.problem, self.fit, self.error = problem, fit, problem.error(fit)

    def offer(self, fit: Fit) -> None:
        """Take it in the rows where it is better."""
        error = self.problem.error(fit)
        better = error < self.error
        self.fit, self.error = fit.where(better, self.fit), np.where(better, error, self.error)


MOMENTS = 5


def moments(problem: Problem, k: Values, t: Values, m: Values | None) -> tuple[Values, ...]:
    """What `refined` needs the sums of: m k t, m k^2, and for zero points m t, m k, m."""
    mk = k if m is None else m * k
    if problem.grid.symmetric:
        return mk * t, mk * k
    return mk * t, mk * k, t if m is None else m * t, mk, np.ones_like(k) if m is None else m


def refined(problem: Problem, fit: Fit, sums: Sums) -> Fit:
    """The fit of least squares for targets t and the k that the fit rounds to (`leastsquares`)."""
    kt, kk, t, k, n = sums
    best, scale, zero = np.full(kt.shape, -1.0), fit.scale, fit.zero
    for d in (0,) if problem.grid.symmetric else (0, -1, 1):
        a, b = kt - d * t, kk - 2 * d * k + d * d * n
        moved = fit.zero + np.float32(d)
        gain = np.divide(a * a, b, out=np.zeros_like(a), where=b > 0)
        right = (a != 0) & ((a > 0) == (fit.scale > 0)) & (gain > best)
        right &= (moved >= problem.grid.qmin) & (moved <= problem.grid.qmax)
        best = np.where(right, gain, best)
        slope = np.divide(a, b, out=np.ones_like(a), where=right & (b > 0))
        scale = np.where(right, slope.astype(np.float32), scale)
        zero = np.where(right, moved, zero)
    return Fit(problem.allowed(scale), zero)


def covering(grid: Grid, low: NDArray[np.floating], high: NDArray[np.floating]) -> Fit:
    """The least scale that covers [low, high]; `leans`: the greater extreme is on qmin, exactly.

    Then the scale is negative where that extreme is positive, and the other one may be clipped, by
    a step at most.
    """
    if grid.leans:
        extreme = np.where(-low >= high, low, high).astype(np.float64)
        scale = extreme / (grid.qmin - grid.middle)
        least = np.where(np.signbit(scale), -SMALLEST_SCALE, SMALLEST_SCALE)
        scale = np.where(np.abs(scale) < SMALLEST_SCALE, least, scale)
        scale = np.where(extreme == 0, 1.0, scale)
        return Fit(scale.astype(np.float32), np.full(scale.shape, grid.middle, np.float32))
    steps, zero = affine_params(
        low,
        high,
        qmin=grid.qmin,
        qmax=grid.qmax,
        dtype=np.float32,
        symmetric=grid.symmetric,
        power_of_two=grid.power_of_two,
    )
    return Fit(steps, zero)
