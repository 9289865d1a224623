"""smooth_activations: what a factor folds into, what declines, what it brings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.data import Samples, open_samples
from onnxq.errors import DataError
from onnxq.excerpts import ROWS, VALUES, excerpts
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.numerics.migration import BOUND, rounding_noise, search, smoothing
from onnxq.passes import QuantizeStatic, SmoothActivations
from onnxq.schemes import PerTensor
from onnxq.targets import load_target
from onnxq.testing import check

TARGET = load_target("ort-cpu")
SHAPES = {
    "g": (16,), "b": (16,), "one": (), "m": (16, 24), "k": (16, 24), "v": (16, 24), "mt": (24, 16),
    "first": (16, 16), "firstt": (16, 16), "wide": (16, 48), "table": (30, 16), "after": (16, 8),
    "w": (16, 16, 3, 3), "c": (16,), "w2": (12, 16, 3, 3), "wg": (16, 8, 3, 3), "wd": (16, 1, 3, 3),
    "wt": (16, 8, 3, 3), "wtp": (16, 8, 3, 3), "wt0": (16, 16, 1, 1), "mean": (16,), "one16": (16,),
    "low8": (16, 8), "low8b": (16, 8),
}  # fmt: skip
LARGE: dict[str, Any] = {  # where channels 2 and 9 are in what makes them ...
    "g": np.s_[[2, 9]], "b": np.s_[[2, 9]], "c": np.s_[[2, 9]], "w": np.s_[[2, 9]],
    "first": np.s_[:, [2, 9]], "firstt": np.s_[[2, 9]], "table": np.s_[:, [2, 9]],
    "wide": np.s_[:, [34, 41]], "wt0": np.s_[:, [2, 9]], "low8": np.s_[:, 2], "low8b": np.s_[:, 1],
}  # fmt: skip
SMALL: dict[str, Any] = {  # ... and in what reads them
    "m": np.s_[[2, 9]], "k": np.s_[[2, 9]], "v": np.s_[[2, 9]], "mt": np.s_[:, [2, 9]],
    "w2": np.s_[:, [2, 9]], "wd": np.s_[[2, 9]], "wt": np.s_[[2, 9]],
}  # fmt: skip
ROWS_IN, IMAGE = "float[N, 6, 16] x", "float[N, 16, 8, 8] x"
Y2, Y3, Y4 = "float[p, q] y", "float[p, q, r] y", "float[p, q, r, s] y"


def graph(body: str, inputs: str, outputs: str, opset: int = 21) -> onnx.ModelProto:
    """Constants of SHAPES that the body names: channels 2 and 9 are outliers."""
    proto = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]> '
        f"t ({inputs}) => ({outputs}) {{ {body} }}"
    )
    rng = np.random.default_rng(4)
    for name in dict.fromkeys(i for node in proto.graph.node for i in node.input):
        if name not in SHAPES:
            continue
        value = rng.normal(0, 0.3, SHAPES[name])
        if name in LARGE:
            value[LARGE[name]] *= 60
        if name in SMALL:
            value[SMALL[name]] /= 60
        if name == "wg":  # two groups
            value[:8, 2] /= 60
            value[8:, 1] /= 60
        if name == "wtp":
            value[:8, 2] *= 60
            value[8:, 1] *= 60
        if name == "mean":
            value = np.abs(value) + 0.5
        proto.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    return proto


def drawn(proto: onnx.ModelProto, count: int = 12) -> Samples:
    model, rng = Model.from_proto(proto), np.random.default_rng(8)
    feeds: list[Mapping[str, NDArray[Any]]] = []
    for _ in range(count):
        feed = {}
        for value in model.graph.inputs:
            shape = [d if isinstance(d, int) else 2 for d in value.shape]
            if value.dtype == np.int64:
                feed[value.name] = rng.integers(0, 30, shape)
            else:
                feed[value.name] = rng.normal(0, 1, shape).astype(np.float32)
        feeds.append(feed)
    return open_samples(feeds, model)


LN = "n = LayerNormalization(x, g, b)"
FOLDS = [
    pytest.param(f"{LN} y = MatMul(n, m)", ROWS_IN, Y3, 21, id="layer-norm"),
    pytest.param("n = RMSNormalization(x, g) y = MatMul(n, m)", ROWS_IN, Y3, 23, id="rms-norm"),
    pytest.param(f"{LN} q = MatMul(n, m) r = MatMul(n, k) s = MatMul(n, v) t = Add(q, r) y = Mul(t, s)", ROWS_IN, Y3, 21, id="q-k-v"),
    pytest.param("t = Tanh(x) a = Mul(t, g) n = Add(a, b) y = MatMul(n, m)", ROWS_IN, Y3, 21, id="mul-add"),
    pytest.param("t = Tanh(x) a = Mul(t, g) n = Sub(b, a) y = MatMul(n, m)", ROWS_IN, Y3, 21, id="sub"),
    pytest.param("t = Tanh(x) a = Mul(g, t) d = Div(a, one) n = Relu(d) y = MatMul(n, m)", ROWS_IN, Y3, 21, id="div"),
    pytest.param("a = MatMul(x, first) h = Add(a, b) r = Relu(h) y = MatMul(r, m)", ROWS_IN, Y3, 21, id="matmul-bias-relu"),
    pytest.param("h = Gemm<transB = 1>(x, firstt, b) r = LeakyRelu(h) y = Gemm<transB = 1>(r, mt)", "float[N, 16] x", Y2, 21, id="gemm-leaky-gemm"),
    pytest.param("t = Tanh(x) s = Sigmoid(x) a = Mul(t, g) n = Mul(s, a) y = MatMul(n, m)", ROWS_IN, Y3, 21, id="gate"),
    pytest.param("n = Gather(table, i) y = MatMul(n, m)", "int64[N, 5] i", Y3, 21, id="table"),
    pytest.param("h = Conv<pads = [1, 1, 1, 1]>(x, w, c) r = Relu(h) y = Conv(r, w2)", IMAGE, Y4, 21, id="conv-relu-conv"),
    pytest.param("h = Conv(x, w) r = MaxPool<kernel_shape = [2, 2]>(h) y = Conv<group = 2>(r, wg)", IMAGE, Y4, 21, id="pool-groups"),
    pytest.param("h = Conv(x, w) y = Conv<group = 16>(h, wd)", IMAGE, Y4, 21, id="depthwise"),
    pytest.param("h = ConvTranspose<group = 2>(x, wtp) y = Conv(h, w2)", IMAGE, Y4, 21, id="transposed-groups"),
    pytest.param("t = Tanh(x) h = BatchNormalization(t, g, b, one16, mean) y = Conv(h, w2)", IMAGE, Y4, 21, id="batch-norm"),
    pytest.param("h = InstanceNormalization(x, g, b) y = Conv(h, w2)", IMAGE, Y4, 21, id="instance-norm"),
    pytest.param("h = Conv(x, w) a = GlobalAveragePool(h) f = Flatten(a) y = Gemm(f, m)", IMAGE, Y2, 21, id="pool-flatten-gemm"),
    pytest.param("h = Conv(x, w) t = Transpose<perm = [0, 2, 3, 1]>(h) y = MatMul(t, m)", IMAGE, Y4, 21, id="transpose"),
    pytest.param("a = MatMul(x, low8) h = Relu(a) d = MatMul(x, low8b) n = Concat<axis = 2>(h, d) y = MatMul(n, m)", ROWS_IN, Y3, 21, id="concat"),
    pytest.param("h = MatMul(x, wide) q, r, s = Split<axis = 2, num_outputs = 3>(h) a = Softmax(q) t = Mul(a, r) y = MatMul(s, m) z = Neg(t)", ROWS_IN, f"{Y3}, float[d, e, f] z", 21, id="split"),
    pytest.param(
        "d = Constant<value_ints = [0, 0, 4, 4]>() f = Constant<value_ints = [0, 0, 16]>() p0 = MatMul(x, first)"
        " h = Reshape(p0, d) t = Transpose<perm = [0, 2, 1, 3]>(h) e = MatMul(s, t)"
        " u = Transpose<perm = [0, 2, 1, 3]>(e) o = Reshape(u, f) y = MatMul(o, m)",
        f"{ROWS_IN}, float[N, 4, 6, 6] s", Y3, 21, id="attention-values",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "inputs", "outputs", "opset"), FOLDS)
def test_a_factor_folds_into_what_makes_the_tensor(
    body: str, inputs: str, outputs: str, opset: int
) -> None:
    proto = graph(body, inputs, outputs, opset)
    samples = drawn(proto)
    checked = check(
        SmoothActivations(TARGET, samples), proto, feeds=list(samples.take(3)), rtol=2e-3, atol=2e-3
    )
    assert any("alpha" in n.text for n in checked.notes if n.changed), checked.notes
    before = sorted(node.op_type for node in proto.graph.node)
    assert sorted(checked.ops.elements()) == before  # no node is added


def test_a_transposed_convolution_reads_what_is_divided() -> None:
    proto = graph("h = ConvTranspose(x, wt0) y = ConvTranspose(h, wt)", IMAGE, Y4)
    pass_ = SmoothActivations(load_target("qnn-htp"), drawn(proto))
    checked = check(pass_, proto, feeds=list(drawn(proto, 2)), rtol=2e-3, atol=2e-3)
    assert any("alpha" in n.text for n in checked.notes if n.changed), checked.notes


DECLINES = [
    pytest.param(f"{LN} h = Gelu(n) y = MatMul(h, m)", "Gelu .* takes no factor", id="gelu"),
    pytest.param("y = MatMul(x, m)", "x is an input of the graph", id="input"),
    pytest.param(f"{LN} h = MatMul(n, first) y = Add(h, n)", "n is also read by Add", id="residual"),
    pytest.param(f"{LN} h = Relu(n) a = MatMul(h, first) y = Add(n, a)", "n is also used elsewhere", id="reader-on-the-way"),
    pytest.param(f"{LN} h = MatMul(n, first) u = Tanh(h) y = MatMul(u, first)", "first is also used elsewhere", id="shared-weight"),
    pytest.param("n = LayerNormalization(x, x2, b) y = MatMul(n, m)", "x2 is not constant", id="scale-not-constant"),
    pytest.param("t = Tanh(x) u = ReduceSum<keepdims = 1>(t, last) s = Mul(u, g) h = Add(u, s) r = Relu(h) y = MatMul(r, m)", "one value for several channels", id="broadcast"),
    pytest.param("f = Reshape(h, flat) y = MatMul(f, m)", "sizes around a Reshape|mixes channels", id="reshape-mixes"),
    pytest.param("t = Tanh(x) u = Slice(t, zero, end, last) y = MatMul(u, m)", "Slice .* takes no factor", id="slice"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), DECLINES)
def test_declines_with_a_reason(body: str, reason: str) -> None:
    inputs = ROWS_IN
    inits = ""
    if "x2" in body:
        inputs += ", float[16] x2"
    if "flat" in body:
        inputs, body = "float[N, 16, 3, 4] x", f"h = Relu(x) {body}"
        inits = "flat = Constant<value_ints = [0, -1, 16]>() "
    for name, value in (("last", -1), ("zero", 0), ("end", 16)):
        if f"{name})" in body or f"{name}," in body:
            inits += f"{name} = Constant<value_ints = [{value}]>() "
    proto = graph(inits + body, inputs, Y3)
    model = Model.from_proto(proto)
    notes = SmoothActivations(TARGET, drawn(proto))(model)
    assert not any(n.changed for n in notes)
    assert any(re.search(reason, n.text) for n in notes), notes
    assert model.to_proto() == Model.from_proto(proto).to_proto()


def test_a_second_output_of_a_normalisation_is_another_tensor() -> None:
    body = (
        "n, u, v, s = com.microsoft.SkipLayerNormalization(x, x, g, b) y = MatMul(s, m) z = Neg(n)"
    )
    proto = graph(body, ROWS_IN, f"{Y3}, float[d, e, f] z")
    known = onnx.helper.make_tensor_value_info("s", onnx.TensorProto.FLOAT, [None, 6, 16])
    proto.graph.value_info.append(known)
    (note,) = SmoothActivations(TARGET, drawn(proto))(Model.from_proto(proto))
    assert "s is a further output of SkipLayerNormalization" in note.text


def test_a_constant_that_is_moved_takes_no_factor() -> None:
    body = "u = Concat<axis = 2>(x, k0) y = MatMul(u, m0)"
    proto = graph(body, "float[2, 6, 16] x", Y3)
    for name, shape in (("k0", (2, 6, 4)), ("m0", (20, 8))):
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    (note,) = SmoothActivations(TARGET, drawn(proto))(Model.from_proto(proto))
    assert re.search("x is an input of the graph|k0 is constant, and moved", note.text)


UNFIT = [
    pytest.param("y = Gemm<transA = 1>(t, m)", "float[16, N] x", Y2, "reads t transposed", id="transposed"),
    pytest.param("y = MatMul(t, m3)", ROWS_IN, Y3, "m3 is of rank 3", id="batch-of-weights"),
    pytest.param("y = MatMul(t, spoiled)", ROWS_IN, Y3, "spoiled has NaN", id="nan"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "inputs", "outputs", "reason"), UNFIT)
def test_layers_that_cannot_be_rescaled_are_told(
    body: str, inputs: str, outputs: str, reason: str
) -> None:
    proto = graph(f"t = Tanh(x) {body}", inputs, outputs)
    for name, value in (("m3", np.ones((1, 16, 4))), ("spoiled", np.full((16, 4), np.nan))):
        proto.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    (note,) = SmoothActivations(TARGET, drawn(proto))(Model.from_proto(proto))
    assert reason in note.text
    assert not note.changed


def test_float16_weights_take_a_factor() -> None:
    proto = graph(
        "u = Cast<to = 10>(x) n = LayerNormalization(u, g, b) h = MatMul(n, m) y = Cast<to = 1>(h)",
        ROWS_IN, Y3,
    )  # fmt: skip
    for tensor in proto.graph.initializer:
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    samples = drawn(proto)
    checked = check(
        SmoothActivations(TARGET, samples), proto, feeds=list(samples.take(3)), rtol=2e-2, atol=2e-2
    )
    assert any(n.changed for n in checked.notes), checked.notes


def test_layers_that_read_a_tensor_along_two_axes() -> None:
    proto = graph(
        "t = Transpose<perm = [0, 2, 1]>(x) u = Tanh(t) y = MatMul(u, six) z = Conv(u, wc)",
        ROWS_IN, f"{Y3}, float[d, e, f] z",
    )  # fmt: skip
    rng = np.random.default_rng(3)
    for name, shape in (("six", (6, 8)), ("wc", (8, 16, 1))):
        value = rng.normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    samples = drawn(proto)
    assert len(SmoothActivations(TARGET, samples, insert=True)(Model.from_proto(proto))) == 2


def test_samples_have_to_be_real_and_there() -> None:
    proto = graph(f"{LN} y = MatMul(n, m)", ROWS_IN, Y3)
    samples = drawn(proto)
    (note,) = SmoothActivations(TARGET, replace(samples, synthetic=True))(Model.from_proto(proto))
    assert "give --data" in note.text
    assert not note.changed
    with pytest.raises(DataError, match="give --data"):
        SmoothActivations(TARGET, samples.take(0))(Model.from_proto(proto))


def test_an_output_keeps_its_values() -> None:
    proto = graph(f"{LN} y = MatMul(n, m)", ROWS_IN, f"{Y3}, float[d, e, f] n")
    (note,) = SmoothActivations(TARGET, drawn(proto))(Model.from_proto(proto))
    assert "n is an output" in note.text


def test_channels_that_are_alike_stay() -> None:
    proto = graph("a = Mul(x, even) t = Clip(a, low) y = MatMul(t, k0)", ROWS_IN, Y3)
    for name, value in (("even", np.ones(16)), ("low", np.array(0.0)), ("k0", np.ones((16, 24)))):
        proto.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    (note,) = SmoothActivations(TARGET, drawn(proto))(Model.from_proto(proto))
    assert note.text == "t has no channels that are much larger than others"
    assert not note.changed


def test_noise_of_one_scale_is_that_of_its_span() -> None:
    lo, hi, energy = np.array([-1.0, 0.5]), np.array([1.0, 100.0]), np.array([4.0, 1.0])
    assert rounding_noise(lo, hi, energy, np.ones(2)) == 101.0**2 * 5
    assert rounding_noise(lo, hi, energy, np.array([1.0, 50.0])) == 3.0**2 * (4 + 2500)
    assert rounding_noise(hi, hi, energy, np.ones(2)) == 100.0**2 * 5  # from zero on


def test_a_layer_with_one_scale_for_all_channels_takes_no_factor() -> None:
    proto = graph("h = Conv(x, w) y = Conv(h, w2)", IMAGE, Y4)
    tensor = replace(TARGET, weights=replace(TARGET.weights, granularity=PerTensor()))
    tensor = replace(
        tensor,
        operators={op: replace(rule, weights=None) for op, rule in tensor.operators.items()},
    )
    notes = SmoothActivations(tensor, drawn(proto))(Model.from_proto(proto))
    assert any("one scale for all channels" in n.text for n in notes)


def test_layers_that_stay_float_are_left() -> None:
    proto = graph(f"{LN} y = MatMul(n, m)", ROWS_IN, Y3)
    pass_ = SmoothActivations(TARGET, drawn(proto), layers=("op:MatMul=float",))
    assert not pass_(Model.from_proto(proto))


def test_alpha_may_be_given() -> None:
    proto = graph(f"{LN} y = MatMul(n, m)", ROWS_IN, Y3)
    (note,) = SmoothActivations(TARGET, drawn(proto), alpha=0.5)(Model.from_proto(proto))
    assert note.text.startswith("alpha 0.5: ")
    with pytest.raises(ValueError, match="alpha is from 0 to 1"):
        SmoothActivations(TARGET, drawn(proto), alpha=1.5)


def quantized(proto: onnx.ModelProto, samples: Samples, *, smooth: bool) -> float:
    model = Model.from_proto(proto)
    if smooth:
        SmoothActivations(TARGET, samples)(model)
    QuantizeStatic(TARGET, samples, layers=("op:MatMul=int8",))(model)
    one, two = runtime.session(proto), runtime.session(model)
    pairs = [(one.run(None, f)[0], two.run(None, f)[0]) for f in samples]
    return sqnr_db(*(np.concatenate(part) for part in zip(*pairs, strict=True)))


def test_int8_with_outliers_is_saved() -> None:
    proto = graph(f"{LN} q = MatMul(n, m) r = Tanh(q) s = MatMul(n, k) y = Mul(r, s)", ROWS_IN, Y3)
    samples = drawn(proto, 24)
    assert quantized(proto, samples, smooth=True) > quantized(proto, samples, smooth=False) + 10


def test_excerpts_have_a_bound_and_extremes_of_all_values() -> None:
    model = Model.from_proto(graph("y = Tanh(x)", "float[N, C, H, W] x", Y4))
    rng = np.random.default_rng(2)
    feeds = [{"x": rng.normal(size=(1, 64, 50, 60)).astype(np.float32)} for _ in range(20)]
    samples = open_samples(feeds, model)
    (found,) = excerpts(model, [("x", 1), ("y", 1), ("y", 3)], (samples, 8))
    assert 0 < sum(part.size for part in found["y", 1].parts) <= VALUES
    assert all(part.shape[1] == 64 for part in found["y", 1].parts)
    seen = np.concatenate([feed["x"] for feed in feeds[::3]])  # 7 of 20
    for name, values in (("x", seen), ("y", np.tanh(seen))):
        np.testing.assert_allclose(found[name, 1].lo, values.min((0, 2, 3)), rtol=1e-5)
        np.testing.assert_allclose(found[name, 1].hi, values.max((0, 2, 3)), rtol=1e-5)
    one, two = excerpts(model, [("y", 3)], (samples, 8), (samples.skip(10), 2))
    assert [part.shape for part in one["y", 3].parts] == [(ROWS // 7 * 7, 60)]
    assert [part.shape for part in two["y", 3].parts] == [(ROWS // 2 * 2, 60)]
    with pytest.raises(DataError, match="no input"):
        excerpts(model, [("y", 1)], (replace(samples, read=lambda a, b: iter([{}])), 8))


def test_tensors_that_are_large_are_fetched_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model.from_proto(graph(f"{LN} h = Tanh(n) y = MatMul(h, m)", ROWS_IN, Y3))
    samples, places = drawn(model.to_proto()), [("n", 2), ("h", 2), ("x", 2)]
    (whole,) = excerpts(model, places, (samples, 4))
    monkeypatch.setattr("onnxq.excerpts.ROUND", 100)
    (apart,) = excerpts(model, places, (samples, 4))
    assert list(whole) == list(apart) == places
    for place in places:
        np.testing.assert_array_equal(whole[place].parts[0], apart[place].parts[0])


def test_what_is_not_finite_has_no_excerpt() -> None:
    blown = Model.from_proto(graph("y = Exp(x)", IMAGE.replace("16, 8, 8", "2, 3, 4"), Y4))
    spoiled = open_samples([{"x": np.full((1, 2, 3, 4), 200.0, np.float32)}], blown)
    assert excerpts(blown, [("y", 1)], (spoiled, 8)) == [{}]


def test_factors_are_those_of_the_paper() -> None:
    x, w = np.array([1.0, 16.0, 0.0, 4.0]), np.array([1.0, 0.25, 1.0, 1.0])
    s = smoothing(x, w, 0.5)
    assert s[2] == 1  # nothing is known of a dead channel
    np.testing.assert_allclose(s[[1, 3]] / s[0], [8.0, 2.0])
    np.testing.assert_allclose(np.log(s).sum(), 0, atol=1e-12)
    far = smoothing(np.array([1e-30, 1e30]), np.ones(2), 1.0)
    np.testing.assert_allclose(far, [1 / BOUND, BOUND])
    assert smoothing(np.zeros(3), np.ones(3), 0.5).tolist() == [1, 1, 1]
    a, error = search(lambda a: (a - 0.66) ** 2, (0.2, 0.6))
    assert a == 0.67
    assert error == pytest.approx(1e-4)


def test_a_node_is_added_only_when_asked_for() -> None:
    proto = graph(
        f"{LN} h = MatMul(n, m) z = Neg(n) y = Tanh(h)", ROWS_IN, f"{Y3}, float[d, e, f] z"
    )
    samples = drawn(proto)
    assert not any(n.changed for n in SmoothActivations(TARGET, samples)(Model.from_proto(proto)))
    pass_ = SmoothActivations(TARGET, samples, insert=True)
    model = Model.from_proto(proto)
    (note,) = pass_(model)
    assert "by a Mul: n is also read by Neg" in note.text
    assert [node.op for node in model.nodes()].count("Mul") == 1
    feed = next(iter(samples))
    one, two = (runtime.session(m, optimize="off").run(None, feed) for m in (proto, model))
    np.testing.assert_allclose(two[0], one[0], rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(two[1], one[1])
