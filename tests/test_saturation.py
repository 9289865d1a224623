"""Pairs of 8-bit products in saturating 16 bits: numerics, and whole models."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxq import check, runtime
from onnxq.attempts import Setting, attempt
from onnxq.data import open_samples
from onnxq.emulation import emulator
from onnxq.job import Job
from onnxq.model import Model, producer
from onnxq.numerics.metrics import sqnr_db
from onnxq.numerics.saturation import excess, lost, safe_scale, saturates
from onnxq.passes import QuantizeStatic, WidenChannels
from onnxq.passes.ops import kernel_rows
from onnxq.recipes import load_recipe
from onnxq.sampling import NO_SAMPLES
from onnxq.synthetic import synthetic_samples
from onnxq.targets import load_target

RNG = np.random.default_rng(9)


def saturated(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x @ w as VPMADDUBSW does it, one pair at a time; x is uint8 [P, K], w int8 [K, N]."""
    total = np.zeros((len(x), w.shape[1]), np.int64)
    for k in range(0, w.shape[0], 2):
        pair = x[:, k : k + 2].astype(np.int64) @ w[k : k + 2].astype(np.int64)
        total += np.clip(pair, -32768, 32767)
    return total


@pytest.mark.parametrize("k", [1, 2, 7, 16])
def test_lost_is_what_saturation_changes(k: int) -> None:
    x = RNG.integers(0, 256, (50, k)).astype(np.uint8)
    w = RNG.choice(np.array([-127, 90, 127], np.int8), (k, 5))
    exact = x.astype(np.int64) @ w.astype(np.int64)
    np.testing.assert_array_equal(exact + lost(lambda i: x[:, i], w, (50,)), saturated(x, w))
    assert (saturated(x, w) != exact).any() == (k > 1)


def test_excess_is_that_of_the_worst_input() -> None:
    w = RNG.integers(-127, 128, (2, 200)).astype(np.int8)
    corners = np.array(list(itertools.product([0, 255], repeat=2)), np.int64)
    sums = corners @ w.astype(np.int64)
    saturates = ((sums > 32767) | (sums < -32768)).any(0)
    np.testing.assert_array_equal(excess(w)[0] > 1, saturates)
    assert 0.2 < saturates.mean() < 0.8


def test_safe_scales_are_safe_and_least() -> None:
    w = RNG.normal(0, 1, (64, 40)).astype(np.float32)
    w[:, :3] *= 0  # dead channels
    w[:, 3] = 0
    w[0, 3] = 1  # a single weight: no pair
    scale = (np.maximum(np.abs(w).max(0), 1e-3) / 127).astype(np.float32)
    safe = safe_scale(w, scale)
    quantized = np.clip(np.rint(w / safe), -127, 127).astype(np.int8)
    assert excess(quantized).max() <= 1
    assert (safe >= scale).all()
    np.testing.assert_array_equal(safe[:4], scale[:4])
    smaller = np.clip(np.rint(w / (safe * 0.98)), -127, 127).astype(np.int8)
    assert (excess(smaller).max(0)[safe > scale] > 1).mean() > 0.9


def test_a_safe_scale_for_all_channels() -> None:
    w = RNG.normal(0, 1, (64, 40)).astype(np.float32)
    safe = safe_scale(w, np.array(np.abs(w).max() / 127, np.float32))
    assert safe.shape == ()
    assert excess(np.rint(w / safe).astype(np.int8)).max() <= 1


CONV = "Conv<strides = [1, 1]>"
LAYERS = [
    pytest.param("Conv<pads = [1, 2, 0, 1], strides = [2, 1]>", (6, 4, 3, 2), 1, id="strides-pads"),
    pytest.param('Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>', (6, 4, 3, 3), 1, id="auto-pad"),
    pytest.param("Conv<dilations = [2, 1]>", (6, 4, 2, 3), 1, id="dilations"),
    pytest.param("Conv<group = 2>", (6, 2, 3, 3), 2, id="groups"),
    pytest.param("Conv<group = 4, pads = [0, 0, 0, 0]>", (4, 1, 1, 1), 0, id="depthwise"),
]
QDQ = """<ir_version: 8, opset_import: ["": 17]> g (float[2, 4, 7, 6] x) => (float[a, b, c, d] y)
    <float xs = {0.01}, uint8 xz = {120}, float ws = {0.02}, int8 wz = {0}> {
    q = QuantizeLinear(x, xs, xz)  d = DequantizeLinear(q, xs, xz)
    e = DequantizeLinear(w, ws, wz)  y = %s(d, e)
}"""


@pytest.mark.parametrize(("op", "shape", "groups"), LAYERS)
def test_convolutions_are_emulated(op: str, shape: tuple[int, ...], groups: int) -> None:
    proto = parser.parse_model(QDQ % op)
    w = RNG.choice(np.array([-127, -90, 80, 127], np.int8), shape)
    proto.graph.initializer.append(numpy_helper.from_array(w, "w"))
    x = RNG.normal(0, 1, (2, 4, 7, 6)).astype(np.float32)
    found = emulator(Model.from_proto(proto))
    (y,) = found.run({"x": x})
    (plain,) = runtime.session(proto, optimize="off").run(None, {"x": x})
    assert found.total == (groups > 0)
    if not groups:
        np.testing.assert_array_equal(y, plain)
        return
    # The reference: every output pixel, its inputs gathered by a Conv with one-hot weights.
    depth, size = shape[1], int(np.prod(shape[2:]))
    for g in range(groups):
        hot = np.zeros((depth * size, 4, *shape[2:]), np.float32)
        for k in range(depth * size):
            i, j = np.unravel_index(k // depth, shape[2:])
            hot[k, g * depth + k % depth, i, j] = 1
        gather = parser.parse_model((QDQ % op.replace(f"group = {groups}", "group = 1")).replace(
            "e = DequantizeLinear(w, ws, wz)", "e = Identity(w)"))  # fmt: skip
        gather.graph.initializer.append(numpy_helper.from_array(hot, "w"))
        (inputs,) = runtime.session(gather, optimize="off").run(None, {"x": x})
        rows = np.rint(np.moveaxis(inputs, 1, -1) / 0.01 + 120).astype(np.uint8)
        n = shape[0] // groups
        mine = np.moveaxis(w[g * n : (g + 1) * n], 1, -1).reshape(n, -1).T
        flat = rows.reshape(-1, depth * size)
        exact = saturated(flat, mine) - 120 * mine.astype(np.int64).sum(0)
        expected = np.moveaxis(exact.reshape(*rows.shape[:-1], n), -1, 1) * 0.0002
        np.testing.assert_allclose(y[:, g * n : (g + 1) * n], expected, rtol=1e-4, atol=1e-3)
    assert np.abs(y - plain).max() > 0.5


PRODUCTS = [
    pytest.param("y = MatMul(d, e)", (8, 5), id="MatMul"),
    pytest.param("y = Gemm(d, e)", (8, 5), id="Gemm"),
    pytest.param("y = Gemm<transB = 1>(d, e)", (5, 8), id="Gemm-transposed"),
]


@pytest.mark.parametrize(("op", "shape"), PRODUCTS)
def test_products_are_emulated(op: str, shape: tuple[int, ...]) -> None:
    text = QDQ.replace("[2, 4, 7, 6]", "[3, 8]").replace("[a, b, c, d]", "[3, 5]")
    proto = parser.parse_model(text.replace("y = %s(d, e)", op))
    w = RNG.choice(np.array([-127, -90, 80, 127], np.int8), shape)
    proto.graph.initializer.append(numpy_helper.from_array(w, "w"))
    x = RNG.normal(0, 1, (3, 8)).astype(np.float32)
    (y,) = emulator(Model.from_proto(proto)).run({"x": x})
    rows = np.clip(np.rint(x / np.float32(0.01)) + 120, 0, 255).astype(np.uint8)
    mine = w.T if "transB" in op else w
    exact = saturated(rows, mine) - 120 * mine.astype(np.int64).sum(0)
    np.testing.assert_allclose(y, exact * 0.0002, rtol=1e-4, atol=1e-3)


def test_layers_one_after_the_other() -> None:
    """The second layer reads what the first one gives after saturation."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[3, 8] x) => (float[3, 8] y)
        <float s = {0.01}, uint8 z = {120}, float ws = {0.002}, int8 wz = {0}> {
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  e = DequantizeLinear(w, ws, wz)
        m = MatMul(d, e)  r = QuantizeLinear(m, s, z)  t = DequantizeLinear(r, s, z)
        y = MatMul(t, e) }"""
    proto = parser.parse_model(text)
    w = RNG.choice(np.array([-127, -90, 80, 127], np.int8), (8, 8))
    proto.graph.initializer.append(numpy_helper.from_array(w, "w"))
    x = RNG.normal(0, 1, (3, 8)).astype(np.float32)
    found = emulator(Model.from_proto(proto))
    (y,) = found.run({"x": x})
    assert len(found.layers) == found.total == 2
    rows, offset = np.clip(np.rint(x / np.float32(0.01)) + 120, 0, 255).astype(np.uint8), 120
    for _ in range(2):
        real = (saturated(rows, w) - offset * w.astype(np.int64).sum(0)) * 0.00002
        rows = np.clip(np.rint(real / 0.01) + 120, 0, 255).astype(np.uint8)
    np.testing.assert_allclose(y, real, rtol=1e-3, atol=5e-3)


MODEL = """<ir_version: 8, opset_import: ["": 17]>
    g (float[1, 8, 12, 12] x) => (float[1, 10] y) {
    c = Conv(x, w)  r = Relu(c)  d = Conv<group = 2>(r, wg)  p = GlobalAveragePool(d)
    f = Flatten(p)  y = MatMul(f, m) }"""


def guarded(saturates: bool) -> tuple[Model, Model, list[str]]:
    proto = parser.parse_model(MODEL)
    rng = np.random.default_rng(4)
    for name, shape in {"w": (16, 8, 3, 3), "wg": (16, 8, 3, 3), "m": (16, 10)}.items():
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    before = Model.from_proto(proto)
    after = before.copy()
    target = replace(load_target("ort-cpu-avx2"), costs=None, saturates=saturates)
    notes = QuantizeStatic(target, synthetic_samples(before, 8))(after)
    return before, after, [n.text for n in notes]


def test_the_guard_keeps_all_sums_in_16_bits() -> None:
    before, after, notes = guarded(saturates=True)
    assert any("channels raised to keep sums of pairs in 16 bits" in text for text in notes)
    found = emulator(after)
    assert (len(found.layers), found.total) == (0, 3)
    assert check(after, target="ort-cpu-avx2").violations == ()
    feeds = list(synthetic_samples(before, 8))
    one, two = (runtime.session(m.to_proto()) for m in (before, after))
    a, b = (np.stack([s.run(None, feed)[0] for feed in feeds]) for s in (one, two))
    assert sqnr_db(a, b) > 25


def test_without_the_guard_they_are_violations() -> None:
    _, after, notes = guarded(saturates=False)
    assert not any("16 bits" in text for text in notes)
    assert len(emulator(after).layers) == 3
    found = check(after, target="ort-cpu-avx2").violations
    assert [v.rule for v in found] == ["saturates"] * 3
    assert check(after, target="ort-cpu").violations == ()


def odd_channels() -> onnx.ModelProto:
    """Three channels, large weights: pairs are others once widen_channels adds a fourth."""
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1, 3, 12, 12] x) => (float[a, b, c, d] y)'
        " { c = Conv<pads = [1, 1, 1, 1]>(x, w) r = Relu(c) y = Conv(r, v) }"
    )
    rng = np.random.default_rng(3)
    for name, shape in {"w": (32, 3, 3, 3), "v": (16, 32, 1, 1)}.items():
        values = rng.choice([-0.11, -0.1, 0.1, 0.12], shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    return proto


def test_the_guard_holds_when_channels_of_zeros_are_added() -> None:
    model = Model.from_proto(odd_channels()).copy()
    target = replace(load_target("ort-cpu-avx2"), costs=None)
    QuantizeStatic(target, synthetic_samples(model, 8))(model)
    assert emulator(model).layers == ()
    (first, _) = model.nodes("Conv")
    source = producer(first.inputs[1])
    assert source is not None
    q = source.inputs[0].values
    wide = np.pad(q, ((0, 0), (0, 1), (0, 0), (0, 0)))
    for weight in (q, wide):
        rows = kernel_rows(first, weight)
        assert rows is not None
        assert not saturates(rows).any()
    model.sweep()
    WidenChannels(target)(model)
    assert emulator(model).layers == ()


def test_balanced_rounding_is_kept_where_pairs_stay_in_16_bits() -> None:
    """Rounding errors of a kernel cancel, to half a step, in all outputs but a few."""
    proto = odd_channels()
    exact = RNG.normal(0, 0.1, (32, 3, 3, 3)).astype(np.float32)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(exact, "w"))
    model = Model.from_proto(proto).copy()
    x = RNG.gamma(1.0, 1.0, (8, 3, 12, 12)).astype(np.float32)
    target = replace(load_target("ort-cpu-avx2"), costs=None)
    QuantizeStatic(target, open_samples({"x": x}, model))(model)
    assert emulator(model).layers == ()
    source = producer(model.nodes("Conv")[0].inputs[1])
    assert source is not None
    q, scale = (np.asarray(source.inputs[i].values, np.float64) for i in (0, 1))
    steps = exact / scale.reshape(-1, 1, 1, 1)
    balanced, nearest = (
        (np.abs((w - steps).sum((2, 3))) < 0.51).all(1) for w in (q, np.rint(steps))
    )
    assert balanced.mean() > 0.6
    assert nearest.mean() < 0.5


def test_what_saturates_is_compared_as_it_runs_there() -> None:
    """Foreign integers know no guard."""
    model = Model.from_proto(odd_channels()).copy()
    QuantizeStatic(replace(load_target("ort-cpu"), costs=None), synthetic_samples(model, 8))(model)
    assert len(emulator(model).layers) == 2
    setting = Setting(
        model, load_target("ort-cpu-avx2"), NO_SAMPLES, synthetic_samples(model, 4), None, 5.0,
        True, Job(None, (), None),
    )  # fmt: skip
    recipe = load_recipe("cleanup")
    found = attempt(recipe, model.copy(), [], setting)
    assert any("exceed 16 bits in 2 layers" in text for text in found.warnings)
    assert found.fidelity is not None
    assert found.fidelity.sqnr_db < 30
    plain = attempt(recipe, model.copy(), [], replace(setting, target=load_target("ort-cpu")))
    assert plain.fidelity is not None
    assert plain.fidelity.sqnr_db > 60
    assert not any("16 bits" in text for text in plain.warnings)
