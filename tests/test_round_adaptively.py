"""round_adaptively: closer results with the same scales, for every operator; what it declines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.data import Samples, open_samples
from onnxq.errors import DataError
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.numerics.saturation import excess
from onnxq.passes import QuantizeStatic, QuantizeWeights, RoundAdaptively
from onnxq.passes.ops import clamp_behind, kernel_rows
from onnxq.passes.packed_weights import stands_for
from onnxq.synthetic import synthetic_samples
from onnxq.targets import load_target

SHAPES = {
    "w": (16, 8, 3, 3), "wg": (16, 4, 3, 3), "wd": (8, 1, 5, 5), "wt": (8, 16, 3, 3),
    "wtg": (8, 8, 3, 3), "w1": (16, 8, 5), "b": (16,), "b8": (8,),
    "m": (32, 48), "mt": (48, 32), "m2": (48, 40), "left": (40, 20), "bias": (48,),
    "square": (32, 32),
}  # fmt: skip
IMAGE, ROWS, FOUR = "float[1, 8, 6, 6] x", "float[20, 32] x", "float[a, b, c, d] y"
OUT = "float[a, b] y"
CASES = {
    "MatMul": ("y = MatMul(x, m)", ROWS, OUT),
    "MatMul-left": ("y = MatMul(left, x)", ROWS, OUT),
    "Gemm": ("y = Gemm<transB = 1>(x, mt, bias)", ROWS, OUT),
    "Gemm-Relu": ("r = Gemm(x, m, bias) y = Relu(r)", ROWS, OUT),
    "Conv": ("y = Conv<strides = [2, 1], pads = [1, 0, 1, 0]>(x, w, b)", IMAGE, FOUR),
    "Conv-Relu": ("r = Conv(x, w, b) y = Relu(r)", IMAGE, FOUR),
    "Conv-Clip": ("r = Conv(x, w, b) y = Clip(r, zero, six)", IMAGE, FOUR),
    "Conv-groups": ("y = Conv<group = 2>(x, wg, b)", IMAGE, FOUR),
    "Conv-depthwise": ("r = Conv<group = 8>(x, wd, b8) y = Relu(r)", IMAGE, FOUR),
    "Conv-1D": ("y = Conv(x, w1)", "float[1, 8, 16] x", "float[a, b, c] y"),
    "ConvTranspose": ("y = ConvTranspose<strides = [2, 2]>(x, wt, b)", IMAGE, FOUR),
    "ConvTranspose-groups": ("r = ConvTranspose<group = 2>(x, wtg, b) y = Relu(r)", IMAGE, FOUR),
    "chain": ("r = MatMul(x, m) s = Relu(r) y = MatMul(s, m2)", ROWS, OUT),
}  # fmt: skip
OTHERS = {
    "both": ("r = Gemm(x, m, bias) y = Relu(r)", ROWS, f"{OUT}, float[c, d] r"),
    "shared": ("h = MatMul(x, square) y = MatMul(h, square)", ROWS, OUT),
    "log": ("l = Log(x) y = MatMul(l, m)", ROWS, OUT),
    "alpha": ("r = Gemm<alpha = 0.5, beta = 2.0>(x, m, bias) y = Relu(r)", ROWS, OUT),
}
TARGET = load_target("generic")


def model(name: str, seed: int = 2) -> Model:
    body, inputs, outputs = {**CASES, **OTHERS}[name]
    proto = parser.parse_model(
        f'<ir_version: 11, opset_import: ["": 21]> g ({inputs}) => ({outputs}) '
        f"<float zero = {{0}}, float six = {{6}}> {{ {body} }}"
    )
    rng = np.random.default_rng(seed)
    for key, shape in SHAPES.items():
        if f"{key}," in body or f"{key})" in body:
            value = rng.normal(0, 0.2, shape).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(value, key))
    return Model.from_proto(proto)


def alike(model: Model, count: int = 32, seed: int = 5) -> Samples:
    """Samples as behind a Relu: channels follow few causes, neighbours in space are alike."""
    rng = np.random.default_rng(seed)
    shape = tuple(model.graph.inputs[0].shape)
    axis = {2: 0 if "left" in str(model.graph.nodes[0].inputs[0].name) else 1}.get(len(shape), 1)
    size = shape[axis]
    mix = np.random.default_rng(1).normal(size=(max(size // 6, 2), size))
    places = [d for i, d in enumerate(shape) if i != axis]
    feeds = []
    for _ in range(count):
        causes = rng.normal(size=(*places, len(mix)))
        if len(places) == 3:
            causes = causes + np.roll(causes, 1, 1) + np.roll(causes, 1, 2)
        x = causes @ mix + 0.2 * rng.normal(size=(*places, size))
        feeds.append({"x": np.moveaxis(np.maximum(x, 0), -1, axis).astype(np.float32)})
    return open_samples(feeds, model)


def quantized(
    name: str, weights: str = "int4", samples: Samples | None = None, **options: Any
) -> tuple[Model, Model, Samples]:
    """A model; what quantize_static makes of it; samples."""
    before = model(name)
    samples = alike(before) if samples is None else samples
    options = {"target": TARGET, "weight_range": "mse", **options}
    after = before.copy()
    QuantizeStatic(samples=samples, activations="a8", weights=weights, **options)(after)  # type: ignore[arg-type]
    return before, after, samples


def closeness(before: Model, after: Model, samples: Samples) -> float:
    one, two = runtime.session(before), runtime.session(after)
    pairs = [(one.run(None, f)[0], two.run(None, f)[0]) for f in samples]
    return sqnr_db(np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]))


def integers(model: Model) -> list[np.ndarray[Any, Any]]:
    found = [stands_for(t) for node in model.nodes() for t in node.inputs]
    return [np.asarray(s.numbers.values) for s in found if s is not None]


@pytest.mark.parametrize("name", CASES)
def test_results_are_closer(name: str) -> None:
    """On samples that the pass has not seen, by more than it takes to be luck."""
    before, after, samples = quantized(name)
    plain = after.copy()
    notes = RoundAdaptively(samples)(after)
    assert notes
    assert all(note.changed for note in notes)
    fresh = alike(before, 8, seed=99)
    gain = closeness(before, after, fresh) - closeness(before, plain, fresh)
    assert gain > (0.3 if "depthwise" in name else 1)


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_integers_alone_are_changed(weights: str) -> None:
    """Scales, zero points and biases stay, to the bit; integers keep to their symmetric range."""
    _, after, samples = quantized("chain", weights)
    plain = after.copy()
    RoundAdaptively(samples)(after)
    saved = Model.from_proto(after.to_proto())
    changed = 0
    one, two = (m.graph.tensors() for m in (plain, saved))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        if not hasattr(tensor, "values"):
            continue
        a, b = np.asarray(tensor.values), np.asarray(two[key].values)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if (a != b).any():
            changed += 1
            assert a.ndim == 2
            assert np.abs(b.astype(int)).max() <= (7 if weights == "int4" else 127)
    assert changed == 2


def decibels(text: str) -> list[float]:
    words = text.split()
    return [float(words[i - 1]) for i, w in enumerate(words) if w.startswith("dB")]


def test_layers_see_what_those_before_have_become() -> None:
    """A second run finds each as close as the first left it: nothing in front changed since."""
    _, after, samples = quantized("chain")
    first = RoundAdaptively(samples)(after)
    second = RoundAdaptively(samples)(after)
    for one, two in zip(first, second, strict=True):
        assert decibels(two.text)[1] == pytest.approx(decibels(one.text)[0], abs=0.11)


def test_results_repeat() -> None:
    _, after, samples = quantized("chain")
    again = after.copy()
    notes = RoundAdaptively(samples)(after)
    assert RoundAdaptively(samples)(again) == notes
    assert after.to_proto().SerializeToString() == again.to_proto().SerializeToString()


def test_a_second_run_refines_or_leaves() -> None:
    before, after, samples = quantized("Conv-Relu")
    RoundAdaptively(samples)(after)
    once = after.copy()
    RoundAdaptively(samples)(after)
    held = samples.skip(24)
    assert closeness(before, after, held) >= closeness(before, once, held) - 0.01


def test_layers_that_get_no_closer_stay() -> None:
    """The samples that judge have other correlations than those that were fitted to."""
    before = model("MatMul")
    rng = np.random.default_rng(0)
    one = rng.normal(size=(3, 20, 2)) @ rng.normal(size=(2, 32))
    feeds = [{"x": v.astype(np.float32)} for v in (*one, rng.normal(size=(20, 32)))]
    _, after, samples = quantized("MatMul", samples=open_samples(feeds, before))
    plain = integers(after)
    (note,) = RoundAdaptively(samples)(after)
    assert not note.changed
    assert "undone" in note.text
    for a, b in zip(plain, integers(after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_notes_tell_both_errors() -> None:
    before, after, samples = quantized("Gemm-Relu")
    held = samples.skip(24)
    plain = closeness(before, after, held)
    (note,) = RoundAdaptively(samples)(after)
    now, was = decibels(note.text)
    assert now > was
    assert abs(was - plain) < 2  # there, results are quantized as well
    assert "integers moved" in note.text


def test_weights_that_quantize_weights_stored() -> None:
    """Behind quantize_static, a layer that it left float."""
    before, after, samples = quantized("chain", layers=("first=float",))
    QuantizeWeights(format="int4", granularity="channel", symmetric=True, smallest=64)(after)
    plain = after.copy()
    notes = RoundAdaptively(samples)(after)
    assert [note.changed for note in notes] == [True, True]
    fresh = alike(before, 8, seed=99)
    assert closeness(before, after, fresh) > closeness(before, plain, fresh) + 1


def test_a_gemm_that_scales_its_product() -> None:
    before, after, samples = quantized("alpha")
    QuantizeWeights(format="int4", granularity="channel", symmetric=True)(after)
    plain = after.copy()
    (note,) = RoundAdaptively(samples)(after)
    assert note.changed
    fresh = alike(before, 8, seed=99)
    assert closeness(before, after, fresh) > closeness(before, plain, fresh) + 1


def test_sums_of_pairs_do_not_come_to_saturate() -> None:
    target = replace(load_target("ort-cpu-avx2"), costs=None)
    _, after, samples = quantized("Conv", "int8", target=target, weight_range="minmax")
    free = after.copy()
    RoundAdaptively(samples, target=target)(after)
    RoundAdaptively(samples)(free)

    def worst(model: Model) -> float:
        (conv,) = model.nodes("Conv")
        stands = stands_for(conv.inputs[1])
        assert stands is not None
        rows = kernel_rows(conv, np.asarray(stands.numbers.values))
        assert rows is not None
        return max(float(excess(part).max()) for part in rows)

    assert worst(after) <= 1 < worst(free)


def text_of(options: dict[str, Any], name: str = "Conv", weights: str = "int8") -> list[str]:
    _, after, samples = quantized(name, weights)
    plain = integers(after)
    notes = RoundAdaptively(samples, **options)(after)
    for a, b in zip(plain, integers(after), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not any(note.changed for note in notes)
    return [note.text for note in notes]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"most_bits": 4}, "a weight of 8 bits: most_bits allows 4"),
        ({"largest": 1000}, "a weight of 1152 values: largest allows 1000"),
        ({"memory_mb": 1}, "what it meets takes 3 MB: memory_mb allows 1"),
    ],
)
def test_what_is_too_much_is_left_alone(options: dict[str, Any], why: str) -> None:
    assert why in text_of(options)[0]


def test_groups_of_a_kernel_are_left_alone() -> None:
    """Those that quantize_weights has stored, laid out along an axis of their own."""
    options = {"format": "uint4", "granularity": "group", "group_size": 24, "symmetric": False}
    _, after, samples = quantized("Conv", layers=("first=float",))
    QuantizeWeights(encoding="storage", layers=("*=uint4",), **options)(after)  # type: ignore[arg-type]
    (note,) = RoundAdaptively(samples)(after)
    assert not note.changed
    assert "in groups" in note.text


def test_weights_that_are_quantized_at_load_are_left_alone() -> None:
    proto = parser.parse_model(
        f'<ir_version: 11, opset_import: ["": 21]> g ({ROWS}) => ({OUT}) '
        "<float s = {0.1}, int8 z = {0}> "
        "{ q = QuantizeLinear(m, s, z) w = DequantizeLinear(q, s, z) y = MatMul(x, w) }"
    )
    value = np.random.default_rng(0).normal(0, 0.2, SHAPES["m"]).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(value, "m"))
    after, (_, before, samples) = Model.from_proto(proto), quantized("MatMul")
    after.unquantized[:] = before.unquantized
    (note,) = RoundAdaptively(samples)(after)
    assert "a weight of float32: integers alone are rounded" in note.text
    assert not note.changed


def test_a_result_that_is_read_before_the_clamp_is_whole() -> None:
    """Only where the Relu alone reads it do negative results not matter."""
    for name, is_clamped in (("Gemm-Relu", True), ("both", False)):
        _, after, _ = quantized(name)
        source = after.unquantized[-1]
        bounds = clamp_behind(source, source.nodes("Gemm")[0])
        assert bounds == ((0, np.inf) if is_clamped else None)


def test_a_weight_with_other_readers_is_left_alone() -> None:
    assert set(text_of({}, "shared")) == {"its weight has other readers"}


def test_what_a_weight_was_must_be_known() -> None:
    _, after, samples = quantized("chain")
    source = after.unquantized[-1]
    source.nodes("MatMul")[0].name = "another"
    first, second = RoundAdaptively(samples)(after)
    assert "nothing tells what the weight was" in first.text
    assert second.changed
    after.unquantized.clear()
    (note,) = RoundAdaptively(samples)(after)
    assert "quantize_static comes first" in note.text


def test_a_float_model_has_nothing_to_round() -> None:
    before, after, samples = quantized("MatMul")
    before.unquantized[:] = [after.unquantized[-1]]
    assert RoundAdaptively(samples)(before) == []


def test_inputs_that_are_not_finite_are_told() -> None:
    before = model("log")
    rng = np.random.default_rng(0)
    feeds = [{"x": v.astype(np.float32)} for v in rng.uniform(1, 2, (8, 20, 32))]
    _, after, _ = quantized("log", samples=open_samples(feeds, before))
    feeds[0]["x"][0, 0] = 0
    (note,) = RoundAdaptively(open_samples(feeds, before))(after)
    assert "NaN or infinite" in note.text


def test_inputs_whose_squares_are_not_finite_are_told() -> None:
    before = model("MatMul")
    rows = np.random.default_rng(0).normal(0, 1e25, (8, 20, 32)).astype(np.float32)
    samples = open_samples([{"x": v} for v in rows], before)
    _, after, _ = quantized("MatMul", samples=samples)
    (note,) = RoundAdaptively(samples)(after)
    assert "too large" in note.text


def test_samples_are_needed_and_must_be_real() -> None:
    before, after, samples = quantized("MatMul")
    with pytest.raises(DataError, match="give --data"):
        RoundAdaptively(samples.take(0))(after)
    (note,) = RoundAdaptively(synthetic_samples(before, 4))(after)
    assert "synthetic" in note.text
    with pytest.raises(DataError, match="has no input"):
        RoundAdaptively(replace(samples, read=lambda a, b: iter([{}] * (b - a))))(after)


@pytest.mark.parametrize("option", ["most_bits", "largest", "places", "memory_mb"])
def test_options_are_checked(option: str) -> None:
    samples = alike(model("MatMul"), 2)
    with pytest.raises(ValueError, match=option):
        RoundAdaptively(samples, **{option: 0})  # type: ignore[arg-type]
