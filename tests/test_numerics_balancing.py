"""balanced rounding: sums of errors, ranges, and what it is worth in a layer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.numerics.balancing import balanced
from onnxq.numerics.metrics import sqnr_db
from onnxq.schemes import PerChannel, PerTensor, QuantScheme, balance, quantize_weight


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 6), st.integers(1, 9))
def test_sums_are_off_by_half_a_step_at_most(seed: int, o: int, i: int, taps: int) -> None:
    exact = np.random.default_rng(seed).uniform(-100, 100, (o, i, taps))
    q = balanced(exact, np.rint(exact), -127, 127)
    assert np.array_equal(q, np.rint(q))
    assert np.abs(q - exact).max() < 1 + 1e-9  # a neighbour on the other side at most
    assert np.abs((q - exact).sum((1, 2))).max() <= 0.5 + 1e-9
    # Moves for a channel's sum take at most one value of a kernel further than its own balance.
    assert np.abs((q - exact).sum(2)).max() <= 1.5 + 1e-9


def test_ends_of_the_range_are_kept() -> None:
    exact = np.full((1, 1, 8), 126.6)
    q = balanced(exact, np.rint(exact), -127, 127)
    assert q.max() <= 127
    assert abs(float((q - exact).sum())) <= 0.5


def test_clipped_values_do_not_move_outward() -> None:
    exact = np.array([[[200.0, 126.4, 3.4, 2.4]]])
    q = balanced(exact, np.clip(np.rint(exact), -127, 127), -127, 127)
    assert q.tolist() == [[[127, 127, 4, 3]]]


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)], ids=["tensor", "channel"])
@pytest.mark.parametrize(("form", "symmetric"), [("int8", True), ("uint8", False), ("int4", True)])
def test_a_convolution_of_smooth_positive_values_gains(
    granularity: PerTensor | PerChannel, form: str, symmetric: bool
) -> None:
    """As pixels behind a Relu are: one value all over a window, positive in every channel."""
    rng = np.random.default_rng(0)
    w = rng.normal(0, 0.1, (16, 32, 3, 3)).astype(np.float32)
    x = np.abs(rng.normal(1, 0.3, (200, 32)))[:, :, None, None] + rng.normal(0, 0.05, (1, 32, 3, 3))
    scheme = QuantScheme(form, granularity, symmetric=symmetric)
    plain, params = quantize_weight(w, scheme, 0)
    better = balance(w, plain, scheme, params, 0)
    assert better.dtype == plain.dtype
    exact = np.einsum("nikl,oikl->no", x, w)
    db = [
        sqnr_db(exact, np.einsum("nikl,oikl->no", x, params.dequantize(q))) for q in (plain, better)
    ]
    assert db[1] > db[0] + 3, db
