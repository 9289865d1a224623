"""Adaptive rounding: planted optima, the gradient, bounds, and what judges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnxq.numerics.adaptive import Meeting, Rounding, Values, adapted

NONE, RELU, RELU6 = (-np.inf, np.inf), (0.0, np.inf), (0.0, 6.0)


def drawn(*shape: int, seed: int = 0) -> Values:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def alike(*shape: int, seed: int = 0) -> Values:
    """Inputs [blocks, values, places] as behind a Relu, that follow few causes."""
    blocks, values, places = shape
    causes = values // 4
    mix = drawn(blocks, values, causes, seed=seed + 50)
    x = mix @ drawn(blocks, causes, places, seed=seed) + drawn(*shape, seed=seed + 51) / 4
    return np.maximum(x, 0).astype(np.float32)


def nearest(weight: Values, scale: float, most: int = 7) -> Rounding:
    """Rounded to nearest, of numbers from -most to most."""
    ends = np.full_like(weight, most)
    steps = np.clip(np.rint(weight / np.float32(scale)), -ends, ends)
    return Rounding(steps, np.full_like(weight, scale), -ends, ends)


def both(
    weight: Values, bias: Values, exact: Values, inputs: Values, clamp: tuple[float, float]
) -> tuple[Meeting, Meeting]:
    """What fits, and what judges: three quarters of the places, and the rest."""
    cut = exact.shape[2] * 3 // 4
    one, two = (
        Meeting.of(weight, bias, exact[:, :, at], inputs[:, :, at], clamp)
        for at in (slice(cut), slice(cut, None))
    )
    return one, two


def error(rounding: Rounding, meeting: Meeting) -> float:
    return float(meeting.errors(rounding.weight).sum() / meeting.signal)


@pytest.mark.parametrize("clamp", [NONE, RELU, RELU6])
def test_a_planted_optimum_is_approached(clamp: tuple[float, float]) -> None:
    """Weights that differ from integers only where the inputs are 0: rounding must not see it."""
    scale, planted = 0.25, np.random.default_rng(1).integers(-5, 6, (1, 8, 24)).astype(np.float32)
    basis, _ = np.linalg.qr(drawn(24, 24))
    seen, unseen = basis[:, :12], basis[:, 12:]
    weight = planted * np.float32(scale) + drawn(1, 8, 12, seed=3) @ unseen.T * np.float32(0.2)
    x = (seen @ drawn(12, 600, seed=2))[None].astype(np.float32)
    bias = drawn(1, 8, 1, seed=4)
    fitting, judging = both(weight, bias, x, x, clamp)
    start = nearest(weight, scale)
    found = adapted(weight, start, fitting, judging)
    assert error(replace(start, steps=planted), judging) < 1e-9
    assert error(found, judging) < 0.5 * error(start, judging)


def test_integers_that_were_moved_are_found_again() -> None:
    planted = np.random.default_rng(1).integers(-5, 6, (3, 4, 9)).astype(np.float32)
    weight = planted * np.float32(0.1)
    x = drawn(3, 9, 400, seed=2)
    fitting, judging = both(weight, drawn(3, 4, 1), x, x, RELU)
    shifts = np.random.default_rng(5).integers(-1, 2, planted.shape)
    start = replace(nearest(weight, 0.1), steps=(planted + shifts).astype(np.float32))
    np.testing.assert_array_equal(adapted(weight, start, fitting, judging).steps, planted)


@pytest.mark.parametrize("clamp", [NONE, RELU, RELU6])
def test_the_gradient_is_that_of_the_error(clamp: tuple[float, float]) -> None:
    weight, other = (drawn(2, 3, 5, seed=s).astype(np.float64) for s in (0, 1))
    x, noise = (drawn(2, 5, 40, seed=s).astype(np.float64) for s in (2, 3))
    bias = drawn(2, 3, 1, seed=4).astype(np.float64)
    meeting = Meeting.of(weight, bias, x, x + 0.1 * noise, clamp)  # type: ignore[arg-type]
    found = 2 * meeting.gradient(other)  # type: ignore[arg-type]
    for place in [(0, 0, 0), (1, 2, 4), (0, 1, 3)]:
        step = np.zeros_like(other)
        step[place] = 1e-6
        up, down = (meeting.errors(other + s * step).sum() for s in (1, -1))  # type: ignore[arg-type]
        assert found[place] == pytest.approx((up - down) / 2e-6, rel=1e-5)


def test_what_was_lost_in_front_is_made_up_for() -> None:
    """Inputs that are all too small: the rounding that knows is closer than the one that not."""
    weight, bias = drawn(1, 16, 32), drawn(1, 16, 1, seed=1)
    x = alike(1, 32, 2000, seed=2)
    short = x * np.float32(0.9)
    start = nearest(weight, 0.4)
    told = both(weight, bias, x, short, RELU)
    found = adapted(weight, start, *told)
    blind = adapted(weight, start, *both(weight, bias, x, x, RELU))
    assert error(found, told[1]) < 0.5 * error(blind, told[1])


def test_the_clamp_matters() -> None:
    """Most results are below 0: only the others have to be right."""
    weight, bias = drawn(1, 16, 32), np.full((1, 16, 1), -6, np.float32)
    x = alike(1, 32, 4000, seed=2)
    start = nearest(weight, 0.5)
    told = both(weight, bias, x, x, RELU)
    found = adapted(weight, start, *told)
    blind = adapted(weight, start, *both(weight, bias, x, x, NONE))
    assert error(found, told[1]) < 0.9 * error(blind, told[1])


def test_numbers_stay_within_bounds() -> None:
    weight, x = 3 * drawn(1, 6, 12), alike(1, 12, 300, seed=1)
    start = nearest(weight, 0.5, most=3)
    found = adapted(weight, start, *both(weight, drawn(1, 6, 1), x, x, RELU))
    assert (found.steps != start.steps).any()
    assert (np.abs(found.steps) <= 3).all()
    np.testing.assert_array_equal(found.steps, np.rint(found.steps))


def test_the_start_stays_where_what_judges_is_another_thing() -> None:
    weight, bias = drawn(1, 6, 12), np.zeros((1, 6, 1), np.float32)
    x, far = drawn(1, 12, 300, seed=1), drawn(1, 12, 300, seed=2)
    start = nearest(weight, 0.1)
    fitting = Meeting.of(weight, bias, x[:, ::-1], x, NONE)
    judging = Meeting.of(weight, bias, far, far, NONE)
    assert adapted(weight, start, fitting, judging) is start


def test_blocks_are_independent_and_results_repeat() -> None:
    weight, bias, x = drawn(3, 4, 9), drawn(3, 4, 1, seed=1), alike(3, 9, 300, seed=2)
    start = nearest(weight, 0.4)
    whole = both(weight, bias, x, x, RELU)
    found = adapted(weight, start, *whole)
    np.testing.assert_array_equal(found.steps, adapted(weight, start, *whole).steps)
    for i in range(3):
        part = slice(i, i + 1)
        own, judge = (
            replace(m, inputs=m.inputs[part], results=m.results[part], bias=m.bias[part])
            for m in whole
        )
        alone = adapted(weight[part], nearest(weight[part], 0.4), own, judge)
        assert (alone.steps == found.steps[part]).mean() > 0.8
