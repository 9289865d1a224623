from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxq.numerics.kmeans import (
    POINTS,
    POINTS_PER_ENTRY,
    Divisions,
    Points,
    clusters,
    squared_error,
)


def best_by_trying(x: NDArray[Any], mass: NDArray[Any], entries: int, *, zero: bool) -> float:
    """The least squared error of all divisions into intervals; zero: one of them is put on 0."""
    least = np.inf
    for parts in range(1, min(entries, len(x)) + 1):
        for cut in combinations(range(1, len(x)), parts - 1):
            own, on_zero = [], []
            for a, b in pairwise([0, *cut, len(x)]):
                mean = np.average(x[a:b], weights=mass[a:b])
                own.append(mass[a:b] @ (x[a:b] - mean) ** 2)
                on_zero.append(mass[a:b] @ x[a:b] ** 2)
            total = sum(own)
            if zero and parts == entries:
                total = min(total - a + b for a, b in zip(own, on_zero, strict=True))
            least = min(least, total)
    return float(least)


@given(
    st.dictionaries(st.integers(-30, 30), st.floats(0.01, 10), min_size=1, max_size=9),
    st.integers(1, 5),
    st.booleans(),
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_clusters_are_optimal(weights: dict[int, float], entries: int, zero: bool) -> None:
    x = np.array(sorted(weights), np.float64)
    mass = np.array([weights[int(v)] for v in x])
    centres = clusters(Points(x, mass), entries, hold_zero=zero)
    assert 1 <= len(centres) <= entries
    assert not zero or 0 in centres
    best = best_by_trying(x, mass, entries, zero=zero)
    assert squared_error(Points(x, mass), centres) == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("entries", "known"), [(2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.009497)]
)
def test_normal_values_reach_the_known_least_errors(entries: int, known: float) -> None:
    """Max, "Quantizing for minimum distortion", 1960, table I."""
    x = np.linspace(-6, 6, 100_001)
    mass = np.exp(-(x**2) / 2)
    points = Points(x, mass / mass.sum())
    assert squared_error(points, clusters(points, entries)) == pytest.approx(known, rel=2e-3)


def test_many_points_are_merged_without_loss_to_speak_of() -> None:
    rng = np.random.default_rng(4)
    x = np.unique(np.concatenate([rng.standard_normal(1500), [40.0, -90.0], 30 + rng.random(40)]))
    points = Points(x, rng.random(len(x)) + 0.1)
    for entries in (2, 5, 16):
        assert len(points.merged(max(POINTS, POINTS_PER_ENTRY * entries)).x) < len(x)
        best = points.mass @ x**2 - Divisions.of(points, entries).gain[entries, -1]
        assert squared_error(points, clusters(points, entries)) <= 1.0001 * best
