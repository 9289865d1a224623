"""Ranges of weights that clip: by least squared error, and by mean and deviation.

mse: candidate ranges inside the extremes, each row takes the one with the least (importance
weighted) squared error. Symmetric: factors on the scale, of both signs where the grid leans.
Asymmetric: factors on both ends at once, then on one end after the other, then on the scale with
zero points next to the one found.

standardized: values as mean + deviation * grid, the grid being the best uniform one for a standard
normal distribution (J. Max, "Quantizing for minimum distortion", 1960): a step of D_n deviations
for n levels (D_16 = 0.335, D_256 = 0.031): mean +- k deviations with k = D_n (n - 1) / 2.
In affine terms the zero point, a whole number, carries the mean; symmetric grids have no mean, and
the deviation is that from 0. Never wider than the extremes. A float grid has no step to choose.
"""

from __future__ import annotations

from functools import cache
from math import erf, exp, pi, sqrt

import numpy as np

from onnxq.numerics.fitting import Best, Fit, Problem, Values

NARROWEST = 0.15  # of the extremes: outliers as far as 16 deviations, two bits
COARSE = tuple(np.geomspace(1, NARROWEST, 18)[1:])
ENDS = tuple(np.geomspace(1, NARROWEST, 10)[1:])
FINE = (0.91, 0.94, 0.96, 0.98, 1.02, 1.04, 1.06)
CLOSE = (0.96, 0.985, 1.0, 1.015, 1.04)


def mse(problem: Problem) -> Fit:
    """The range of least squared error; never worse than the extremes or `standardized`."""
    best = Best(problem, problem.cover)
    grid = problem.grid
    if grid.symmetric:
        signs = (1, -1) if grid.leans else (1,)
        for factor in (1.0, *COARSE):
            for sign in signs if factor < 1 else signs[1:]:
                best.offer(problem.scaled(problem.cover, sign * factor))
        found = best.fit
        for factor in FINE:
            for sign in signs:
                best.offer(problem.scaled(found, sign * factor))
    else:
        _ends(problem, best)
        found = best.fit
        for shift in (0, -1, 1):
            zero = np.clip(found.zero + np.float32(shift), grid.qmin, grid.qmax)
            for factor in CLOSE:
                if shift or factor != 1:
                    best.offer(problem.scaled(Fit(found.scale, zero), factor))
    best.offer(standardized(problem))
    return best.fit


def _ends(problem: Problem, best: Best) -> None:
    """Offer smaller ranges: both ends, then the upper one, then the lower one."""
    low, high = problem.low, problem.high
    for factors, moves_low, moves_high in (
        (COARSE, True, True),
        (ENDS, False, True),
        (ENDS, True, False),
    ):
        start_low, start_high = low, high
        for factor in factors:
            f = np.float32(factor)
            new_low = start_low * f if moves_low else start_low
            new_high = start_high * f if moves_high else start_high
            before = best.error
            best.offer(problem.covering(new_low, new_high))
            better = best.error < before
            low, high = np.where(better, new_low, low), np.where(better, new_high, high)


def standardized(problem: Problem) -> Fit:
    """The best range for a normal distribution of the row's mean and deviation."""
    grid = problem.grid
    if grid.is_float:
        return problem.cover
    count = np.zeros(1)
    for x, _ in problem.pieces():
        count += x.shape[problem.rows.axis]
    mean = np.zeros(problem.rows.params_shape)
    if not grid.symmetric:
        mean = problem.total(1, lambda x, m: (x,))[0] / count
    centre = mean.astype(np.float32)

    def squares(x: Values, m: Values | None) -> tuple[Values]:
        r = x - centre
        r *= r
        return (r,)

    deviation = np.sqrt(problem.total(1, squares)[0] / count)
    step = normal_step(grid.levels) * deviation
    if grid.symmetric:
        factor = np.minimum(step / np.abs(problem.cover.scale), 1.0)
        narrow = problem.scaled(problem.cover, factor.astype(np.float32))
        return narrow.where(factor > 0, problem.cover)
    reach = step * (grid.levels - 1) / 2
    low = np.clip(mean - reach, problem.low, 0)
    return problem.covering(low, np.clip(mean + reach, 0, problem.high))


@cache
def normal_step(levels: int) -> float:
    """The step of the best uniform grid of n levels for a standard normal distribution."""
    low, high = 1e-6, 3.2
    golden = (sqrt(5) - 1) / 2
    while high - low > 1e-7 * high:
        a, b = high - golden * (high - low), low + golden * (high - low)
        if _distortion(a, levels) < _distortion(b, levels):
            high = b
        else:
            low = a
    return (low + high) / 2


EXACT_LEVELS = 256  # beyond, rounding errors are uniform to 4 digits


def _distortion(step: float, levels: int) -> float:
    """The mean squared error of a standard normal variable on a uniform grid around 0."""
    if levels > EXACT_LEVELS:
        reach = step * levels / 2
        tail = (1 + reach * reach) * (1 - _cumulative(reach)) - reach * _density(reach)
        return step * step / 12 + 2 * tail
    points = [(i - (levels - 1) / 2) * step for i in range(levels)]
    edges = [point - step / 2 for point in points[1:]]
    mass = [0.0, *(_cumulative(t) for t in edges), 1.0]
    slope = [0.0, *(_density(t) for t in edges), 0.0]
    return 1.0 + sum(
        y * y * (mass[i + 1] - mass[i]) - 2 * y * (slope[i] - slope[i + 1])
        for i, y in enumerate(points)
    )


def _density(t: float) -> float:
    return exp(-t * t / 2) / sqrt(2 * pi)


def _cumulative(t: float) -> float:
    return (1 + erf(t / sqrt(2))) / 2
