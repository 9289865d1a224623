from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxq.numerics import grouping
from onnxq.numerics.clipping import normal_step
from onnxq.numerics.metrics import sqnr_db
from onnxq.numerics.weights import DEAD
from onnxq.schemes import (
    Granularity,
    Method,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantScheme,
    quantize_weight,
)

MODELS = Path(__file__).resolve().parents[1] / "models"
NAMES = ["char_gpt", "digits_cnn", "digits_mobilenet", "lang_lstm"]
RNG = np.random.default_rng(3)
# operator: input, axis of output channels, axis that is summed over
AXES = {"MatMul": (1, -1, -2), "Gemm": (1, 0, 1), "Conv": (1, 0, 1), "LSTM": (1, 1, 2)}
METHODS: tuple[Method, ...] = ("minmax", "mse", "standardized", "hqq", "importance")
FOUR_BITS = [
    pytest.param(QuantScheme("int4"), id="int4"),
    pytest.param(QuantScheme("int4", levels=15), id="15-levels"),
    pytest.param(QuantScheme("uint4", symmetric=False), id="uint4"),
]


@cache
def weights_of(name: str) -> list[tuple[NDArray[np.float32], int, int]]:
    """The weights of a model, each over its deviation, with channel and contraction axis."""
    graph = onnx.load(MODELS / f"{name}.onnx").graph
    constants = {t.name: t for t in graph.initializer}
    found = []
    for node in graph.node:
        index, channels, contraction = AXES.get(node.op_type, (0, 0, 0))
        if index and node.input[index] in constants:
            w = numpy_helper.to_array(constants[node.input[index]])
            if w.size >= 512:
                found.append((w / w.std(), channels % w.ndim, contraction % w.ndim))
    assert len(found) > 1
    return found


def graded(scheme: QuantScheme, granularity: str) -> QuantScheme:
    grains: dict[str, Granularity] = {"channel": PerChannel(), "group": PerGroup(32)}
    return QuantScheme(
        scheme.format,
        grains.get(granularity, PerTensor()),
        scheme.symmetric,
        levels=scheme.levels,
    )


def errors(
    name: str, scheme: QuantScheme, method: Method, *, power: float = 2, weighted: bool = False
) -> NDArray[np.float64]:
    """The sum of |error|^power of each weight of a model, or of importance |error|^power."""
    out = []
    for w, channels, contraction in weights_of(name):
        axis = contraction if isinstance(scheme.granularity, PerGroup) else channels
        m = importance_of(w, contraction)
        q, params = quantize_weight(w, scheme, axis, method, importance=m)
        error = np.abs(params.dequantize(q).astype(np.float64) - w) ** power
        out.append(float((m * error if weighted else error).sum()))
    return np.array(out)


def importance_of(w: NDArray[Any], contraction: int) -> NDArray[np.float32]:
    shape = [1] * w.ndim
    shape[contraction] = -1
    m = np.random.default_rng(w.size).chisquare(1, w.shape[contraction]) + 0.1
    return np.asarray(m, np.float32).reshape(shape)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("fmt", "symmetric"), [("int8", True), ("uint8", False), ("int4", True)])
def test_groups_are_better_than_channels_than_tensors(name: str, fmt: str, symmetric: bool) -> None:
    scheme = QuantScheme(fmt, symmetric=symmetric)
    tensor, channel, group = (
        sum(errors(name, graded(scheme, g), "minmax")) for g in ("tensor", "channel", "group")
    )
    assert group <= channel <= tensor


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("scheme", FOUR_BITS)
def test_hqq_is_no_worse_than_mse_than_minmax_and_standardized(
    name: str, granularity: str, scheme: QuantScheme
) -> None:
    scheme = graded(scheme, granularity)
    minmax, mse, standardized, hqq = (errors(name, scheme, m) for m in METHODS[:4])
    little, rounding = 1 + 1e-5, 1e-10  # where one scale a value is exact
    assert (mse <= np.minimum(minmax, standardized) * little + rounding).all()
    assert (hqq <= mse * little + rounding).all()  # of squares
    assert sum(mse) < 0.97 * sum(minmax)
    norms = [errors(name, scheme, m, power=0.5) for m in (METHODS[1], METHODS[3])]
    assert (norms[1] <= norms[0] * little + 1e-3).all()  # of its own norm


@pytest.mark.parametrize("name", ["char_gpt", "digits_cnn"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("scheme", FOUR_BITS)
def test_importance_is_no_worse_than_all_by_its_error(
    name: str, granularity: str, scheme: QuantScheme
) -> None:
    scheme = graded(scheme, granularity)
    found = {m: errors(name, scheme, m, weighted=True) for m in METHODS}
    best = found.pop("importance")
    for other in found.values():
        assert (best <= other * (1 + 1e-5)).all()
    assert best.sum() < 0.99 * found["mse"].sum() or granularity == "tensor"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize(("fmt", "odd"), [("int4", 15), ("int2", 3)])
def test_the_level_that_symmetric_grids_have_more_is_worth_using(
    name: str, method: Method, fmt: str, odd: int
) -> None:
    for granularity in ("channel", "group"):
        whole, narrow = (
            sum(errors(name, graded(QuantScheme(fmt, levels=n), granularity), method))
            for n in (None, odd)
        )
        assert whole < 10**-0.05 * narrow  # by half a dB and more


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    w=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=9),
        elements=st.one_of(st.floats(-1, 1, width=32), st.sampled_from([0.0, 40.0, 1e-3])),
    ),
    size=st.integers(1, 5),
    scheme=st.sampled_from(
        [
            QuantScheme("int4"),
            QuantScheme("uint4", symmetric=False),
            QuantScheme("int2"),
            QuantScheme("uint2", symmetric=False),
            QuantScheme("int8", levels=11),
            QuantScheme("float8e4m3fn"),
            QuantScheme("int4", power_of_two=True),
            QuantScheme("uint4", symmetric=False, power_of_two=True),
        ]
    ),
)
def test_the_order_of_errors_holds_for_any_weight(
    w: NDArray[np.float32], size: int, scheme: QuantScheme
) -> None:
    grouped = QuantScheme(
        scheme.format, PerGroup(size), scheme.symmetric, scheme.power_of_two, scheme.levels
    )
    m = importance_of(w, 0)
    squares, weighted = {}, {}
    for method in METHODS:
        q, params = quantize_weight(w, grouped, 0, method, importance=m)
        if scheme.power_of_two:
            assert (np.frexp(params.scale)[0] == 0.5).all()
        error = (params.dequantize(q).astype(np.float64) - w) ** 2
        squares[method], weighted[method] = error.sum(), (m * error).sum()
    little = 1e-5 * float(np.square(w).sum()) * 1e-2
    assert squares["hqq"] <= squares["mse"] * (1 + 1e-5) + little
    assert squares["mse"] <= min(squares["minmax"], squares["standardized"]) * (1 + 1e-5) + little
    assert weighted["importance"] <= min(weighted.values()) * (1 + 1e-5) + little


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grain", [PerTensor(), PerChannel(1), PerGroup(8, 0), PerGroup(8, 1)])
def test_pieces_make_no_difference(
    method: Method, grain: Granularity, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = RNG.normal(size=(20, 300, 2)).astype(np.float32)
    m = importance_of(w, 1)
    scheme = QuantScheme("uint4", grain, symmetric=False)
    q, params = quantize_weight(w, scheme, method=method, importance=m)
    monkeypatch.setattr(grouping, "PIECE", 64)
    cut, cut_params = quantize_weight(np.asfortranarray(w), scheme, method=method, importance=m)
    if method == "minmax":
        np.testing.assert_array_equal(q, cut)
    db = sqnr_db(w, params.dequantize(q)), sqnr_db(w, cut_params.dequantize(cut))
    assert db[0] == pytest.approx(db[1], abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-100, 120])
def test_powers_of_two_change_scales_alone(method: Method, exponent: int) -> None:
    w = RNG.uniform(-1, 1, size=(64, 6)).astype(np.float32)
    for scheme in (QuantScheme("int4", PerGroup(16, 0)), QuantScheme("uint8", symmetric=False)):
        one = quantize_weight(w, scheme, None, method, importance=np.ones(1))
        other = quantize_weight(np.ldexp(w, exponent), scheme, None, method, importance=np.ones(1))
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(np.ldexp(one[1].scale, exponent), other[1].scale)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fmt", ["int4", "uint4", "int2", "float8e4m3fn", "int8"])
def test_constant_and_zero_groups(method: Method, fmt: str) -> None:
    w = np.repeat(np.array([[0, 0.7, -3, 1e-42, 1e38, -3e38]], np.float32), 8, axis=0)
    scheme = QuantScheme(fmt, PerGroup(8), symmetric=fmt != "uint4")
    q, params = quantize_weight(w, scheme, 0, method, importance=np.ones(1))
    back = params.dequantize(q)
    assert back[0, 0] == 0
    np.testing.assert_allclose(back[:, [1, 2, 4, 5]], w[:, [1, 2, 4, 5]], rtol=1e-6)
    assert (np.abs(back[:, 3]) <= 1.2e-38).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(method: Method, bad: float) -> None:
    w = np.ones((3, 4), np.float32)
    w[1, 2] = bad
    for grain in (PerTensor(), PerChannel(0), PerGroup(3, 1)):
        with pytest.raises(ValueError, match="finite"):
            quantize_weight(w, QuantScheme("int4", grain), None, method, importance=np.ones(1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("format", ["int8", "uint4", "float8e4m3fn"])
def test_channels_of_any_size_overflow_nothing(format: str, method: Method) -> None:
    """Warnings are errors here: of dead channels as little comes as of large ones."""
    rows = RNG.normal(0, 1, (40, 3)) * np.exp2(np.linspace(-120, 60, 40))[:, None]
    w = rows.astype(np.float32)
    scheme = QuantScheme(format, PerChannel(0), symmetric=format != "uint4")
    _, params = quantize_weight(w, scheme, method=method, importance=np.ones((1, 3)))
    assert np.isfinite(params.scale).all()


def test_dead_channels_are_lifted() -> None:
    w = np.array([[1, -2], [1e-30, 0], [0, 0]], np.float32)
    for method in METHODS:
        q, params = quantize_weight(
            w, QuantScheme("int8", PerChannel(0)), None, method, importance=np.ones(1)
        )
        np.testing.assert_allclose(params.scale[1:], 2 * DEAD / 127)
        assert not q[1:].any()
    _, params = quantize_weight(w, QuantScheme("int8", PerGroup(2, 1)))
    assert params.scale[1, 0] < 1e-31  # groups have no bias


@pytest.mark.parametrize("levels", [2, 3, 5, 11, 15, 16])
@pytest.mark.parametrize(("fmt", "symmetric"), [("int4", True), ("int4", False), ("uint4", False)])
def test_any_count_of_levels(levels: int, fmt: str, symmetric: bool) -> None:
    w = RNG.normal(size=(200, 50)).astype(np.float32)
    scheme = QuantScheme(fmt, PerChannel(1), symmetric, levels=levels)
    q, params = quantize_weight(w, scheme)
    assert len(np.unique(q.astype(np.int8))) == levels
    assert q.min() >= scheme.qmin
    assert q.max() <= scheme.qmax
    assert scheme.qmax - scheme.qmin == levels - 1
    if symmetric:
        assert not params.zero_point.astype(np.int8).any()
        assert (params.scale > 0).all() or levels % 2 == 0
    error = np.abs(params.dequantize(q) - w)
    limit = 1 if symmetric and levels % 2 == 0 else 0.5
    if symmetric or levels > 2:
        assert (error <= np.abs(params.scale) * (limit + 1e-3)).all()


def test_symmetric_unsigned_formats_are_shifted_signed_ones() -> None:
    w = RNG.normal(size=(64, 8)).astype(np.float32)
    for signed, unsigned, shift in (("int4", "uint4", 8), ("int2", "uint2", 2)):
        a, p = quantize_weight(w, QuantScheme(signed, PerGroup(16, 0)), None, "mse")
        b, r = quantize_weight(w, QuantScheme(unsigned, PerGroup(16, 0)), None, "mse")
        np.testing.assert_array_equal(a.astype(np.int8) + shift, b.astype(np.int8))
        np.testing.assert_array_equal(p.scale, r.scale)
        assert (r.zero_point.astype(np.int8) == shift).all()


@pytest.mark.parametrize("fmt", ["int8", "int4", "uint4", "float8e4m3fn", "float8e5m2"])
def test_stochastic_rounding_is_seeded_and_unbiased(fmt: str) -> None:
    w = np.tile(RNG.uniform(-0.9, 0.9, 40).astype(np.float32), (4000, 1))
    w[0, :2] = -1, 1  # the ends; nothing else is clipped
    w[1:, :2] = 0
    scheme = QuantScheme(fmt, symmetric=fmt != "uint4", levels=15 if fmt == "int4" else None)
    q, params = quantize_weight(w, scheme, rounding="stochastic", seed=1)
    again, _ = quantize_weight(w, scheme, rounding="stochastic", seed=1)
    other, _ = quantize_weight(w, scheme, rounding="stochastic", seed=2)
    assert q.tobytes() == again.tobytes()
    assert q.tobytes() != other.tobytes()
    even = params.dequantize(quantize_weight(w, scheme)[0])
    back = params.dequantize(q)[1:].astype(np.float64)
    step = 2 * np.abs(even - w).max(axis=0) + float(np.abs(np.diff(np.unique(back))).min())
    assert (np.abs(back - w[1:]) <= np.abs(np.diff(np.unique(back))).max() * 1.001).all()
    spread = np.maximum(back.std(axis=0), 1e-9) / np.sqrt(len(back))
    assert (np.abs(back.mean(axis=0) - w[1]) <= 5 * spread + 1e-7).all()
    assert (spread[2:] <= step[2:]).all()


def test_values_on_the_grid_are_not_moved_by_stochastic_rounding() -> None:
    w = np.arange(-127, 128, dtype=np.float32)
    q, _ = quantize_weight(w, QuantScheme("int8"), rounding="stochastic")
    np.testing.assert_array_equal(q, w)
    every = np.arange(256, dtype=np.uint8).view(QuantScheme("float8e4m3fn").numbers.dtype)
    every = every.astype(np.float32)
    every = every[np.isfinite(every)]
    q, params = quantize_weight(every, QuantScheme("float8e4m3fn"), rounding="stochastic")
    np.testing.assert_array_equal(params.dequantize(q), every)


MAX_1960 = {2: 1.596, 3: 1.224, 4: 0.9957, 8: 0.5860, 16: 0.3352, 32: 0.1881}


@pytest.mark.parametrize(("levels", "step"), MAX_1960.items())
def test_the_step_for_a_normal_distribution_is_that_of_the_table(levels: int, step: float) -> None:
    assert normal_step(levels) == pytest.approx(step, abs=6e-4)


def test_the_approximate_step_for_many_levels_meets_the_exact_one() -> None:
    assert normal_step(257) == pytest.approx(normal_step(256) * 256 / 257, rel=5e-3)
    assert 0 < normal_step(65536) < 3e-4


@pytest.mark.parametrize("symmetric", [True, False])
def test_standardized_is_near_the_best_for_normal_weights(symmetric: bool) -> None:
    w = RNG.normal(0 if symmetric else 0.5, 1, size=(8, 20_000)).astype(np.float32)
    fmt = "int4" if symmetric else "uint4"
    db = []
    for method in METHODS[2:0:-1]:
        scheme = QuantScheme(fmt, PerChannel(0), symmetric, levels=15)
        q, params = quantize_weight(w, scheme, None, method)
        db.append(sqnr_db(w, params.dequantize(q)))
    assert db[1] - 0.1 <= db[0] <= db[1] + 1e-6


def test_float16_weights_are_quantized_as_the_same_floats() -> None:
    w = RNG.normal(size=(40, 8)).astype(np.float16)
    for method in METHODS:
        a = quantize_weight(w, QuantScheme("int4", PerGroup(16, 0)), None, method, importance=w * w)
        wide = w.astype(np.float32)
        b = quantize_weight(
            wide, QuantScheme("int4", PerGroup(16, 0)), None, method, importance=w * w
        )
        np.testing.assert_array_equal(a[0], b[0])


def test_unimportant_values_do_not_count() -> None:
    w = RNG.normal(size=(64, 4)).astype(np.float32)
    m = np.ones((64, 1))
    m[::2] = 0
    scheme = QuantScheme("int4", PerGroup(64, 0))
    _, params = quantize_weight(w, scheme, None, "importance", importance=m)
    half = QuantScheme("int4", PerGroup(32, 0))
    _, alone = quantize_weight(w[1::2], half, None, "importance", importance=np.ones(1))
    back = params.dequantize(params.quantize(w))[1::2], alone.dequantize(alone.quantize(w[1::2]))
    assert sqnr_db(w[1::2], back[0]) == pytest.approx(sqnr_db(w[1::2], back[1]), abs=0.3)
    nothing = quantize_weight(w, scheme, None, "importance", importance=np.zeros(1))
    assert sqnr_db(w, nothing[1].dequantize(nothing[0])) > 18


@pytest.mark.parametrize(
    ("method", "importance", "message"),
    [
        pytest.param("entropy", None, "minmax, mse, standardized, hqq, importance", id="method"),
        pytest.param("importance", None, "give data, or use hqq", id="none"),
        pytest.param("importance", -np.ones(4), "not negative", id="negative"),
        pytest.param("importance", np.full(4, np.nan), "finite", id="nan"),
        pytest.param("importance", np.ones((2, 3, 4)), "does not fit", id="shape"),
    ],
)
def test_refuses(method: Any, importance: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_weight(np.ones((3, 4)), QuantScheme(), None, method, importance=importance)


def test_refuses_unknown_roundings_and_axes() -> None:
    with pytest.raises(ValueError, match="even or stochastic"):
        quantize_weight(np.ones(3), QuantScheme(), rounding="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no axis 2"):
        quantize_weight(np.ones((3, 4)), QuantScheme("int4", PerGroup(2)), 2)
