"""quantize_dynamic: what ONNX Runtime fuses, what each layer loses, and every reason to decline."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser

from onnxq import check, runtime
from onnxq.coverage import coverage
from onnxq.model import Model, values_of
from onnxq.numerics.metrics import sqnr_db
from onnxq.numerics.saturation import excess
from onnxq.passes import QuantizeDynamic, QuantizeWeights
from onnxq.schemes import PerChannel, PerTensor, QuantScheme
from onnxq.targets import Target, load_target
from onnxq.targets.dynamic import DynamicRule, Pace, Product

SHAPES: dict[str, tuple[int, ...]] = {
    "w": (32, 48), "w2": (32, 48), "wt": (48, 32), "left": (24, 32), "b": (48,), "c2": (1, 48),
    "vector": (32,), "stack": (2, 32, 48), "f": (16, 8, 3, 3), "g": (16, 4, 3, 3),
    "d": (8, 1, 3, 3), "f1": (16, 8, 3), "fb": (16,), "lw": (1, 64, 32), "lr": (1, 64, 16),
    "lb": (1, 128), "lp": (1, 48), "bw": (2, 64, 32), "br": (2, 64, 16), "bb": (2, 128),
    "h0": (1, 3, 16),
    "c0": (1, 3, 16), "sq": (32, 32), "gw": (1, 48, 32), "gr": (1, 48, 16),
}  # fmt: skip
ROWS, OUT = "float[8, 32] x", "float[a, b] y"
SEQUENCE, STATES = "float[5, 3, 32] x", "float[a, b, c, d] y"
IMAGE = "float[1, 8, 7, 6] x"


def model(body: str, inputs: str = ROWS, outputs: str = OUT, opset: int = 13) -> Model:
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    rng = np.random.default_rng(4)
    for name, shape in SHAPES.items():
        if any(f"{name}{end}" in body for end in (",", ")")):
            values = rng.normal(0, 0.3, shape).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(values, name))
    return Model.from_proto(proto)


def eager(name: str = "ort-cpu", **more: DynamicRule) -> Target:
    """A target on which everything pays that it has a kernel for."""
    target = load_target(name)
    rules = {op: replace(r, floats=None, integers=None) for op, r in target.dynamic.items()}
    return replace(target, dynamic=rules | more)


def conv_rule(format_: str = "uint8", *, per_channel: bool = False) -> DynamicRule:
    granularity = PerChannel() if per_channel else PerTensor()
    symmetric = format_ == "int8"
    return DynamicRule("ConvInteger", QuantScheme(format_, granularity, symmetric=symmetric))


def feeds(subject: Model, n: int = 4) -> list[dict[str, Any]]:
    """Activations that are mostly positive: their zero points are far from the middle."""
    rng = np.random.default_rng(8)
    drawn = []
    for _ in range(n):
        feed = {}
        for t in subject.graph.inputs:
            if t.dtype == np.float32:
                feed[t.name] = np.abs(rng.normal(0.2, 1, t.shape)).astype(np.float32) - 0.3
            else:
                feed[t.name] = np.array([5, 3, 4], t.dtype) if t.shape else np.array(True)
        drawn.append(feed)
    return drawn


def outputs(subject: Model, optimize: Any = "all") -> list[np.ndarray]:
    session = runtime.session(subject, optimize=optimize)
    every = [session.run(None, feed) for feed in feeds(subject)]
    return [np.stack(values) for values in zip(*every, strict=True)]


def executed(subject: Model, folder: Path) -> Counter[str]:
    """Operators as onnxruntime executes them, in bodies too."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    proto = subject.to_proto().SerializeToString()
    ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return Counter(node.op for node in Model.load(folder / "optimized.onnx").nodes())


FUSED = {"DynamicQuantizeMatMul": 1}
SHARED = {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 2}
TURNED = {"DynamicQuantizeLinear": 1, "Transpose": 1, "MatMulIntegerToFloat": 1}
IN_ROWS = {"Abs": 1, "ReduceMax": 1, "Max": 1, "Div": 1, "Mul": 1, **FUSED}
PRODUCTS = [
    pytest.param("y = MatMul(x, w)", ROWS, OUT, FUSED, id="MatMul"),
    pytest.param("h = MatMul(x, w) y = Add(h, b)", ROWS, OUT, FUSED, id="bias"),
    pytest.param("h = MatMul(x, w) y = Add(b, h)", ROWS, OUT, FUSED, id="bias-first"),
    pytest.param(
        "y = MatMul(x, w)", "float[2, 3, 4, 32] x", "float[a, b, c, d] y", FUSED, id="batched"
    ),
    pytest.param("y = MatMul(x, w)", "float[32] x", "float[a] y", FUSED, id="one-row"),
    pytest.param(
        "h = Reshape(x, r) y = MatMul(h, w)", f"{ROWS}, int64[k] r", OUT, {"Reshape": 1, **FUSED},
        id="any-rank",
    ),
    pytest.param(
        "y = MatMul(left, x)", "float[2, 32, 9] x", "float[a, b, c] y",
        {**TURNED, "Transpose": 2}, id="left",
    ),
    pytest.param("y = Gemm(x, w)", ROWS, OUT, FUSED, id="Gemm"),
    pytest.param("y = Gemm(x, w, b)", ROWS, OUT, FUSED, id="Gemm-bias"),
    pytest.param(
        "y = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, wt, c2)", ROWS, OUT, FUSED, id="Gemm-all"
    ),
    pytest.param(
        "k = Constant<value_float = 0.7>() y = Gemm<beta = 3.0>(x, w, k)", ROWS, OUT, FUSED,
        id="Gemm-scalar",
    ),
    pytest.param(
        "y = Gemm<transA = 1>(x, w, b)", "float[32, 8] x", OUT, TURNED, id="Gemm-transA"
    ),
    pytest.param(
        "h = Reshape(x, r) y = Gemm<transA = 1>(h, w, b)", "float[32, 8] x, int64[k] r", OUT,
        {"Reshape": 1, **TURNED}, id="Gemm-transA-of-no-known-shape",
    ),
    pytest.param(
        "y = Gemm<beta = 0.5>(x, w, z)", f"{ROWS}, float[8, 48] z", OUT,
        {**FUSED, "Mul": 1, "Add": 1}, id="Gemm-input-bias",
    ),
    pytest.param("p = MatMul(x, w) q = MatMul(x, w2) y = Add(p, q)", ROWS, OUT,
                 {**SHARED, "Add": 1}, id="shared"),
    pytest.param("p = MatMul(x, sq) y = MatMul(p, w)", ROWS, OUT,
                 {"DynamicQuantizeMatMul": 2}, id="two"),
    pytest.param(
        "h = Neg(x) y = If(c) <then_branch = p () => (float[8, 48] u) { u = MatMul(h, w) },"
        " else_branch = q () => (float[8, 48] v) { v = MatMul(h, w2) }>",
        f"bool c, {ROWS}", OUT, {"If": 1, "Neg": 1, "DynamicQuantizeMatMul": 2}, id="If",
    ),
    pytest.param(
        "n = Constant<value_int = 3>() t = Cast<to = 9>(n) y = Loop(n, t, x) <body = p"
        " (int64 i, bool k, float[8, 32] h) => (bool o, float[8, 32] u)"
        " { o = Identity(k) m = MatMul(h, sq) u = Tanh(m) }>",
        ROWS, OUT, {"Loop": 1, "Identity": 1, "Tanh": 1, "DynamicQuantizeMatMul": 1}, id="Loop",
    ),
]  # fmt: skip


def rewritten(before: Model, pass_: QuantizeDynamic) -> Model:
    """The result, held against what every result has to be."""
    proto = before.to_proto()
    after = before.copy()
    notes = pass_(after)
    assert any(n.changed for n in notes), [n.text for n in notes]
    result = after.to_proto()
    onnx.checker.check_model(result, full_check=True)
    for kind in ("input", "output"):
        names = [[v.name for v in getattr(p.graph, kind)] for p in (proto, result)]
        assert names[0] == names[1]
    again = pass_(after)
    assert not [n for n in again if n.changed]
    assert after.to_proto() == result
    return after


@pytest.mark.parametrize(("body", "inputs", "out", "kernels"), PRODUCTS)
def test_products_are_fused(
    body: str, inputs: str, out: str, kernels: dict[str, int], tmp_path: Path
) -> None:
    before = model(body, inputs, out)
    after = rewritten(before, QuantizeDynamic(eager()))
    found = executed(after, tmp_path)
    found.pop("Constant", None)
    assert dict(found) == kernels
    if "Reshape" in kernels:
        return
    for optimize in ("off", "all"):
        (a,), (b,) = outputs(before, "off"), outputs(after, optimize)
        assert a.shape == b.shape
        assert sqnr_db(a, b) > 34  # 8 bits on both sides give 36 to 40 dB on such values


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_rows_have_ranges_of_their_own(opset: int, tmp_path: Path) -> None:
    before = model("y = MatMul(x, w)", opset=opset)
    results = {}
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, (8, 32)).astype(np.float32)
    x[0] *= 100  # a token that takes the whole range
    x[1] = 0
    exact = runtime.session(before, optimize="off").run(None, {"x": x})[0]
    for kind in ("tensor", "row"):
        after = rewritten(before, QuantizeDynamic(eager(), per_row=kind == "row"))
        results[kind] = runtime.session(after).run(None, {"x": x})[0]
    assert dict(executed(after, tmp_path)) == IN_ROWS
    small = slice(2, None)
    assert sqnr_db(exact[small], results["tensor"][small]) < 10
    assert sqnr_db(exact[small], results["row"][small]) > 34
    assert (results["row"][1] == 0).all()


def test_rows_are_shared_and_keep_the_bias() -> None:
    before = model("p = Gemm(x, w, b) q = MatMul(x, w2) y = Add(p, q)")
    after = rewritten(before, QuantizeDynamic(eager(), per_row=True))
    ops = Counter(n.op for n in after.nodes())
    assert (ops["DynamicQuantizeLinear"], ops["ReduceMax"]) == (1, 1)
    assert sqnr_db(outputs(before)[0], outputs(after)[0]) > 34


ATTENTION = (
    "one = Constant<value_floats = [1.]>() n = LayerNormalization(x, one) "
    "q = MatMul(n, w) k = MatMul(n, w2) t = Transpose<perm = [1, 0]>(k) s = MatMul(q, t) "
    "p = Softmax(s) v = MatMul(n, sq) c = MatMul(p, v) "
)
EVEN = [
    pytest.param(ATTENTION + "y = Add(c, n)", 0, id="queries-keys-values"),
    pytest.param(ATTENTION + "y = MatMul(c, w)", 0, id="averages"),
    pytest.param(
        ATTENTION + "zero = Constant<value_ints = [0]>() r = Unsqueeze(c, zero) "
        "u = MatMul(r, w) y = Squeeze(u, zero)",
        0, id="averages-in-another-shape",
    ),
    pytest.param(ATTENTION + "m = LayerNormalization(c, one) y = MatMul(m, w)", 1, id="one-reads"),
    pytest.param(ATTENTION + "r = Relu(c) y = MatMul(r, w)", 1, id="not-averages-any-more"),
    pytest.param("p = MatMul(x, w) q = MatMul(x, w2) y = Add(p, q)", 1, id="not-normalised"),
    pytest.param(
        "t = Transpose<perm = [1, 0]>(x) s = MatMul(x, t) c = MatMul(s, x) y = MatMul(c, w)",
        1, id="no-averages",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "found"), EVEN)
def test_rows_that_are_even_have_one_range(body: str, found: int) -> None:
    before = model(body, outputs="float[a, b] y", opset=17)
    after = Model.from_proto(before.to_proto())
    assert any(note.changed for note in QuantizeDynamic(eager(), per_row=True)(after))
    assert len(after.nodes("ReduceMax")) == found
    assert sqnr_db(outputs(before)[0], outputs(after)[0]) > 22  # up to six products in a row


def test_columns_have_no_rows() -> None:
    """A constant left operand: rows of its other operand are summed over."""
    before = model("y = MatMul(left, x)", "float[32, 9] x")
    after = rewritten(before, QuantizeDynamic(eager(), per_row=True))
    assert not after.nodes("ReduceMax")


LSTMS = {
    "plain": "y = LSTM<hidden_size = 16>(x, lw, lr)",
    "bias": "y = LSTM<hidden_size = 16>(x, lw, lr, lb)",
    "reverse": 'y = LSTM<hidden_size = 16, direction = "reverse">(x, lw, lr, lb)',
    "bidirectional": 'y = LSTM<hidden_size = 16, direction = "bidirectional">(x, bw, br, bb)',
    "states": "y = LSTM<hidden_size = 16>(x, lw, lr, lb, , h0, c0)",
    "lengths": "y = LSTM<hidden_size = 16>(x, lw, lr, lb, n)",
    "peepholes": "y = LSTM<hidden_size = 16>(x, lw, lr, lb, , , , lp)",
    "clip": "y = LSTM<hidden_size = 16, clip = 0.4>(x, lw, lr, lb)",
    "activations": 'y = LSTM<hidden_size = 16, activations = ["HardSigmoid", "Relu", "Tanh"],'
    " activation_alpha = [0.3]>(x, lw, lr, lb)",
    "coupled": "y = LSTM<hidden_size = 16, input_forget = 1>(x, lw, lr, lb)",
    "all": 'y = LSTM<hidden_size = 16, clip = 1.5, direction = "reverse">'
    "(x, lw, lr, lb, n, h0, c0, lp)",
}


@pytest.mark.parametrize("name", LSTMS)
def test_lstms(name: str, tmp_path: Path) -> None:
    inputs = SEQUENCE + (", int32[3] n" if " n" in LSTMS[name] else "")
    before = model(LSTMS[name], inputs, STATES)
    after = rewritten(before, QuantizeDynamic(eager()))
    assert executed(after, tmp_path)["DynamicQuantizeLSTM"] == 1
    (a,), (b,) = outputs(before, "off"), outputs(after)
    assert a.shape == b.shape
    assert sqnr_db(a, b) > 30


def test_last_states_of_an_lstm() -> None:
    """Outputs that are left out stay so; weights are stored as bytes."""
    body = ", h, c = LSTM<hidden_size = 16>(x, lw, lr, lb)"
    before = model(body, SEQUENCE, "float[a, b, d] h, float[a, b, d] c")
    after = rewritten(before, QuantizeDynamic(eager()))
    for a, b in zip(outputs(before, "off"), outputs(after), strict=True):
        assert sqnr_db(a, b) > 30
    stored = coverage(after)
    assert stored.quantized_weight_bytes > 0.9 * stored.weight_bytes
    assert stored.macs_share == 1
    assert stored.macs == coverage(before).macs == 5 * 3 * 64 * (32 + 16)


GRANULARITIES = [
    pytest.param("y = MatMul(x, w)", ROWS, OUT, (48,), id="MatMul"),
    pytest.param("y = MatMul(left, x)", "float[32, 9] x", OUT, (24,), id="left"),
    pytest.param("y = Gemm<transB = 1>(x, wt, b)", ROWS, OUT, (48,), id="Gemm"),
    pytest.param("y = Conv(x, f, fb)", IMAGE, STATES, (1, 16, 1, 1), id="Conv"),
    pytest.param(
        'y = LSTM<hidden_size = 16, direction = "bidirectional">(x, bw, br)', SEQUENCE, STATES,
        (2, 64), id="LSTM",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "inputs", "out", "shape"), GRANULARITIES)
def test_one_scale_a_tensor_where_it_is_asked_for(
    body: str, inputs: str, out: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Coarser than a channel's, and run by the same kernels; an LSTM has one a direction."""
    before = model(body, inputs, out)
    target = eager(Conv=conv_rule("int8", per_channel=True))
    by_channel = rewritten(before, QuantizeDynamic(target))
    by_tensor = rewritten(before, QuantizeDynamic(target, scales="tensor"))
    assert weight_scales(by_channel) == {shape}
    assert weight_scales(by_tensor) == {(2,) if len(shape) == 2 else ()}
    assert executed(by_tensor, tmp_path) == executed(by_channel, tmp_path)
    exact = outputs(before, "off")[0]
    fine, coarse = (sqnr_db(exact, outputs(m)[0]) for m in (by_channel, by_tensor))
    assert fine > coarse > 28


def weight_scales(subject: Model) -> set[tuple[int, ...]]:
    """Shapes of the scales of weights."""
    lstms = [t for n in subject.nodes("DynamicQuantizeLSTM") for t in (n.inputs[8], n.inputs[10])]
    scales = [n.inputs[1] for n in subject.nodes("Mul") if values_of(n.inputs[1]) is not None]
    return {np.shape(np.asarray(values_of(t))) for t in (*lstms, *scales)}


def test_an_lstm_in_a_body() -> None:
    body = (
        "y = If(k) <then_branch = p () => (float[5, 1, 3, 16] u)"
        " { u = LSTM<hidden_size = 16>(x, lw, lr) }, else_branch = q () =>"
        " (float[5, 1, 3, 16] v) { t = LSTM<hidden_size = 16>(x, lw, lr) v = Neg(t) }>"
    )
    before = model(body, f"bool k, {SEQUENCE}", STATES)
    after = rewritten(before, QuantizeDynamic(eager()))
    kinds = [t.data_type for t in after.to_proto().graph.initializer if len(t.dims) == 3]
    assert kinds.count(onnx.TensorProto.INT8) == 2  # W and R are shared by both branches
    assert sqnr_db(outputs(before)[0], outputs(after)[0]) > 30


PADS = "pads = [1, 2, 0, 1]"
CONVS = [
    pytest.param(f"y = Conv<{PADS}>(x, f, fb)", IMAGE, conv_rule(), id="pads"),
    pytest.param(f"y = Conv<{PADS}, group = 2>(x, g)", IMAGE, conv_rule(), id="groups"),
    pytest.param(f"y = Conv<{PADS}, group = 8>(x, d)", IMAGE, conv_rule(), id="depthwise"),
    pytest.param(
        'y = Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, f)', IMAGE, conv_rule("int8"),
        id="signed",
    ),
    pytest.param(
        f"y = Conv<{PADS}>(x, f, fb)", IMAGE, conv_rule("int8", per_channel=True), id="channels"
    ),
    pytest.param(
        "y = Conv<dilations = [2]>(x, f1, fb)", "float[1, 8, 9] x", conv_rule(), id="1-D"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "inputs", "rule"), CONVS)
def test_convolutions_where_a_target_has_them(
    body: str, inputs: str, rule: DynamicRule, tmp_path: Path
) -> None:
    out = "float[a, b, c] y" if "f1" in body else STATES
    before = model(body, inputs, out)
    after = rewritten(before, QuantizeDynamic(eager(Conv=rule)))
    assert executed(after, tmp_path)["ConvInteger"] == 1
    for optimize in ("off", "all"):
        assert sqnr_db(outputs(before, "off")[0], outputs(after, optimize)[0]) > 33
    assert coverage(after).macs == coverage(before).macs
    assert coverage(after).macs_share == 1


def nan_weight() -> Model:
    subject = model("y = MatMul(x, w)")
    (node,) = subject.nodes("MatMul")
    node.inputs[1].values = np.full((32, 48), np.nan, np.float32)
    return subject


def stored_weight() -> Model:
    subject = model("y = MatMul(x, w)")
    QuantizeWeights(encoding="storage")(subject)
    return subject


DECLINES = [
    pytest.param(model("y = MatMul(x, z)", f"{ROWS}, float[32, 4] z"), "its weight is not constant",
                 id="attention"),
    pytest.param(model("y = MatMul(x, vector)", outputs="float[a] y"), "its weight is a vector",
                 id="vector"),
    pytest.param(model("y = MatMul(x, stack)", outputs="float[a, b, c] y"),
                 "its weight is a stack of matrices", id="stack"),
    pytest.param(model("y = MatMul(left, x)", "float[] x", "float[] y"),
                 "nothing is known of the shape of x", id="left-any-rank"),
    pytest.param(nan_weight(), "its weight has NaN or infinite values", id="NaN"),
    pytest.param(stored_weight(), "its weight is stored in integers already", id="stored"),
    pytest.param(model("y = Conv(x, f)", IMAGE, STATES), "ort-cpu gains nothing by a dynamic Conv",
                 id="Conv"),
    pytest.param(model("y = ConvTranspose(x, f)", "float[1, 16, 5, 5] x", STATES),
                 "ort-cpu gains nothing by a dynamic ConvTranspose", id="ConvTranspose"),
    pytest.param(model("y = GRU<hidden_size = 16>(x, gw, gr)", SEQUENCE, STATES),
                 "ort-cpu gains nothing by a dynamic GRU", id="GRU"),
    pytest.param(
        model("y = LSTM<hidden_size = 16, layout = 1>(x, lw, lr)", SEQUENCE, STATES, 14),
        "layout is 1: DynamicQuantizeLSTM has the sequence first", id="layout"),
    pytest.param(
        model("y = LSTM<hidden_size = 16>(x, v, lr)", f"{SEQUENCE}, float[1, 64, 32] v", STATES),
        "its weight is not constant", id="LSTM-weight"),
    pytest.param(model("h = MatMul(x, w) y = Log(h)"),
                 "its result goes into Log: relative errors of small values count there", id="Log"),
    pytest.param(model("y = MatMul(x, w)", opset=10),
                 "opset 10 has no DynamicQuantizeLinear: opset 11 is needed", id="opset"),
    pytest.param(model("y = MatMul(w, wt)", outputs="float[a, b] y"),
                 "all its inputs are constant", id="constant"),
]  # fmt: skip


@pytest.mark.parametrize(("subject", "reason"), DECLINES)
def test_declines(subject: Model, reason: str) -> None:
    before = subject.to_proto()
    notes = QuantizeDynamic(eager())(subject)
    assert [(n.text, n.changed) for n in notes] == [(reason, False)]
    assert subject.to_proto() == before


def test_float16_is_left_to_convert_float32() -> None:
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 13]> g (float16[8, 32] x) => (float16[a, b] y)'
        " { y = MatMul(x, w) }"
    )
    w = np.ones((32, 48), np.float16)
    proto.graph.initializer.append(numpy_helper.from_array(w, "w"))
    notes = QuantizeDynamic(eager())(Model.from_proto(proto))
    assert [n.text for n in notes] == ["w is float16, not float32"]


def test_a_convolution_needs_a_constant_bias() -> None:
    subject = model("y = Conv(x, f, v)", f"{IMAGE}, float[16] v", STATES)
    notes = QuantizeDynamic(eager(Conv=conv_rule()))(subject)
    assert [n.text for n in notes] == ["its bias is not constant"]


def test_targets_without_kernels() -> None:
    subject = model("y = MatMul(x, w)")
    pass_ = QuantizeDynamic(load_target("tensorrt"))
    assert [n.changed for n in pass_(subject)] == [False]
    assert pass_.unfit is not None
    assert QuantizeDynamic(load_target("generic")).unfit is None


def test_generic_has_standard_operators_only() -> None:
    pair = "y = LSTM<hidden_size = 16>(x, lw, lr)"
    notes = QuantizeDynamic(load_target("generic"))(model(pair, SEQUENCE, STATES))
    assert [n.text for n in notes] == ["generic gains nothing by a dynamic LSTM"]
    after = rewritten(model("y = MatMul(x, w)"), QuantizeDynamic(load_target("generic")))
    assert check(after, target="generic").is_clean
    assert {n.domain for n in after.nodes()} <= {None, ""}


# What it costs.


def sized(rows: int, size: int) -> Model:
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 13]> g (float[n, {rows}, {size}] x)'
        " => (float[a, b, c] y) { y = MatMul(x, w) }"
    )
    w = np.ones((size, size), np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(w, "w"))
    return Model.from_proto(proto)


@pytest.mark.parametrize(
    ("rows", "size", "pays"),
    [(1, 8, False), (1, 128, False), (64, 32, False), (1, 512, True), (64, 128, True)],
)
def test_it_pays_for_large_products_only(rows: int, size: int, pays: bool) -> None:
    notes = QuantizeDynamic(load_target("ort-cpu"))(sized(rows, size))
    assert [n.changed for n in notes] == [pays]
    assert pays or notes[0].text == (
        f"floats are faster here on ort-cpu: it multiplies {rows} x {size} x {size}"
    )


def test_sizes_are_those_of_a_sample() -> None:
    target = load_target("ort-cpu")
    subject = model("y = MatMul(x, sq)", "float[n, t, 32] x", "float[n, t, 32] y")
    few = QuantizeDynamic(target, shapes={"x": (1, 2, 32)})(subject)
    assert few[0].text.endswith("it multiplies 2 x 32 x 32")
    many = QuantizeDynamic(target)(subject)
    assert many[0].text.endswith("it multiplies 64 x 32 x 32")


def test_rows_cost_more() -> None:
    target = load_target("ort-cpu")
    assert QuantizeDynamic(target)(sized(64, 128))[0].changed
    assert not QuantizeDynamic(target, per_row=True)(sized(64, 128))[0].changed


def test_paces() -> None:
    pace = Pace(node=10, step=2, column=1, input=0.5, output=0.25, mac=0.1, rows=3)
    assert pace.ns([Product(4, 5, 6, 7)]) == pytest.approx(
        10 + 7 * (2 + 6 + 0.5 * 20 + 0.25 * 24 + 0.1 * 7 * 30)
    )


def test_small_layers_are_stored() -> None:
    """What stays float here is the next pass's."""
    subject = model("y = MatMul(x, w)")
    assert not QuantizeDynamic(load_target("ort-cpu"))(subject)[0].changed
    assert any(n.changed for n in QuantizeWeights(encoding="storage")(subject))


# Overrides.


@pytest.mark.parametrize(
    ("layers", "taken", "reason"),
    [
        (("*=float",), [], "asked for by the override '*=float'"),
        (("op:MatMul=int4",), [], "its kernel has int8 weights"),
        (("*=float", "last=int8"), ["last"], "asked for by the override '*=float'"),
    ],
)
def test_layers(layers: tuple[str, ...], taken: list[str], reason: str) -> None:
    subject = model("[first] p = MatMul(x, sq) [last] y = MatMul(p, w)")
    notes = QuantizeDynamic(eager(), layers=layers)(subject)
    assert [n.node for n in notes if n.changed] == taken
    assert all(reason in n.text for n in notes if not n.changed)


def test_a_layer_that_is_asked_for_need_not_pay() -> None:
    subject = model("h = MatMul(x, w) y = Log(h)")
    assert QuantizeDynamic(load_target("ort-cpu"), layers=("*=int8",))(subject)[0].changed


# Sums of pairs in 16 bits.


@pytest.mark.parametrize(
    ("body", "inputs", "out"),
    [
        ("y = MatMul(x, w)", ROWS, OUT),
        ("y = MatMul(left, x)", "float[32, 9] x", OUT),
        ('y = LSTM<hidden_size = 16, direction = "bidirectional">(x, bw, br)', SEQUENCE, STATES),
        ("y = Conv<group = 2>(x, g)", IMAGE, STATES),
    ],
    ids=["MatMul", "left", "LSTM", "Conv"],
)
def test_no_pair_saturates_where_it_could(body: str, inputs: str, out: str) -> None:
    rule = conv_rule("int8", per_channel=True)
    before = model(body, inputs, out)
    loose = rewritten(before, QuantizeDynamic(eager(Conv=rule)))
    assert not check(loose, target="ort-cpu-avx2").is_clean
    target = eager("ort-cpu-avx2", Conv=rule)
    after = before.copy()
    (note,) = QuantizeDynamic(target)(after)
    assert "channels raised to keep sums of pairs in 16 bits" in note.text
    assert check(after, target="ort-cpu-avx2").is_clean
    for node in after.nodes("MatMulInteger"):
        assert excess(np.asarray(values_of(node.inputs[1]))).max() <= 1
    assert sqnr_db(outputs(before)[0], outputs(after)[0]) > 26
