"""Several operators become one: activations, normalisations, cancelled Transposes; by `check`."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxq.core import Pass
from onnxq.passes import (
    cancel_transposes,
    cleanup,
    fold_mul,
    fuse_activations,
    fuse_normalisations,
)
from onnxq.testing import check

CONSTANTS = (
    "float zero = {0.0}, float half = {0.5}, float one = {1.0}, float root = {1.4142135}, float two = {2.0},"
    " float[1] three = {3.0}, float six = {6.0}, float inverse = {0.70710677}, float k = {0.7978846}, float c = {0.044715},"
    " float eps = {0.00001}, float bad = {1.5}, int64[1] last = {-1}, int64[1] mid = {1}, int64[2] sides = {2, 3}, int64[2] ends = {1, -1},"
    " float[4] g = {1.0, 2.0, 0.5, -1.0}, float[4] b = {0.1, 0.2, 0.3, 0.4}, float[1, 4] row = {1.0, 2.0, 0.5, -1.0},"
    " float[4, 2] mat = {1.0, 2.0, 0.5, -1.0, 1.0, 2.0, 0.5, -1.0}, float[2] b2 = {0.5, 1.0},"
    " float[1, 3, 1, 1] wide = {1.0, 2.0, 3.0}, float[1, 1, 1, 3] channels = {1.0, 2.0, 3.0}, float[3] flat = {1.0, 2.0, 3.0}"
)
ROWS, IMAGE = "float[N, 3, 4] x", "float[N, 3, 5, 4] x"
Y2, Y3, Y4 = "float[p, q] y", "float[p, q, r] y", "float[p, q, r, s] y"


def graph(body: str, inputs: str, outputs: str, opset: int) -> onnx.ModelProto:
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> t ({inputs}) => ({outputs})'
        f" <{CONSTANTS}> {{ {body} }}"
    )
    read = {name for node in proto.graph.node for name in node.input}
    for attribute in (a for n in proto.graph.node for a in n.attribute if a.HasField("g")):
        read |= {name for node in attribute.g.node for name in node.input}
    read -= {name for node in proto.graph.node for name in node.output}
    kept = [t for t in proto.graph.initializer if t.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto


TANH = "p = Pow(x, three) q = Mul(p, c) i = Add(x, q) j = Mul(i, k) t = Tanh(j) a = Add(t, one)"
TANH_FACTORED = "s = Mul(x, x) p = Mul(s, c) q = Add(one, p) i = Mul(k, x) j = Mul(i, q) t = Tanh(j) a = Add(one, t)"
SQUARES = "p = Pow(d, two) v = ReduceMean(p, last) e = Add(v, eps) s = Sqrt(e)"
NORM = f"m = ReduceMean(x, last) d = Sub(x, m) {SQUARES} n = Div(d, s)"
ONE = [
    pytest.param("d = Div(x, root) r = Erf(d) a = Add(r, one) q = Mul(x, a) y = Mul(q, half)", 20, "Gelu", id="erf"),
    pytest.param("h = Mul(x, half) d = Mul(x, inverse) r = Erf(d) a = Add(one, r) y = Mul(h, a)", 20, "Gelu", id="erf-half-first"),
    pytest.param("d = Div(x, root) r = Erf(d) a = Add(r, one) h = Mul(a, half) y = Mul(h, x)", 20, "Gelu", id="erf-half-of-sum"),
    pytest.param(f"{TANH} m = Mul(x, half) y = Mul(m, a)", 20, "Gelu", id="tanh"),
    pytest.param(f"{TANH_FACTORED} m = Mul(x, a) y = Div(m, two)", 20, "Gelu", id="tanh-factored"),
    pytest.param("a = Add(x, three) s = Clip(a, zero, six) q = Mul(x, s) y = Div(q, six)", 14, "HardSwish", id="hard-swish"),
    pytest.param("a = Add(x, three) s = Clip(a, zero, six) q = Div(s, six) y = Mul(x, q)", 14, "HardSwish", id="hard-swish-of-product"),
    pytest.param("a = Add(x, three) s = Clip<min = 0.0, max = 6.0>(a) y = Div(s, six)", 8, "HardSigmoid", id="hard-sigmoid"),
    pytest.param("s = Softplus(x) t = Tanh(s) y = Mul(x, t)", 18, "Mish", id="mish"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "opset", "op"), ONE)
def test_an_activation_is_one_operator(body: str, opset: int, op: str) -> None:
    checked = check(fuse_activations, graph(body, ROWS, Y3, opset))
    assert checked.ops == {op: 1}
    assert checked.model.opset == opset


NORMALS = [
    pytest.param(f"{NORM} h = Mul(n, g) y = Add(h, b)", 18, ["LayerNormalization"], id="layer"),
    pytest.param(f"{NORM} h = Mul(n, row) y = Neg(h)", 18, ["LayerNormalization", "Neg"], id="layer-no-bias"),
    pytest.param(f"{NORM} y = Neg(n)", 18, ["LayerNormalization", "Neg"], id="layer-no-scale"),
    pytest.param("m = ReduceMean(x, last) d = Sub(x, m) p = Mul(d, d) v = ReduceMean(p, last) e = Add(eps, v) s = Sqrt(e) r = Reciprocal(s)"
                 " n = Mul(d, r) h = Mul(g, n) y = Add(b, h)", 18, ["LayerNormalization"], id="layer-reciprocal"),
    pytest.param("m = ReduceMean<axes = [-1]>(x) d = Sub(x, m) p = Pow(d, two) v = ReduceMean<axes = [2]>(p) e = Add(v, eps) s = Sqrt(e) n = Div(d, s)"
                 " h = Mul(n, g) y = Add(h, b)", 17, ["LayerNormalization"], id="axes-as-attributes"),
    pytest.param(f"{NORM} h = Mul(n, g) y = Add(h, b)".replace("last", "ends"), 18, ["LayerNormalization"], id="two-axes"),
    pytest.param("d = Relu(x) " + SQUARES + " n = Div(d, s) y = Mul(n, g)", 23, ["RMSNormalization", "Relu"], id="rms"),
    pytest.param("d = Relu(x) " + SQUARES + " r = Reciprocal(s) n = Mul(r, d) y = Mul(g, n)", 23, ["RMSNormalization", "Relu"], id="rms-reciprocal"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "opset", "left"), NORMALS)
def test_a_normalisation_is_one_operator(body: str, opset: int, left: list[str]) -> None:
    checked = check(fuse_normalisations, graph(body, ROWS, Y3, opset))
    assert sorted(checked.ops.elements()) == left


IN, OUT = "<perm = [0, 2, 3, 1]>", "<perm = [0, 3, 1, 2]>"
TRANSPOSES = [
    pytest.param(f"a = Transpose{IN}(x) h = Relu(a) y = Transpose{OUT}(h)", ["Relu"], id="unary"),
    pytest.param(f"a = Transpose{IN}(x) y = Transpose{OUT}(a)", ["Transpose", "Transpose"], id="between-interfaces"),
    pytest.param(f"r = Relu(x) a = Transpose{IN}(r) y = Transpose{OUT}(a)", ["Relu"], id="inverse"),
    pytest.param(f"a = Transpose{IN}(x) b = Transpose{IN}(a) y = Relu(b)", ["Relu", "Transpose"], id="two-are-one"),
    pytest.param(f"a = Transpose{IN}(x) h = Mul(a, channels) l = Add(h, flat) m = Sub(l, half) y = Transpose{OUT}(m)", ["Add", "Mul", "Sub"], id="constants"),
    pytest.param(f"r = Relu(x) a = Transpose{IN}(x) b = Transpose{IN}(r) h = Sigmoid(b) l = Mul(b, h) m = Concat<axis = 3>(a, l) y = Transpose{OUT}(m)",
                 ["Concat", "Mul", "Relu", "Sigmoid"], id="two-branches"),
    pytest.param(f"a = Transpose{IN}(x) h = Softmax<axis = 3>(a) l = ReduceMean(h, ends) y = Transpose{OUT}(l)", ["ReduceMean", "Softmax"], id="axes"),
    pytest.param(f"a = Transpose{IN}(x) h = ReduceMean<keepdims = 0>(a, ends) y = Relu(h)", ["ReduceMean", "Relu"], id="reduction"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "left"), TRANSPOSES)
def test_transposes_cancel(body: str, left: list[str]) -> None:
    outputs = Y2 if "keepdims = 0" in body else Y4
    checked = check(cancel_transposes, graph(body, IMAGE, outputs, 18))
    assert sorted(checked.ops.elements()) == left


DECLINES = [
    pytest.param(fuse_activations, ONE[0].values[0], ROWS, Y3, 19, "needs opset 20", id="gelu-too-new"),
    pytest.param(fuse_activations, "a = Add(x, three) s = Clip(a, zero, six) q = Mul(x, s) y = Div(q, bad)", ROWS, Y3, 18, None, id="other-constant"),
    pytest.param(fuse_activations, "a = Add(x, three) s = Clip(a, zero, six) q = Mul(x, s) y = Div(q, six)", ROWS, f"{Y3}, float[u, v, w] s", 18, None, id="inside-is-output"),
    pytest.param(fuse_activations, "d = Cast<to = 11>(x) s = Softplus(d) t = Tanh(s) h = Mul(d, t) y = Cast<to = 1>(h)", ROWS, Y3, 18, "float64", id="double"),
    pytest.param(fuse_activations, "s = Sigmoid(x) y = Mul(x, s)", ROWS, Y3, 24, None, id="swish"),
    pytest.param(fuse_normalisations, f"{NORM} h = Mul(n, g) y = Add(h, b)", ROWS, f"{Y3}, float[u, v, w] d", 18, "also an output", id="centred-is-output"),
    pytest.param(fuse_normalisations, f"{NORM} h = Mul(n, g) l = Add(h, s) y = Add(l, b)", ROWS, Y3, 18, "also used elsewhere", id="root-is-used"),
    pytest.param(fuse_normalisations, NORMALS[-1].values[0], ROWS, Y3, 18, "needs opset 23", id="rms-too-new"),
    pytest.param(fuse_normalisations, f"{NORM} h = Mul(n, g) y = Add(h, b)".replace("last", "mid"), ROWS, Y3, 18, None, id="middle-axis"),
    pytest.param(cancel_transposes, f"a = Transpose{IN}(x) h = Relu(a) l = Transpose{OUT}(h) y = Add(l, x)", IMAGE, f"{Y4}, float[u, v, w, z] h", 18, None, id="region-is-output"),
    pytest.param(cancel_transposes, f"h = Relu(x) y = Transpose{OUT}(h)", IMAGE, Y4, 18, "1 Transposes would go, 1 would come", id="no-gain"),
    pytest.param(cancel_transposes, f"a = Transpose{IN}(x) h = Softmax<axis = 3>(a) y = Transpose{OUT}(h)", IMAGE, Y4, 11, None, id="old-softmax"),
    pytest.param(cancel_transposes, "a = Transpose<perm = [0, 3, 2, 1]>(x) h = ReduceMean<keepdims = 0>(a, last) y = Relu(h)", IMAGE, Y3, 18, None, id="reduction-in-other-order"),
    pytest.param(fold_mul, "d = Div(x, root) r = Erf(d) a = Add(r, one) q = Mul(x, a) h = Mul(q, half) y = MatMul(h, mat)", ROWS, Y3, 17, "part of a Gelu", id="half-of-a-gelu"),
]  # fmt: skip


@pytest.mark.parametrize(("pass_", "body", "inputs", "outputs", "opset", "reason"), DECLINES)
def test_declines(
    pass_: Pass, body: str, inputs: str, outputs: str, opset: int, reason: str | None
) -> None:
    proto = graph(body, inputs, outputs, opset)
    checked = check(pass_, proto)
    assert not [note for note in checked.notes if note.changed]
    if reason is not None:
        assert any(reason in text for text in checked.declined), checked.declined


def test_float16_is_left_alone() -> None:
    body = "a = Add(x, t) s = Clip(a, z, u) q = Mul(x, s) y = Div(q, u)"
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float16[2, 4] x) => (float16[p, q2] y)'
        f" <float16 z = {{0}}, float16 t = {{16896}}, float16 u = {{17920}}> {{ {body} }}"
    )
    checked = check(fuse_activations, proto, rtol=1e-2, atol=1e-2)
    assert any("float32 only" in text for text in checked.declined)


def test_gelu_and_normalisation_survive_the_whole_cleanup() -> None:
    """Folding constants into layers must not take them apart before they are recognised."""
    body = f"{NORM} h = Mul(n, g) z = Add(h, b) d1 = Div(z, root) r = Erf(d1) a = Add(r, one) q = Mul(z, a) f = Mul(q, half) y = MatMul(f, mat)"
    checked = check(cleanup, graph(body, ROWS, Y3, 20))
    assert checked.ops == {"LayerNormalization": 1, "Gelu": 1, "MatMul": 1}


GELU = "d = Div(x, root) r = Erf(d)", "a = Add(r, one) q = Mul(x, a) u = Mul(q, half)"
HALVES = [
    pytest.param(fuse_activations, *GELU, {"Div", "Erf", "Add", "Mul"}, id="gelu"),
    pytest.param(fuse_normalisations, NORM, "u = Mul(n, g)", {"LayerNormalization", "Mul"}, id="scale"),
]  # fmt: skip


@pytest.mark.parametrize(("pass_", "outside", "inside", "left"), HALVES)
def test_halves_on_two_sides_of_a_body_are_not_one(
    pass_: Pass, outside: str, inside: str, left: set[str]
) -> None:
    shape = "float[2, 3, 4]"
    proto = graph(
        f"{outside} y = If(flag) <then_branch = f () => ({shape} u) {{ {inside} }},"
        f" else_branch = t () => ({shape} w) {{ w = Neg(x) }}>",
        f"bool flag, {shape} x", Y3, 20,
    )  # fmt: skip
    x = np.random.default_rng(0).normal(0, 1, (2, 3, 4)).astype(np.float32)
    checked = check(pass_, proto, feeds=[{"flag": np.array(k), "x": x} for k in (True, False)])
    assert set(checked.ops) == left | {"If", "Neg"}


def test_a_gelu_in_a_body() -> None:
    gelu = "d = Div(x, root) r = Erf(d) a = Add(r, one) q = Mul(x, a) u = Mul(q, half)"
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 20]> t (bool k, float[2, 4] x) => (float[2, 4] y)'
        " <float half = {0.5}, float one = {1.0}, float root = {1.4142135}>"
        f" {{ y = If(k) <then_branch = f () => (float[2, 4] u) {{ {gelu} }}, else_branch = e () => (float[2, 4] v) {{ v = Neg(x) }}> }}"
    )
    x = np.random.default_rng(0).normal(0, 1, (2, 4)).astype(np.float32)
    checked = check(cleanup, proto, feeds=[{"k": np.array(k), "x": x} for k in (True, False)])
    assert checked.ops == {"If": 1, "Gelu": 1, "Neg": 1}
