"""Whole channels, neurons, heads and hidden units removed: what goes together, and what stays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from pruning_cases import chosen, compared
from test_equalize_layers import IMAGE, ROWS
from test_equalize_layers import net as drawn

from onnxq.errors import RecipeError
from onnxq.model import Model, values_of
from onnxq.passes import PruneChannels, cleanup, inline_functions
from onnxq.passes.removal import remove, structure, weight_from, weight_matrix
from onnxq.passes.unit_choice import norms

PAIR = {"w": [8, 6, 3, 3], "b": [8], "v": [4, 8, 3, 3], "c": [4]}
FIRST, SECOND = "a = Conv<pads=[1,1,1,1]>(x, w, b)", "y4 = Conv<pads=[1,1,1,1]>(h, v, c)"
DENSE = {"w": [5, 8], "v": [8, 3]}
SEQUENCE = "float[N, 6, 5] x"
STEPS = "float[6, N, 5] x"


def net(
    body: str, weights: dict[str, list[int]], x: str = IMAGE, opset: int = 17
) -> onnx.ModelProto:
    """A graph from x to y with random weights; variances are positive."""
    proto = drawn(body, weights, x, opset)
    for tensor in proto.graph.initializer:
        if tensor.name == "var":
            values = np.abs(numpy_helper.to_array(tensor)) + 0.5
            tensor.CopyFrom(numpy_helper.from_array(values, "var"))
    return proto


def ints(**values: list[int]) -> str:
    return " ".join(f"{k} = Constant<value_ints={v}>()" for k, v in values.items())


FOUND = [
    pytest.param(f"{FIRST} h = Relu(a) {SECOND}", PAIR, [8], id="relu"),
    pytest.param(f"{FIRST} n = BatchNormalization(a, g, e, m, var) h = HardSwish(n) {SECOND}",
                 PAIR | {"g": [8], "e": [8], "m": [8], "var": [8]}, [8], id="batchnorm"),
    pytest.param(f"{FIRST} n = InstanceNormalization(a, g, e) h = PRelu(n, s) {SECOND}",
                 PAIR | {"g": [8], "e": [8], "s": [8, 1, 1]}, [8], id="instancenorm-prelu"),
    pytest.param(f"{FIRST} d = Conv<pads=[1,1,1,1]>(x, u) s = Add(a, d) h = Relu(s) {SECOND}",
                 PAIR | {"u": [8, 6, 3, 3]}, [8], id="residual"),
    pytest.param(f"{FIRST} d = Conv<pads=[1,1,1,1]>(x, u) j = Concat<axis=1>(a, d, x) y4 = Conv(j, v)",
                 PAIR | {"u": [5, 6, 3, 3], "v": [4, 19, 1, 1]}, [8, 5], id="concat"),
    pytest.param(f"{FIRST} d = Conv<pads=[1,1,1,1]>(x, u) j = Concat<axis=1>(a, d) "
                 "e = Conv<pads=[1,1,1,1]>(x, t) s = Add(j, e) y4 = Conv(s, v)",
                 PAIR | {"u": [5, 6, 3, 3], "t": [13, 6, 3, 3], "v": [4, 13, 1, 1]}, [8, 5],
                 id="sum-with-concat"),
    pytest.param(f"{FIRST} d = Conv<group=8,pads=[1,1,1,1]>(a, u, e) h = Clip(d) {SECOND}",
                 PAIR | {"u": [8, 1, 3, 3], "e": [8]}, [8], id="depthwise"),
    pytest.param("a = Conv(x, w) d = Conv<group=8>(a, u, e) y4 = Conv(d, v)",
                 {"w": [8, 6, 1, 1], "u": [16, 1, 3, 3], "e": [16], "v": [4, 16, 1, 1]}, [8],
                 id="depthwise-of-two"),
    pytest.param("a = Conv(x, w) d = Conv<group=2>(a, u, e) y4 = Conv(d, v)",
                 {"w": [8, 6, 1, 1], "u": [6, 4, 3, 3], "e": [6], "v": [4, 6, 1, 1]}, [4, 3],
                 id="grouped"),
    pytest.param("a = Conv(x, w) d = Conv<group=4>(a, u, e) y4 = Conv(d, v)",
                 {"w": [8, 6, 1, 1], "u": [12, 2, 3, 3], "e": [12], "v": [4, 12, 1, 1]}, [4],
                 id="many-groups"),
    pytest.param("a = Conv<group=6>(x, u, e) y4 = Conv(a, v)",
                 {"u": [12, 1, 3, 3], "e": [12], "v": [4, 12, 1, 1]}, [2], id="depthwise-of-input"),
    pytest.param("a = Conv(x, w) d = ConvTranspose<group=2>(a, u, e) y4 = ConvTranspose(d, v)",
                 {"w": [8, 6, 1, 1], "u": [8, 3, 3, 3], "e": [6], "v": [6, 4, 1, 1]}, [4, 3],
                 id="transposed-grouped"),
    pytest.param("a = Conv(x, w) d = ConvTranspose<group=8>(a, u) y4 = Conv(d, v)",
                 {"w": [8, 6, 1, 1], "u": [8, 1, 3, 3], "v": [4, 8, 1, 1]}, [8],
                 id="transposed-depthwise"),
    pytest.param(f"{FIRST} g = GlobalAveragePool(a) d = Conv(g, u) r = Relu(d) e = Conv(r, t) "
                 f"k = HardSigmoid(e) h = Mul(a, k) {SECOND}",
                 PAIR | {"u": [3, 8, 1, 1], "t": [8, 3, 1, 1]}, [8, 3], id="gate"),
    pytest.param(f"{FIRST} p = MaxPool<kernel_shape=[2,2]>(a) f = Flatten(p) y2 = Gemm<transB=1>(f, v, c)",
                 PAIR | {"v": [3, 392], "c": [3]}, [8], id="flatten-gemm"),
    pytest.param(f"{FIRST} {ints(t=[0, -1])} f = Reshape(a, t) y2 = MatMul(f, v)",
                 PAIR | {"v": [512, 3]}, [8], id="reshape-left"),
    pytest.param(f"{FIRST} {ints(t=[-1, 8, 64])} f = Reshape(a, t) y3 = MatMul(v, f)",
                 PAIR | {"v": [3, 8]}, [], id="reshape-number"),
    pytest.param(f"{FIRST} {ints(t=[-1, 512])} f = Reshape(a, t) y2 = MatMul(f, v)",
                 PAIR | {"v": [512, 3]}, [8], id="reshape-all-numbers"),
    pytest.param(f"{FIRST} {ints(t=[0, 0, 64])} f = Reshape(a, t) q = Reshape(x, t) "
                 "u = Transpose<perm=[0,2,1]>(f) m = MatMul(u, v) n = ReduceMean<axes=[1,2],keepdims=0>(q) "
                 "y3 = Add(m, n)", PAIR | {"v": [8, 6]}, None, id="shared-shape"),
    pytest.param(f"{FIRST} {ints(ax=[2, 3])} f = ReduceMean<keepdims=0>(a, ax) y2 = MatMul(f, v)",
                 PAIR | {"v": [8, 3]}, [8], id="reduce-mean"),
    pytest.param(f"{FIRST} {ints(s=[3, 5])} d, e = Split<axis=1>(a, s) f = Conv(d, v) g = Conv(e, u) "
                 "y4 = Add(f, g)", PAIR | {"v": [4, 3, 1, 1], "u": [4, 5, 1, 1]}, [3, 5], id="split"),
    pytest.param(f"{FIRST} {ints(s=[2], e=[-2], ax=[1])} d = Slice(a, s, e, ax) y4 = Conv(d, v)",
                 PAIR | {"v": [4, 4, 1, 1]}, [4, 4], id="slice"),
    pytest.param(f"{FIRST} {ints(i=[7, 0, -3, 0])} d = Gather<axis=1>(a, i) y4 = Conv(d, v)",
                 PAIR | {"v": [4, 4, 1, 1]}, None, id="gather"),
    pytest.param(f"{FIRST} {ints(s=[0, 2, 4, 8, 8], e=[0, 8, 8, 8])} d = Reshape(a, s) "
                 f"t = Transpose<perm=[0,2,1,3,4]>(d) h = Reshape(t, e) {SECOND}", PAIR, [8], id="shuffle"),
    pytest.param(f"{FIRST} d = DepthToSpace<blocksize=2>(a) y4 = Conv(d, v)",
                 PAIR | {"v": [4, 2, 1, 1]}, [2], id="depth-to-space"),
    pytest.param(f"{FIRST} {ints(s=[0, 2, 2, 2, 8, 8], e=[0, 2, 16, 16])} d = Reshape(a, s) "
                 "t = Transpose<perm=[0,1,4,2,5,3]>(d) u = Reshape(t, e) y4 = Conv(u, v)",
                 PAIR | {"v": [4, 2, 1, 1]}, [2], id="pixel-shuffle"),
    pytest.param(f"{FIRST} d = SpaceToDepth<blocksize=2>(a) y4 = Conv(d, v)",
                 PAIR | {"v": [4, 32, 1, 1]}, [8], id="space-to-depth"),
    pytest.param(f"{FIRST} z = Shape(a) {ints(s=[0], e=[2], o=[16, 16])} n = Slice(z, s, e) "
                 "t = Concat<axis=0>(n, o) u = Resize(a, , , t) y4 = Conv(u, v)",
                 PAIR | {"v": [4, 8, 1, 1]}, [8], id="resize-to-its-shape"),
    pytest.param(f"{FIRST} {ints(p=[0, 1, 0, 0, 0, 2, 0, 0])} d = Pad(a, p) e = Conv<pads=[1,1,1,1]>(x, u) "
                 "s = Add(d, e) y4 = Conv(s, v)",
                 PAIR | {"u": [11, 6, 3, 3], "v": [4, 11, 1, 1]}, [8, 3], id="padded-shortcut"),
    pytest.param(f"{FIRST} {ints(t=[0, 4, -1])} r = Reshape(a, t) n = InstanceNormalization(r, g, e) "
                 f"z = Shape(a) h = Reshape(n, z) {SECOND}", PAIR | {"g": [4], "e": [4]}, [4], id="group-norm"),
    pytest.param(f"{FIRST} {ints(t=[0, 8, -1])} r = Reshape(a, t) u = Transpose<perm=[0,2,1]>(r) "
                 "m = MatMul(u, k) h = Gelu(m) y3 = MatMul(h, v)", PAIR | {"k": [8, 5], "v": [5, 3]}, [8, 5],
                 id="patches"),
    pytest.param(f"{FIRST} s = Softmax<axis=3>(a) h = Mul(s, a) {SECOND}", PAIR, [8], id="softmax-aside"),
]  # fmt: skip
ROW_CASES = [
    pytest.param("float[N, 5] x", "a = Gemm(x, w, b) r = Relu(a) y2 = Gemm<transB=1>(r, v, c)",
                 {"w": [5, 8], "b": [8], "v": [3, 8], "c": [3]}, [8], id="gemm"),
    pytest.param(ROWS, "a = MatMul(x, w) d = Add(b, a) h = Gelu(d) e = MatMul(h, v) y3 = Add(e, c)",
                 {"w": [6, 8], "b": [8], "v": [8, 3], "c": [3]}, [8], id="mlp"),
    pytest.param(ROWS, "a = MatMul(x, w) g = MatMul(x, u) s = Sigmoid(g) h = Mul(a, s) y3 = MatMul(h, v)",
                 {"w": [6, 8], "u": [6, 8], "v": [8, 3]}, [8], id="gated-mlp"),
    pytest.param("int64[N, 4] x", "e = Gather(w, x) y3 = MatMul(e, v)",
                 {"w": [9, 6], "v": [6, 3]}, [6], id="embedding"),
    pytest.param(ROWS, "a = MatMul(x, w) r = Relu(a) e = MatMul(r, v) h = Relu(e) f = MatMul(h, v) y3 = MatMul(f, u)",
                 {"w": [6, 8], "v": [8, 8], "u": [8, 3]}, [8], id="shared-weight"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "weights", "groups"), FOUND)
def test_removes_from_images(
    body: str, weights: dict[str, list[int]], groups: list[int] | None
) -> None:
    opset = 20 if "Gelu" in body else 18 if "ReduceMean<keepdims=0>(a, ax)" in body else 17
    found, _ = compared(net(body, weights, IMAGE, opset))
    if groups is not None:
        assert [len(g) for g in found.groups] == groups
    else:
        assert found.count > 2


OLD = [
    pytest.param(f"{FIRST} d = Slice<starts=[2], ends=[1000], axes=[1]>(a) y4 = Conv(d, v)",
                 PAIR | {"v": [4, 6, 1, 1]}, 9, [2, 6], id="slice"),
    pytest.param(f"{FIRST} d, e = Split<axis=1>(a) f = Conv(d, v) g = Conv(e, u) y4 = Add(f, g)",
                 PAIR | {"v": [4, 4, 1, 1], "u": [4, 4, 1, 1]}, 11, [4, 4], id="split"),
    pytest.param(f"{FIRST} d, e = Split<axis=1,split=[3,5]>(a) f = Conv(d, v) g = Conv(e, u) y4 = Add(f, g)",
                 PAIR | {"v": [4, 3, 1, 1], "u": [4, 5, 1, 1]}, 11, [3, 5], id="split-sizes"),
    pytest.param(f"{FIRST} h = Pad<pads=[0,0,1,1,0,0,1,1]>(a) {SECOND}", PAIR, 10, [8], id="pad"),
    pytest.param(f"{FIRST} h = Pad<pads=[0,1,0,0,0,0,0,0]>(a) y4 = Conv(h, v)", PAIR | {"v": [4, 9, 1, 1]},
                 10, [8], id="pad-channels"),
    pytest.param("f = Constant<value = float[4] {1.0, 1.0, 2.0, 2.0}>() "
                 f"{FIRST} h = Upsample(a, f) {SECOND}", PAIR, 9, [8], id="upsample"),
    pytest.param(f"{FIRST} s = Softmax<axis=2>(a) h = Mul(a, s) {SECOND}", PAIR, 11, [8], id="softmax"),
    pytest.param(f"{FIRST} s = Softmax(a) h = Mul(a, s) {SECOND}", PAIR, 11, [], id="softmax-from-channels"),
    pytest.param(f"{FIRST} g = ReduceMean<axes=[2,3],keepdims=0>(a) s = Unsqueeze<axes=[2,3]>(g) "
                 "t = Squeeze<axes=[2,3]>(s) y2 = Gemm(t, v, c)", PAIR | {"v": [8, 3], "c": [3]}, 11, [8], id="axes"),
    pytest.param(f"{FIRST} h = Clip<min=0.0,max=6.0>(a) {SECOND}", PAIR, 9, [8], id="clip"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "weights", "opset", "groups"), OLD)
def test_removes_in_old_opsets(
    body: str, weights: dict[str, list[int]], opset: int, groups: list[int]
) -> None:
    found, _ = compared(net(body, weights, "float[2, 6, 8, 8] x", opset))
    assert [len(g) for g in found.groups] == groups


@pytest.mark.parametrize(("x", "body", "weights", "groups"), ROW_CASES)
def test_removes_from_rows(
    x: str, body: str, weights: dict[str, list[int]], groups: list[int]
) -> None:
    found, _ = compared(net(body, weights, x, 20))
    assert [len(g) for g in found.groups] == groups


def test_what_is_cut_is_cut_everywhere() -> None:
    """A network of a convolution, its normalisation and a depthwise one: shapes and attributes."""
    body = (
        f"{FIRST} n = BatchNormalization(a, g, e, m, var) "
        "d = Conv<group=8,pads=[1,1,1,1]>(n, u, t) y4 = Conv(d, v)"
    )
    weights = PAIR | {"g": [8], "e": [8], "m": [8], "var": [8], "u": [8, 1, 3, 3], "t": [8]}
    _, model = compared(net(body, weights | {"v": [4, 8, 1, 1]}), 0.5)
    first, norm, depthwise, last = model.nodes("Conv", "BatchNormalization")
    assert [list(t.shape) for t in first.inputs[1:]] == [[4, 6, 3, 3], [4]]
    assert [list(t.shape) for t in norm.inputs[1:]] == [[4]] * 4
    assert list(depthwise.inputs[1].shape) == [4, 1, 3, 3]
    assert depthwise.attrs["group"] == 4
    assert list(last.inputs[1].shape) == [4, 4, 1, 1]
    assert first.outputs[0].shape[1] == depthwise.outputs[0].shape[1] == 4


def recurrent(
    op: str, two: bool, more: str = "", *, tail: str = "", attributes: str = "", x: str = STEPS
) -> onnx.ModelProto:
    gates, d = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 2 if two else 1
    weights = {
        "w": [d, gates * 6, 5], "r": [d, gates * 6, 6], "b": [d, 2 * gates * 6], "p": [d, 18],
        "h0": [d, 2, 6], "v": [6 * d, 3],
    }  # fmt: skip
    weights = {k: s for k, s in weights.items() if k in "wrv" or f"{k}" in more.split(", ")}
    direction = "bidirectional" if two else "forward"
    tail = tail or (
        "t = Transpose<perm=[0,2,1,3]>(s) z = Constant<value_ints=[0,0,-1]>() "
        "f = Reshape(t, z) y3 = MatMul(f, v)"
    )
    body = (
        f'{attributes_of(more)} s, q = {op}<hidden_size=6, direction="{direction}"{attributes}>'
        f"(x, w, r{more}) {tail}"
    )
    return net(body, weights, x)


def attributes_of(more: str) -> str:
    return "k = Constant<value_ints=[2]>()" if "k" in more.split(", ") else ""


RECURRENT = [
    pytest.param(recurrent("LSTM", two=False), id="lstm"),
    pytest.param(recurrent("LSTM", two=True, more=", b"), id="bilstm"),
    pytest.param(recurrent("GRU", two=True, more=", b"), id="bigru"),
    pytest.param(recurrent("RNN", two=False, more=", b"), id="rnn"),
    pytest.param(recurrent("LSTM", two=True, more=", b, , h0, h0, p", x="float[6, 2, 5] x"),
                 id="states-and-peepholes"),
    pytest.param(recurrent("GRU", two=False, attributes=", linear_before_reset=1"), id="gru-reset"),
    pytest.param(recurrent("LSTM", two=True,
                           tail="t = Transpose<perm=[1,0,2]>(q) z = Constant<value_ints=[0,12]>() "
                           "f = Reshape(t, z) y2 = MatMul(f, v)"), id="last-state"),
]  # fmt: skip


@pytest.mark.parametrize("proto", RECURRENT)
def test_removes_hidden_units(proto: onnx.ModelProto) -> None:
    found, model = compared(proto)
    assert [len(g) for g in found.groups] == [6]
    (node,) = model.nodes("LSTM", "GRU", "RNN")
    assert node.attrs["hidden_size"] == 4
    assert node.inputs[2].shape[2] == 4


def test_removes_hidden_units_batch_first() -> None:
    """onnxruntime does not run layout=1: the checker's shapes have to do."""
    tail = f"{ints(z=[0, 0, 6])} f = Reshape(s, z) y3 = MatMul(f, v)"
    proto = recurrent("GRU", two=False, attributes=", layout=1", x=SEQUENCE, tail=tail)
    model = Model.from_proto(proto)
    assert [n.text for n in PruneChannels(amount=0.5)(model) if n.changed] == [
        "3 of 6 hidden units removed"
    ]
    result = model.to_proto()
    onnx.checker.check_model(result, full_check=True)
    assert sorted(list(t.dims) for t in result.graph.initializer) == [
        [1, 9, 3], [1, 9, 5], [3], [3, 3],
    ]  # fmt: skip


def test_removes_hidden_units_of_zero_states() -> None:
    """A state of zeros of computed shape, as PyTorch writes it."""
    body = (
        f"n = Shape<start=1, end=2>(x) {ints(one=[1], six=[6])} z = Concat<axis=0>(one, n, six) "
        "h0 = ConstantOfShape(z) s, q = GRU<hidden_size=6>(x, w, r, , , h0) "
        f"{ints(ax=[1])} f = Squeeze(s, ax) y3 = MatMul(f, v)"
    )
    found, _ = compared(net(body, {"w": [1, 18, 5], "r": [1, 18, 6], "v": [6, 3]}, STEPS))
    assert [len(g) for g in found.groups] == [6]


ATTENTION = {
    "apart": "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)",
    "split": "a = MatMul(x, w) d = Add(a, b) q, k, v = Split<axis=2, num_outputs=3>(d)",
    "slices": (
        "a = MatMul(x, w) s0 = Constant<value_ints=[0]>() s1 = Constant<value_ints=[12]>() "
        "s2 = Constant<value_ints=[24]>() s3 = Constant<value_ints=[36]>() ax = Constant<value_ints=[2]>() "
        "q = Slice(a, s0, s1, ax) k = Slice(a, s1, s2, ax) v = Slice(a, s2, s3, ax)"
    ),
}  # fmt: skip
TAIL = (
    "m = MatMul(qh, kh) half = Constant<value_float=0.5>() z = Mul(m, half) p = Softmax<axis=-1>(z) "
    "o = MatMul(p, vh) t = Transpose<perm=[0,2,1,3]>(o)"
)
WEIGHTS = {"wq": [5, 12], "wk": [5, 12], "wv": [5, 12], "w": [5, 36], "b": [36], "u": [12, 5]}


def attention(front: str, heads: str, back: str, x: str = SEQUENCE) -> onnx.ModelProto:
    body = f"{front} {heads} {TAIL} {back} y3 = MatMul(f, u)"
    names = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return net(body, {k: s for k, s in WEIGHTS.items() if k in names}, x, 18)


def folded(target: str) -> str:
    return (
        f"{target} qr = Reshape(q, hs) kr = Reshape(k, hs) vr = Reshape(v, hs) "
        "qh = Transpose<perm=[0,2,1,3]>(qr) kh = Transpose<perm=[0,2,3,1]>(kr) vh = Transpose<perm=[0,2,1,3]>(vr)"
    )


@pytest.mark.parametrize("form", ATTENTION)
@pytest.mark.parametrize("target", [[0, 6, 4, 3], [0, 0, -1, 3]])
def test_removes_heads(form: str, target: list[int]) -> None:
    back = f"{ints(os=[0, 6, 12])} f = Reshape(t, os)"
    found, model = compared(attention(ATTENTION[form], folded(ints(hs=target)), back), 0.5)
    assert [len(g) for g in found.groups] == [4]
    assert list(model.nodes("MatMul")[-1].inputs[1].shape) == [6, 5]


def test_removes_heads_of_one_projection() -> None:
    """[batch, time, 3, heads, size], transposed to have q, k and v apart."""
    front = f"a = MatMul(x, w) {ints(hs=[0, 6, 3, 4, 3])} r = Reshape(a, hs) g = Transpose<perm=[2,0,3,1,4]>(r)"
    heads = " ".join(
        f"i{n} = Constant<value_int={i}>() {n} = Gather<axis=0>(g, i{n})"
        for i, n in enumerate(("qh", "kt", "vh"))
    )
    heads += " kh = Transpose<perm=[0,1,3,2]>(kt)"
    back = f"{ints(os=[0, 0, -1])} f = Reshape(t, os)"
    found, _ = compared(attention(front, heads, back), 0.5)
    assert [len(g) for g in found.groups] == [4]


def test_removes_heads_where_sizes_are_computed() -> None:
    """Targets of Reshapes from Shape, Gather, Unsqueeze and Concat, one for several Reshapes."""
    sizes = (
        "sh = Shape(x) i0 = Constant<value_int=0>() i1 = Constant<value_int=1>() z0 = Constant<value_ints=[0]>() "
        "n0 = Gather(sh, i0) n1 = Gather(sh, i1) u0 = Unsqueeze(n0, z0) u1 = Unsqueeze(n1, z0) "
        "h4 = Constant<value_ints=[4]>() h3 = Constant<value_ints=[3]>() h12 = Constant<value_ints=[12]>() "
        "hs = Concat<axis=0>(u0, u1, h4, h3) os = Concat<axis=0>(u0, u1, h12)"
    )
    back = "f = Reshape(t, os)"
    found, _ = compared(attention(ATTENTION["apart"], folded(sizes), back, "float[N, T, 5] x"), 0.5)
    assert [len(g) for g in found.groups] == [4]


def test_removes_heads_of_flattened_projections() -> None:
    """Gemm on [batch * time, channels], as GPT-2 has it; a bias per head from a table, as T5 has."""
    sizes = (
        "sh = Shape(x) i0 = Constant<value_int=0>() i1 = Constant<value_int=1>() z0 = Constant<value_ints=[0]>() "
        "n0 = Gather(sh, i0) n1 = Gather(sh, i1) u0 = Unsqueeze(n0, z0) u1 = Unsqueeze(n1, z0) "
        "h4 = Constant<value_ints=[4]>() h3 = Constant<value_ints=[3]>() h12 = Constant<value_ints=[12]>() "
        "h36 = Constant<value_ints=[36]>() h5 = Constant<value_ints=[5]>() rows = Constant<value_ints=[-1, 5]>() "
        "ls = Concat<axis=0>(u0, u1, h36) hs = Concat<axis=0>(u0, u1, h4, h3) os = Concat<axis=0>(u0, u1, h12) "
        "more = Constant<value_ints=[-1, 12]>() xs = Concat<axis=0>(u0, u1, h5)"
    )
    front = (
        f"{sizes} xr = Reshape(x, rows) g = Gemm(xr, w, b) d = Reshape(g, ls) "
        "q, k, v = Split<axis=2, num_outputs=3>(d)"
    )
    bias = (
        "pl = Constant<value_ints=[0, 1, 2, 3, 4, 5]>() pa = Unsqueeze(pl, z0) pb = Transpose(pa) "
        "dist = Sub(pa, pb) far = Abs(dist) tb = Gather(rel, far) tt = Transpose<perm=[2,0,1]>(tb) tu = Unsqueeze(tt, z0) "
    )
    tail = TAIL.replace(
        "p = Softmax<axis=-1>(z)", f"{bias} zb = Add(z, tu) p = Softmax<axis=-1>(zb)"
    )
    heads = folded("")
    body = (
        f"{front} {heads} {tail} f = Reshape(t, os) fr = Reshape(f, more) "
        "o2 = Gemm(fr, u, c) y3 = Reshape(o2, xs)"
    )
    weights = {"w": [5, 36], "b": [36], "u": [12, 5], "c": [5], "rel": [6, 4]}
    found, model = compared(net(body, weights, "float[N, 6, 5] x", 18), 0.5)
    assert [len(g) for g in found.groups] == [4]
    assert [list(n.inputs[0].shape) for n in model.nodes("Gather")][-1] == [6, 2]


def test_removes_from_text_recognition() -> None:
    """Convolutions, their columns as time steps of a BiLSTM, and rows of a Gemm."""
    body = (
        f"{FIRST} r = Relu(a) {ints(k=[2], n=[0, 0, -1], m=[-1, 12])} "
        "p = ReduceMean<axes=[2]>(r) s = Squeeze(p, k) t = Transpose<perm=[2,0,1]>(s) "
        'l, e = LSTM<hidden_size=6, direction="bidirectional">(t, lw, lr) '
        "u = Transpose<perm=[0,2,1,3]>(l) f = Reshape(u, n) g = Reshape(f, m) y2 = Gemm(g, v, c)"
    )
    weights = PAIR | {"lw": [2, 24, 8], "lr": [2, 24, 6], "v": [12, 4]}
    found, _ = compared(net(body, weights))
    assert [len(g) for g in found.groups] == [8, 6]


@pytest.mark.parametrize("split_again", [False, True])
def test_removes_heads_beside_the_batch(split_again: bool) -> None:
    """[time, batch * heads, size], as torch.nn.MultiheadAttention has it, for any batch."""
    sizes = (
        "sh = Shape(x) i1 = Constant<value_int=1>() z0 = Constant<value_ints=[0]>() n1 = Gather(sh, i1) "
        "h = Constant<value_int=4>() nh = Mul(n1, h) u1 = Unsqueeze(n1, z0) u2 = Unsqueeze(nh, z0) "
        "six = Constant<value_ints=[6]>() h3 = Constant<value_ints=[3]>() h12 = Constant<value_ints=[12]>() "
        "h4 = Constant<value_ints=[4]>() "
        "hs = Concat<axis=0>(six, u2, h3) os = Concat<axis=0>(six, u1, h12) ss = Concat<axis=0>(u1, h4, six, h3)"
    )
    heads = "qr = Reshape(q, hs) kr = Reshape(k, hs) vr = Reshape(v, hs) "
    if split_again:
        heads += (
            "qt = Transpose<perm=[1,0,2]>(qr) kt = Transpose<perm=[1,0,2]>(kr) vt = Transpose<perm=[1,0,2]>(vr) "
            "qh = Reshape(qt, ss) k4 = Reshape(kt, ss) vh = Reshape(vt, ss) kh = Transpose<perm=[0,1,3,2]>(k4)"
        )
        tail = TAIL.replace("perm=[0,2,1,3]", "perm=[2,0,1,3]")
    else:
        heads += "qh = Transpose<perm=[1,0,2]>(qr) kh = Transpose<perm=[1,2,0]>(kr) vh = Transpose<perm=[1,0,2]>(vr)"
        tail = TAIL.replace("perm=[0,2,1,3]", "perm=[1,0,2]")
    body = f"{ATTENTION['apart']} {sizes} {heads} {tail} f = Reshape(t, os) y3 = MatMul(f, u)"
    weights = {k: s for k, s in WEIGHTS.items() if k in ("wq", "wk", "wv", "u")}
    found, model = compared(net(body, weights, STEPS, 18), 0.5)
    assert [len(g) for g in found.groups] == [4]
    assert list(model.nodes("MatMul")[-1].inputs[1].shape) == [6, 5]


def test_removes_from_weights_in_constants_and_listed_inputs() -> None:
    """Opset 8, IR version 3: initializers are inputs too; one weight in a Constant node."""
    proto = net(f"{FIRST} h = Relu(a) {SECOND}", PAIR, "float[2, 6, 8, 8] x", 8)
    proto.ir_version = 3
    for tensor in list(proto.graph.initializer):
        if tensor.name == "w":
            made = onnx.helper.make_node("Constant", [], ["w"], value=tensor)
            proto.graph.node.insert(0, made)
            proto.graph.initializer.remove(tensor)
        else:
            info = onnx.helper.make_tensor_value_info(tensor.name, 1, list(tensor.dims))
            proto.graph.input.append(info)
    model = Model.from_proto(proto)
    found = structure(model, "test")
    remove(model, found, chosen(found, norms(found), 0.5), "test")
    result = model.to_proto()
    onnx.checker.check_model(result, full_check=True)
    assert sorted(list(t.dims) for t in result.graph.initializer) == [
        [4], [4], [4, 4, 3, 3], [4, 6, 3, 3],
    ]  # fmt: skip


HELD = [
    pytest.param(IMAGE, "y4 = Conv(x, w)", {"w": [8, 6, 1, 1]}, "it reaches the output y4", id="output"),
    pytest.param(IMAGE, "a = Conv(x, w) y4 = Add(a, x)", {"w": [6, 6, 1, 1]},
                 "Add_1 (Add) combines it with x, which stays", id="residual-of-input"),
    pytest.param(IMAGE, "a = Conv(x, w) s = Softmax<axis=1>(a) y4 = Conv(s, v)",
                 {"w": [8, 6, 1, 1], "v": [3, 8, 1, 1]}, "(Softmax) computes across its channels", id="softmax"),
    pytest.param(ROWS, "a = MatMul(x, w) n = LayerNormalization<axis=-1>(a, g) y3 = MatMul(n, v)",
                 {"w": [6, 8], "g": [8], "v": [8, 3]}, "(LayerNormalization) computes across its channels",
                 id="layernorm"),
    pytest.param(IMAGE, "a = Conv(x, w) s = ReduceMean<axes=[1]>(a) y4 = Mul(x, s)", {"w": [8, 6, 1, 1]},
                 "(ReduceMean) computes across its channels", id="mean-of-channels"),
    pytest.param(IMAGE, "a = Conv(x, w) g = Sigmoid(a) y4 = Mul(x, g)", {"w": [1, 6, 1, 1]},
                 "(Mul) repeats it along its channels", id="spatial-gate"),
    pytest.param(IMAGE, "a = Conv(x, w) s = CumSum(a, k) y4 = Conv(s, v) k = Constant<value_int=1>()",
                 {"w": [8, 6, 1, 1], "v": [3, 8, 1, 1]}, "channels cannot be followed through it", id="operator"),
    pytest.param(IMAGE, "k = Relu(w) a = Conv(x, k) y4 = Conv(a, v)", {"w": [8, 6, 1, 1], "v": [3, 8, 1, 1]},
                 "its weight k is not constant", id="computed-weight"),
    pytest.param(ROWS, "q = Constant<value=int8[2,2] {1, 2, 3, 4}>() s = Constant<value_float=0.5>() "
                 "k = DequantizeLinear(q, s) a = MatMul(x, w) d = MatMul(a, k) y3 = MatMul(d, v)",
                 {"w": [6, 2], "v": [2, 3]}, "its weight k is quantized: prune first", id="quantized"),
    pytest.param(IMAGE, "a = Conv(x, w) s = DepthToSpace<blocksize=2>(a) y4 = Conv(s, v)",
                 {"w": [4, 6, 1, 1], "v": [3, 1, 1, 1]}, "its channels go all together", id="one-unit"),
    pytest.param(IMAGE, "a = Conv(x, w, c) y4 = Conv(a, v) c = Relu(b)",
                 {"w": [8, 6, 1, 1], "v": [3, 8, 1, 1], "b": [8]}, "its bias c is computed", id="computed-bias"),
    pytest.param(IMAGE, "a = Conv(x, w) y4 = Conv(a, v) z = Mul(w, w)",
                 {"w": [8, 6, 1, 1], "v": [3, 8, 1, 1]}, "its weight w is also used by", id="weight-elsewhere"),
    pytest.param("float[5, N] x", "a = Gemm<transA=1>(x, w) y2 = Gemm(a, v)", {"w": [5, 8], "v": [8, 3]},
                 "it transposes its input", id="trans-a"),
    pytest.param(IMAGE, "a = Conv(x, w) n = Size(a) f = Cast<to=1>(n) y4 = Mul(x, f)", {"w": [8, 6, 1, 1]},
                 "(Size): channels cannot be followed through it", id="size"),
    pytest.param(IMAGE, "a = Conv(x, w) p, i = MaxPool<kernel_shape=[2,2]>(a) k = Cast<to=1>(i) y4 = Conv(k, v)",
                 {"w": [8, 6, 1, 1], "v": [3, 8, 1, 1]}, "its indices are read", id="pool-indices"),
    pytest.param(STEPS + ", float[1, N, 6] h0", "s, q = GRU<hidden_size=6>(x, w, r, , , h0) y4 = Relu(s)",
                 {"w": [1, 18, 5], "r": [1, 18, 6]}, "starts from h0, which stays", id="state-from-outside"),
]  # fmt: skip


ONE = {"w": [8, 6, 1, 1], "v": [3, 8, 1, 1]}
CONV, LAST = "a = Conv(x, w)", "y4 = Conv(h, v)"
GUARDS = [
    pytest.param(IMAGE, f"{CONV} h = Add<axis=1, broadcast=1>(a, b) {LAST}", ONE | {"b": [8]},
                 "as before opset 7", id="old-broadcast"),
    pytest.param(IMAGE, f"{CONV} h, m, k = BatchNormalization<training_mode=1>(a, g, e, n, var) {LAST}",
                 ONE | {"g": [8], "e": [8], "n": [8], "var": [8]}, "it is in training mode", id="training"),
    pytest.param(IMAGE, f"{CONV} k = Abs(var) h = BatchNormalization(a, g, e, n, k) {LAST}",
                 ONE | {"g": [8], "e": [8], "n": [8], "var": [8]}, "its parameters are not constant",
                 id="computed-variance"),
    pytest.param(IMAGE + ", int64[2] ax", f"{CONV} m = ReduceSum(a, ax) h = Sub(a, m) {LAST}", ONE,
                 "its axes are computed", id="computed-axes"),
    pytest.param(IMAGE, f"{CONV} y4 = MatMul(a, v)", {"w": [8, 6, 1, 1], "v": [1, 8, 8, 3]},
                 "a constant of several matrices", id="stacked-constant"),
    pytest.param(IMAGE + ", float[8] z", f"{CONV} y3 = MatMul(a, z)", {"w": [8, 6, 1, 1]},
                 "it multiplies with a vector", id="vector"),
    pytest.param(IMAGE + ", int64[2] t", f"{CONV} f = Reshape(a, t) y2 = MatMul(f, v)",
                 {"w": [8, 6, 1, 1], "v": [512, 3]}, "(Reshape)", id="computed-target"),
    pytest.param(IMAGE, f'{CONV} r = Constant<value_floats=[0.0,0.0,0.0,0.0,1.0,1.0,1.0,1.0]>() '
                 'f = Constant<value_floats=[1.0,1.0,1.0,1.0]>() h = Resize<coordinate_transformation_mode='
                 f'"tf_crop_and_resize">(a, r, f) {LAST}', ONE, "it crops", id="crop"),
    pytest.param(IMAGE + ", int64[8] p", f"{CONV} h = Pad(a, p) {LAST}", ONE, "what it pads is computed",
                 id="computed-pads"),
    pytest.param(IMAGE, f'{CONV} {ints(p=[0, 1, 0, 0, 0, 0, 0, 0])} h = Pad<mode="edge">(a, p) y4 = Conv(h, v)',
                 {"w": [8, 6, 1, 1], "v": [3, 9, 1, 1]}, "it pads channels", id="padded-by-copies"),
    pytest.param(IMAGE + ", int64[1] ax", f"{CONV} {ints(s=[0], e=[8])} h = Slice(a, s, e, ax) {LAST}", ONE,
                 "its axes are computed", id="slice-axes"),
    pytest.param(IMAGE + ", int64[1] s", f"{CONV} {ints(e=[9], ax=[1])} h = Slice(a, s, e, ax) {LAST}", ONE,
                 "where it cuts is computed", id="slice-start"),
    pytest.param(IMAGE, f"{CONV} {ints(s=[0], e=[8], ax=[1], st=[2])} h = Slice(a, s, e, ax, st) y4 = Conv(h, v)",
                 {"w": [8, 6, 1, 1], "v": [3, 4, 1, 1]}, "it takes every so many channels", id="slice-steps"),
    pytest.param(IMAGE + ", int64[2] s", f"{CONV} h, k = Split<axis=1>(a, s) m = Concat<axis=1>(k, h) y4 = Conv(m, v)",
                 ONE, "of its parts are", id="split-sizes"),
    pytest.param("int64[N, 4] x", "y3 = Gather<axis=1>(w, x)", {"w": [9, 6]}, "it does not look up rows", id="columns"),
    pytest.param(IMAGE, f"{CONV} {ints(i=[2])} k = Squeeze(c) h = Gather<axis=1>(a, k) c = Unsqueeze(i, i0) "
                 "i0 = Constant<value_ints=[0]>() y4 = Conv(h, v)", {"w": [8, 6, 1, 1], "v": [3, 8, 1, 1]},
                 "takes single channels", id="computed-index"),
    pytest.param(IMAGE + ", int64[4] t", f"{CONV} g = GlobalAveragePool(a) h = Expand(g, t) {LAST}", ONE,
                 "its sizes are computed", id="computed-expand"),
    pytest.param(IMAGE, f"{CONV} {ints(t=[1, 2, 1, 1])} h = Tile(a, t) y4 = Conv(h, v)",
                 {"w": [8, 6, 1, 1], "v": [3, 16, 1, 1]}, "(Tile) repeats its channels", id="tile"),
    pytest.param(IMAGE, f"{CONV} y4 = MatMul(a, v)", {"w": [8, 6, 1, 1], "v": [8, 3]},
                 "reads it along another axis", id="another-axis"),
]  # fmt: skip


@pytest.mark.parametrize(("x", "body", "weights", "reason"), HELD + GUARDS)
def test_says_why_channels_stay(
    x: str, body: str, weights: dict[str, list[int]], reason: str
) -> None:
    proto = net(body, weights, x)
    model = Model.from_proto(proto)
    notes = PruneChannels(amount=0.5)(model)
    held = [note for note in notes if not note.changed]
    assert any(reason in note.text for note in held), [note.text for note in held]
    assert not any(note.changed for note in notes)
    same = Model.from_proto(proto)
    same.infer_shapes()
    assert model.to_proto() == same.to_proto()


def test_bodies_hold_what_they_read() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 6, 8, 8] x, bool c) => (float[p, q, r, s] y)
        <float[8, 6, 1, 1] w, float[3, 8, 1, 1] v> {
            a = Conv(x, w)
            h = If (c) <then_branch = t () => (float[p, q, r, s] o) { o = Relu(a) },
                        else_branch = e () => (float[p, q, r, s] i) { i = Neg(a) }>
            y = Conv(h, v)
        }"""
    proto = parser.parse_model(text.replace("<float[8, 6, 1, 1] w, float[3, 8, 1, 1] v>", ""))
    for name, shape in (("w", (8, 6, 1, 1)), ("v", (3, 8, 1, 1))):
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    notes = PruneChannels(amount=0.5)(Model.from_proto(proto))
    assert "reads it in a body" in notes[0].text


def test_functions_are_inlined_first() -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "local": 1]>
        g (float[N, 6, 8, 8] x) => (float[p, q, r, s] y) {
            a = Conv(x, w)
            h = local.Activate(a)
            y = Conv(h, v)
        }
        <domain: "local", opset_import: ["": 17]> Activate (i) => (o) { o = Relu(i) }"""
    proto = parser.parse_model(text)
    for name, shape in (("w", (8, 6, 1, 1)), ("v", (3, 8, 1, 1))):
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    model = Model.from_proto(proto)
    assert "inline it first" in PruneChannels(amount=0.5)(model)[0].text
    inline_functions(model)
    assert [n.text for n in PruneChannels(amount=0.5)(model) if n.changed] == [
        "4 of 8 channels removed"
    ]


def test_overrides_keep_layers_dense() -> None:
    body = f"{FIRST} h = Relu(a) k = Conv(h, u) y4 = Conv(k, v)"
    proto = net(body, PAIR | {"u": [8, 8, 1, 1], "v": [3, 8, 1, 1]})
    proto.graph.node[0].name = "stem"
    model = Model.from_proto(proto)
    notes = PruneChannels(amount=0.5, layers=("stem=dense",))(model)
    assert [n.text for n in notes if n.node == "stem"] == [
        "its channels stay: an override keeps stem dense"
    ]
    assert [list(n.inputs[1].shape)[:2] for n in model.nodes("Conv")] == [[8, 6], [4, 8], [3, 4]]


def test_keeps_the_largest_and_multiples() -> None:
    proto = net(f"{FIRST} h = Relu(a) {SECOND}", PAIR)
    model = Model.from_proto(proto)
    weight = np.asarray(values_of(model.nodes("Conv")[0].inputs[1]))
    best = np.sort(np.argsort(np.square(weight).sum((1, 2, 3)))[-4:])
    notes = PruneChannels(amount=0.6, multiple=4)(model)
    kept = np.asarray(values_of(model.nodes("Conv")[0].inputs[1]))
    np.testing.assert_array_equal(kept, weight[best])
    assert [n.text for n in notes if n.changed] == ["4 of 8 channels removed"]


def test_multiples_count_channels_of_heads() -> None:
    """Heads of 3 channels: of 4 heads two or four are multiples of 6 channels."""
    back = f"{ints(os=[0, 6, 12])} f = Reshape(t, os)"
    proto = attention(ATTENTION["apart"], folded(ints(hs=[0, 6, 4, 3])), back)
    for amount, left in ((0.3, 12), (0.5, 6), (0.7, 6)):
        model = Model.from_proto(proto)
        notes = PruneChannels(amount=amount, multiple=6)(model)
        assert [n.text for n in notes if n.changed] == ["6 of 12 neurons removed: 2 of 4 units"] * (
            3 if left == 6 else 0
        )
        assert model.nodes("MatMul")[-1].inputs[1].shape[0] == left


def test_one_unit_of_each_group_stays() -> None:
    proto = net(f"{FIRST} h = Relu(a) {SECOND}", PAIR)
    found, _ = compared(proto, 0.99)
    assert found.count == 8
    model = Model.from_proto(proto)
    found = structure(model, "test")
    with pytest.raises(ValueError, match="nothing is left of group 0"):
        remove(model, found, np.zeros(8, np.bool_), "test")


def test_weights_as_matrices_and_back() -> None:
    bodies = [
        ("a = Conv<group=2>(x, w) y4 = Conv(a, v)", {"w": [8, 3, 3, 3], "v": [3, 8, 1, 1]}, IMAGE),
        ("s, q = LSTM<hidden_size=6>(x, w, r) y4 = Relu(s)", {"w": [1, 24, 5], "r": [1, 24, 6]}, STEPS),
        ("e = Gather(w, x) y3 = MatMul(e, v)", {"w": [9, 6], "v": [6, 3]}, "int64[N, 4] x"),
    ]  # fmt: skip
    for body, weights, x in bodies:
        for layer in structure(Model.from_proto(net(body, weights, x)), "test").layers:
            weight = np.asarray(values_of(layer.node.inputs[layer.index]))
            matrix = weight_matrix(layer, weight)
            groups, outputs, inputs, _ = matrix.shape
            assert layer.outputs.shape == (groups, outputs)
            assert layer.inputs.shape == (groups, inputs)
            np.testing.assert_array_equal(weight_from(layer, matrix, weight), weight)


@pytest.mark.parametrize("name", ["digits_cnn", "digits_mobilenet", "lang_lstm", "char_gpt"])
def test_models_of_ours(name: str) -> None:
    proto = onnx.load(f"models/{name}.onnx")
    found, _ = compared(proto, 0.3)
    model = Model.from_proto(proto)
    cleanup(model)
    compared(model.to_proto(), 0.3)
    assert found.count >= 128


@pytest.mark.parametrize(
    "options", [{"amount": 1.0}, {"amount": -0.1}, {"criterion": "luck"}, {"multiple": 0}]
)
def test_refuses_nonsense(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        PruneChannels(**options)  # type: ignore[arg-type]
