"""Half-quadratic quantization: scale and zero point that few large errors do not pull.

H. Badri, A. Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023: least
sum |w - w'|^p, p < 1, by splitting off the part e of the error that is let go:

    e = sign(r) max(|r| - |r|^(p - 1) / beta, 0)        r = w - w', in steps
    scale, zero point: least squares on the targets w - e
    beta = beta * kappa

What differs. The paper moves a zero point of fractions, at a fixed scale; ONNX zero points are
whole, and rounding one at the end undoes it: 21.8 dB on the weights of models/char_gpt (uint4,
groups of 32), where min-max has 21.8, the fractions 22.6, and the following 22.3. (2 bits: 7.8,
7.8, 8.6, 9.6.) Each step chooses among whole zero points next to the last one, and the scale that
is best for it, in closed form (`leastsquares`); symmetric grids refine the scale alone. Errors are
measured in steps: the paper's beta is for weights of one size. The start is `mse`. Kept is what has
the least p-norm among the fits whose squared error is not above that of the start: no worse than
`mse` in either.
"""

from __future__ import annotations

import numpy as np

from onnxq.numerics.clipping import mse
from onnxq.numerics.fitting import MOMENTS, Fit, Problem, Values, moments, refined

BETA, KAPPA = 1.0, 1.3
STEPS = 10
PATIENCE = 3  # steps without a gain after which a row is done


def hqq(problem: Problem, start: Fit | None = None) -> Fit:
    """The least p-norm of errors, from the fit of least squared error (`start`) on."""
    fit = best = mse(problem) if start is None else start
    norm = bound = np.zeros(fit.scale.shape)
    idle = np.zeros(fit.scale.shape, int)
    beta = BETA
    for step in range(STEPS + 1):

        def terms(
            x: Values, m: Values | None, fit: Fit = fit, beta: float = beta
        ) -> tuple[Values, ...]:
            k = problem.snapped(x, fit)
            r = x - k * fit.scale
            magnitude = np.abs(r)
            lost = kept_back(r, magnitude, np.abs(fit.scale), beta)
            return np.sqrt(magnitude), magnitude * magnitude, *moments(problem, k, x - lost, m)

        sums = problem.total(2 + MOMENTS, terms)
        if step == 0:
            norm, bound = sums[0], sums[1]
        else:
            better = (sums[0] < norm) & (sums[1] <= bound) & (idle < PATIENCE)
            best, norm = fit.where(better, best), np.where(better, sums[0], norm)
            idle = np.where(better, 0, idle + 1)
            if (idle >= PATIENCE).all():
                break
        fit = refined(problem, fit, sums[2:])
        beta *= KAPPA
    return best


def kept_back(r: Values, magnitude: Values, step: Values, beta: float) -> Values:
    """The part of the errors that is let go: proximal operator of the p-norm, p = 1/2."""
    share = np.sqrt(magnitude)
    share *= magnitude
    limit = step * np.sqrt(step) / np.float32(beta)
    np.maximum(share, limit, out=share)  # also where there is no error
    np.divide(limit, share, out=share)
    np.subtract(1, share, out=share)
    share *= r
    return share
