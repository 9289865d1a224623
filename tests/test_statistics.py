from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.statistics import Histogram, MinMax

arrays = hnp.arrays(np.float32, st.integers(0, 30), elements=st.floats(width=32))
KINDS = pytest.mark.parametrize("kind", [MinMax, Histogram])


@KINDS
@settings(derandomize=True, deadline=None, max_examples=60)
@given(a=arrays, b=arrays, c=arrays)
def test_merging_is_exact_in_any_order(
    kind: type[MinMax] | type[Histogram], a: np.ndarray, b: np.ndarray, c: np.ndarray
) -> None:
    x, y, z = kind.of(a), kind.of(b), kind.of(c)
    whole = x.merge(y).merge(z)  # type: ignore[arg-type]
    assert whole == x.merge(y.merge(z))  # type: ignore[arg-type]
    assert whole == z.merge(x).merge(y)  # type: ignore[arg-type]
    together = kind.of(np.concatenate([a, b, c]))
    assert (whole.lo, whole.hi) == (together.lo, together.hi)
    assert whole.has_nonfinite == together.has_nonfinite
    assert whole.count == 3
    if isinstance(whole, Histogram) and isinstance(together, Histogram):
        np.testing.assert_array_equal(whole.bins, together.bins)
        np.testing.assert_array_equal(whole.counts, together.counts)


@KINDS
def test_non_finite_values_are_flagged_and_left_out(kind: type[MinMax] | type[Histogram]) -> None:
    seen = kind.of(np.array([1, -np.inf, np.nan, -2], np.float32))
    assert (seen.lo, seen.hi, seen.has_nonfinite) == (-2, 1, True)
    assert kind.of(np.array([np.nan], np.float32)).lo == np.inf
    if isinstance(seen, Histogram):
        assert seen.counts.sum() == 2


def test_a_histogram_is_small() -> None:
    x = np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)
    seen = Histogram.of(x)
    assert seen.counts.sum() == x.size
    assert seen.bins.nbytes + seen.counts.nbytes < 65_000


def test_a_histogram_of_another_dtype() -> None:
    x = np.random.default_rng(0).normal(size=100)
    half = x.astype(np.float16)
    assert Histogram.of(half) == Histogram.of(half.astype(np.float32))


def test_a_range_comes_from_exact_extremes() -> None:
    x = np.array([-0.123456, 0.5, 3.14159], np.float32)
    assert Histogram.of(x).range("minmax") == (x[0], x[2])
    assert Histogram.of(x).range("minmax", symmetric=True) == (-x[2], x[2])


def test_no_finite_value_has_no_range() -> None:
    with pytest.raises(ValueError, match="no finite value"):
        Histogram.of(np.array([np.nan], np.float32)).range("minmax")
