"""Which inputs go, and how the rest makes up for them: against brute force and numpy's solver."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.numerics.channel_pruning import Aim, Fitting, Moments, Reader, eliminated

Values = NDArray[np.float64]
VECTORS, UNITS, TAPS, OUTPUTS = 4000, 5, 2, 3


def drawn(seed: int = 0) -> tuple[Values, Values]:
    """Correlated vectors with means, and the rows that read them."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(VECTORS, UNITS * TAPS)) @ rng.normal(size=(UNITS * TAPS,) * 2)
    return mixed + rng.normal(size=UNITS * TAPS), rng.normal(size=(OUTPUTS, UNITS * TAPS))


def reader(x: Values, rows: Values, weight: float = 1.0) -> Reader:
    at = np.arange(UNITS * TAPS).reshape(UNITS, TAPS)
    return Reader(rows, np.cov(x.T, bias=True), at, weight)


def residual(x: Values, rows: Values, gone: tuple[int, ...]) -> float:
    """The least mean squared error of rows and bias on what is left."""
    kept = [c for c in range(x.shape[1]) if c // TAPS not in gone]
    inputs = np.column_stack([x[:, kept], np.ones(len(x))])
    target = x @ rows.T
    solved = np.linalg.lstsq(inputs, target, rcond=None)[0]
    return float(np.square(inputs @ solved - target).sum() / len(x))


def test_costs_are_those_of_least_squares() -> None:
    x, rows = drawn()
    found = eliminated([reader(x, rows)], damping=1e-12)
    assert found.costs[0] == 0
    for count in range(1, UNITS):
        exact = residual(x, rows, tuple(found.order[:count].tolist()))
        assert found.costs[count] == pytest.approx(exact, rel=1e-5)


def test_each_that_goes_is_the_cheapest_of_those_left() -> None:
    x, rows = drawn(1)
    order = eliminated([reader(x, rows)], damping=1e-12).order.tolist()
    assert sorted(order) == list(range(UNITS))
    for count in range(1, UNITS):
        before = tuple(order[: count - 1])
        rest = [u for u in range(UNITS) if u not in before]
        costs = {u: residual(x, rows, (*before, u)) for u in rest}
        assert order[count - 1] == min(costs, key=lambda u: costs[u])


def test_rows_make_up_for_what_is_gone() -> None:
    x, rows = drawn(2)
    found = eliminated([reader(x, rows)], stops=(1, 3), damping=1e-12)
    assert sorted(found.rows) == [1, 3]
    for count, (made,) in found.rows.items():
        gone = found.order[:count]
        assert not made.reshape(OUTPUTS, UNITS, TAPS)[:, gone].any()
        error = (x - x.mean(0)) @ (made - rows).T
        exact = residual(x, rows, tuple(gone.tolist()))
        assert np.square(error).sum() / len(x) == pytest.approx(exact, rel=1e-5)


def test_an_order_that_is_given_is_kept() -> None:
    x, rows = drawn(3)
    order = np.array([4, 0, 2, 1, 3])
    found = eliminated([reader(x, rows)], order=order, stops=(2,), damping=1e-12)
    assert found.order.tolist() == order.tolist()
    assert found.costs[2] == pytest.approx(residual(x, rows, (4, 0)), rel=1e-5)


def test_costs_of_readers_add_up_by_weight() -> None:
    (x, rows), (y, others) = drawn(4), drawn(5)
    found = eliminated([reader(x, rows, 2.0), reader(y, others, 0.5)], damping=1e-12)
    gone = (int(found.order[0]),)
    exact = 2 * residual(x, rows, gone) + 0.5 * residual(y, others, gone)
    assert found.costs[1] == pytest.approx(exact, rel=1e-5)


def test_what_never_varies_goes_first() -> None:
    x, rows = drawn(6)
    x[:, 2 * TAPS : 3 * TAPS] = 7.0
    found = eliminated([reader(x, rows)], damping=1e-12)
    assert found.order[0] == 2
    assert found.costs[1] < 1e-6


def test_readers_have_the_same_units() -> None:
    x, rows = drawn()
    other = Reader(rows, np.cov(x.T), np.arange(10).reshape(10, 1))
    with pytest.raises(ValueError, match="one number of units"):
        eliminated([reader(x, rows), other])
    with pytest.raises(ValueError, match="one number of units"):
        eliminated([])


def test_moments_add_up() -> None:
    x = drawn()[0].astype(np.float32)
    moments = Moments()
    for part in np.array_split(x, 7):
        moments.add(part)
    assert moments.is_finite
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(np.diag(moments.covariance), x.var(0), rtol=1e-3)
    shrunk = moments.covariance[0, 1] / np.cov(x.T, bias=True)[0, 1]
    assert shrunk == pytest.approx(1 - 10 / (2 * (10 + VECTORS)), rel=1e-3)
    moments.add(np.full((1, 10), np.inf, np.float32))
    assert not moments.is_finite


def test_fits_like_a_solver() -> None:
    x, rows = (a.astype(np.float32) for a in drawn(7))
    left = np.ascontiguousarray(x[:, 4:])
    target = x @ rows.T + np.float32(3)
    made, bias = Fitting(rows[:, 4:], left, Aim(target)).solve(1e-6)
    error = np.square(left @ made.T + bias - target, dtype=np.float64).sum() / VECTORS
    assert error == pytest.approx(residual(*drawn(7), (0, 1)), rel=0.02)


def test_a_large_ridge_keeps_the_rows() -> None:
    x, rows = (a.astype(np.float32) for a in drawn(8))
    left = np.ascontiguousarray(x[:, 4:])
    made, bias = Fitting(rows[:, 4:], left, Aim(x @ rows.T)).solve(1e6)
    np.testing.assert_allclose(made, rows[:, 4:], atol=1e-3)
    np.testing.assert_allclose((left @ made.T + bias).mean(0), (x @ rows.T).mean(0), atol=1e-2)


def test_without_a_bias_there_is_none() -> None:
    x, rows = (a.astype(np.float32) for a in drawn(9))
    left = np.ascontiguousarray(x[:, 4:])
    made, bias = Fitting(rows[:, 4:], left, Aim(x @ rows.T), has_bias=False).solve(1e-6)
    assert not bias.any()
    exact = np.linalg.lstsq(left, x @ rows.T, rcond=None)[0].T
    np.testing.assert_allclose(made, exact, atol=0.02)


@pytest.mark.parametrize("clamp", [(0.0, np.inf), (0.0, 2.0)])
def test_what_is_cut_off_does_not_count(clamp: tuple[float, float]) -> None:
    x, rows = (a.astype(np.float32) for a in drawn(10))
    left = np.ascontiguousarray(x[:, 4:])
    beside = np.random.default_rng(0).normal(size=(VECTORS, OUTPUTS)).astype(np.float32)
    aim = Aim(x @ rows.T, beside, clamp)

    def behind(sweeps: int) -> float:
        made, bias = Fitting(rows[:, 4:], left, aim).solve(1e-6, sweeps)
        values = left @ made.T + bias
        true, now = (np.clip(v + beside, *clamp) for v in (aim.values, values))
        error = float(np.square(true - now, dtype=np.float64).sum())
        assert error <= aim.error(values) * (1 + 1e-6)  # an upper bound
        return error

    errors = [behind(sweeps) for sweeps in (1, 2, 6)]
    assert errors[2] < errors[1] < errors[0]
