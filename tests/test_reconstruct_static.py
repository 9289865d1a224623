"""reconstruct_static: closer results with the scales, formats and biases that there are."""

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
from onnxq.passes import QuantizeStatic, ReconstructStatic
from onnxq.passes.ops import kernel_rows
from onnxq.passes.packed_weights import stands_for
from onnxq.synthetic import synthetic_samples
from onnxq.targets import load_target

SHAPES = {
    "w": (16, 8, 3, 3), "wg": (16, 4, 3, 3), "wd": (24, 1, 5, 5), "wt": (8, 16, 3, 3),
    "wtg": (8, 8, 3, 3), "m": (32, 48), "mt": (48, 32), "m2": (48, 40), "left": (40, 20),
    "b": (16,), "c": (48,), "d": (24,), "stack": (2, 32, 24),
}  # fmt: skip
IMAGE, ROWS, FOUR, OUT = (
    "float[1, 8, 6, 6] x", "float[20, 32] x", "float[p, q, r, s] y", "float[p, q] y",
)  # fmt: skip
CASES = {
    "MatMul": ("y = MatMul(x, m)", ROWS, OUT),
    "MatMul-left": ("y = MatMul(left, x)", ROWS, OUT),
    "Gemm": ("y = Gemm<transB = 1>(x, mt, c)", ROWS, OUT),
    "Gemm-plain": ("y = Gemm(x, m, c)", ROWS, OUT),
    "Conv": ("y = Conv<strides = [2, 1], pads = [1, 0, 1, 0]>(x, w, b)", IMAGE, FOUR),
    "Conv-groups": ("y = Conv<group = 2>(x, wg, b)", IMAGE, FOUR),
    "Conv-depthwise": ("y = Conv<group = 24>(x, wd, d)", "float[1, 24, 9, 9] x", FOUR),
    "ConvTranspose": ("y = ConvTranspose<strides = [2, 2]>(x, wt, b)", IMAGE, FOUR),
    "ConvTranspose-groups": ("y = ConvTranspose<group = 2>(x, wtg, b)", IMAGE, FOUR),
    "chain": ("h = Gemm(x, m, c) r = Relu(h) y = MatMul(r, m2)", ROWS, OUT),
    "shared": ("h = MatMul(x, m) k = Relu(x) g = MatMul(k, m) y = Add(h, g)", ROWS, OUT),
}  # fmt: skip
AXES = {"MatMul-left": 0}


def model(body: str, inputs: str, outputs: str) -> Model:
    proto = parser.parse_model(
        f'<ir_version: 11, opset_import: ["": 21]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    rng = np.random.default_rng(2)
    for name, shape in SHAPES.items():
        if f"{name}," in body or f"{name})" in body:
            value = rng.normal(0, 0.2, shape).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(value, name))
    return Model.from_proto(proto)


def correlated(model: Model, count: int = 32, axis: int = 1) -> Samples:
    """Samples whose vectors follow few causes; neighbours in space are alike."""
    rng = np.random.default_rng(5)
    shape = (count, *model.graph.inputs[0].shape)
    size = shape[1 + axis]
    mix = rng.normal(size=(size, max(size // 6, 2))) @ rng.normal(size=(max(size // 6, 2), size))
    x = rng.normal(size=shape)
    if len(shape) == 5:
        x = x + np.roll(x, 1, 4) + np.roll(x, 2, 4) + np.roll(x, 1, 3)
    mixed = np.moveaxis(x, 1 + axis, -1) @ (mix / size + 0.1 * np.eye(size))
    values = np.moveaxis(mixed, -1, 1 + axis)
    return open_samples([{"x": v.astype(np.float32)} for v in values], model)


def closeness(before: Model, after: Model, samples: Samples) -> float:
    one, two = runtime.session(before), runtime.session(after)
    pairs = [(one.run(None, f)[0], two.run(None, f)[0]) for f in samples]
    return sqnr_db(np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]))


def quantized(before: Model, samples: Samples, target: Any = None, **options: Any) -> Model:
    after = before.copy()
    target = target or replace(load_target("generic"), costs=None)
    QuantizeStatic(target, samples, activations="a16", **options)(after)
    return after


def weights(model: Model) -> dict[str, np.ndarray]:
    """Constants by name."""
    found = model.graph.tensors()
    return {n: t.values for n, t in found.items() if hasattr(t, "values") and t.values is not None}


EACH = [(n, g) for n in CASES for g in ("tensor", "channel", "group")]
EACH.remove(("Conv-depthwise", "group"))  # groups of one value


@pytest.mark.parametrize(("name", "granularity"), EACH)
def test_results_are_closer_and_integers_alone_change(name: str, granularity: Any) -> None:
    before = model(*CASES[name])
    samples = correlated(before, axis=AXES.get(name, 1))
    plain = quantized(
        before, samples, weights="int4", weight_range="mse", granularity=granularity, group_size=8
    )
    after = plain.copy()
    notes = ReconstructStatic(samples=samples)(after)
    assert all(note.changed for note in notes)
    held = samples.skip(24)
    gain = closeness(before, after, held) - closeness(before, plain, held)
    assert gain > (0.4 if "depthwise" in name else 2)
    one, two = weights(plain), weights(after)
    assert one.keys() == two.keys()
    changed = {n for n in one if not np.array_equal(one[n], two[n])}
    assert len(changed) == len(notes)
    for key in changed:
        assert (one[key].dtype, one[key].shape) == (two[key].dtype, two[key].shape)
        assert str(two[key].dtype) == "int4"
        assert abs(two[key].astype(int)).max() <= 7


@pytest.mark.parametrize(("format", "least"), [("int8", 2.0), ("uint8", 2.0)])
def test_eight_bits(format: Any, least: float) -> None:
    before = model(*CASES["Conv"])
    samples = correlated(before)
    plain = quantized(before, samples, weights=format)
    after = plain.copy()
    ReconstructStatic(samples=samples)(after)
    assert closeness(before, after, samples) > closeness(before, plain, samples) + least
    assert [n.text for n in ReconstructStatic(samples=samples, most_bits=4)(plain)] == [
        "weights of 8 bits, more than 4"
    ]


def test_weights_that_are_widened_at_load() -> None:
    before = model(*CASES["Conv"])
    samples = correlated(before)
    target = replace(load_target("ort-cpu"), costs=None)
    after = before.copy()
    QuantizeStatic(target, samples, weights="int4", layers=("*=w4",))(after)
    plain = after.copy()
    (note,) = ReconstructStatic(samples=samples)(after)
    assert note.changed
    assert note.text.startswith("weights as int4: results within")
    assert closeness(before, after, samples) > closeness(before, plain, samples) + 2


def saturating(model: Model) -> float:
    """How far the worst pair of a model's weights can go; above 1 saturates."""
    worst = 0.0
    for node in model.nodes("Conv", "Gemm", "MatMul"):
        stands = stands_for(node.inputs[1])
        assert stands is not None
        assert stands.read is not None
        rows = kernel_rows(node, stands.read().numbers)
        assert rows is not None
        worst = max(worst, *(float(excess(part).max()) for part in rows))
    return worst


@pytest.mark.parametrize("name", ["Conv", "Gemm", "Conv-groups"])
def test_no_integer_is_chosen_with_which_sums_saturate(name: str) -> None:
    before = model(*CASES[name])
    samples = correlated(before)
    target = replace(load_target("ort-cpu-avx2"), costs=None)
    plain = before.copy()
    QuantizeStatic(target, samples)(plain)
    assert saturating(plain) <= 1
    free, held = plain.copy(), plain.copy()
    ReconstructStatic(samples=samples)(free)
    assert saturating(free) > 1
    assert all(n.changed for n in ReconstructStatic(samples=samples, target=target)(held))
    assert saturating(held) <= 1
    assert closeness(before, held, samples) > closeness(before, plain, samples)


def test_integers_stay_where_that_is_better() -> None:
    """The samples that judge have other correlations than those that were fitted to."""
    before = model(*CASES["MatMul"])
    rng = np.random.default_rng(0)
    one = rng.normal(size=(12, 20, 2)) @ rng.normal(size=(2, 32))
    other = rng.normal(size=(4, 20, 32))
    samples = open_samples([{"x": v.astype(np.float32)} for v in (*one, *other)], before)
    after = quantized(before, samples, weights="int4", weight_range="mse")
    plain = weights(after)
    (note,) = ReconstructStatic(samples=samples, damping=0.0)(after)
    assert (note.changed, note.text.endswith(": undone")) == (False, True)
    assert all(np.array_equal(value, plain[n]) for n, value in weights(after).items())


IF = (
    "t = Constant<value_int = 1>() k = Cast<to = 9>(t) y = If(k) <then_branch = g1 () => "
    "(float[20, 48] u) { e = Neg(x) u = MatMul(e, m) }, else_branch = g2 () => (float[20, 48] v) "
    "{ h = MatMul(x, m) v = Neg(h) }>"
)
DECLINES = [
    pytest.param(IF, ROWS, OUT, "body", id="body"),
    pytest.param("y = MatMul(x, stack)", "float[1, 20, 32] x", "float[p, q, r] y", "a stack of 2",
                 id="stack"),
    pytest.param("z = Sub(x, x) y = MatMul(z, m)", ROWS, OUT, "inputs are zeros", id="zeros"),
    pytest.param("h = MatMul(x, m) k = Transpose(h) g = MatMul(m, k) y = MatMul(x, g)", ROWS,
                 "float[20, 20] y", "other readers", id="two sides"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "inputs", "outputs", "why"), DECLINES)
def test_declines(body: str, inputs: str, outputs: str, why: str) -> None:
    before = model(body, inputs, outputs)
    samples = correlated(before)
    after = quantized(before, samples, weights="int8", granularity="tensor")
    proto = after.to_proto()
    notes = ReconstructStatic(samples=samples)(after)
    assert notes
    for note in notes:
        assert not note.changed
        assert why in note.text
    assert after.to_proto() == proto


def test_it_needs_what_weights_were_and_samples() -> None:
    before = model(*CASES["MatMul"])
    samples = correlated(before, 4)
    assert "quantize_static comes first" in ReconstructStatic(samples=samples)(before)[0].text
    after = quantized(before, samples)
    with pytest.raises(DataError, match="give --data"):
        ReconstructStatic(samples=samples.take(0))(after)
    notes = ReconstructStatic(samples=synthetic_samples(before, 8))(after)
    assert [(n.changed, "synthetic" in n.text) for n in notes] == [(False, True)]
    few = ReconstructStatic(samples=samples, memory_mb=1)
    assert few(after)[0].changed


def test_what_was_renamed_is_left_alone() -> None:
    before = model(*CASES["MatMul"])
    samples = correlated(before, 4)
    after = quantized(before, samples)
    after.nodes("MatMul")[0].name = "another"
    (note,) = ReconstructStatic(samples=samples)(after)
    assert not note.changed
    assert "nothing tells what weights were" in note.text


OPTIONS = [({"damping": -1.0}, "damping"), ({"sweeps": -1}, "sweeps"), ({"rounds": 0}, "rounds"),
           ({"memory_mb": 0}, "memory_mb"), ({"most_bits": 1}, "most_bits")]  # fmt: skip


@pytest.mark.parametrize(("options", "match"), OPTIONS)
def test_options(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ReconstructStatic(samples=correlated(model(*CASES["MatMul"]), 2), **options)
