"""Rounding whose errors cancel in the sums that a layer computes.

Activations are mostly positive and neighbouring pixels alike, so that what a layer's output loses
is led by the *sum* of its weights' rounding errors, over each kernel and over all that goes into
one output channel. To the nearest, that sum is of the order of sqrt(n / 12) steps. Here as many
values as it takes, those closest to the middle between two integers first, are rounded the other
way, until no sum is off by more than half a step (Guo et al., "SQuant: On-the-Fly Data-Free
Quantization via Diagonal Hessian Approximation", 2022, sections 3.2 and 3.3). No data is needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def balanced(
    exact: NDArray[np.float64], rounded: NDArray[np.float64], qmin: float, qmax: float
) -> NDArray[np.float64]:
    """Return [channels, inputs, taps] of integers, each sum over taps and over a channel balanced.

    exact: the values before rounding, in steps; rounded: to the nearest, in [qmin, qmax].
    """
    if exact.shape[2] > 1:
        rounded = _row_sums(exact, rounded, qmin, qmax)
    flat = (exact.shape[0], -1)
    return _row_sums(exact.reshape(flat), rounded.reshape(flat), qmin, qmax).reshape(exact.shape)


def _row_sums(
    exact: NDArray[Any], rounded: NDArray[Any], qmin: float, qmax: float
) -> NDArray[np.float64]:
    """Move values by one step, so that sums along the last axis are off by at most half a step."""
    error = rounded - exact
    total = error.sum(-1, keepdims=True)
    moved = rounded - np.sign(total)
    is_free = (moved >= qmin) & (moved <= qmax) & (error * np.sign(total) > 0)
    gain = np.where(is_free, np.abs(error), -1.0)
    rank = np.argsort(np.argsort(-gain, -1, kind="stable"), -1, kind="stable")
    chosen = is_free & (rank < np.rint(np.abs(total)))
    return np.asarray(np.where(chosen, moved, rounded))
