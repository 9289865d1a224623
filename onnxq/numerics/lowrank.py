"""Matrices of low rank in the place of larger ones, fitted to what they are multiplied with.

For W [M, K] and products H [K, K] = sum x x^T, the A [M, r] and B [r, K] that minimise

    sum |W x - A B x|^2 = |(W - A B) L|^2        with  H = L L^T

are  A = U_r, B = U_r^T W  with the first left singular vectors U_r of W L (Eckart and Young 1936,
in the norm that H gives): no inverse of L is needed. Without products H is the identity: plain SVD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """The directions U [M, n] of a matrix's results, those that matter most first.

    errors [n + 1]: share of the squared results that is lost with the first 0, 1, ... of them only.
    """

    vectors: Values
    errors: Values

    def rank(self, sqnr_db: float) -> int:
        """The least rank whose results are within so many dB; n where none is."""
        enough = np.flatnonzero(self.errors <= 10 ** (-sqnr_db / 10))
        return int(enough[0]) if enough.size else len(self.errors) - 1

    def factors(
        self, matrix: NDArray[Any], rank: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A [M, r] and B [r, K]."""
        left = self.vectors[:, :rank]
        right = left.T @ matrix.astype(np.float64)
        return left.astype(np.float32), right.astype(np.float32)


def directions(
    matrix: NDArray[Any],
    fitted: NDArray[Any] | None = None,
    judging: NDArray[Any] | None = None,
) -> Directions:
    """The directions of W [M, K].

    fitted: products [K, K] that they are fitted to; judging: those that errors are of (default: the
    same). None: the identity.
    """
    wide = matrix.astype(np.float64)
    vectors = _left(wide, None if fitted is None else np.asarray(fitted, np.float64))
    judged = fitted if judging is None else judging
    seen = vectors.T @ wide
    each = np.square(seen).sum(1) if judged is None else ((seen @ judged) * seen).sum(1)
    whole = np.square(wide).sum() if judged is None else ((wide @ judged) * wide).sum()
    kept = np.concatenate([[0.0], np.cumsum(each)])
    errors = np.clip(1 - kept / (whole or 1.0), 0, None)
    return Directions(vectors, np.minimum.accumulate(errors))


def _left(wide: Values, products: Values | None) -> Values:
    """Left singular vectors of W L, by the smaller one of its two products with itself."""
    rows, columns = wide.shape
    if rows <= columns:
        square = wide @ wide.T if products is None else wide @ products @ wide.T
        return _leading(square)[1]
    spread = wide if products is None else wide @ _root(products)
    values, right = _leading(spread.T @ spread)
    is_some = values > values[0] * 1e-24
    left = spread @ right[:, is_some]
    return np.asarray(np.linalg.qr(left)[0])


def _leading(square: Values) -> tuple[Values, Values]:
    """Eigenvalues and vectors of a symmetric matrix, the largest first; signs are fixed."""
    values, vectors = np.linalg.eigh((square + square.T) / 2)
    vectors = vectors[:, ::-1]
    at = np.abs(vectors).argmax(0)
    return values[::-1], vectors * np.sign(vectors[at, np.arange(vectors.shape[1])])


def _root(products: Values) -> Values:
    """L with L L^T = H, of a matrix that may be singular."""
    values, vectors = np.linalg.eigh((products + products.T) / 2)
    return np.asarray(vectors * np.sqrt(np.clip(values, 0, None)))
