"""Random networks with channels removed: equal to those whose channels were set to zero."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from pruning_cases import compared
from test_random_graphs import Builder

Draw = st.DrawFn


class Network(Builder):
    """Grows over images [2, 4, 6, 6] with weights drawn from a seed."""

    def __init__(self, free: bool, seed: int) -> None:
        super().__init__(free)
        self.shapes = {"x": (2, 4, 6, 6)}
        self.rng = np.random.default_rng(seed)

    def weight(self, *shape: int, positive: bool = False) -> str:
        values = self.rng.normal(0, 1, shape) / max(prod(shape[1:]), 1) ** 0.5
        return self.constant(np.abs(values) + 0.5 if positive else values, np.float32)

    def model(self, outputs: list[str]) -> onnx.ModelProto:
        proto = super().model(outputs)
        proto.graph.input[0].CopyFrom(
            helper.make_tensor_value_info("x", 1, ["N" if self.free else 2, 4, 6, 6])
        )
        for value in proto.graph.output:
            for i, (dim, size) in enumerate(
                zip(value.type.tensor_type.shape.dim, self.shapes[value.name], strict=True)
            ):
                dim.dim_value = size
                if i == 0 and self.free:
                    dim.dim_param = "N"
        return proto


def channels(draw: Draw, even: bool = False) -> int:
    return draw(st.sampled_from([4, 6, 8, 12])) if even else draw(st.integers(2, 9))


def conv(draw: Draw, b: Network, t: str) -> str:
    n, c, h, w = b.shapes[t]
    groups = draw(st.sampled_from([g for g in (1, 1, 1, 2, 3, 4, 6) if c % g == 0]))
    out = max(channels(draw, even=True) // groups, 1) * groups
    k = draw(st.sampled_from([1, 3]))
    bias = [b.weight(out)] if draw(st.booleans()) else []
    return b.add(
        "Conv", t, b.weight(out, c // groups, k, k), *bias, shape=(n, out, h, w),
        group=groups, pads=[k // 2] * 4,
    )  # fmt: skip


def depthwise(draw: Draw, b: Network, t: str) -> str:
    n, c, h, w = b.shapes[t]
    times = draw(st.sampled_from([1, 1, 2]))
    return b.add(
        "Conv", t, b.weight(c * times, 1, 3, 3), b.weight(c * times),
        shape=(n, c * times, h, w), group=c, pads=[1] * 4,
    )  # fmt: skip


def transposed(draw: Draw, b: Network, t: str) -> str:
    n, c, h, w = b.shapes[t]
    groups = draw(st.sampled_from([g for g in (1, 2, c) if c % g == 0]))
    per_group = draw(st.integers(1, 4))
    return b.add(
        "ConvTranspose", t, b.weight(c, per_group, 3, 3), b.weight(per_group * groups),
        shape=(n, per_group * groups, h, w), group=groups, pads=[1] * 4,
    )  # fmt: skip


def norm(draw: Draw, b: Network, t: str) -> str:
    c = b.shapes[t][1]
    scale, shift = b.weight(c, positive=True), b.weight(c)
    if draw(st.booleans()):
        return b.add("InstanceNormalization", t, scale, shift, shape=b.shapes[t])
    more = b.weight(c), b.weight(c, positive=True)
    return b.add("BatchNormalization", t, scale, shift, *more, shape=b.shapes[t])


def unary(draw: Draw, b: Network, t: str) -> str:
    ops = ["Relu", "Tanh", "Sigmoid", "HardSwish", "Gelu", "Identity", "PRelu", "Clip", "scale"]
    op = draw(st.sampled_from(ops))
    c = b.shapes[t][1]
    if op == "PRelu":
        return b.add(op, t, b.weight(c, 1, 1), shape=b.shapes[t])
    if op == "Clip":
        bounds = b.constant(-1, np.float32), b.constant(0.5, np.float32)
        return b.add(op, t, *bounds, shape=b.shapes[t])
    if op == "scale":
        shape = draw(st.sampled_from([(1, c, 1, 1), (c, 1, 1), (1,), ()]))
        kind = draw(st.sampled_from(["Mul", "Add", "Sub"]))
        return b.add(kind, t, b.weight(*shape), shape=b.shapes[t])
    return b.add(op, t, shape=b.shapes[t])


def add(draw: Draw, b: Network, t: str) -> str:
    twins = [name for name, shape in b.shapes.items() if shape == b.shapes[t]]
    op = draw(st.sampled_from(["Add", "Mul", "Max"]))
    return b.add(op, t, draw(st.sampled_from(twins)), shape=b.shapes[t])


def concat(draw: Draw, b: Network, t: str) -> str:
    n, _, h, w = b.shapes[t]
    beside = [k for k, s in b.shapes.items() if len(s) == 4 and (s[0], *s[2:]) == (n, h, w)]
    parts = draw(st.lists(st.sampled_from(beside), min_size=1, max_size=2))
    total = sum(b.shapes[p][1] for p in (t, *parts))
    return b.add("Concat", t, *parts, axis=1, shape=(n, total, h, w))


def gate(draw: Draw, b: Network, t: str) -> str:
    n, c, h, w = b.shapes[t]
    few = draw(st.integers(1, 4))
    mean = b.add("GlobalAveragePool", t, shape=(n, c, 1, 1))
    down = b.add("Conv", mean, b.weight(few, c, 1, 1), b.weight(few), shape=(n, few, 1, 1))
    up = b.add("Conv", b.add("Relu", down), b.weight(c, few, 1, 1), shape=(n, c, 1, 1))
    return b.add("Mul", t, b.add("HardSigmoid", up), shape=(n, c, h, w))


def pool(draw: Draw, b: Network, t: str) -> str:
    n, c, h, w = b.shapes[t]
    if h % 2 or w % 2:
        return t
    op = draw(st.sampled_from(["MaxPool", "AveragePool"]))
    return b.add(op, t, shape=(n, c, h // 2, w // 2), kernel_shape=[2, 2], strides=[2, 2])


def resize(draw: Draw, b: Network, t: str) -> str:
    n, c, h, w = b.shapes[t]
    if h > 12:
        return t
    if draw(st.booleans()):
        scales = b.constant([1, 1, 2, 2], np.float32)
        return b.add("Resize", t, "", scales, shape=(n, c, 2 * h, 2 * w))
    if draw(st.booleans()):  # channels from the tensor's own shape
        front = b.add("Slice", b.add("Shape", t), b.constant([0]), b.constant([2]))
        sizes = b.add("Concat", front, b.constant([2 * h, 2 * w]), axis=0)
    else:
        sizes = b.constant([n, c, 2 * h, 2 * w])
        if b.free:
            return t
    return b.add("Resize", t, "", "", sizes, shape=(n, c, 2 * h, 2 * w))


def shuffle(draw: Draw, b: Network, t: str) -> str:
    n, c, h, w = b.shapes[t]
    groups = draw(st.sampled_from([g for g in (2, 3, 4) if c % g == 0] or [1]))
    first = 0 if b.free else draw(st.sampled_from([0, n]))
    folded = b.add("Reshape", t, b.constant([first, groups, c // groups, h, w]))
    turned = b.add("Transpose", folded, perm=[0, 2, 1, 3, 4])
    last = draw(st.sampled_from([[0, c, h, w], [0, -1, h, w], [-1, c, h, w]]))
    return b.add("Reshape", turned, b.constant(last), shape=(n, c, h, w))


def split(draw: Draw, b: Network, t: str) -> str:
    n, c, h, w = b.shapes[t]
    at = draw(st.integers(1, c - 1)) if c > 1 else 0
    if not at:
        return t
    names = [f"s{len(b.nodes)}_{i}" for i in range(2)]
    sizes = b.constant([at, c - at])
    b.nodes.append(helper.make_node("Split", [t, sizes], names, axis=1))
    for name, size in zip(names, (at, c - at), strict=True):
        b.shapes[name] = (n, size, h, w)
    return names[0]


def cut(draw: Draw, b: Network, t: str) -> str:
    n, c, h, w = b.shapes[t]
    start = draw(st.integers(-c, c - 1))
    size = len(range(c)[start:])
    if draw(st.booleans()):
        index = draw(st.lists(st.integers(-c, c - 1), min_size=1, max_size=6))
        return b.add("Gather", t, b.constant(index), axis=1, shape=(n, len(index), h, w))
    bounds = [b.constant([v]) for v in (start, 1 << 40, draw(st.sampled_from([1, -3])))]
    return b.add("Slice", t, *bounds, shape=(n, size, h, w))


def to_space(draw: Draw, b: Network, t: str) -> str:
    n, c, h, w = b.shapes[t]
    if c % 4 or h > 12:
        return t
    if draw(st.booleans()):
        mode = draw(st.sampled_from(["DCR", "CRD"]))
        return b.add("DepthToSpace", t, blocksize=2, mode=mode, shape=(n, c // 4, 2 * h, 2 * w))
    folded = b.add("Reshape", t, b.constant([0, c // 4, 2, 2, h, w]))
    turned = b.add("Transpose", folded, perm=[0, 1, 4, 2, 5, 3])
    last = b.constant([0, c // 4, 2 * h, 2 * w])
    return b.add("Reshape", turned, last, shape=(n, c // 4, 2 * h, 2 * w))


def pad(draw: Draw, b: Network, t: str) -> str:
    n, c, h, w = b.shapes[t]
    front, back = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    ends = b.constant([0, front, 0, 0, 0, back, 0, 0])
    return b.add("Pad", t, ends, shape=(n, c + front + back, h, w))


def regroup(draw: Draw, b: Network, t: str) -> str:
    """Group normalisation as PyTorch writes it: back to the tensor's own shape."""
    c = b.shapes[t][1]
    groups = draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
    folded = b.add("Reshape", t, b.constant([0, groups, -1]))
    scale, shift = b.weight(groups, positive=True), b.weight(groups)
    done = b.add("InstanceNormalization", folded, scale, shift)
    return b.add("Reshape", done, b.add("Shape", t), shape=b.shapes[t])


def by_shape(draw: Draw, b: Network, t: str) -> str:
    """Reshaped, repeated or scaled by numbers that are read from the tensor's own shape."""
    _, c, h, w = b.shapes[t]
    own = b.add("Shape", t)
    kind = draw(st.sampled_from(["reshape", "expand", "scale"]))
    if kind == "expand":
        mean = b.add("GlobalAveragePool", t)
        return b.add("Sub", t, b.add("Expand", mean, own), shape=b.shapes[t])
    if kind == "scale":
        count = b.add("Gather", own, b.constant(draw(st.integers(0, 3))))
        return b.add("Div", t, b.add("Cast", count, to=1), shape=b.shapes[t])
    n, k = (b.add("Gather", own, b.constant([i])) for i in range(2))
    flat = b.add("Reshape", t, b.add("Concat", n, k, b.constant([-1]), axis=0))
    whole = draw(st.sampled_from([k, b.constant([c]), b.constant([-1])]))
    target = b.add("Concat", n, whole, b.constant([h, w]), axis=0)
    return b.add("Reshape", b.add("Tanh", flat), target, shape=b.shapes[t])


IMAGES: list[Callable[[Draw, Network, str], str]] = [
    conv, conv, conv, conv, depthwise, transposed, norm, unary, unary, add, add, concat, gate,
    pool, resize, shuffle, split, cut, to_space, pad, regroup, by_shape, by_shape,
]  # fmt: skip


def linear(b: Network, t: str, size: int) -> str:
    """MatMul and Add, or Gemm for matrices."""
    shape = b.shapes[t]
    if len(shape) == 2 and b.rng.random() < 0.5:
        weight = b.weight(size, shape[-1])
        return b.add("Gemm", t, weight, b.weight(size), transB=1, shape=(*shape[:-1], size))
    product = b.add("MatMul", t, b.weight(shape[-1], size), shape=(*shape[:-1], size))
    return b.add("Add", b.weight(size), product, shape=(*shape[:-1], size))


def sequence(b: Network, t: str) -> str:
    """[batch, pixels, channels]"""
    n, c, h, w = b.shapes[t]
    flat = b.add("Reshape", t, b.constant([0, 0, -1]))
    return b.add("Transpose", flat, perm=[0, 2, 1], shape=(n, h * w, c))


def attention(draw: Draw, b: Network, t: str) -> str:
    """Several forms of attention over a sequence."""
    n, steps, _ = b.shapes[t]
    heads, size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    whole = heads * size
    form = draw(st.sampled_from(["apart", "split", "folded"]))
    if form == "folded":
        fused = linear(b, t, 3 * whole)
        folded = b.add("Reshape", fused, b.constant([0, steps, 3, heads, size]))
        turned = b.add("Transpose", folded, perm=[2, 0, 3, 1, 4])
        q, k, v = (b.add("Gather", turned, b.constant(i), axis=0) for i in range(3))
        k = b.add("Transpose", k, perm=[0, 1, 3, 2])
    else:
        parts = [linear(b, t, whole) for _ in range(3)]
        if form == "split":
            fused = linear(b, t, 3 * whole)
            parts = [f"p{len(b.nodes)}_{i}" for i in range(3)]
            b.nodes.append(helper.make_node("Split", [fused], parts, axis=-1, num_outputs=3))
        target = draw(st.sampled_from([[0, 0, heads, size], [0, steps, -1, size]]))
        q, k, v = (b.add("Reshape", p, b.constant(target)) for p in parts)
        q, k, v = (
            b.add("Transpose", p, perm=perm)
            for p, perm in ((q, [0, 2, 1, 3]), (k, [0, 2, 3, 1]), (v, [0, 2, 1, 3]))
        )
    scores = b.add("Mul", b.add("MatMul", q, k), b.constant(0.5, np.float32))
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(steps, steps), (heads, 1, steps), (1, 1, 1, steps)]))
        scores = b.add("Add", scores, b.weight(*shape))
    mixed = b.add("MatMul", b.add("Softmax", scores, axis=-1), v)
    back = b.add("Transpose", mixed, perm=[0, 2, 1, 3])
    target = draw(st.sampled_from([[0, steps, whole], [0, 0, -1]]))
    return b.add("Reshape", back, b.constant(target), shape=(n, steps, whole))


def recurrent(draw: Draw, b: Network, t: str) -> str:
    n, steps, size = b.shapes[t]
    op, hidden = draw(st.sampled_from(["LSTM", "GRU", "RNN"])), draw(st.integers(2, 5))
    gates, two = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], draw(st.integers(1, 2))
    inputs = [
        b.add("Transpose", t, perm=[1, 0, 2]),
        b.weight(two, gates * hidden, size), b.weight(two, gates * hidden, hidden),
    ]  # fmt: skip
    if draw(st.booleans()):
        inputs.append(b.weight(two, 2 * gates * hidden))
        if not b.free and draw(st.booleans()):
            inputs += ["", b.weight(two, n, hidden)]
    names = [f"r{len(b.nodes)}_{i}" for i in range(2)]
    direction = "bidirectional" if two == 2 else "forward"
    b.nodes.append(helper.make_node(op, inputs, names, hidden_size=hidden, direction=direction))
    if draw(st.booleans()):  # the last state: [directions, batch, hidden]
        turned = b.add("Transpose", names[1], perm=[1, 0, 2])
        last = b.add("Reshape", turned, b.constant([0, two * hidden]))
        return b.add("Unsqueeze", last, b.constant([1]), shape=(n, 1, two * hidden))
    turned = b.add("Transpose", names[0], perm=[2, 0, 1, 3])
    return b.add("Reshape", turned, b.constant([0, steps, -1]), shape=(n, steps, two * hidden))


def mlp(draw: Draw, b: Network, t: str) -> str:
    shape = b.shapes[t]
    inner = b.add("Gelu", linear(b, t, channels(draw)))
    b.shapes[inner] = b.shapes[b.nodes[-2].output[0]]
    outer = linear(b, inner, shape[-1])
    if draw(st.booleans()):
        scale = b.weight(shape[-1], positive=True)
        t = b.add("LayerNormalization", t, scale, axis=-1, shape=shape)
    return b.add("Add", t, outer, shape=shape)


@st.composite
def models(draw: Draw) -> onnx.ModelProto:
    b = Network(draw(st.booleans()), draw(st.integers(0, 99)))
    last = conv(draw, b, "x")
    for _ in range(draw(st.integers(1, 8))):
        images = [k for k, s in b.shapes.items() if len(s) == 4 and np.prod(s) < 4000 and k != "x"]
        t = last if last in images and draw(st.booleans()) else draw(st.sampled_from(images))
        last = draw(st.sampled_from(IMAGES))(draw, b, t)
    outputs = []
    if draw(st.booleans()):
        t = sequence(b, last)
        for _ in range(draw(st.integers(1, 3))):
            t = draw(st.sampled_from([attention, recurrent, mlp]))(draw, b, t)
        outputs.append(linear(b, t, 3))
    else:
        n, c, h, w = b.shapes[last]
        if draw(st.booleans()):
            last = b.add("GlobalAveragePool", last, shape=(n, c, 1, 1))
            h = w = 1
        flat = b.add("Flatten", last, shape=(n, c * h * w))
        outputs.append(linear(b, b.add("Relu", linear(b, flat, 5), shape=(n, 5)), 3))
    if draw(st.integers(0, 3)) == 0:
        outputs.append(draw(st.sampled_from([k for k in b.shapes if k not in ("x", *outputs)])))
    return b.model(outputs)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(models(), st.sampled_from([0.2, 0.5, 0.8]), st.integers(0, 9))
def test_removal_equals_zeros(proto: onnx.ModelProto, amount: float, seed: int) -> None:
    compared(proto, amount, seed=seed)
