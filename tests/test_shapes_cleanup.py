"""Passes over shapes: sizes folded, reshapes, Slices and Ifs merged; by `check` of onnxq.testing."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxq.core import Pass
from onnxq.model import Model
from onnxq.passes import (
    cleanup,
    drop_noops,
    drop_zero_states,
    fold_pad,
    fold_shapes,
    inline_if,
    merge_reshapes,
    merge_slices,
    share_nodes,
)
from onnxq.passes.size_algebra import broadcast, cut, product, quotient, target_of
from onnxq.passes.sizes import Sizes
from onnxq.testing import check

CONSTANTS = (
    "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64[1] end = {99},"
    " int64[1] rest = {-1}, int64 first = {0}, int64 second = {1}, int64[2] pair = {2, 3}, int64 scalar = {6},"
    " int64[8] pads = {0, 0, 1, 2, 0, 0, 1, 0}, int64[8] channels = {0, 1, 0, 0, 0, 0, 0, 0},"
    " int64[8] cuts = {0, 0, -1, 0, 0, 0, 0, 0}, int64[4] inner = {1, 2, 1, 0}, int64[0] none = {}, int64[2] none2 = {0, 5}, float nothing = {0.0},"
    " int32[1] start = {1}, int32[1] axis = {2}, int32[1] stop = {7}, int64[1] last = {9223372036854775807},"
    " float half = {0.5}, float low = {-3.4e38}, bool yes = {1}, bool no = {0},"
    " float[1, 3, 2, 2] w = {1.0, -1.0, 0.5, 2.0, 1.0, -1.0, 0.5, 2.0, 1.0, 3.0, 0.5, 2.0}"
)


def graph(
    body: str, inputs: str, outputs: str = "float y", opset: int = 17, ir: int = 8
) -> onnx.ModelProto:
    proto = parser.parse_model(
        f'<ir_version: {ir}, opset_import: ["": {opset}]> g ({inputs}) => ({outputs})'
        f" <{CONSTANTS}> {{ {body} }}"
    )
    read = {name for node in proto.graph.node for name in node.input}
    for attribute in (a for n in proto.graph.node for a in n.attribute if a.HasField("g")):
        read |= {name for node in attribute.g.node for name in node.input}
    kept = [t for t in proto.graph.initializer if t.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto


def dim(name: str, index: str, source: str = "x") -> str:
    """Text of nodes that make a one-element tensor of a size."""
    return f"{name}s = Shape({source}) {name}g = Gather({name}s, {index}) {name} = Unsqueeze({name}g, zero) "


IMAGE, FREE = "float[N, 3, 8, 6] x", "float[N, T, 4] x"
Y2, Y3, Y4 = "float[a, b] y", "float[a, b, c] y", "float[a, b, c, d] y"
CHANGES = [
    pytest.param(fold_shapes, dim("n", "first") + "k = Concat<axis = 0>(n, rest) y = Reshape(x, k)", IMAGE, Y2, ["Reshape"], id="one-free-size"),
    pytest.param(fold_shapes, dim("n", "first") + dim("t", "second") + "k = Concat<axis = 0>(n, t, two, two) y = Reshape(x, k)", FREE, Y4, ["Reshape"], id="two-free-sizes"),
    pytest.param(fold_shapes, dim("n", "first") + dim("t", "second") + "p = Mul(n, t) k = Concat<axis = 0>(p, rest) y = Reshape(x, k)", FREE, Y2, ["Reshape"], id="product-of-sizes"),
    pytest.param(fold_shapes, dim("t", "second") + "k = Concat<axis = 0>(rest, t, two, two) y = Reshape<allowzero = 1>(x, k)", FREE, Y4, ["Reshape"], id="allowzero"),
    pytest.param(fold_shapes, "s = Shape(x) y = Reshape(x, s)", FREE, Y3, None, id="between-interfaces"),
    pytest.param(fold_shapes, "h = Relu(x) s = Shape(x) k = Reshape(h, s) y = Neg(k)", FREE, Y3, ["Neg", "Relu"], id="reshape-to-its-shape"),
    pytest.param(fold_shapes, "h = Relu(x) s = Shape(x) k = Expand(h, s) y = Neg(k)", FREE, Y3, ["Neg", "Relu"], id="expand-to-its-shape"),
    pytest.param(fold_shapes, dim("t", "second") + "p = Slice(x, zero, t, one) y = Neg(p)", FREE, Y3, ["Neg", "Shape", "Slice"], id="one-Shape-is-left"),
    pytest.param(fold_shapes, dim("t", "second") + "p = Slice(x, zero, t, one) y = Neg(p)", "float[N, T, 4] x", Y3, ["Gather", "Neg", "Shape", "Slice"], id="one-Gather-before-15"),
    pytest.param(fold_shapes, dim("a", "first") + dim("b", "first") + "p = Slice(x, zero, a, zero) q = Slice(x, zero, b, zero) y = Add(p, q)", FREE, Y3, ["Add", "Shape", "Slice", "Slice"], id="the-same-size-twice"),
    pytest.param(fold_shapes, dim("n", "first") + "k = Concat<axis = 0>(n, two) e = Equal(k, rest) o = ConstantOfShape(two) "
                 "f = Where(e, pair, k) z = Reshape(f, rest) y = Expand(half, z)", IMAGE, Y2, None, id="sizes-are-not-negative"),
    pytest.param(fold_shapes, "s = Shape(x) c = Gather(s, one) k = Mul(c, last) l = Mul(k, two) y = Add(l, l)", IMAGE, "int64[p] y", None, id="products-wrap-around"),
    pytest.param(fold_shapes, "k = Size(x) l = Mul(k, last) m = Cast<to = 6>(l) y = Add(m, m)", "float[2, 4] x", "int32[p] y", None, id="casts-wrap-around"),
    pytest.param(fold_shapes, "k = Mul(n, first) c = Cast<to = 1>(k) y = Add(x, c)", f"{FREE}, int64 n", Y3, ["Add", "Cast"], id="nothing-times-zero"),
    pytest.param(fold_shapes, "k = Mul(zero, n) l = Add(k, two) y = Mul(l, n)", f"int64[1] n, {FREE}", "int64[p] y", ["Mul"], id="one-element-times-zero"),
    pytest.param(merge_reshapes, "h = Unsqueeze(x, zero) k = Unsqueeze(h, zero) y = Neg(k)", FREE, "float[a, b, c, d, e] y", ["Neg", "Unsqueeze", "Unsqueeze"], id="free-sizes-move"),
    pytest.param(merge_reshapes, "h = Unsqueeze(x, three) k = Flatten(h) y = Neg(k)", "float[N, 3, 4] x", Y2, ["Neg", "Reshape"], id="unsqueeze-flatten"),
    pytest.param(merge_reshapes, "h = Unsqueeze(x, one) k = Squeeze(h, one) y = Neg(k)", FREE, Y3, ["Neg"], id="inverse"),
    pytest.param(merge_reshapes, "r = Relu(x) h = Unsqueeze(r, one) y = Squeeze(h, one)", FREE, Y3, ["Relu"], id="inverse-to-output"),
    pytest.param(merge_reshapes, "h = Unsqueeze(x, one) y = Squeeze(h, one)", "float[2, 4] x", Y2, ["Reshape"], id="inverse-between-interfaces"),
    pytest.param(merge_reshapes, "h = Transpose<perm = [0, 2, 3, 1]>(x) y = Neg(h)", "float[N, 1, 8, 6] x", Y4, ["Neg", "Reshape"], id="transpose-of-one-channel"),
    pytest.param(merge_slices, "h = Slice(x, one, end, two) y = Slice(h, zero, end, three, two)", IMAGE, Y4, ["Slice"], id="slice-slice"),
    pytest.param(merge_slices, "h = Slice(x, one, end, two) a = Slice(h, zero, three, three) b = Slice(h, three, end, three) y = Add(a, b)", IMAGE, Y4, ["Add", "Slice", "Slice"], id="all-its-readers"),
    pytest.param(merge_slices, "h = Slice(x, start, stop, axis) y = Slice(h, zero, last, three)", IMAGE, Y4, ["Slice"], id="int32-and-all-of-int64"),
    pytest.param(share_nodes, "a = Exp(x) b = Exp(x) c = Neg(a) d = Neg(b) y = Add(c, d)", FREE, Y3, ["Add", "Exp", "Neg"], id="equal-chains"),
    pytest.param(share_nodes, "a = Slice(x, zero, two, one) b = Slice(x, zero, two, one) y = Add(a, b)", FREE, Y3, ["Add", "Slice"], id="equal-constants"),
    pytest.param(inline_if, "r = If(yes) <then_branch = t () => (float[N, 3, 8, 6] u) { h = Exp(x) u = Neg(h) }, else_branch = e () => (float[N, 3, 8, 6] v)"
                 " { v = Abs(x) }> y = Relu(r)", IMAGE, Y4, ["Exp", "Neg", "Relu"], id="then"),
    pytest.param(inline_if, "h = Exp(x) k = Neg(h) y = If(no) <then_branch = t () => (float[N, 3, 8, 6] u) { u = Neg(x) }, else_branch = e () => (float[N, 3, 8, 6] v)"
                 " { h2 = Exp(k) v = Add(h2, h) }>", IMAGE, Y4, ["Add", "Exp", "Exp", "Neg"], id="else-to-output"),
    pytest.param(fold_pad, "h = Pad(x, pads) y = Conv(h, w)", IMAGE, Y4, ["Conv"], id="pad-conv"),
    pytest.param(fold_pad, "h = Pad(x, pads) y = Conv<pads = [0, 1, 2, 0]>(h, w)", IMAGE, Y4, ["Conv"], id="pad-padded-conv"),
    pytest.param(fold_pad, "h = Pad(x, inner, nothing, pair) y = Conv(h, w)", IMAGE, Y4, ["Conv"], id="pad-axes"),
    pytest.param(fold_pad, "h = Pad(x, none, nothing, none) y = Conv(h, w)", IMAGE, Y4, ["Conv"], id="pad-no-axes"),
    pytest.param(fold_pad, "h = Pad(x, pads) y = AveragePool<kernel_shape = [3, 3]>(h)", IMAGE, Y4, ["AveragePool"], id="average-pool"),
    pytest.param(fold_pad, "h = Pad(x, pads, low) y = MaxPool<kernel_shape = [3, 3]>(h)", IMAGE, Y4, ["MaxPool"], id="max-pool"),
    pytest.param(fold_pad, "r = Relu(x) h = Pad(r, pads) y = MaxPool<kernel_shape = [3, 3]>(h)", IMAGE, Y4, ["MaxPool", "Relu"], id="max-pool-of-positives"),
]  # fmt: skip
OPSETS = {"pad-axes": 18, "pad-no-axes": 18, "one-Gather-before-15": 13}


@pytest.mark.parametrize(("pass_", "body", "inputs", "outputs", "left"), CHANGES)
def test_changes(
    pass_: Pass, body: str, inputs: str, outputs: str, left: list[str] | None,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """left: the operators that remain; None: only that the results do."""
    opset = OPSETS.get(request.node.callspec.id, 17)
    checked = check(pass_, graph(body, inputs, outputs, opset))
    if left is not None:
        assert sorted(checked.ops.elements()) == left


DECLINES = [
    pytest.param(fold_shapes, dim("n", "first") + dim("t", "second") + "k = Concat<axis = 0>(t, n, rest) y = Reshape(x, k)", FREE, Y3, None, id="swapped"),
    pytest.param(merge_reshapes, "h = Unsqueeze(x, zero) k = Relu(h) l = Squeeze(h, zero) m = Squeeze(k, zero) y = Add(l, m)", "float[2, 4] x", Y2, None, id="kept-by-another"),
    pytest.param(merge_reshapes, "h = Unsqueeze(x, zero) k = Relu(h) l = Flatten(h) m = Flatten(k) y = Add(l, m)", "float[2, 4] x", Y2, "also used elsewhere", id="second-reader"),
    pytest.param(merge_reshapes, "h = Unsqueeze(x, zero) y = Unsqueeze(h, zero)", FREE, "float[a, b, c, d, e] y", "more free axes", id="two-free-axes"),
    pytest.param(merge_reshapes, "h = Unsqueeze(x, zero) k = Reshape<allowzero = 1>(h, none2) y = Neg(k)", "float[4, 0] x", Y2, "a size of zero", id="empty"),
    pytest.param(merge_reshapes, "y = Transpose<perm = [0, 2, 3, 1]>(x)", IMAGE, Y4, None, id="moves-values"),
    pytest.param(merge_slices, "h = Slice(x, one, end, two) y = Slice(h, zero, two, two)", IMAGE, Y4, "cuts the same axis", id="same-axis"),
    pytest.param(merge_slices, "h = Slice(x, one, end, two) k = Slice(h, zero, end, three, two) y = Concat<axis = 3>(h, k)", IMAGE, Y4, "also used elsewhere", id="slice-second-reader"),
    pytest.param(merge_slices, "h = Slice(x, k, end, two) y = Slice(h, zero, two, three)", f"{IMAGE}, int64[1] k", Y4, "not constant", id="runtime-bounds"),
    pytest.param(share_nodes, "a = Exp(x) y = Exp(x)", FREE, f"{Y3}, float[d, e, f] a", None, id="both-outputs"),
    pytest.param(share_nodes, "a = LeakyRelu<alpha = 0.1>(x) b = LeakyRelu<alpha = 0.2>(x) y = Add(a, b)", FREE, Y3, None, id="other-attributes"),
    pytest.param(inline_if, "y = If(c) <then_branch = t () => (float[N, 3, 8, 6] u) { u = Neg(x) }, else_branch = e () => (float[N, 3, 8, 6] v)"
                 " { v = Abs(x) }>", f"bool c, {IMAGE}", Y4, None, id="runtime-condition"),
    pytest.param(inline_if, "h = Relu(x) y = If(yes) <then_branch = t () => (float[N, 3, 8, 6] u) { u = Identity(h) }, else_branch = e () => (float[N, 3, 8, 6] v)"
                 " { v = Abs(x) }>", IMAGE, Y4, None, id="identity-of-outside"),
    pytest.param(fold_pad, "h = Pad(x, pads, half) y = Conv(h, w)", IMAGE, Y4, "pads with 0.5", id="pads-with-half"),
    pytest.param(fold_pad, "h = Pad(x, channels) y = AveragePool<kernel_shape = [3, 3]>(h)", IMAGE, Y4, "batch or channels", id="pads-channels"),
    pytest.param(fold_pad, "h = Pad(x, cuts) y = Conv(h, w)", IMAGE, Y4, "it cuts", id="cuts"),
    pytest.param(fold_pad, 'h = Pad<mode = "reflect">(x, pads) y = Conv(h, w)', IMAGE, Y4, "pads by reflect", id="reflect"),
    pytest.param(fold_pad, "h = Pad(x, pads) a = Conv(h, w) b = Relu(h) c = ReduceMax(b) y = Add(a, c)", IMAGE, Y4, None, id="pad-second-reader"),
    pytest.param(fold_pad, "h = Pad(x, pads) y = Conv(h, w)", IMAGE, f"{Y4}, float[e, f, g, i] h", "also used elsewhere", id="pad-output"),
    pytest.param(fold_pad, 'h = Pad(x, pads) y = Conv<auto_pad = "SAME_UPPER">(h, w)', IMAGE, Y4, "auto_pad", id="auto-pad"),
    pytest.param(fold_pad, "h = Pad(x, pads) y = AveragePool<kernel_shape = [4, 4], pads = [1, 1, 1, 1]>(h)", IMAGE, Y4, "does not count", id="average-of-two-paddings"),
    pytest.param(fold_pad, "h = Pad(x, pads) y = AveragePool<kernel_shape = [3, 3], ceil_mode = 1>(h)", IMAGE, Y4, "ceil_mode", id="ceil"),
    pytest.param(fold_pad, "h = Pad(x, pads) y = AveragePool<kernel_shape = [2, 2]>(h)", IMAGE, Y4, "the padding would fill", id="filled-by-padding"),
    pytest.param(fold_pad, "h = Pad(x, pads) y = MaxPool<kernel_shape = [3, 3]>(h)", IMAGE, Y4, "would not see", id="max-pool-of-negatives"),
]  # fmt: skip


@pytest.mark.parametrize(("pass_", "body", "inputs", "outputs", "reason"), DECLINES)
def test_declines(pass_: Pass, body: str, inputs: str, outputs: str, reason: str | None) -> None:
    rng = np.random.default_rng(0)
    values = {
        "x": rng.normal(0, 1, (2, 3, 8, 6)).astype(np.float32),
        "c": np.array(True),
        "k": np.array([1]),
    }
    feeds = (
        [{k: v for k, v in values.items() if f" {k}" in f"{inputs},"}] if IMAGE in inputs else None
    )
    checked = check(pass_, graph(body, inputs, outputs), feeds=feeds)
    if reason is not None:
        assert any(reason in text for text in checked.declined), checked.declined
    elif "identity" not in body:
        wanted = [n.op_type for n in graph(body, inputs, outputs).graph.node]
        assert len(checked.model.graph.nodes) <= len(wanted)


def test_one_name_for_two_axes_is_no_name() -> None:
    """Some exporters write `None` for every free axis."""
    model = Model.from_proto(graph("y = Relu(x)", "float[None, 3, None, None] x", Y4))
    shape = Sizes(model).shape(model.graph.inputs[0])
    assert shape is not None
    assert shape[1] == 3
    assert len(set(shape)) == 4
    named = Model.from_proto(graph("y = Relu(x)", "float[N, T] x", Y2))
    assert Sizes(named).shape(named.graph.outputs[0]) == ["=N", "=T"]


def test_a_table_cut_to_the_length_has_that_length() -> None:
    """Position embeddings: [100, 4] cut to T rows and added to [N, T, 4]."""
    body = (
        dim("t", "second") + "p = Slice(table, zero, t, zero) h = Add(x, p) "
        + dim("n", "first", "h") + dim("u", "second", "h") + "k = Concat<axis = 0>(n, u, two, two) y = Reshape(h, k)"
    )  # fmt: skip
    proto = graph(body, FREE, Y4)
    table = np.random.default_rng(0).normal(0, 1, (5000, 4)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    checked = check(cleanup, proto)
    assert checked.ops == {"Shape": 1, "Slice": 1, "Add": 1, "Reshape": 1}


def test_sizes_multiply_and_divide() -> None:
    assert product([2, "a", 3, "b"]) == product(["b", "a", 6])
    assert quotient(["a", "b", 6], ["b", 2]) == product(["a", 3])
    assert quotient(["a", 6], ["b"]) is None
    assert quotient(["a", 6], [4]) is None
    assert quotient([0, "a"], [0]) is None
    assert broadcast([["a", 1, 3], [4, 3]]) == ["a", 4, 3]
    assert broadcast([["a"], ["b"]]) == [None]
    assert broadcast([["a"], None]) is None
    cut_a, other = cut("a", 100), cut("a", 50)
    assert cut_a != other
    assert cut_a is not None
    assert other is not None
    assert broadcast([["a"], [cut_a]]) == ["a"]
    assert broadcast([[cut_a], [other]]) == [None]
    assert cut(3, 2) == 2
    assert cut("a", "a") == "a"


def test_targets_of_reshapes() -> None:
    assert target_of(["n", "t", 4], ["n", "t", 2, 2]) == [0, 0, 2, 2]
    assert target_of(["n", "t", 4], ["t", 8]) == [-1, 8]
    assert target_of(["n", "t"], ["t", "n"]) is None
    assert target_of([0, 4], [0, 2, 2]) is None


def test_what_only_drops_axes_is_no_noop() -> None:
    checked = check(
        drop_noops, graph("h = Squeeze(x, zero) y = Relu(h)", "float[1, 3] x", "float[a] y")
    )
    assert checked.ops == {"Squeeze": 1, "Relu": 1}


SEQUENCE = "float[5, N, 2] x"
ZEROS = "s = Shape(x) n = Slice(s, one, two) f = Concat<axis = 0>(one, n, three) "
STATES = [
    pytest.param(ZEROS + "h = ConstantOfShape(f) y = GRU<hidden_size = 3>(x, wx, wh, , , h)", ["GRU"], id="gru"),
    pytest.param(ZEROS + "h = Expand(nothing, f) y = RNN<hidden_size = 3>(x, wx, wh, , , h)", ["RNN"], id="expanded"),
    pytest.param(ZEROS + "h = ConstantOfShape(f) y = LSTM<hidden_size = 3>(x, wx, wh, , , h, h)", ["LSTM"], id="both"),
    pytest.param(ZEROS + "h = ConstantOfShape(f) c = Expand(half, f) y = LSTM<hidden_size = 3>(x, wx, wh, , , h, c)",
                 ["Concat", "Expand", "LSTM", "Shape", "Slice"], id="one-of-them"),
    pytest.param(ZEROS + "h = Expand(half, f) y = GRU<hidden_size = 3>(x, wx, wh, , , h)", None, id="not-zero"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "left"), STATES)
def test_zero_states_are_left_out(body: str, left: list[str] | None) -> None:
    proto = graph(body, SEQUENCE, Y4)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[proto.graph.node[-1].op_type] * 3
    rng = np.random.default_rng(0)
    for name, width in (("wx", 2), ("wh", 3)):
        values = rng.normal(0, 1, (1, gates, width)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    checked = check(drop_zero_states, proto)
    assert sorted(checked.ops.elements()) == (left or sorted(n.op_type for n in proto.graph.node))


def test_a_convolution_says_how_many_channels_there_are() -> None:
    """Whatever is known of its input: here not even the rank."""
    proto = graph(
        "h = Reshape(x, k) c = Conv(h, w) r = Relu(c) y = Neg(r)", f"{IMAGE}, int64[q] k", Y4
    )
    model = Model.from_proto(proto)
    for tensor in model.graph.tensors().values():
        if tensor.name in ("h", "c", "r"):
            tensor.shape = None
    shape = Sizes(model).shape(model.graph.tensors()["r"])
    assert shape is not None
    assert len(shape) == 4
    assert shape[1] == 1
