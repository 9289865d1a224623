"""Factors for channels that move difficulty from activations to weights, or importance into scales.

    y = x W = (x / s) (s W)

smoothing   s_j = max|x_j|^a / max|w_j|^(1 - a)    Xiao et al., "SmoothQuant", 2023, equation 4
salience    s_j = mean|x_j|^a                      Lin et al., "AWQ", 2023, equation 5

s is given to the geometric mean 1 over channels that are not dead, and bounded. Dead channels have
s = 1. Which a is best is searched: coarsely, then around the best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Factor = NDArray[np.float64]

BOUND = 2.0**12  # of s and 1 / s: what float16 weights and subnormal products leave room for
FINE = (-0.07, 0.07)


def smoothing(inputs: NDArray[np.floating], weights: NDArray[np.floating], a: float) -> Factor:
    """From the greatest magnitudes of activations and of weights, by channel."""
    x, w = np.asarray(inputs, np.float64), np.asarray(weights, np.float64)
    return _levelled(a * _log(x) - (1 - a) * _log(w), (x > 0) & (w > 0))


def salience(means: NDArray[np.floating], a: float) -> Factor:
    """From mean magnitudes of activations, by channel."""
    x = np.asarray(means, np.float64)
    return _levelled(a * _log(x), x > 0)


def _log(x: Factor) -> Factor:
    return np.log(np.where(x > 0, x, 1.0))


def _levelled(logs: Factor, alive: NDArray[np.bool_]) -> Factor:
    if not alive.any():
        return np.ones(logs.shape)
    limit = np.log(BOUND)
    middle = logs[alive].mean()
    return np.where(alive, np.exp(np.clip(logs - middle, -limit, limit)), 1.0)


def rounding_noise(
    lo: NDArray[np.floating], hi: NDArray[np.floating], energy: NDArray[np.floating], s: Factor
) -> float:
    """What rounding x / s with one scale adds to (x / s) (s W), but for a constant.

    lo, hi: extremes of x by channel. energy: sums of squares of w by channel.
    """
    span = max(float((hi / s).max()), 0.0) - min(float((lo / s).min()), 0.0)
    return span**2 * float((energy * s**2).sum())


def search(
    error: Callable[[float], float], coarse: Sequence[float], fine: Sequence[float] = FINE
) -> tuple[float, float]:
    """The a of least error in [0, 1], and that error: the best of `coarse`, then steps from it."""
    best = min((error(a), a) for a in coarse)
    for step in fine:
        if 0 <= (a := round(best[1] + step, 3)) <= 1:
            best = min(best, (error(a), a))
    return best[1], best[0]
