"""The clean-up passes: what each folds or drops, what it declines, by `check` of onnxq.testing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxq.core import Pass
from onnxq.model import Model
from onnxq.passes import (
    cleanup,
    drop_dead_nodes,
    drop_noops,
    drop_traces,
    fold_add,
    fold_batchnorm,
    fold_constants,
    fold_mul,
    share_initializers,
)
from onnxq.testing import check

SHAPES = {
    "w": (6, 4, 3, 3), "wt": (4, 6, 3, 3), "wt2": (4, 3, 3, 3), "w2": (6, 2, 3, 3), "w1": (6, 4, 3),
    "w11": (5, 6, 1, 1), "v3": (6, 4, 3, 3, 3), "m": (4, 6), "mt": (6, 4), "m6": (6, 5),
    "b": (6,), "g": (6,), "beta": (6,), "mean": (6,), "var": (6,), "g4": (4,), "beta4": (4,),
    "mean4": (4,), "var4": (4,), "zero4": (4,), "c": (1, 6, 1, 1), "row": (6,), "one": (), "wide": (2, 6, 1, 1),
    "plane": (1, 1, 3, 3),
}  # fmt: skip
IMAGE, ROWS = "float[2, 4, 8, 8] x", "float[3, 4] x"


def graph(body: str, inputs: str = IMAGE, outputs: str = "float[a, b, c, d] y", opset: int = 17,
          dtype: Any = np.float32, **given: Any) -> onnx.ModelProto:  # fmt: skip
    """ONNX text with weights of SHAPES drawn at random where the body names them."""
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    rng = np.random.default_rng(5)
    named = {name for node in proto.graph.node for name in node.input}
    for attribute in (a for n in proto.graph.node for a in n.attribute if a.HasField("g")):
        named |= {name for node in attribute.g.node for name in node.input}
    for name, shape in SHAPES.items():
        if name in named:
            value = (
                rng.normal(0, 1, shape)
                if not name.startswith("var")
                else rng.uniform(0.5, 2, shape)
            )
            value = np.zeros(shape) if name == "zero4" else given.get(name, value)
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))
    return proto


BN = "BatchNormalization({0}, g, beta, mean, var)"
BN4 = "n = BatchNormalization(x, g4, beta4, mean4, var4)"
PADS = "<pads = [1, 1, 1, 1]>"
FOLDS = [
    pytest.param(fold_batchnorm, dict(body="h = Conv(x, w, b) y = " + BN.format("h")), ["Conv"], id="conv-bn"),
    pytest.param(fold_batchnorm, dict(body=f"h = Conv{PADS}(x, w) y = " + BN.format("h")), ["Conv"], id="no-bias"),
    pytest.param(fold_batchnorm, dict(body="h = Conv<group = 2>(x, w2, b) y = " + BN.format("h")), ["Conv"], id="groups"),
    pytest.param(fold_batchnorm, dict(body="h = Conv(x, w1, b) y = " + BN.format("h"), inputs="float[2, 4, 8] x",
                                      outputs="float[a, b, c] y"), ["Conv"], id="1-d"),
    pytest.param(fold_batchnorm, dict(body="h = Conv(x, v3) y = " + BN.format("h"), inputs="float[1, 4, 4, 4, 4] x",
                                      outputs="float[a, b, c, d, e] y"), ["Conv"], id="3-d"),
    pytest.param(fold_batchnorm, dict(body="h = ConvTranspose(x, wt, b) y = " + BN.format("h")), ["ConvTranspose"], id="transposed"),
    pytest.param(fold_batchnorm, dict(body="h = ConvTranspose<group = 2>(x, wt2, b) y = " + BN.format("h")), ["ConvTranspose"], id="transposed-groups"),
    pytest.param(fold_batchnorm, dict(body="h = Gemm(x, m, b) y = " + BN.format("h"), inputs=ROWS, outputs="float[a, b] y"), ["Gemm"], id="gemm"),
    pytest.param(fold_batchnorm, dict(body="h = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, mt, b) y = " + BN.format("h"),
                                      inputs=ROWS, outputs="float[a, b] y"), ["Gemm"], id="gemm-alpha-beta"),
    pytest.param(fold_batchnorm, dict(body=f"{BN4} y = Conv(n, w, b)"), ["Conv"], id="bn-conv"),
    pytest.param(fold_batchnorm, dict(body=f"{BN4} y = Conv<group = 2>(n, w2)"), ["Conv"], id="bn-conv-groups"),
    pytest.param(fold_batchnorm, dict(body=f"{BN4} y = Gemm(n, m, b)", inputs=ROWS, outputs="float[a, b] y"), ["Gemm"], id="bn-gemm"),
    pytest.param(fold_batchnorm, dict(body=f"n = BatchNormalization(x, g4, zero4, zero4, var4) y = Conv{PADS}(n, w)"), ["Conv"], id="bn-padded-conv-without-shift"),
    pytest.param(fold_batchnorm, dict(body="h = Conv(x, w) k = Conv(x, w) p = " + BN.format("h") + " y = Add(p, k)"),
                 ["Add", "Conv", "Conv"], id="shared-weight-gets-a-copy"),
    pytest.param(fold_mul, dict(body="h = Conv(x, w, b) y = Mul(h, c)"), ["Conv"], id="conv-mul"),
    pytest.param(fold_mul, dict(body="h = Conv(x, w, b) y = Div(h, one)"), ["Conv"], id="conv-div"),
    pytest.param(fold_mul, dict(body="h = Gemm(x, m, b) y = Mul(row, h)", inputs=ROWS, outputs="float[a, b] y"), ["Gemm"], id="gemm-mul"),
    pytest.param(fold_mul, dict(body="h = MatMul(x, m) y = Mul(h, row)", inputs=ROWS, outputs="float[a, b] y"), ["MatMul"], id="matmul-mul"),
    pytest.param(fold_mul, dict(body="h = Mul(x, one) y = Conv(h, w, b)"), ["Conv"], id="mul-conv"),
    pytest.param(fold_mul, dict(body="h = Div(x, one) y = Gemm(h, m, b)", inputs=ROWS, outputs="float[a, b] y"), ["Gemm"], id="div-gemm"),
    pytest.param(fold_add, dict(body="h = Conv(x, w) y = Add(c, h)"), ["Conv"], id="conv-add"),
    pytest.param(fold_add, dict(body="h = ConvTranspose(x, wt, b) y = Sub(h, c)"), ["ConvTranspose"], id="transposed-sub"),
    pytest.param(fold_add, dict(body="h = Gemm<beta = 2.0>(x, m, b) y = Add(h, row)", inputs=ROWS, outputs="float[a, b] y"), ["Gemm"], id="gemm-add"),
    pytest.param(fold_add, dict(body="h = MatMul(x, m) y = Add(h, row)", inputs=ROWS, outputs="float[a, b] y"), ["Gemm"], id="matmul-add"),
    pytest.param(fold_add, dict(body="h = MatMul(x, m) y = Add(h, row)", inputs="float[2, 3, 4] x", outputs="float[a, b, c] y"),
                 ["Gemm", "Reshape", "Reshape"], id="stacked-matmul-add"),
    pytest.param(fold_add, dict(body="h = Add(x, one) y = Conv<group = 2>(h, w2, b)"), ["Conv"], id="add-conv"),
    pytest.param(fold_add, dict(body="h = Sub(x, one) y = Gemm<transB = 1, alpha = 0.5>(h, mt)", inputs=ROWS, outputs="float[a, b] y"), ["Gemm"], id="sub-gemm"),
    pytest.param(fold_constants, dict(body="k = Constant<value_ints = [2, -1]>() y = Reshape(x, k)", outputs="float[a, b] y"), ["Reshape"], id="constant-node"),
    pytest.param(fold_constants, dict(body="k = Transpose(m) y = Gemm(x, k)", inputs="float[3, 6] x", outputs="float[a, b] y"), ["Gemm"], id="constant-weight"),
    pytest.param(fold_constants, dict(body="s = Shape(x) i = Constant<value_int = 0>() n = Gather(s, i) z = Constant<value_ints = [0]>()"
                                      " u = Unsqueeze(n, z) r = Constant<value_ints = [-1]>() k = Concat<axis = 0>(u, r) y = Reshape(x, k)",
                                      outputs="float[a, b] y"), ["Reshape"], id="known-shape"),
    pytest.param(drop_noops, dict(body="h = Identity(x) y = Relu(h)"), ["Relu"], id="identity"),
    pytest.param(drop_noops, dict(body="h = Relu(x) y = Identity(h)"), ["Relu"], id="identity-to-output"),
    pytest.param(drop_noops, dict(body="h = Dropout(x) y = Relu(h)"), ["Relu"], id="dropout"),
    pytest.param(drop_noops, dict(body="h = Dropout<ratio = 0.3>(x) y = Relu(h)", opset=9), ["Relu"], id="dropout-opset-9"),
    pytest.param(drop_noops, dict(body="h = Cast<to = 1>(x) y = Relu(h)"), ["Relu"], id="cast"),
    pytest.param(drop_noops, dict(body="h = Transpose<perm = [0, 1, 2, 3]>(x) y = Relu(h)"), ["Relu"], id="transpose"),
    pytest.param(drop_noops, dict(body="h = Concat<axis = 1>(x) y = Relu(h)"), ["Relu"], id="concat"),
    pytest.param(drop_noops, dict(body="h = Clip(x) y = Relu(h)"), ["Relu"], id="clip"),
    pytest.param(drop_noops, dict(body="h = Mul(x, one) y = Relu(h)", one=1), ["Relu"], id="mul-one"),
    pytest.param(drop_noops, dict(body="h = Sub(x, one) y = Relu(h)", one=0), ["Relu"], id="sub-zero"),
    pytest.param(drop_noops, dict(body="h = MaxPool<kernel_shape = [1, 1]>(x) y = Relu(h)"), ["Relu"], id="max-pool"),
    pytest.param(drop_noops, dict(body="h = Cast<to = 11>(x) k = Cast<to = 1>(h) y = Relu(k)"), ["Relu"], id="cast-there-and-back"),
    pytest.param(drop_noops, dict(body="h = Split<axis = 1, num_outputs = 1>(x) y = Relu(h)", opset=18), ["Relu"], id="split-into-one"),
    pytest.param(drop_noops, dict(body="z = Constant<value_ints = [0]>() e = Constant<value_ints = [9223372036854775807]>() h = Slice(x, z, e, z) y = Relu(h)",
                                  inputs="float[N, 4, 8, 8] x"), ["Relu"], id="slice-of-all"),
    pytest.param(drop_dead_nodes, dict(body="h = Exp(x) k = Relu(h) y = Relu(x)"), ["Relu"], id="dead"),
    pytest.param(share_initializers, dict(body="h = Conv(x, w) k = Conv(x, v) y = Add(h, k)"), ["Add", "Conv", "Conv"], id="equal"),
]  # fmt: skip


@pytest.mark.parametrize(("pass_", "case", "left"), FOLDS)
def test_folds(pass_: Pass, case: dict[str, Any], left: list[str]) -> None:
    proto = graph(**case)
    if "v)" in case["body"]:
        twin = onnx.TensorProto()
        twin.CopyFrom(next(t for t in proto.graph.initializer if t.name == "w"))
        twin.name = "v"
        proto.graph.initializer.append(twin)
    checked = check(pass_, proto, rtol=1e-3, atol=1e-4)
    assert sorted(checked.ops.elements()) == left
    assert any(note.changed for note in checked.notes)
    if pass_ is share_initializers:
        assert len(checked.model.to_proto().graph.initializer) == 1


def test_a_bias_that_no_runtime_takes_is_left_alone() -> None:
    """Checker and onnxruntime load it; it fails when it is run."""
    edited = Model.from_proto(graph(body="h = Conv(x, w, w) y = " + BN.format("h")))
    (note,) = fold_batchnorm(edited)
    assert not note.changed
    assert "its bias w is not one value a channel" in note.text


DECLINES = [
    pytest.param(fold_batchnorm, dict(body="h = Conv(x, w) y = " + BN.format("h"), outputs="float[a, b, c, d] y, float[e, f, g0, h0] h"), "also used elsewhere", id="bn-output"),
    pytest.param(fold_batchnorm, dict(body="h = Conv(x, w) n = " + BN.format("h") + " y = Add(n, h)"), "also used elsewhere", id="bn-second-reader"),
    pytest.param(fold_batchnorm, dict(body="h = Conv(x, v) y = " + BN.format("h"), inputs=f"{IMAGE}, float[6, 4, 3, 3] v"), "v is not constant", id="bn-runtime-weight"),
    pytest.param(fold_batchnorm, dict(body="h = MatMul(x, m) y = " + BN.format("h"), inputs=ROWS, outputs="float[a, b] y"), "no bias to take the shift", id="bn-matmul-shift"),
    pytest.param(fold_batchnorm, dict(body=f"{BN4} y = Conv{PADS}(n, w)"), "pads with zeros", id="bn-padded-conv"),
    pytest.param(fold_batchnorm, dict(body=f"{BN4} h = Conv(n, w) k = Relu(n) l = Conv(k, w) y = Add(h, l)"), None, id="bn-two-readers"),
    pytest.param(fold_mul, dict(body="h = Conv(x, w) y = Mul(h, wide)"), "not one value a channel", id="mul-wide"),
    pytest.param(fold_mul, dict(body="h = Conv(x, w) k = Relu(h) l = Mul(h, c) y = Add(k, l)"), "also used elsewhere", id="mul-second-reader"),
    pytest.param(fold_mul, dict(body="h = Mul(x, g4) y = Conv(h, w)", inputs="float[2, 4, 8, 4] x"), "not one value for all", id="mul-before-per-axis"),
    pytest.param(fold_mul, dict(body="y = Mul(x, one)"), None, id="mul-no-layer"),
    pytest.param(fold_add, dict(body="h = Conv(x, w) y = Add(h, wide)"), "not one value a channel", id="add-wide"),
    pytest.param(fold_add, dict(body="h = Conv(x, w) y = Sub(c, h)"), None, id="sub-reversed"),
    pytest.param(fold_add, dict(body="h = MatMul(x, m) y = Add(h, row)", inputs="float[N, 3, 4] x", outputs="float[a, b, c] y"), None, id="stack-of-free-size"),
    pytest.param(fold_add, dict(body=f"h = Add(x, one) y = Conv{PADS}(h, w)"), "pads with zeros", id="add-padded-conv"),
    pytest.param(drop_noops, dict(body="y = Identity(x)"), "has a name to keep too", id="identity-between-interfaces"),
    pytest.param(drop_noops, dict(body="h = Relu(x) y = Identity(h)", outputs="float[a, b, c, d] y, float[e, f, g0, h0] h"), "both outputs", id="identity-of-output"),
    pytest.param(drop_noops, dict(body="y = Mul(x, wide)", wide=np.ones((2, 6, 1, 1)), inputs="float[1, 1, 8, 8] x"), None, id="ones-that-broadcast"),
    pytest.param(drop_noops, dict(body="y = Transpose(x)"), None, id="transpose-reversed"),
    pytest.param(drop_noops, dict(body="h = Cast<to = 10>(x) k = Cast<to = 1>(h) y = Relu(k)"), None, id="cast-by-a-narrow-type"),
    pytest.param(drop_noops, dict(body="z = Constant<value_ints = [0]>() e = Constant<value_ints = [7]>() h = Slice(x, z, e, z) y = Relu(h)",
                                  inputs="float[N, 4, 8, 8] x"), None, id="slice-of-a-part"),
    pytest.param(fold_constants, dict(body="k = Constant<value_ints = [600, 600]>() v = ConstantOfShape(k) y = Add(v, x)", inputs="float[1] x", outputs="float[a, b] y"), "would take 1.4 MB", id="large-result"),
    pytest.param(share_initializers, dict(body="h = Conv(x, w) y = Conv(h, w11)"), None, id="different"),
    pytest.param(drop_dead_nodes, dict(body="y = Relu(x)"), None, id="nothing-dead"),
]  # fmt: skip


@pytest.mark.parametrize(("pass_", "case", "reason"), DECLINES)
def test_declines(pass_: Pass, case: dict[str, Any], reason: str | None) -> None:
    proto = graph(**case)
    checked = check(pass_, proto)
    changed = [
        note for note in checked.notes if note.changed and "now an initializer" not in note.text
    ]
    assert not changed
    if reason is None:
        assert not checked.declined
    else:
        assert any(reason in text for text in checked.declined)


def test_division_by_zero_is_not_folded() -> None:
    """By hand: `check` does not compare with an original that is infinite."""
    proto = graph("h = Conv(x, w) y = Div(h, one)", one=0.0)
    assert [note.text for note in fold_mul(Model.from_proto(proto))] == ["the factor is not finite"]


def test_quantized_weights_are_not_unpacked() -> None:
    """Folding Cast and Mul over int8 would undo quantize_weights."""
    proto = graph("k = Cast<to = 1>(q) v = Mul(k, one) y = Conv(x, v)")
    q = np.random.default_rng(0).integers(-127, 127, (6, 4, 3, 3)).astype(np.int8)
    proto.graph.initializer.append(numpy_helper.from_array(q, "q"))
    checked = check(cleanup, proto, rtol=1e-3, atol=1e-3)
    assert checked.ops == {"Cast": 1, "Mul": 1, "Conv": 1}


def both_ways() -> list[dict[str, np.ndarray]]:
    x = np.random.default_rng(5).normal(0, 1, (2, 4, 8, 8)).astype(np.float32)
    return [{"c0": np.array(c), "x": x} for c in (True, False)]


FOLLOWERS = [
    pytest.param(fold_batchnorm, BN.format("h"), id="batchnorm"),
    pytest.param(fold_mul, "Mul(h, c)", id="mul"),
    pytest.param(fold_add, "Add(h, c)", id="add"),
]


@pytest.mark.parametrize(("pass_", "follower"), FOLLOWERS)
def test_layers_do_not_reach_into_bodies(pass_: Pass, follower: str) -> None:
    proto = graph(
        f"h = Conv(x, w) y = If(c0) <then_branch = t () => (float[2, 6, 6, 6] u) {{ u = {follower} }},"
        " else_branch = e () => (float[2, 6, 6, 6] v) { v = Conv(x, w) }>",
        f"bool c0, {IMAGE}",
    )
    checked = check(pass_, proto, feeds=both_ways())
    assert checked.declined == ["h is read in a body, and made outside of it"]
    assert checked.ops["Conv"] == 2


def test_bodies_are_cleaned_too() -> None:
    proto = graph(
        "y = If(c0) <then_branch = t () => (float[2, 6, 6, 6] u) { h = Conv(x, w) u = BatchNormalization"
        "(h, g, beta, mean, var) }, else_branch = e () => (float[2, 6, 6, 6] v) { k = Conv(x, w) v = Relu(k) }>",
        f"bool c0, {IMAGE}",
    )
    checked = check(cleanup, proto, feeds=both_ways(), rtol=1e-3, atol=1e-3)
    assert checked.ops == {"If": 1, "Conv": 2, "Relu": 1}


def test_what_bodies_have_in_common_is_stored_once() -> None:
    """Each body has the same tensor under the same name, made of constants."""
    half = "Constant<value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]>()"
    proto = graph(
        f"y = If(c0) <then_branch = t () => (float[2, 4, 8, 8] u) {{ k = {half} n = Neg(k) u = Mul(x, n) }},"
        f" else_branch = e () => (float[2, 4, 8, 8] v) {{ k = {half} n = Neg(k) v = Add(x, n) }}>",
        f"bool c0, {IMAGE}",
    )
    checked = check(cleanup, proto, feeds=both_ways())
    assert checked.ops == {"If": 1, "Mul": 1, "Add": 1}
    assert len(checked.model.to_proto().graph.initializer) == 1


def test_what_fails_does_not_keep_the_others_from_being_folded() -> None:
    """A lookup beyond the end of its table, in a branch that no sample takes."""
    ids = "far = Constant<value_ints = [0, 9]>() near = Constant<value_ints = [0, 1]>()"
    proto = graph(
        f"y = If(c0) <then_branch = t () => (float[2] u) {{ {ids} p = Gather(row, far) q = Gather(row, near)"
        " k = Neg(q) l = Exp(p) n = Add(x, k) u = Add(n, l) }, else_branch = e () => (float[2] v) { v = Neg(x) }>",
        "bool c0, float[2] x", "float[a] y",
    )  # fmt: skip
    feeds = [{"c0": np.array(False), "x": np.ones(2, np.float32)}]
    checked = check(fold_constants, proto, feeds=feeds)
    assert checked.ops == {"If": 1, "Gather": 1, "Exp": 1, "Add": 2, "Neg": 1}
    assert [text for text in checked.declined if "cannot be computed" in text]


def test_float16_is_folded_in_float16() -> None:
    proto = graph(
        "h = Conv(x, w, b) y = " + BN.format("h"), "float16[2, 4, 8, 8] x", "float16[a, b, c, d] y",
        dtype=np.float16,
    )  # fmt: skip
    checked = check(fold_batchnorm, proto, rtol=0.05, atol=0.05)  # half precision has 11 bits
    assert checked.ops == {"Conv": 1}


class Breaks:
    """A pass that does something wrong, to see that `check` can fail."""

    name = "breaks"

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, model: Any) -> list[Any]:
        (node,) = model.nodes()
        if self.how == "values":
            node.op = "Abs"
        elif self.how == "name":
            model.graph.outputs[0].name = "z"
        elif self.how == "again":
            model.graph.name += "x"
        elif self.how == "invalid":
            node.attrs["no_such_attribute"] = 1
        return []


@pytest.mark.parametrize("how", ["values", "name", "again", "invalid"])
def test_check_can_fail(how: str) -> None:
    proto = graph("y = Relu(x)")
    check(Breaks("not at all"), proto)
    with pytest.raises((AssertionError, onnx.checker.ValidationError)):
        check(Breaks(how), proto)


def test_check_wants_finite_references() -> None:
    zeros = [{"x": np.zeros((2, 4, 8, 8), np.float32)}]
    with pytest.raises(AssertionError, match="not finite"):
        check(drop_noops, graph("y = Log(x)"), feeds=zeros)


def test_drop_traces() -> None:
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    for key in ("namespace", "pkg.torch.onnx.stack_trace", "mine"):
        model.graph.node[0].metadata_props.add(key=key, value="text")
    model.metadata_props.add(key="pkg.torch.onnx.of_the_model", value="text")
    after = Model.from_proto(model)
    (note,) = drop_traces(after)
    assert note.text.startswith("1 nodes told")
    proto = after.to_proto()
    assert [p.key for p in proto.graph.node[0].metadata_props] == ["mine"]
    assert [p.key for p in proto.metadata_props] == ["pkg.torch.onnx.of_the_model"]
    assert not drop_traces(after)


def test_a_namespace_of_ones_own_stays() -> None:
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    model.graph.node[0].metadata_props.add(key="namespace", value="text")
    assert not drop_traces(Model.from_proto(model))
