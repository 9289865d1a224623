from __future__ import annotations

import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxq.codebooks import CodebookScheme, Codes, Kind, fit_codebook
from onnxq.numerics.codebooks import NF4, Nearest, exponential, geometric, logarithmic
from onnxq.numerics.metrics import sqnr_db
from onnxq.schemes import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantScheme,
    quantize_weight,
)

MODELS = Path(__file__).resolve().parents[1] / "models"
KINDS: tuple[Kind, ...] = get_args(Kind)
GRAINS: tuple[Granularity, ...] = (PerTensor(), PerChannel(0), PerGroup(24, 1))
# With an entry for each sign and one for zero: value = codebook[index] * scale has no other sign.
SIGNED: tuple[Kind, ...] = ("nf4", "power-of-two", "logarithmic", "exponential")
LARGEST = np.finfo(np.float32).max
NORMAL = np.random.default_rng(5).standard_normal((96, 256)).astype(np.float32)
BASE = np.random.default_rng(1).standard_normal((6, 50)).astype(np.float32)


def schemes(bits: tuple[int, ...] = (1, 2, 3, 4, 8)) -> list[Any]:
    """Every kind, with bits, granularities and lengths of vectors that it has."""
    found = []
    for kind in KINDS:
        for b in (4,) if kind == "nf4" else bits:
            for dim in (2, 3, 8) if kind == "vector" else (1,):
                for grain in GRAINS:
                    scheme = CodebookScheme(kind, b, grain, dim)
                    name = f"{kind}-{b}-{dim}-{type(grain).__name__}"
                    found.append(pytest.param(scheme, id=name))
    return found


def spread(codes: Codes, length: int) -> NDArray[np.float32]:
    """The scale of each value."""
    scale = codes.scale.reshape(-1, 1) if codes.scale.ndim < 2 else codes.scale
    scale = np.repeat(scale, codes.group_size or length, axis=1)[:, :length]
    return np.broadcast_to(scale, (len(codes.indices), length))


def plain(codes: Codes, length: int) -> NDArray[np.float32]:
    """The definition: codebook[indices] * scale."""
    entries = codes.codebook[codes.indices].reshape(len(codes.indices), -1)[:, :length]
    return (entries * spread(codes, length)).astype(np.float32)


def error(rows: NDArray[np.float32], scheme: CodebookScheme, **options: Any) -> float:
    """The sum of squared errors."""
    codes = fit_codebook(rows, scheme, **options)
    return float(((codes.values(rows.shape[1]).astype(np.float64) - rows) ** 2).sum())


def quality(rows: NDArray[np.float32], scheme: CodebookScheme | QuantScheme) -> float:
    """SQNR in dB of rows, by a codebook or by integers with scales of the greatest magnitude."""
    if isinstance(scheme, CodebookScheme):
        return sqnr_db(rows, fit_codebook(rows, scheme).values(rows.shape[1]))
    q, params = quantize_weight(rows, scheme)
    return sqnr_db(rows, params.dequantize(q))


# ---- what a result is


@pytest.mark.parametrize("scheme", schemes())
def test_shapes_values_and_repeats(scheme: CodebookScheme) -> None:
    codes = fit_codebook(BASE, scheme, seed=7)
    assert codes.indices.shape == (6, -(-50 // scheme.dim))
    assert codes.indices.dtype == np.uint8
    assert codes.indices.max() < scheme.entries
    width = (scheme.dim,) if scheme.kind == "vector" else ()
    assert codes.codebook.shape == (scheme.entries, *width)
    assert codes.codebook.dtype == codes.scale.dtype == np.float32
    shapes: dict[type, tuple[int, ...]] = {PerTensor: (), PerChannel: (6,), PerGroup: (6, 3)}
    assert codes.scale.shape == shapes[type(scheme.granularity)]
    assert codes.values(50).tobytes() == plain(codes, 50).tobytes()
    assert codes.values(49).tobytes() == plain(codes, 49).tobytes()
    if scheme.kind != "vector":
        assert (np.diff(codes.codebook) >= 0).all()
    again = fit_codebook(BASE.copy(), scheme, seed=7)
    assert codes.indices.tobytes() == again.indices.tobytes()
    assert codes.codebook.tobytes() == again.codebook.tobytes()
    assert codes.scale.tobytes() == again.scale.tobytes()


def test_other_seeds_begin_with_other_vectors() -> None:
    a, b = (fit_codebook(NORMAL, CodebookScheme("vector", 4, dim=4), seed=seed) for seed in (0, 1))
    assert not np.array_equal(a.codebook, b.codebook)


@pytest.mark.parametrize("scheme", [p for p in schemes() if p.values[0].kind in SIGNED])
def test_signs_are_kept_and_zero_is_exact(scheme: CodebookScheme) -> None:
    rows = BASE.copy()
    rows[:, ::7] = 0
    values = fit_codebook(rows, scheme).values(50)
    assert (values * rows >= 0).all()
    if scheme.bits > 1:  # else the two entries are -s and +s
        assert (values[rows == 0] == 0).all()


@pytest.mark.parametrize("scheme", [p for p in schemes() if p.values[0].dim == 1])
def test_each_value_has_its_nearest_entry(scheme: CodebookScheme) -> None:
    codes = fit_codebook(BASE, scheme)
    far = np.abs(codes.codebook * spread(codes, 50)[..., None].astype(np.float64) - BASE[..., None])
    assert (np.abs(codes.values(50) - BASE) <= far.min(-1) * (1 + 1e-6) + 1e-6).all()  # float32


def test_nearest_agrees_with_all_distances() -> None:
    rng = np.random.default_rng(2)
    for count in (1, 2, 16, 33, 100, 256):
        for spread in (1.0, 1e-3, 1e30):
            book = np.sort(rng.standard_normal(count) * spread).astype(np.float32)
            book[: count // 3] = np.sort(book[: count // 3] * np.float32(1e-6))
            book.sort()
            t = np.concatenate([rng.standard_normal(500) * spread, book, [0, 1e-42, -3e38, 3e38]])
            t = t.astype(np.float32)
            far = np.abs(t[:, None].astype(np.float64) - book)
            index = Nearest(book)(t)
            assert (far[np.arange(len(t)), index] == far.min(1)).all()


def test_nf4_is_the_greatest_magnitude_and_the_sixteen_values() -> None:
    codes = fit_codebook(NORMAL, CodebookScheme("nf4", 4, PerGroup(64, 1)))
    assert codes.codebook.tolist() == np.array(NF4, np.float32).tolist()
    assert np.array_equal(codes.scale, np.abs(NORMAL.reshape(96, 4, 64)).max(2))
    # The values are means of neighbouring quantiles: 8 of the positive side, 7 of the negative.
    assert np.allclose(codes.codebook[[7, 11, 15]], [0, 0.3379, 1], atol=1e-4)


@pytest.mark.parametrize("bits", range(2, 9))
def test_shapes_of_powers(bits: int) -> None:
    for book in geometric(bits, 2.0):
        magnitudes = np.abs(book[book != 0])
        assert (np.frexp(magnitudes)[0] == 0.5).all()
        assert (book == 0).sum() == 1
        assert (np.diff(book) >= 0).all()
    below, above = geometric(bits, 2.0)
    if bits < 6:
        assert len(set(below)) == len(set(above)) == 2**bits
        assert below[0] == -1
        assert above[0] == -0.5


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_logarithmic_bases_come_from_the_range(bits: int) -> None:
    steps = 2 ** (bits - 1) - 1
    for book in logarithmic(bits):
        positive = book[book > 0].astype(np.float64)
        ratio = positive[-1] / positive[0]
        assert np.allclose(positive[1:] / positive[:-1], ratio ** (1 / steps), rtol=1e-5)


def test_exponential_contains_linear_and_bends() -> None:
    linear, *bent = exponential(4)
    assert np.allclose(linear, np.arange(-7, 9) / 8)
    for book in bent:
        assert (np.diff(book, 2)[8:] > 0).all()
        assert np.allclose(book[:7], -book[8:15][::-1])


def test_pruned_weights_keep_their_zeros() -> None:
    rows = np.where(np.random.default_rng(0).random(NORMAL.shape) < 0.3, 0, NORMAL)
    rows[3] = 0
    for grain in GRAINS:
        for bits in (2, 3, 4, 8):
            codes = fit_codebook(rows, CodebookScheme("kmeans", bits, grain))
            values = codes.values(256)
            assert (values[rows == 0] == 0).all()
            assert 0 in codes.codebook
            assert (codes.scale != 0).all()  # the codebook has a 0 for what is all zeros
    assert 0 not in fit_codebook(NORMAL, CodebookScheme("kmeans", 4)).codebook


# ---- how good


@pytest.mark.parametrize("grain", [PerChannel(0), PerGroup(64, 1), PerGroup(32, 1)])
def test_kmeans_nf4_linear(grain: Granularity) -> None:
    whole = QuantScheme("int4", grain, levels=15)
    linear = quality(NORMAL, whole)
    nf4, kmeans, bent = (
        quality(NORMAL, CodebookScheme(kind, 4, grain)) for kind in ("nf4", "kmeans", "exponential")
    )
    assert kmeans > bent > linear
    assert kmeans > nf4 + 0.5
    assert nf4 > linear + (1 if isinstance(grain, PerChannel) else 0.3)
    assert kmeans > quality(NORMAL, QuantScheme("int4", grain)) + 0.5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nf4"])
@pytest.mark.parametrize("grain", GRAINS)
def test_more_bits_less_error(kind: Kind, grain: Granularity) -> None:
    dim = 2 if kind == "vector" else 1
    found = [error(NORMAL, CodebookScheme(kind, bits, grain, dim)) for bits in (1, 2, 3, 4, 5, 6)]
    for more, fewer in pairwise(found):
        assert fewer <= more * (1.0005 if kind == "power-of-two" else 0.99)


@pytest.mark.parametrize("kind", KINDS)
def test_smaller_groups_less_error(kind: Kind) -> None:
    dim = 4 if kind == "vector" else 1
    rows = NORMAL * np.exp(np.random.default_rng(0).standard_normal((96, 1))).astype(np.float32)
    grains = (PerTensor(), PerChannel(0), PerGroup(64, 1), PerGroup(32, 1))
    found = [error(rows, CodebookScheme(kind, 4, grain, dim)) for grain in grains]
    for coarse, fine in pairwise(found):
        assert fine < coarse


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("nf4", "vector")])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_searched_scales_are_better_than_the_greatest_magnitude(kind: Kind, bits: int) -> None:
    codes = fit_codebook(NORMAL, CodebookScheme(kind, bits))
    scale = np.abs(NORMAL).max(1, keepdims=True) / np.abs(codes.codebook).max()
    index = Nearest(codes.codebook)(NORMAL / scale)
    assert sqnr_db(NORMAL, codes.values(256)) > sqnr_db(NORMAL, codes.codebook[index] * scale)


@pytest.mark.parametrize("kind", ["kmeans", "vector", "exponential"])
@pytest.mark.parametrize("grain", GRAINS)
def test_importance_lowers_the_weighted_error(kind: Kind, grain: Granularity) -> None:
    importance = np.exp(2 * np.random.default_rng(8).standard_normal(256))
    scheme = CodebookScheme(kind, 3, grain, 2 if kind == "vector" else 1)

    def weighted(options: dict[str, Any]) -> float:
        values = fit_codebook(NORMAL, scheme, **options).values(256).astype(np.float64)
        return float((importance * (values - NORMAL) ** 2).sum())

    with_it, without = weighted({"importance": importance}), weighted({})
    assert with_it <= without * 1.0001
    if kind == "vector" or isinstance(grain, PerGroup):
        assert with_it < 0.97 * without
    same = fit_codebook(NORMAL, scheme, importance=np.full((96, 1), 3.0))
    assert sqnr_db(fit_codebook(NORMAL, scheme).values(256), same.values(256)) > 30


@pytest.mark.parametrize("name", ["char_gpt", "digits_cnn", "lang_lstm"])
def test_trained_weights_of_three_and_four_bits(name: str) -> None:
    found = []
    for tensor in onnx.load(MODELS / f"{name}.onnx").graph.initializer:
        w = numpy_helper.to_array(tensor)
        if w.ndim >= 2 and w.size >= 2048 and len(np.unique(w)) > 1000:
            rows = w.reshape(w.shape[0], -1)
            found.append([quality(rows, scheme) for scheme in TRAINED])
    int4, nf4, kmeans, groups3 = np.mean(found, axis=0)
    assert kmeans > nf4
    assert kmeans > int4 + 0.5
    assert groups3 > 14


TRAINED = (
    QuantScheme("int4", PerChannel(0)),
    CodebookScheme("nf4"),
    CodebookScheme("kmeans"),
    CodebookScheme("kmeans", 3, PerGroup(32, 1)),
)


# ---- edges

CASES: dict[str, NDArray[Any]] = {
    "zeros": BASE * 0,
    "dead rows": BASE * np.array([1, 0, 1, 1, 0, 1], np.float32)[:, None],
    "dead groups": np.concatenate([BASE, BASE * 0, BASE], axis=1),
    "constant": np.full((5, 40), 0.3, np.float32),
    "one value": np.full((1, 1), -2.5, np.float32),
    "shorter than a vector": BASE[:, :1],
    "no values": BASE[:, :0],
    "no rows": BASE[:0],
    "huge": (BASE / np.abs(BASE).max() * 3.3e38).astype(np.float32),
    "greatest": np.where(BASE > 0, LARGEST, -LARGEST).astype(np.float32),
    "one huge": np.where(BASE.max() == BASE, LARGEST, BASE).astype(np.float32),
    "tiny": BASE * np.float32(1e-38),
    "subnormal": BASE * np.float32(1e-44),
    "magnitudes": BASE * np.float32(10) ** np.array([-40, -30, 0, 10, 30, 37], np.float32)[:, None],
    "float16": BASE.astype(np.float16),
}


@pytest.mark.parametrize("scheme", schemes((1, 3, 6)))
def test_edges(scheme: CodebookScheme) -> None:
    for name, rows in CASES.items():
        length = rows.shape[1]
        for importance in (None, np.zeros(length), np.arange(length)):
            codes = fit_codebook(rows, scheme, importance=importance)
            values, scale = codes.values(length), np.abs(codes.scale)
            assert values.shape == rows.shape, name
            assert np.isfinite(values).all(), name
            assert np.isfinite(scale).all(), name
            assert ((scale == 0) | (scale >= np.finfo(np.float32).tiny)).all(), name
            if not isinstance(scheme.granularity, PerTensor):
                assert (values[(rows == 0).all(axis=1)] == 0).all(), name


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_few_values_are_exact(grain: Granularity, bits: int) -> None:
    few = np.array([-0.7, 0.1, 0.3], np.float32)
    rows = np.random.default_rng(0).choice(few, (40, 60))
    rows[:, [0, 24, 48]] = few[0]  # every group has the same extreme, so the same few ratios
    values = fit_codebook(rows, CodebookScheme("kmeans", bits, grain)).values(60)
    assert np.allclose(values, rows, rtol=2e-7, atol=0)
    if isinstance(grain, PerTensor):
        assert np.array_equal(values, rows)


def test_few_vectors_are_exact() -> None:
    few = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    rows = few[np.random.default_rng(1).integers(0, 16, (30, 20))].reshape(30, 80)
    values = fit_codebook(rows, CodebookScheme("vector", 4, PerTensor(), 4)).values(80)
    assert np.allclose(values, rows, rtol=1e-6)


@pytest.mark.parametrize("scheme", schemes((4,)))
def test_long_rows_and_groups_are_cut_into_blocks(scheme: CodebookScheme) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 300_001)).astype(np.float32)
    if isinstance(scheme.granularity, PerGroup):
        scheme = CodebookScheme(scheme.kind, scheme.bits, PerGroup(140_040, 1), scheme.dim)
    floors: dict[Kind, float] = {"power-of-two": 13, "vector": 1.4, "nf4": 12}
    assert quality(rows, scheme) > floors.get(scheme.kind, 17)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_that_of_the_indices(kind: Kind) -> None:
    rows = np.random.default_rng(0).standard_normal((1024, 2048)).astype(np.float32)
    scheme = CodebookScheme(kind, 4, PerGroup(64, 1), 4 if kind == "vector" else 1)
    tracemalloc.start()
    codes = fit_codebook(rows, scheme, importance=np.ones(2048))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < codes.indices.nbytes + 10 * codes.scale.nbytes + (12 << 20)


# ---- what is refused, and the count of bits


REFUSED = [
    (dict(kind="nf3"), "one of nf4"),
    (dict(bits=0), "1 to 8 bits"),
    (dict(bits=9), "1 to 8 bits"),
    (dict(kind="nf4", bits=3), "use kmeans"),
    (dict(kind="vector"), "use kmeans"),
    (dict(kind="vector", dim=9), "2 to 8 values"),
    (dict(dim=2), "use vector"),
    (dict(granularity=PerChannel(1)), r"PerChannel\(0\)"),
    (dict(granularity=PerGroup(32, 0)), r"PerGroup\(size, 1\)"),
    (dict(kind="vector", dim=3, granularity=PerGroup(32, 1)), "use a multiple"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_schemes_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodebookScheme(**options)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused(bad: float) -> None:
    rows = np.where(BASE[2, 3] == BASE, bad, BASE)
    for kind in KINDS:
        with pytest.raises(ValueError, match="keep it float"):
            fit_codebook(rows, CodebookScheme(kind, 4, dim=2 if kind == "vector" else 1))


def test_rows_and_importance_that_do_not_fit() -> None:
    scheme = CodebookScheme()
    with pytest.raises(ValueError, match="reshape"):
        fit_codebook(BASE[0], scheme)
    with pytest.raises(ValueError, match="does not fit rows"):
        fit_codebook(BASE, scheme, importance=np.ones(7))
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="finite and not negative"):
            fit_codebook(BASE, scheme, importance=np.full(50, bad))


def test_bits_per_weight() -> None:
    shape = (100, 640)
    assert CodebookScheme("kmeans", 3, PerTensor()).bits_per_weight(shape) == pytest.approx(
        3 + (32 + 8 * 32) / 64_000
    )
    groups = CodebookScheme("kmeans", 3, PerGroup(64, 1))
    assert groups.bits_per_weight(shape) == pytest.approx(3.5 + 8 * 32 / 64_000)
    assert groups.bits_per_weight(shape, index_bits=4) == pytest.approx(4.5 + 8 * 32 / 64_000)
    vector = CodebookScheme("vector", 8, PerChannel(0), 3)
    expected = (100 * 214 * 8 + 100 * 32 + 256 * 3 * 32) / 64_000
    assert vector.bits_per_weight(shape) == pytest.approx(expected)
