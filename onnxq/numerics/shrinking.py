"""Narrower ranges for groups of weights, by the error of what they add to the results.

A group's rounding errors d [n, g] add x d to a result; over the inputs x [r, g] that is d H d with
H = x^T x [g, g]: errors that the inputs do not show, or that cancel, cost nothing. Ranges from the
extremes down to half of them are tried (Lin et al., "AWQ", 2023, section 3.2, "clip").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Affine = tuple[Array, NDArray[np.generic]]  # scale, zero point: both [n, groups]

SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


def grams(x: Array, size: int) -> Array:
    """[groups, size, size] of inputs [r, groups * size]."""
    parts = x.reshape(len(x), -1, size).transpose(1, 2, 0)
    return np.asarray(parts @ parts.transpose(0, 2, 1), np.float32)


def errors(difference: Array, gram: Array) -> NDArray[np.float64]:
    """Of each group, d H d: [n, groups], of differences [n, groups * size]."""
    parts = difference.reshape(len(difference), *gram.shape[:2]).transpose(1, 0, 2)
    return np.asarray(((parts @ gram) * parts).sum(2, dtype=np.float64).T)


def shrunk(
    rows: Array,
    gram: Array,
    start: Affine,
    covering: Callable[[Array, Array], Affine],
    rounded: Callable[[Affine], Array],
) -> Affine:
    """Scales and zero points of least error for rows [n, groups * size]: the start, or narrower.

    covering: parameters for extremes [n, groups]. rounded: the rows as parameters leave them.
    """
    best, error = start, errors(rounded(start) - rows, gram)
    for candidate in _candidates(rows, gram.shape[1], covering):
        tried = errors(rounded(candidate) - rows, gram)
        better = tried < error
        error = np.where(better, tried, error)
        best = (
            np.where(better, candidate[0], best[0]),
            np.where(better, candidate[1], best[1]).astype(best[1].dtype),
        )
    return best


def _candidates(
    rows: Array, size: int, covering: Callable[[Array, Array], Affine]
) -> Iterator[Affine]:
    parts = rows.reshape(len(rows), -1, size)
    low, high = np.minimum(parts.min(2), 0), np.maximum(parts.max(2), 0)
    for share in SHARES:
        yield covering(low * np.float32(share), high * np.float32(share))
