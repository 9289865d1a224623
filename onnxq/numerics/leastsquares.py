"""Scale and zero point by least squares, in turn with rounding.

For what the grid holds, k = q - zero point, and targets t with importances m, the sum of
m (t - s (k - d))^2 over a row is least for a shift d of the zero point at

    s = A / B,    A = sum m (k - d) t,    B = sum m (k - d)^2,    where A^2 / B is greatest.

d is -1, 0 or 1 (0 where the zero point is fixed): it stays a whole number at every step, so that
nothing is lost at the end. After each step the values are rounded anew; rounding to the nearest and
this step both lower the sum. (Lloyd's algorithm, on a grid of two parameters: S. Lloyd, "Least
squares quantization in PCM", 1982.)

importance: clipping by the weighted error, the results of all other methods as further starts, and
these steps from the best two; no method has a lower weighted error.
"""

from __future__ import annotations

import numpy as np

from onnxq.numerics import alternating
from onnxq.numerics.clipping import mse, standardized
from onnxq.numerics.fitting import MOMENTS, Best, Fit, Problem, Values, moments, refined
from onnxq.numerics.hqq import hqq

STEPS = 6


def importance(problem: Problem) -> Fit:
    """The least sum of importance * error^2 that the steps find from several starts."""
    plain = problem.without_importance()
    start = mse(plain)
    best = Best(problem, start)
    others = [hqq(plain, start), standardized(plain), problem.cover]
    if alternating.is_short(plain):
        others += [alternating.least_squares(plain), alternating.least_norm(plain)]
    for other in others:
        best.offer(other)
    other = best.fit
    _descend(problem, best, mse(problem))
    _descend(problem, best, other)
    return best.fit


def _descend(problem: Problem, best: Best, fit: Fit) -> None:
    best.offer(fit)
    for _ in range(STEPS):

        def terms(x: Values, m: Values | None, fit: Fit = fit) -> tuple[Values, ...]:
            return moments(problem, problem.snapped(x, fit), x, m)

        fit, last = refined(problem, fit, problem.total(MOMENTS, terms)), fit
        if np.array_equal(fit.scale, last.scale) and np.array_equal(fit.zero, last.zero):
            break
        best.offer(fit)
