from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from onnxq.numerics.metrics import ErrorSums, cosine, max_abs, sqnr_db

pairs = hnp.arrays(
    np.float32, st.tuples(st.just(2), st.integers(0, 8)), elements=st.integers(-9, 9)
)


def test_known_values() -> None:
    r, y = np.array([3, 4], np.float32), np.array([3, 4.5], np.float32)
    assert sqnr_db(r, y) == pytest.approx(10 * np.log10(25 / 0.25))
    assert cosine(r, y) == pytest.approx((9 + 18) / (5 * np.hypot(3, 4.5)))
    assert max_abs(r, y) == 0.5


@settings(derandomize=True, deadline=None)
@given(pairs, pairs)
def test_merging_is_the_metric_of_all(a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    merged = ErrorSums.of(*a).merge(ErrorSums.of(*b))
    assert merged == ErrorSums.of(*b).merge(ErrorSums.of(*a))
    assert merged == ErrorSums.of(*np.concatenate([a, b], axis=1))  # integers: exact sums


def test_limits() -> None:
    zero, one = np.zeros(3), np.ones(3)
    assert sqnr_db(one, one) == np.inf
    assert sqnr_db(zero, one) == -np.inf
    assert cosine(zero, zero) == 1
    assert cosine(zero, one) == 0
    assert sqnr_db(1e100 * one, 1.1e100 * one) == pytest.approx(20)


def test_non_finite_alike_is_no_error_and_else_infinite() -> None:
    r = np.array([1, np.nan, -np.inf])
    assert sqnr_db(r, r) == np.inf
    assert max_abs(r, np.array([1, np.nan, np.inf])) == np.inf
    assert sqnr_db(r, np.array([1, 0, -np.inf])) == -np.inf


def test_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="differ"):
        ErrorSums.of(np.ones((1, 2)), np.ones(2))
