from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxq.numerics import histograms
from onnxq.numerics.metrics import sqnr_db
from onnxq.numerics.ranges import Density, search
from onnxq.schemes import QuantScheme
from onnxq.statistics import Histogram

RNG = np.random.default_rng(7)
NORMAL = RNG.normal(size=100_000).astype(np.float32)
SHAPES = {
    "normal": NORMAL,
    "relu": np.maximum(NORMAL, 0),
    "relu6": np.clip(4 * NORMAL, 0, 6),
    "silu": 3 * NORMAL / (1 + np.exp(-3 * NORMAL)),
    "laplace": RNG.laplace(size=100_000).astype(np.float32),
    "shifted": NORMAL + 2,
    "negative": -np.abs(NORMAL),
    "heavy": RNG.standard_t(3, size=100_000).astype(np.float32),
    "outlier": np.append(NORMAL, np.array([40, -7], np.float32)),
}
CASES = [(name, sym) for name in SHAPES for sym in (False, True)]


def quality_db(x: NDArray[np.float32], bounds: tuple[float, float], symmetric: bool) -> float:
    params = QuantScheme("uint8", symmetric=symmetric).params(*bounds)
    return sqnr_db(x, params.dequantize(params.quantize(x)))


@pytest.mark.parametrize(("name", "symmetric"), CASES)
def test_mse_is_at_least_as_good_as_every_other_method(name: str, symmetric: bool) -> None:
    x = SHAPES[name]
    density = Density.of(x)
    db = {
        m: quality_db(x, search(density, m, symmetric=symmetric), symmetric)
        for m in ("minmax", "percentile", "mse", "entropy")
    }
    assert db["mse"] >= max(db.values()) - 0.3, db


@pytest.mark.parametrize(("name", "symmetric"), CASES)
def test_mse_is_near_the_best_of_an_exhaustive_search(name: str, symmetric: bool) -> None:
    x = SHAPES[name][-20_000:]
    found = quality_db(x, search(Density.of(x), "mse", symmetric=symmetric), symmetric)
    lo, hi = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    factors = np.geomspace(1, 0.1, 16)
    best = max(
        quality_db(x, (lo * f, hi * g), symmetric)
        for f in (factors if lo < 0 and not symmetric else [1.0])
        for g in factors
    )
    assert found >= best - 0.3


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "careful", "entropy"])
@pytest.mark.parametrize(("name", "symmetric"), CASES)
def test_ranges_hold_zero_and_lie_inside_of_the_extremes(
    name: str, symmetric: bool, method: str
) -> None:
    x = SHAPES[name]
    lo, hi = search(Density.of(x), method, symmetric=symmetric)
    top = max(-float(x.min()), float(x.max()))
    assert lo <= 0 <= hi
    assert lo == -hi if symmetric else (lo >= min(x.min(), 0) and hi <= max(x.max(), 0))
    assert 0 < hi - lo <= 2 * top


@pytest.mark.parametrize("symmetric", [False, True])
def test_entropy_clips_an_outlier_and_keeps_the_bulk(symmetric: bool) -> None:
    x = np.append(NORMAL, np.float32(-1e9))  # an attention mask
    lo, hi = search(Density.of(x), "entropy", symmetric=symmetric)
    assert -6 < lo < -3
    assert 3 < hi < 6


def test_entropy_keeps_spikes_at_the_ends() -> None:
    assert search(Density.of(SHAPES["relu6"]), "entropy") == (0, 6)


def test_percentile_is_numpys_quantile_to_a_bin() -> None:
    lo, hi = search(Density.of(NORMAL), "percentile")
    np.testing.assert_allclose([lo, hi], np.quantile(NORMAL, [5e-5, 1 - 5e-5]), rtol=0.01)
    _, hi = search(Density.of(NORMAL), "percentile", symmetric=True)
    np.testing.assert_allclose(hi, np.quantile(np.abs(NORMAL), 1 - 1e-4), rtol=0.01)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "careful", "entropy"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "x",
    [
        pytest.param(np.zeros(5, np.float32), id="zeros"),
        pytest.param(np.full(5, 3, np.float32), id="constant"),
        pytest.param(np.array([0, 1, 1, 0], np.float32), id="binary"),
        pytest.param(np.array([-1e-40], np.float32), id="subnormal"),
        pytest.param(np.array([3e38, -3e38], np.float32), id="huge"),
    ],
)
def test_degenerate_data_keeps_its_range(
    x: NDArray[np.float32], symmetric: bool, method: str
) -> None:
    lo, hi = search(Density.of(x), method, symmetric=symmetric)
    top = float(np.abs(x).max())
    expected = (-top, top) if symmetric else (min(float(x.min()), 0), max(float(x.max()), 0))
    np.testing.assert_allclose((lo, hi), expected, rtol=0.01, atol=1e-40)
    assert quality_db(x, (lo, hi), symmetric) > 40 or method == "percentile" or top < 1e-30


def test_refuses_unknown_methods_and_no_data() -> None:
    with pytest.raises(ValueError, match="minmax, percentile, mse, careful, entropy"):
        search(Density.of(NORMAL), "kl")
    with pytest.raises(ValueError, match="no finite value"):
        Density.of_counts(histograms.NONE, np.inf, -np.inf)


floats = st.lists(st.floats(width=32), min_size=1, max_size=50)


@settings(derandomize=True, deadline=None)
@given(floats)
def test_each_value_lies_in_its_bin(values: list[float]) -> None:
    x = np.array(values, np.float32)
    finite = x[np.isfinite(x)].astype(np.float64)
    finite[np.abs(finite) < histograms.ZERO_WIDTH] = 0  # subnormals may count as 0
    (bins, counts), dropped = histograms.count(histograms.halves_of(x))
    assert dropped == x.size - finite.size
    assert counts.sum() == finite.size
    assert (np.diff(bins.astype(int)) > 0).all()
    left, right = histograms.edges_of(bins)
    for k in range(len(bins)):
        inside = (finite >= left[k]) & (finite <= right[k])
        assert inside.sum() >= counts[k]
    finite = finite[np.abs(finite) > histograms.ZERO_WIDTH]
    index = np.searchsorted(left, finite, side="right") - 1
    assert (finite <= right[index]).all()
    normal = np.abs(finite) > 1e-37
    assert ((right - left)[index] <= np.abs(finite) / 127)[normal].all()


def test_careful_clips_less_than_mse() -> None:
    x = np.random.default_rng(2).standard_t(3, 100_000).astype(np.float32)
    mse, careful, minmax = (search(Density.of(x), m) for m in ("mse", "careful", "minmax"))
    assert minmax[0] < careful[0] < mse[0] < 0 < mse[1] < careful[1] < minmax[1]


def test_leaning_gives_the_range_to_positive_values() -> None:
    x = np.random.default_rng(2).normal(0, 1, 100_000).astype(np.float32)
    plain, leaning = (h.range("mse") for h in (Histogram.of(x), Histogram.of(x).leaning(0.01)))
    assert leaning[0] > plain[0] + 0.5
    assert leaning[1] >= plain[1]
