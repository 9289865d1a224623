"""Cross-layer equalization: the same function, ranges made equal, and what it stays away from."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxq.model import Model, values_of
from onnxq.numerics.metrics import sqnr_db
from onnxq.passes import EqualizeLayers, cleanup
from onnxq.passes.channels import FIXED, network
from onnxq.passes.moments import moments
from onnxq.schemes import QParams
from onnxq.testing import check

IMAGE, ROWS = "float[N, 6, 8, 8] x", "float[N, 5, 6] x"


def net(
    body: str, weights: dict[str, list[int]], x: str = IMAGE, opset: int = 17
) -> onnx.ModelProto:
    """A graph from x to y; weights are drawn, output channels (axis 0) scaled by 2^-4 to 2^4."""
    rng = np.random.default_rng(7)
    declared = "".join(f", float[{', '.join(map(str, s))}] {n}" for n, s in weights.items())
    rank = "p, q, r, s" if "y4" in body else "p, q, r" if "y3" in body else "p, q"
    out = "y4" if "y4" in body else "y3" if "y3" in body else "y2"
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> g ({x}{declared}) => (float[{rank}] {out})'
        f" {{ {body} }}"
    )
    kept = [v for v in proto.graph.input if v.name not in weights]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    for name, shape in weights.items():
        values = rng.normal(size=shape) / np.sqrt(max(prod(shape[1:]), 1))
        spread = np.exp2(rng.uniform(-4, 4, shape[0]))
        if name.startswith("w"):
            values = values * spread.reshape(-1, *[1] * (len(shape) - 1))
        tensor = onnx.numpy_helper.from_array(values.astype(np.float32), name)
        proto.graph.initializer.append(tensor)
    return proto


PAIR = {"w": [8, 6, 3, 3], "b": [8], "v": [4, 8, 3, 3], "c": [4]}
FIRST, SECOND = "a = Conv<pads=[1,1,1,1]>(x, w, b)", "y4 = Conv<pads=[1,1,1,1]>(h, v, c)"
ALIKE = [
    pytest.param(f"{FIRST} h = Relu(a) {SECOND}", PAIR, id="relu"),
    pytest.param(f"{FIRST} h = LeakyRelu(a) {SECOND}", PAIR, id="leaky-relu"),
    pytest.param(f"{FIRST} h = PRelu(a, slope) {SECOND}", PAIR | {"slope": [8, 1, 1]}, id="prelu"),
    pytest.param(f"zero = Constant<value_float=0.0>() {FIRST} h = Clip(a, zero) {SECOND}", PAIR, id="clip-at-zero"),
    pytest.param(f"{FIRST} r = Relu(a) h = MaxPool<kernel_shape=[2,2]>(r) {SECOND}", PAIR, id="maxpool"),
    pytest.param(f"{FIRST} r = Relu(a) h = AveragePool<kernel_shape=[2,2]>(r) {SECOND}", PAIR, id="averagepool"),
    pytest.param(f"p = Constant<value_ints=[0,0,1,1,0,0,1,1]>() {FIRST} h = Pad(a, p) {SECOND}", PAIR, id="pad"),
    pytest.param(f"f = Constant<value_floats=[1.0,1.0,2.0,2.0]>() {FIRST} h = Resize<mode=\"linear\">(a, , f) {SECOND}", PAIR, id="resize"),
    pytest.param(f"s = Constant<value_float=0.5>() {FIRST} h = Mul(s, a) {SECOND}", PAIR, id="mul-constant"),
    pytest.param(f"{FIRST} r = Relu(a) h = Add(r, k) {SECOND}", PAIR | {"k": [8, 1, 1]}, id="add-constant"),
    pytest.param(f"k = Constant<value_float=0.5>() {FIRST} h = Add(a, k) {SECOND}", PAIR, id="add-number"),
    pytest.param(f"{FIRST} r = Relu(a) g = GlobalAveragePool(r) f = Flatten(g) y2 = Gemm<transB=1>(f, v, c)",
                 {"w": [8, 6, 3, 3], "b": [8], "v": [4, 8], "c": [4]}, id="gemm-behind-pool"),
    pytest.param(f"{FIRST} r = Relu(a) f = Flatten(r) y2 = Gemm(f, v, c)",
                 {"w": [8, 6, 3, 3], "b": [8], "v": [512, 4], "c": [4]}, id="gemm-behind-flatten"),
    pytest.param(f"to = Constant<value_ints=[-1,512]>() {FIRST} r = Relu(a) f = Reshape(r, to) y2 = Gemm(f, v, c)",
                 {"w": [8, 6, 3, 3], "b": [8], "v": [512, 4], "c": [4]}, id="gemm-behind-reshape"),
    pytest.param(f"{FIRST} r = Relu(a) t = Transpose<perm=[0,2,3,1]>(r) y4 = MatMul(t, v)",
                 {"w": [8, 6, 3, 3], "b": [8], "v": [8, 4]}, id="matmul-behind-transpose"),
    pytest.param(f"{FIRST} m = ReduceMean<axes=[2,3], keepdims=0>(a) y2 = Gemm(m, v)",
                 {"w": [8, 6, 3, 3], "b": [8], "v": [8, 4]}, id="reduce-mean"),
    pytest.param(f"{FIRST} h = Relu(a) y4 = ConvTranspose<group=2, strides=[2,2]>(h, v, c)",
                 {"w": [8, 6, 3, 3], "b": [8], "v": [8, 3, 2, 2], "c": [6]}, id="conv-transpose-grouped"),
    pytest.param("a = ConvTranspose<group=2>(x, w, b) h = Relu(a) y4 = Conv(h, v)",
                 {"w": [6, 4, 2, 2], "b": [8], "v": [4, 8, 1, 1]}, id="behind-conv-transpose"),
    pytest.param("a = Conv<group=2>(x, w) h = Relu(a) y4 = Conv<group=4>(h, v, c)",
                 {"w": [8, 3, 3, 3], "v": [4, 2, 3, 3], "c": [4]}, id="grouped"),
    pytest.param(f"{FIRST} d = DepthToSpace<blocksize=2>(a) y4 = Conv(d, v)",
                 {"w": [8, 6, 3, 3], "b": [8], "v": [4, 2, 3, 3]}, id="depth-to-space"),
    pytest.param(f"{FIRST} d = DepthToSpace<blocksize=2, mode=\"CRD\">(a) y4 = Conv(d, v)",
                 {"w": [8, 6, 3, 3], "b": [8], "v": [4, 2, 3, 3]}, id="depth-to-space-crd"),
    pytest.param(f"{FIRST} d = SpaceToDepth<blocksize=2>(a) y4 = Conv(d, v)",
                 {"w": [8, 6, 3, 3], "b": [8], "v": [4, 32, 1, 1]}, id="space-to-depth"),
    pytest.param(f"{FIRST} e = Conv<pads=[1,1,1,1]>(x, w2) h = Concat<axis=1>(a, e) y4 = Conv(h, v)",
                 {"w": [8, 6, 3, 3], "b": [8], "w2": [4, 6, 3, 3], "v": [4, 12, 1, 1]}, id="concat"),
    pytest.param(f"{FIRST} g, i = Split<axis=1>(a) h = Add(g, i) y4 = Conv(h, v)",
                 {"w": [8, 6, 3, 3], "b": [8], "v": [4, 4, 1, 1]}, id="split"),
    pytest.param(f"from = Constant<value_ints=[2]>() to = Constant<value_ints=[-1]>() ax = Constant<value_ints=[1]>() {FIRST}"
                 " h = Slice(a, from, to, ax) y4 = Conv(h, v)", {"w": [8, 6, 3, 3], "b": [8], "v": [4, 5, 1, 1]}, id="slice"),
    pytest.param(f"i = Constant<value_ints=[3,1,1]>() {FIRST} h = Gather<axis=1>(a, i) y4 = Conv(h, v)",
                 {"w": [8, 6, 3, 3], "b": [8], "v": [4, 3, 1, 1]}, id="gather"),
    pytest.param("a = Conv<pads=[1,1,1,1]>(x, w) d = Conv<group=8, pads=[1,1,1,1]>(a, wd) r = Relu(d) e = Conv(r, wp)"
                 " s = Add(a, e) h = Relu(s) y4 = Conv(h, v)",
                 {"w": [8, 6, 3, 3], "wd": [8, 1, 3, 3], "wp": [8, 8, 1, 1], "v": [4, 8, 1, 1]}, id="residual-depthwise"),
    pytest.param(f"{FIRST} r = Relu(a) g = GlobalAveragePool(r) e = Conv(g, u) s = Sigmoid(e) h = Mul(r, s) {SECOND}",
                 PAIR | {"u": [8, 8, 1, 1]}, id="squeeze-excite"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "weights"), ALIKE)
def test_factors_move_through_and_nothing_else_changes(
    body: str, weights: dict[str, list[int]]
) -> None:
    checked = check(EqualizeLayers(always=True), net(body, weights), rtol=1e-3, atol=1e-4)
    assert any(note.changed for note in checked.notes)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("a = MatMul(x, w) b = Add(a, k) h = Relu(b) y3 = MatMul(h, v)", id="matmul"),
        pytest.param(
            "ax = Constant<value_ints=[0]>() a = MatMul(x, w) m = ReduceMax<axes=[1], keepdims=0>(a)"
            " h = Unsqueeze(m, ax) y3 = MatMul(h, v)",
            id="rank-changes",
        ),
    ],
)
def test_rows_have_their_channels_last(body: str) -> None:
    weights = {"w": [6, 8], "k": [8], "v": [8, 3]}
    if ", k)" not in body:
        del weights["k"]
    checked = check(EqualizeLayers(always=True), net(body, weights, ROWS), rtol=1e-3, atol=1e-4)
    assert any(note.changed for note in checked.notes)


def test_ranges_of_a_pair_become_those_of_the_paper() -> None:
    model = Model.from_proto(net(f"{FIRST} h = Relu(a) {SECOND}", PAIR))
    before = {n.name: values_of(n.inputs[1]) for n in model.nodes("Conv")}
    EqualizeLayers(always=True)(model)
    first, second = (np.asarray(values_of(n.inputs[1])) for n in model.nodes("Conv"))
    made, read = np.abs(first).max((1, 2, 3)), np.abs(second).max((0, 2, 3))
    assert np.ptp(np.log2(made / read)) < 0.01
    old, other = (np.abs(np.asarray(v)) for v in before.values())
    product = old.max((1, 2, 3)) * other.max((0, 2, 3))
    np.testing.assert_allclose(made * read, product, rtol=1e-4)  # their product stays


STAYS = [
    pytest.param(f"{FIRST} h = Cast<to=10>(a) r = Cast<to=1>(h) y4 = Conv(r, v)", {"w": [8, 6, 3, 3], "b": [8], "v": [4, 8, 1, 1]}, id="in-halves"),
    pytest.param("i = Constant<value_ints=[3,1]>() a = Conv(x, w) s = Add(a, k) h = Gather<axis=1>(s, i) y4 = Conv(h, v)",
                 {"w": [1, 6, 1, 1], "k": [4, 1, 1], "v": [4, 2, 1, 1]}, id="sum-of-more-channels"),
    pytest.param("a = Conv(x, w) s = Add(a, k) e = Conv(x, w2) c = Concat<axis=1>(s, e) i = Constant<value_ints=[0,1,2,3,4]>()"
                 " h = Gather<axis=1>(c, i) y4 = Conv(h, v)", {"w": [1, 6, 1, 1], "k": [4, 1, 1], "w2": [4, 6, 1, 1], "v": [4, 5, 1, 1]},
                 id="sum-of-more-channels-joined"),
    pytest.param(f"six = Constant<value_float=6.0>() zero = Constant<value_float=0.0>() {FIRST} h = Clip(a, zero, six) {SECOND}", PAIR, id="relu6"),
    pytest.param(f"{FIRST} h = Sigmoid(a) {SECOND}", PAIR, id="sigmoid"),
    pytest.param(f"{FIRST} s = Sigmoid(a) h = Mul(a, s) {SECOND}", PAIR, id="silu"),
    pytest.param(f"{FIRST} h = Mul(a, a) {SECOND}", PAIR, id="square"),
    pytest.param(f"one = Constant<value_float=1.0>() {FIRST} h = Div(one, a) {SECOND}", PAIR, id="reciprocal"),
    pytest.param(f"k = Constant<value_float=1.0>() p = Constant<value_ints=[0,0,1,1,0,0,1,1]>() {FIRST} h = Pad(a, p, k) {SECOND}", PAIR, id="pads-ones"),
    pytest.param(f"p = Constant<value_ints=[0,1,0,0,0,-1,0,0]>() {FIRST} h = Pad(a, p) {SECOND}", PAIR, id="pads-channels"),
    pytest.param(f"{FIRST} h = Softmax<axis=1>(a) {SECOND}", PAIR, id="softmax"),
    pytest.param(f"{FIRST} t = Transpose<perm=[0,2,1,3]>(a) h = MaxPool<kernel_shape=[2,1]>(t) y4 = Conv(h, v)",
                 {"w": [8, 6, 3, 3], "b": [8], "v": [4, 8, 1, 1]}, id="pool-over-channels"),
    pytest.param("a = Conv<pads=[1,1,1,1]>(x, w, b) h = Relu(a) e = Conv<pads=[1,1,1,1]>(h, w2) y4 = Concat<axis=1>(h, e)",
                 {"w": [8, 6, 3, 3], "b": [8], "w2": [4, 8, 3, 3]}, id="graph-output"),
    pytest.param("a = Conv<pads=[1,1,1,1]>(x, w) h = Relu(a) s = Add(h, x) y4 = Conv(s, v)",
                 {"w": [6, 6, 3, 3], "v": [4, 6, 1, 1]}, id="sum-with-input"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "weights"), STAYS)
def test_what_holds_channels_where_they_are(body: str, weights: dict[str, list[int]]) -> None:
    checked = check(
        EqualizeLayers(always=True),
        net(body, weights),
        rtol=1e-3,
        feeds=[{"x": np.random.default_rng(1).uniform(1, 2, (2, 6, 8, 8)).astype(np.float32)}],
        atol=1e-3,
    )
    assert not any(note.changed for note in checked.notes)


def test_shared_weights_and_halves_stay() -> None:
    shared = "a = Conv<pads=[1,1,1,1]>(x, w) r = Relu(a) e = Conv<pads=[1,1,1,1]>(r, w) h = Relu(e) y4 = Conv(h, v)"
    checked = check(
        EqualizeLayers(always=True), net(shared, {"w": [6, 6, 3, 3], "v": [4, 6, 1, 1]})
    )
    assert checked.declined == ["w is also used elsewhere"] * 2
    proto = net(f"{FIRST} h = Relu(a) {SECOND}", PAIR)
    for tensor in proto.graph.initializer:
        half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    notes = EqualizeLayers(always=True)(Model.from_proto(proto))
    assert [note.text for note in notes] == [
        f"{name} is float16: rounding again would cost more" for name in ("w", "v")
    ]


def test_what_holds_channels_is_told() -> None:
    body = f"six = Constant<value_float=6.0>() zero = Constant<value_float=0.0>() {FIRST} h = Clip(a, zero, six) {SECOND}"
    notes = EqualizeLayers()(Model.from_proto(net(body, PAIR)))
    assert [n.text for n in notes] == [
        "its bounds are not 0, and would have to move with the channels"
    ]
    body = f"{FIRST} h = Softmax<axis=1>(a) e = PRelu(h, slope) {SECOND}"
    assert not EqualizeLayers()(Model.from_proto(net(body, PAIR | {"slope": [8, 1, 1]})))


def test_ranges_from_before_hold_channels() -> None:
    model = Model.from_proto(net(f"{FIRST} h = Relu(a) {SECOND}", PAIR))
    model.ranges["h"] = (QParams(np.array(0.1, np.float32), np.array(0, np.uint8)),)
    assert not EqualizeLayers(always=True)(model)


def test_a_vector_as_weight_is_declined() -> None:
    model = Model.from_proto(net("y2 = MatMul(x, v)", {"v": [6]}, ROWS))
    assert [n.text for n in EqualizeLayers()(model)] == ["its weight is not one matrix"]
    assert moments(model) == {}


def test_runtime_weights_and_bad_biases_are_declined() -> None:
    proto = net(
        f"{FIRST} h = Relu(a) y4 = Conv<pads=[1,1,1,1]>(h, v, c)", PAIR | {"v": [4, 8, 3, 3]}
    )
    taken = next(t for t in proto.graph.initializer if t.name == "v")
    proto.graph.input.append(
        onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, [4, 8, 3, 3])
    )
    proto.graph.initializer.remove(taken)
    notes = EqualizeLayers(always=True)(Model.from_proto(proto))
    assert [note.text for note in notes] == ["v is not constant"]


def test_a_branch_takes_part() -> None:
    body = (
        "a = Conv<pads=[1,1,1,1]>(x, w, b) h = Relu(a) m = ReduceMax<keepdims=0>(x) zero = Constant<value_float=0.0>()"
        " f = Greater(m, zero) y4 = If<then_branch = one () => (float[p, q, r, s] t) { t = Conv<pads=[1,1,1,1]>(h, v, c) },"
        " else_branch = two () => (float[p, q, r, s] e) { n = Neg(h) e = Conv<pads=[1,1,1,1]>(n, u, c) }>(f)"
    )
    proto = net(body, PAIR | {"u": [4, 8, 3, 3]}, opset=13)
    checked = check(EqualizeLayers(always=True), proto, rtol=1e-3, atol=1e-4)
    assert any("between 3 layers" in note.text for note in checked.notes if note.changed)


def test_labels_of_a_residual_are_one() -> None:
    body = "a = Conv(x, w) e = Conv(a, v) s = Add(a, e) h = Relu(s) y4 = Conv(h, u)"
    weights = {"w": [8, 6, 1, 1], "v": [8, 8, 1, 1], "u": [4, 8, 1, 1]}
    model = Model.from_proto(net(body, weights))
    found = network(model, "test")
    first, inner, last = found.layers
    np.testing.assert_array_equal(first.outputs, inner.outputs)
    np.testing.assert_array_equal(first.outputs, last.inputs)
    assert (first.inputs == FIXED).all()
    assert (last.outputs == FIXED).all()
    assert len(np.unique(first.outputs)) == 8


def rounded(proto: onnx.ModelProto, feed: np.ndarray) -> float:
    """SQNR with weights in int8 by tensor and the inputs of layers too, in dB."""
    model = Model.from_proto(proto)
    outputs = []
    for bits in (None, 8):
        x = feed.astype(np.float64)
        for node in model.nodes("Gemm"):
            w, b = (np.asarray(values_of(t), np.float64) for t in node.inputs[1:3])
            if bits:
                step, own = np.abs(w).max() / 127, np.abs(x).max() / 127
                w, x = np.rint(w / step) * step, np.rint(x / own) * own
            x = np.maximum(x @ w + b, 0)
        outputs.append(x)
    return sqnr_db(outputs[0], outputs[1])


def test_what_collapses_is_recovered_and_what_is_fine_stays() -> None:
    rng = np.random.default_rng(3)
    body = "a = Gemm(x, w, b) h = Relu(a) d = Gemm(h, v, c) r = Relu(d) y2 = Gemm(r, u, k)"
    weights = {"w": [16, 32], "b": [32], "v": [32, 32], "c": [32], "u": [32, 8], "k": [8]}
    proto = net(body, weights, "float[N, 16] x")
    arrays = {}
    for tensor in proto.graph.initializer:
        shape = tuple(tensor.dims)
        arrays[tensor.name] = rng.normal(size=shape) / np.sqrt(shape[0])
    one, two = (np.exp2(rng.uniform(-6, 6, 32)) for _ in range(2))
    hard = dict(
        w=arrays["w"] * one, b=arrays["b"] * one, v=arrays["v"] / one[:, None] * two,
        c=arrays["c"] * two, u=arrays["u"] / two[:, None], k=arrays["k"],
    )  # fmt: skip
    feed = rng.normal(size=(64, 16))
    sqnr = {}
    for name, values in (("easy", arrays), ("hard", hard)):
        made = onnx.ModelProto()
        made.CopyFrom(proto)
        for tensor in made.graph.initializer:
            array = values[tensor.name].astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        model = Model.from_proto(made).copy()
        notes = EqualizeLayers()(model)
        sqnr[name] = rounded(made, feed), rounded(model.to_proto(), feed)
        assert any(note.changed for note in notes) == (name == "hard")
        assert all("left as it is" in n.text for n in notes if not n.changed)
    assert sqnr["hard"][0] < 10
    assert sqnr["hard"][1] > sqnr["easy"][0] - 2


def test_what_a_normalisation_knew_is_scaled_along() -> None:
    rng = np.random.default_rng(5)
    body = f"{FIRST} n = BatchNormalization(a, g, e, m, s) h = Relu(n) {SECOND}"
    proto = net(body, PAIR | {"g": [8], "e": [8], "m": [8], "s": [8]})
    for tensor in proto.graph.initializer:
        if tensor.name in "gs":
            array = np.exp2(rng.uniform(-5, 5, 8)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    model = Model.from_proto(proto)
    cleanup(model)
    (name,) = model.moments
    mean, deviation = model.moments[name]
    conv = next(n for n in model.nodes("Conv") if n.outputs[0].name == name)
    before = np.asarray(values_of(conv.inputs[1]))
    EqualizeLayers(always=True)(model)
    factor = before[:, 0, 0, 0] / np.asarray(values_of(conv.inputs[1]))[:, 0, 0, 0]
    assert np.ptp(np.log2(factor)) > 1
    np.testing.assert_allclose(model.moments[name][0], mean / factor, rtol=1e-4)
    np.testing.assert_allclose(model.copy().moments[name][1], deviation / factor, rtol=1e-4)
