"""Masks with exact counts, and zeros whose places and neighbours are chosen together."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.numerics import pruning
from onnxq.numerics.pruning import pruned, saliency
from onnxq.numerics.reconstruction import squared_error
from onnxq.numerics.sparsity import (
    Count,
    Fixed,
    Pattern,
    RowCount,
    allocated,
    counts_together,
    without_least,
    zeros_in,
)


def problem(
    rows: int = 24, values: int = 48, blocks: int = 1, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the products of correlated inputs of uneven size."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(blocks, values, values)) * np.exp(rng.normal(size=values))
    x = rng.normal(size=(blocks, 8 * values, values)) @ mix
    return rng.normal(0, 0.1, (rows, values)).astype(np.float32), x.swapaxes(1, 2) @ x


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 41))
def test_counts_are_exact_and_ties_go_by_index(scores: list[int], zeros: int) -> None:
    kept = without_least(np.array(scores), zeros)
    gone = sorted(range(len(scores)), key=lambda i: (scores[i], i))[:zeros]
    assert np.flatnonzero(~kept).tolist() == sorted(gone)


def test_rows_have_as_many_each() -> None:
    scores = np.random.default_rng(0).integers(0, 4, (5, 9))
    kept = RowCount(13).mask(scores)
    assert (~kept).sum(1).tolist() == [3, 3, 3, 2, 2]
    for row, stays in zip(scores, kept, strict=True):
        zeros = int((~stays).sum())
        np.testing.assert_array_equal(stays, without_least(row, zeros))


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8), (1, 3), (1, 16)])
@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("inputs", [16, 18, 3])
def test_patterns_keep_the_greatest_of_each_group(
    kept: int, of: int, taps: int, inputs: int
) -> None:
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 5, (6, inputs * taps)).astype(np.float32)
    pattern = Pattern(kept, of, taps)
    mask = pattern.mask(scores).reshape(6, inputs, taps)
    for row in range(6):
        for tap in range(taps):
            for start in range(0, inputs, of):
                own = scores.reshape(6, inputs, taps)[row, start : start + of, tap]
                stays = mask[row, start : start + of, tap]
                assert stays.sum() == min(kept, len(own))
                np.testing.assert_array_equal(stays, without_least(own, len(own) - stays.sum()))
    assert pattern.holds(np.where(mask.reshape(scores.shape), 1.0, 0.0))
    if inputs > kept:
        assert not pattern.holds(np.ones_like(scores))


@pytest.mark.parametrize(
    ("text", "why"),
    [("2", "is N:M"), ("two:4", "is N:M"), ("4:4", "at least one"), ("0:4", "at least one"),
     ("5:4", "at least one"), ("2:4:8", "is N:M"), ("", "is N:M"), ("-1:4", "is N:M"),
     ("1:257", "up to 256"), ("1:" + "9" * 5000, "up to 256")],
)  # fmt: skip
def test_patterns_that_are_none(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Pattern.parse(text)
    assert Pattern.parse(" 2:4 ") == Pattern(2, 4)


def test_one_count_for_several() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.random((4, 8)), 2 * rng.random((3, 5)), rng.random((2, 2))]
    counts = counts_together(parts, 20)
    bound = np.sort(np.concatenate([p.ravel() for p in parts]))[20]
    assert counts == [int((p < bound).sum()) for p in parts]
    assert counts_together([np.ones(3), np.ones(3)], 4) == [3, 1]
    assert zeros_in(9, 0.5) == 4


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("choice", [Count(576), RowCount(576), Pattern(2, 4), Pattern(2, 4, 3)])
def test_results_are_much_closer_than_by_magnitude(blocks: int, choice: Pattern) -> None:
    w, gram = problem(blocks=blocks)
    made, kept = pruned(w, gram, choice)
    plain = w * choice.mask(np.abs(w))
    assert np.count_nonzero(made == 0) == np.count_nonzero(plain == 0) == np.count_nonzero(~kept)
    np.testing.assert_array_equal(made != 0, kept)
    gain = squared_error(w - plain, gram) / squared_error(w - made, gram)
    assert gain > 6
    if isinstance(choice, Pattern):
        assert choice.holds(made)


def test_what_stays_is_the_least_square_solution() -> None:
    w, gram = problem(3, 12)
    kept = np.random.default_rng(3).random(w.shape) < 0.5
    made, _ = pruned(w, gram, Fixed(kept), damping=0)
    for row, values, stays in zip(w, made, kept, strict=True):
        h = gram[0]
        best = np.linalg.solve(h[np.ix_(stays, stays)], h[stays] @ row)
        np.testing.assert_allclose(values[stays], best, rtol=2e-3, atol=2e-4)
        assert not values[~stays].any()


def test_the_zeros_are_nearly_the_best_there_are() -> None:
    """Against all supports of rows of 8, by brute force: within a tenth of the least error."""
    ours = least = 0.0
    for seed in range(12):
        w, gram = problem(1, 8, seed=seed)
        made, _ = pruned(w, gram, Count(4), damping=0)
        ours += squared_error(w - made, gram) / squared_error(w, gram)
        errors = []
        for stays in combinations(range(8), 4):
            at = list(stays)
            best = np.zeros_like(w)
            best[0, at] = np.linalg.solve(gram[0][np.ix_(at, at)], gram[0][at] @ w[0])
            errors.append(squared_error(w - best, gram))
        least += min(errors) / squared_error(w, gram)
    assert ours < 1.3 * least


def test_without_correlations_it_is_wanda() -> None:
    w, _ = problem()
    squares = np.exp(np.random.default_rng(2).normal(size=w.shape[1]))
    made, kept = pruned(w, np.diag(squares)[None], Count(400), damping=0)
    best = w * without_least(np.square(w) * squares, 400)
    least = (np.square(w - best) * squares).sum()
    assert (np.square(w - made) * squares).sum() < 1.01 * least
    np.testing.assert_allclose(made, w * kept, rtol=1e-4, atol=1e-6)
    cost = saliency(w, np.diag(squares)[None], damping=0)
    whole = (np.square(w) * squares).sum()
    np.testing.assert_allclose(cost, np.square(w) * squares / whole, rtol=1e-3)


@pytest.mark.parametrize("choice", [Count(576), Pattern(2, 4)])
def test_large_weights_are_not_alternated(choice: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    w, gram = problem(blocks=4)
    best, _ = pruned(w, gram, choice)
    monkeypatch.setattr(pruning, "MOST", 0.0)
    made, kept = pruned(w, gram, choice)
    norms = np.sqrt(np.repeat(np.einsum("bii->bi", gram), len(w) // 4, axis=0))
    wanda = choice.mask(np.asarray(np.abs(w) * norms, np.float32))
    np.testing.assert_array_equal(kept, wanda)
    plain, some, all_ = (squared_error(w - v, gram) for v in (w * kept, made, best))
    assert all_ < some < plain / 1.5


def test_values_that_meet_zeros_go_first() -> None:
    w, gram = problem()
    gram[:, :10] = gram[:, :, :10] = 0
    _, kept = pruned(w, gram, Count(240))
    assert not kept[:, :10].any()
    made, _ = pruned(w, np.zeros_like(gram), Count(240))
    assert np.count_nonzero(made) == w.size - 240


@pytest.mark.parametrize("shape", [(2, 48, 40), (48, 48), (5, 48, 48)])
def test_grams_that_do_not_fit(shape: tuple[int, ...]) -> None:
    w, gram = problem()
    with pytest.raises(ValueError, match="does not fit"):
        pruned(w, np.zeros(shape), Count(3))
    with pytest.raises(ValueError, match="must be finite"):
        pruned(w, gram * np.nan, Count(3))


def test_zeros_go_where_they_cost_least() -> None:
    flat, steep = (
        ((0.25, 60.0), (0.5, 50.0), (0.85, 30.0)),
        ((0.25, 20.0), (0.5, 10.0), (0.85, 1.0)),
    )
    counts = allocated([flat, steep], [1000, 1000], 1000)
    assert sum(counts) == 1000
    assert counts[0] == 850
    even = allocated([flat, flat], [1000, 3000], 2000)
    assert sum(even) == 2000
    assert abs(even[0] - 500) < 60
    assert allocated([flat, steep], [10, 10], 19) == [10, 9]
    assert allocated([], [], 0) == []


@given(
    st.lists(st.lists(st.floats(-20, 120), min_size=3, max_size=3), min_size=1, max_size=5),
    st.floats(0, 1),
)
def test_allocations_are_exact(levels: list[list[float]], share: float) -> None:
    curves = [tuple(zip((0.25, 0.5, 0.85), level, strict=True)) for level in levels]
    sizes = [100 + 37 * i for i in range(len(curves))]
    zeros = zeros_in(sum(sizes), share)
    counts = allocated(curves, sizes, zeros)
    assert sum(counts) == zeros
    assert all(0 <= n <= size for n, size in zip(counts, sizes, strict=True))
