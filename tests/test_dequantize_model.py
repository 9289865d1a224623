"""dequantize_model: pairs and integer operators become floats; what was cut off is cut off still."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxq import check, runtime
from onnxq.model import Model
from onnxq.passes import DequantizeModel
from onnxq.testing import check as check_pass

RNG = np.random.default_rng(5)
X, Y = "float[2, 8] x", "float[a, b] y"
SMALL = "float[2, 8] small"
IMAGE, MAP = "float[1, 4, 6, 6] x", "float[a, b, c, d] y"
S, ZERO = np.array(0.05, np.float32), np.array(120, np.uint8)
VALUES: dict[str, np.ndarray] = {
    "s": S, "z": ZERO, "s2": np.array(0.1, np.float32), "z2": np.array(100, np.uint8), "u": np.array(0, np.uint8),
    "s6": np.array(6 / 255, np.float32), "ss": np.array([0.05, 0.06], np.float32), "zz": np.array([120, 120], np.uint8),
    "s1": np.array(1 / 255, np.float32), "hs": np.array(0.05, np.float16),
    "w": RNG.integers(-90, 90, (8, 5)).astype(np.int8), "ws": np.array(0.01, np.float32), "wz": np.array(0, np.int8),
    "k": RNG.integers(-90, 90, (6, 4, 3, 3)).astype(np.int8), "kf": RNG.normal(0, 0.1, (6, 4, 3, 3)).astype(np.float32),
    "wf": RNG.normal(0, 0.3, (8, 5)).astype(np.float32), "shape": np.array([4, 4]), "ids": np.array([1, 0]),
    "pads": np.array([0, 1, 0, 2]), "seven": np.array(7, np.uint8), "cut": np.array([1]), "end": np.array([7]),
    "cond": RNG.random((2, 8)) > 0.5, "c": RNG.integers(0, 255, (2, 8)).astype(np.uint8),
}  # fmt: skip
IN, OUT = "q = QuantizeLinear(x, s, z) ", " y = DequantizeLinear(r, s2, z2)"
ENDS = "s, z, s2, z2"
OPERATORS = {
    "QLinearConcat": ("r = com.microsoft.QLinearConcat<axis = 1>(s2, z2, q, s, z, c, s, z)", X, Y, "Concat"),
    "QLinearMul": ("r = com.microsoft.QLinearMul(q, s, z, q, s, z, s2, z2)", SMALL, Y, "Mul"),
    "QLinearAdd": ("r = com.microsoft.QLinearAdd(q, s, z, q, s, z, s2, z2)", X, Y, "Add"),
    "QLinearMatMul": ("t = Transpose(q) r = QLinearMatMul(q, s, z, t, s, z, s2, z2)", SMALL, Y, "MatMul"),
    "QLinearLeakyRelu": (f"r = com.microsoft.QLinearLeakyRelu<alpha = 0.2>(q, {ENDS})", X, Y, "LeakyRelu"),
    "QLinearSigmoid": (f"r = com.microsoft.QLinearSigmoid(q, {ENDS})", X, Y, "Sigmoid"),
    "QLinearSoftmax": (f"r = com.microsoft.QLinearSoftmax<axis = 1, opset = 13>(q, {ENDS})", X, Y, "Softmax"),
    "QLinearWhere": ("r = com.microsoft.QLinearWhere(cond, q, s, z, c, s, z, s2, z2)", X, Y, "Where"),
    "QLinearAveragePool": (f"r = com.microsoft.QLinearAveragePool<kernel_shape = [2, 2], channels_last = 0>(q, {ENDS})", IMAGE, MAP, "AveragePool"),
    "QLinearGlobalAveragePool": (f"r = com.microsoft.QLinearGlobalAveragePool<channels_last = 0>(q, {ENDS})", IMAGE, MAP, "GlobalAveragePool"),
}  # fmt: skip


def proto(body: str, inputs: str = X, outputs: str = Y, opset: int = 17) -> onnx.ModelProto:
    head = f'<ir_version: 8, opset_import: ["": {opset}, "com.microsoft": 1]>'
    made = parser.parse_model(f"{head} g ({inputs}) => ({outputs}) {{ {body} }}")
    read = {name for node in made.graph.node for name in node.input}
    read |= {
        n for node in made.graph.node for a in node.attribute for m in a.g.node for n in m.input
    }
    for name in VALUES.keys() & read:
        made.graph.initializer.append(numpy_helper.from_array(VALUES[name], name))
    return made


def on_grid(made: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    """Inputs that integers stand for exactly."""
    (given,) = made.graph.input
    shape = [d.dim_value for d in given.type.tensor_type.shape.dim]
    most = 20 if given.name == "small" else 100
    return [{given.name: RNG.integers(-most, most, shape).astype(np.float32) * S} for _ in "ab"]


def recovered(body: str, *args: Any, atol: float = 0.0501, **more: Any) -> Any:
    made = proto(body, *args, **more)
    return check_pass(DequantizeModel(), made, feeds=on_grid(made), atol=atol)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_on_integers(name: str) -> None:
    body, inputs, outputs, op = OPERATORS[name]
    start = IN.replace("x", "small") if inputs == SMALL else IN
    result = recovered(start + body + OUT, inputs, outputs)
    assert result.ops[op] == 1
    assert not [o for o in result.ops if "Q" in o or "uantize" in o]
    assert {str(p.zero_point.dtype) for ps in result.model.ranges.values() for p in ps} == {"uint8"}
    assert check(result.model).is_clean


MOVES = {
    "Reshape": ("m = Reshape(q, shape)", "float[2, 8] x"),
    "Transpose": ("m = Transpose(q)", X),
    "Gather": ("m = Gather<axis = 1>(q, ids)", X),
    "Pad": ("m = Pad(q, pads, z)", X),
    "Pad-value": ("m = Pad(q, pads, seven)", X),
    "Pad-zero": ("m = Pad(q, pads)", X),
    "Slice": ("m = Slice(q, cut, end, cut)", X),
    "Split": ("n, m = Split<axis = 1>(q)", X),
    "Concat": ("m = Concat<axis = 1>(q, c, q)", X),
    "chain": ("n = Transpose(q) o = Reshape(n, shape) m = Squeeze(o)", X),
}


@pytest.mark.parametrize("name", MOVES)
def test_integers_that_move(name: str) -> None:
    body, inputs = MOVES[name]
    result = recovered(f"{IN}{body} y = DequantizeLinear(m, s, z)", inputs, atol=1e-6)
    assert not [o for o in result.ops if "uantize" in o]
    assert result.model.ranges["x"][0].scale == S
    assert result.model.ranges["y"][0].scale == S


def test_max_pool_of_integers() -> None:
    body = IN + "m = MaxPool<kernel_shape = [2, 2]>(q) y = DequantizeLinear(m, s, z)"
    assert set(recovered(body, IMAGE, MAP, atol=1e-6).ops) == {"MaxPool"}


def test_a_table_of_integers_that_is_gathered_from() -> None:
    body = "g = Gather(c, i) y = DequantizeLinear(g, s, z)"
    result = check_pass(DequantizeModel(), proto(body, "int64[2] i", "float[2, 8] y"))
    assert set(result.ops) == {"Gather"}


CLAMPS = {
    "relu": ("h = MatMul(x, wf) q = QuantizeLinear(h, s, u) y = DequantizeLinear(q, s, u)", "Relu"),
    "relu6": ("h = MatMul(x, wf) q = QuantizeLinear(h, s6, u) y = DequantizeLinear(q, s6, u)", "Clip"),
    "both-signs": ("h = MatMul(x, wf) q = QuantizeLinear(h, s, z) y = DequantizeLinear(q, s, z)", ""),
    "relu-there": ("h = MatMul(x, wf) t = Relu(h) q = QuantizeLinear(t, s, u) y = DequantizeLinear(q, s, u)", "Relu"),
    "clip-there": ("a = Constant<value_float = 0.5>() h = Clip(x, a) q = QuantizeLinear(h, s, u) y = DequantizeLinear(q, s, u)", "Clip"),
    "clip-below": ("a = Constant<value_float = -0.5>() h = Clip(x, a) q = QuantizeLinear(h, s, u) y = DequantizeLinear(q, s, u)", "Clip Relu"),
    "positive": ("h = Sigmoid(x) t = Add(h, h) q = QuantizeLinear(t, s, u) y = DequantizeLinear(q, s, u)", ""),
    "moved": ("h = MatMul(x, wf) t = Transpose(h) q = QuantizeLinear(t, s, u) y = DequantizeLinear(q, s, u)", "Relu"),
    "input": ("q = QuantizeLinear(x, s1, u) d = DequantizeLinear(q, s1, u) y = Abs(d)", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAMPS)
def test_what_a_range_cuts_off(name: str) -> None:
    body, wanted = CLAMPS[name]
    result = check_pass(
        DequantizeModel(), proto(body), atol=0.03,
        feeds=[{"x": RNG.random((2, 8)).astype(np.float32) * (1 if name == "input" else 2)}],
    )  # fmt: skip
    assert " ".join(sorted(set(result.ops) & {"Relu", "Clip"})) == wanted
    assert sum(result.ops[op] for op in ("Relu", "Clip")) == len(wanted.split())


def test_relu6_in_an_old_opset() -> None:
    result = check_pass(DequantizeModel(), proto(CLAMPS["relu6"][0], opset=10), atol=0.03)
    assert result.ops["Clip"] == 1


def test_one_relu_for_all_that_read_the_integers() -> None:
    body = (
        "h = MatMul(x, wf) q = QuantizeLinear(h, s, u) a = DequantizeLinear(q, s, u) "
        "b = DequantizeLinear(q, s, u) p = QuantizeLinear(h, s, u) c1 = DequantizeLinear(p, s, u) "
        "d = Add(a, b) y = Add(d, c1)"
    )
    result = check_pass(DequantizeModel(), proto(body), atol=0.1)
    assert result.ops["Relu"] == 1


def test_integers_of_the_interface_stay() -> None:
    made = proto(
        "d = DequantizeLinear(x, s, z) e = Relu(d) q = QuantizeLinear(e, s, z) "
        "f = DequantizeLinear(q, s, z) g = Neg(f) y = QuantizeLinear(g, s2, z2)",
        "uint8[2, 8] x", "uint8[2, 8] y",
    )  # fmt: skip
    result = check_pass(DequantizeModel(), made)
    assert result.ops == {"DequantizeLinear": 1, "Relu": 1, "Neg": 1, "QuantizeLinear": 1}


def test_qlinear_operators_between_integer_interfaces() -> None:
    made = proto(
        "r = com.microsoft.QLinearSigmoid(x, s, z, s1, u) y = com.microsoft.QLinearMul(r, s1, u, x, s, z, s2, z2)",
        "uint8[2, 8] x", "uint8[2, 8] y",
    )  # fmt: skip
    result = check_pass(DequantizeModel(), made, atol=1)
    assert result.ops["Sigmoid"] == result.ops["Mul"] == result.ops["QuantizeLinear"] == 1


def test_integers_that_something_else_reads_are_made_again() -> None:
    body = f"{IN}r = com.microsoft.QLinearSigmoid(q, s, z, s1, u) y = Cast<to = 1>(r)"
    result = recovered(body, atol=1.01)
    assert result.ops == {"Sigmoid": 1, "QuantizeLinear": 1, "Cast": 1}


def test_names_and_ranges() -> None:
    body = (
        "h_float = MatMul(x, wf) q = QuantizeLinear(h_float, s, z) h = DequantizeLinear(q, s, z) "
        "n = Neg(h) p = QuantizeLinear(n, s2, z2) n_dq = DequantizeLinear(p, s2, z2) o = Abs(n) y = Add(n_dq, o)"
    )
    model = Model.from_proto(proto(body))
    DequantizeModel()(model)
    made = {node.op: node.outputs[0].name for node in model.nodes()}
    assert made == {"MatMul": "h", "Neg": "n", "Abs": "o", "Add": "y"}
    assert {n: (float(p[0].scale), int(p[0].zero_point)) for n, p in model.ranges.items()} == {
        "h": (float(S), 120), "n": (float(np.float32(0.1)), 100),
    }  # fmt: skip
    assert model.copy().ranges == model.ranges
    other = Model.from_proto(proto(body))
    DequantizeModel(ranges=False)(other)
    assert not other.ranges


LEFT = {
    "other-scale": f"{IN}y = DequantizeLinear(q, s2, z)",
    "other-zero": f"{IN}y = DequantizeLinear(q, s, z2)",
    "an-operator-between": f"{IN}t = Max(q, q) y = DequantizeLinear(t, s, z)",
    "runtime-scale": "m = ReduceMax<keepdims = 0>(x) q = QuantizeLinear(x, m, z) y = DequantizeLinear(q, m, z)",
    "channels": "q = QuantizeLinear<axis = 0>(x, ss, zz) y = DequantizeLinear<axis = 0>(q, ss, zz)",
    "in-is-out": f"{IN}y = DequantizeLinear(q, s, z)",
}


@pytest.mark.parametrize("name", LEFT)
def test_pairs_that_are_left_alone(name: str) -> None:
    result = check_pass(DequantizeModel(), proto(LEFT[name]))
    assert result.ops["DequantizeLinear"] == 1
    assert not any(note.changed for note in result.notes)


def test_scales_spread_over_channels_are_one() -> None:
    made = proto(f"{IN}d = DequantizeLinear<axis = 0>(q, same, zz) y = Abs(d)")
    made.graph.initializer.append(numpy_helper.from_array(np.full(2, S), "same"))
    assert set(check_pass(DequantizeModel(), made, feeds=on_grid(made)).ops) == {"Abs"}


DECLINES = [
    pytest.param("i = MatMulInteger(x, w) f = Cast<to = 1>(i) y = Mul(f, s)", "uint8[2, 8] x",
                 "not quantized by a DynamicQuantizeLinear", id="integers"),
    pytest.param("q, a, b = DynamicQuantizeLinear(x) t = Transpose(q) i = MatMulInteger(q, t, b, b) f = Cast<to = 1>(i) y = Mul(f, a)", X,
                 "its weight is not constant", id="runtime-weight"),
    pytest.param("q, a, b = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, b) f = Cast<to = 1>(i) y = Neg(f)", X,
                 "not scaled", id="no-scales"),
    pytest.param("q, a, b = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, b) y = Cast<to = 6>(i)", X.replace("y", "y"),
                 "not scaled", id="sums-are-the-output"),
    pytest.param("q, a, b = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, b) f = Cast<to = 1>(i) t = ReduceMax(x) m = Mul(f, t) y = Mul(m, a)", X,
                 "which is no scale of its own", id="foreign-factor"),
    pytest.param(f"{IN}r = com.microsoft.QLinearSoftmax<axis = 1, opset = 11>(q, {ENDS}){OUT}", X,
                 "a Softmax of opset 11", id="softmax"),
    pytest.param(f"{IN}r = com.microsoft.QLinearGlobalAveragePool<channels_last = 1>(q, {ENDS}){OUT}", IMAGE,
                 "its channels are last", id="channels-last"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "inputs", "reason"), DECLINES)
def test_declines(body: str, inputs: str, reason: str) -> None:
    outputs = "int32[a, b] y" if "to = 6" in body else MAP if inputs == IMAGE else Y
    model = Model.from_proto(proto(body, inputs, outputs))
    before = {node.op for node in model.nodes()}
    notes = DequantizeModel()(model)
    assert any(reason in note.text for note in notes if not note.changed), notes
    assert (
        {"MatMulInteger", "QLinearSoftmax", "QLinearGlobalAveragePool"}
        & before
        & {node.op for node in model.nodes()}
    )
    runtime.session(model)


def test_rows_of_sizes_of_their_own() -> None:
    body = (
        "a = Abs(x) m = ReduceMax<axes = [-1], keepdims = 1>(a) l = Constant<value_float = 1e-30>() r = Max(m, l) "
        "d = Div(x, r) q, e, f = DynamicQuantizeLinear(d) i = MatMulInteger(q, w, f) c1 = Cast<to = 1>(i) "
        "g = Mul(e, ws) h = Mul(c1, g) y = Mul(h, r)"
    )
    result = check_pass(DequantizeModel(), proto(body), atol=0.2)
    assert result.ops == {"MatMul": 1}


def test_bodies() -> None:
    body = (
        "t = Constant<value_int = 1>() c1 = Cast<to = 9>(t) y = If(c1) <then_branch = p () => (float[2, 5] v) "
        "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear(w, ws, wz) v = MatMul(d, e) }, "
        "else_branch = o () => (float[2, 5] u) { e2 = DequantizeLinear(w, ws, wz) u = MatMul(x, e2) }>"
    )
    made = proto(body)
    result = check_pass(DequantizeModel(), made, feeds=on_grid(made))
    assert result.ops["MatMul"] == 2
    assert not result.ops["DequantizeLinear"]


def test_nothing_to_do() -> None:
    assert not check_pass(DequantizeModel(), proto("h = MatMul(x, wf) y = Relu(h)")).notes


def test_pairs_of_another_domain_have_types_that_nobody_infers() -> None:
    made = proto(
        """
        q = com.microsoft.QuantizeLinear(small, s, z) a = com.microsoft.DequantizeLinear(q, s, z)
        m = com.microsoft.DequantizeLinear(w, ws, wz) r = MatMul(a, m)
        p = com.microsoft.QuantizeLinear(r, s2, z2) y = com.microsoft.DequantizeLinear(p, s2, z2)
    """,
        SMALL,
    )
    result = check_pass(DequantizeModel(), made, feeds=on_grid(made), atol=0.0501)
    assert result.ops == {"MatMul": 1}


LAYER = (
    "q, d, e = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, e) g = Cast<to = 1>(i) "
    "m = Mul(d, ws) y = Mul(g, m)"
)
DECLINED = [
    pytest.param(proto(LAYER, X, f"{Y}, int32[a, b] i"), "its sums are not scaled", id="sums-out"),
    pytest.param(proto(LAYER, X, f"{Y}, float[a, b] g"), "its sums are not scaled", id="cast-out"),
    pytest.param(
        proto(f"{IN} r = QLinearConv(q, s, z, v, sv, z, s2, z2) {OUT}".replace("sv", "ss"),
              "float[1, 2, 6, 6] x, uint8[2, 2, 3, 3] v", MAP),
        "v is not constant, and has scales of channels", id="channels",
    ),
    pytest.param(
        proto("r = QLinearMatMul(c, hs, u, t, hs, u, hs, u)",
              "uint8[8, 2] t", "uint8[a, b] r", opset=21),
        "its scales are float16", id="half",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("made", "why"), DECLINED)
def test_declined_as_it_is(made: onnx.ModelProto, why: str) -> None:
    model = Model.from_proto(made)
    before = sorted(node.op for node in model.nodes())
    notes = DequantizeModel()(model)
    assert any(why in note.text for note in notes if not note.changed)
    layers = ("MatMulInteger", "QLinearConv", "QLinearMatMul")
    assert sorted(n.op for n in model.nodes() if n.op in layers) == [
        o for o in before if o in layers
    ]
    onnx.checker.check_model(model.to_proto(), full_check=True)


def test_packed_weights_of_a_half_precision_model() -> None:
    """Nobody infers the type of what MatMulNBits returns: that of its scales is known."""
    made = proto("""
        h = Relu(x)
        t = com.microsoft.MatMulNBits<K = 16, N = 8, bits = 4, block_size = 16>(h, b, scales)
        y = Relu(t)
    """, "float16[2, 16] x", "float16[2, 8] y")  # fmt: skip
    numbers = RNG.integers(0, 256, (8, 1, 8)).astype(np.uint8)
    scales = np.full(8, 0.1, np.float16)
    made.graph.initializer.append(numpy_helper.from_array(numbers, "b"))
    made.graph.initializer.append(numpy_helper.from_array(scales, "scales"))
    feeds = [{"x": RNG.normal(0, 1, (2, 16)).astype(np.float16)}]
    assert check_pass(DequantizeModel(), made, feeds=feeds, atol=0.02).ops["MatMul"] == 1
