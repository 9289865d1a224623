"""widen_channels: the same integers from more channels; what is widened, and what is left."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.model import Model
from onnxq.passes import WidenChannels
from onnxq.targets import load_target

TARGET = load_target("ort-cpu")
RNG = np.random.default_rng(5)
PAIR = "{0}q = QuantizeLinear({0}, s, z) {0}d = DequantizeLinear({0}q, s, z)"


def pair(name: str) -> str:
    return PAIR.format(name)


def conv(out: str, source: str, weight: str, **attrs: int) -> str:
    edge = 0 if attrs.get("point") else 1
    inside = f"pads = [{edge}, {edge}, {edge}, {edge}], group = {attrs.get('group', 1)}"
    return (
        f"{weight}d = DequantizeLinear<axis = 0>({weight}, {weight}s, {weight}z) "
        f"{weight}bd = DequantizeLinear<axis = 0>({weight}b, {weight}bs, {weight}bz) "
        f"{out} = Conv<{inside}>({source}, {weight}d, {weight}bd)"
    )


def model(
    body: str, channels: int, size: str = "40, 40", outputs: str = "", large: int = 50_000,
    **shapes: tuple[int, ...],
) -> Model:  # fmt: skip
    """A model in Q/DQ form: weights of the given shapes, with bias, scales and zero points.

    large: bytes of another constant, which makes zeros a small share.
    """
    out = f"{outputs or 'float[a, b, c, d] y'}, int8[n] rest"
    body += " rest = Identity(large)"
    shapes = {**shapes, "large": (large,)}
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[1, {channels}, {size}] x) => ({out}) '
        f"<float s = {{0.05}}, uint8 z = {{117}}> {{ {body} }}"
    )
    proto.graph.initializer.append(
        numpy_helper.from_array(np.zeros(shapes.pop("large"), np.int8), "large")
    )
    for name, shape in shapes.items():
        count = shape[0]
        scale = RNG.uniform(0.001, 0.01, count).astype(np.float32)
        arrays: dict[str, NDArray[Any]] = {
            name: RNG.integers(-127, 128, shape).astype(np.int8),
            f"{name}s": scale,
            f"{name}bs": scale * np.float32(0.05),
            f"{name}z": np.zeros(count, np.int8),
            f"{name}b": RNG.integers(-99, 99, count).astype(np.int32),
            f"{name}bz": np.zeros(count, np.int32),
        }
        for key, value in arrays.items():
            if re.search(rf"\b{key}\b", body):
                proto.graph.initializer.append(numpy_helper.from_array(value, key))
    onnx.checker.check_model(proto, full_check=True)
    return Model.from_proto(proto)


def outputs(model: Model, level: str) -> list[np.ndarray]:
    session = runtime.session(model.to_proto(), optimize=level)  # type: ignore[arg-type]
    x = session.get_inputs()[0]
    shape = [d if isinstance(d, int) else 1 for d in x.shape]
    feed = np.random.default_rng(1).normal(0, 2, shape).astype(np.float32)
    return [np.asarray(o) for o in session.run(None, {"x": feed})]


def weights(model: Model) -> dict[str, tuple[int, ...]]:
    """Of each convolution, by its name's output."""
    return {n.outputs[0].name: tuple(n.inputs[1].shape) for n in model.nodes("Conv")}


WIDENED = [
    pytest.param(
        model(f"{pair('x')} {conv('e', 'xd', 'w')} {pair('e')} y = Identity(ed)", 3,
              w=(16, 3, 3, 3)),
        {"e": (16, 4, 3, 3)}, {"Pad": 1}, id="input",
    ),
    pytest.param(
        model(f"{pair('x')} {conv('e', 'xd', 'w')} {pair('e')} y = Identity(ed)", 16,
              w=(3, 16, 3, 3)),
        {"e": (16, 16, 3, 3)}, {"Slice": 1}, id="output",
    ),
    pytest.param(
        model(f"{pair('x')} {conv('m', 'xd', 'w')} {pair('m')} {conv('e', 'md', 'v', point=1)} "
              f"{pair('e')} y = Identity(ed)", 16, w=(6, 16, 3, 3), v=(16, 6, 1, 1)),
        {"m": (16, 16, 3, 3), "e": (16, 16, 1, 1)}, {}, id="between",
    ),
    pytest.param(
        model(f"{pair('x')} {conv('m', 'xd', 'w')} {pair('m')} "
              f"{conv('k', 'md', 'u', group=24)} {pair('k')} a = Add(md, kd) {pair('a')} "
              f"p = MaxPool<kernel_shape = [2, 2]>(aq) pd = DequantizeLinear(p, s, z) "
              f"{conv('e', 'pd', 'v')} {pair('e')} y = Identity(ed)",
              16, large=99_000, w=(24, 16, 3, 3), u=(24, 1, 3, 3), v=(16, 24, 3, 3)),
        {"m": (32, 16, 3, 3), "k": (32, 1, 3, 3), "e": (16, 32, 3, 3)}, {}, id="depthwise-and-add",
    ),
    pytest.param(
        model(f"{pair('x')} {conv('m', 'xd', 'w')} {pair('m')} "
              f"{conv('e', 'md', 'v', point=1)} {pair('e')} f = Neg(md) y = Identity(ed)",
              16, outputs="float[a, b, c, d] y, float[e, g, h, i] f",
              w=(6, 16, 3, 3), v=(16, 6, 1, 1)),
        {"m": (16, 16, 3, 3), "e": (16, 16, 1, 1)}, {"Slice": 1}, id="also-used-elsewhere",
    ),
    pytest.param(
        model(f"{pair('x')} {conv('e', 'xd', 'w')} {pair('e')} f = Neg(xd) y = Identity(ed)", 3,
              outputs="float[a, b, c, d] y, float[e, g, h, i] f", w=(16, 3, 3, 3)),
        {"e": (16, 4, 3, 3)}, {"Pad": 1}, id="input-also-used-elsewhere",
    ),
    pytest.param(
        model(f"{pair('x')} t = Transpose<perm = [0, 1, 3, 2]>(xq) td = DequantizeLinear(t, s, z) "
              f"a = Add(td, xd) {pair('a')} {conv('e', 'ad', 'w')} {pair('e')} y = Identity(ed)",
              3, w=(16, 3, 3, 3)),
        {"e": (16, 4, 3, 3)}, {"Pad": 1}, id="behind-integers-that-were-moved",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("before", "widths", "added"), WIDENED)
def test_the_integers_are_the_same(
    before: Model, widths: dict[str, tuple[int, ...]], added: dict[str, int]
) -> None:
    after = before.copy()
    assert all(note.changed for note in WidenChannels(TARGET)(after))
    onnx.checker.check_model(after.to_proto(), full_check=True)
    assert weights(after) == widths
    ops = [node.op for node in after.graph.nodes]
    assert {op: ops.count(op) for op in ("Pad", "Slice") if op in ops} == added
    for one, two in zip(outputs(before, "off"), outputs(after, "off"), strict=True):
        np.testing.assert_array_equal(one, two)
    for one, two in zip(outputs(before, "off"), outputs(after, "all"), strict=True):
        np.testing.assert_allclose(one, two, atol=0.051)  # a step: kernels round their own way
    assert not WidenChannels(TARGET)(after)


@pytest.mark.parametrize(("before", "widths", "added"), WIDENED)
def test_kernels_run_on_what_is_written(
    before: Model, widths: dict[str, tuple[int, ...]], added: dict[str, int], tmp_path: Path
) -> None:
    """Each convolution becomes a QLinearConv with its weight in integers."""
    after = before.copy()
    WidenChannels(TARGET)(after)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    ort.InferenceSession(after.to_proto().SerializeToString(), options)
    ops = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert ops.count("QLinearConv") == len(widths)
    assert "Conv" not in ops


LEFT = [
    pytest.param((16, 4, 3, 3), 4, "40, 40", id="fits"),
    pytest.param((16, 3, 3, 3), 3, "4, 4", id="too-small-to-pay"),
]


@pytest.mark.parametrize(("shape", "channels", "size"), LEFT)
def test_left_alone(shape: tuple[int, ...], channels: int, size: str) -> None:
    body = f"{pair('x')} {conv('e', 'xd', 'w')} {pair('e')} y = Identity(ed)"
    assert not WidenChannels(TARGET)(model(body, channels, size, w=shape))


CONV = conv("e", "xd", "w")
POOL = "p = MaxPool<kernel_shape = [2, 2]>({}) pd = DequantizeLinear(p, s, z) "
FOREIGN = [
    pytest.param(
        f"t = Transpose<perm = [0, 1, 3, 2]>(xq) {POOL.format('t')} {conv('e', 'pd', 'w')}",
        id="pooled-after-what-is-not-known",
    ),
    pytest.param(
        "o = Constant<value = float[3] {0.05, 0.04, 0.03}>() "
        "oz = Constant<value = uint8[3] {1, 2, 3}>() nq = QuantizeLinear<axis = 1>(x, o, oz) "
        f"nd = DequantizeLinear<axis = 1>(nq, o, oz) {conv('e', 'nd', 'w')}",
        id="scales-of-channels",
    ),
    pytest.param(
        f"nq = QuantizeLinear(x, s) nd = DequantizeLinear(nq, s) {conv('e', 'nd', 'w')}",
        id="no-zero-point",
    ),
    pytest.param(
        "o = Constant<value = float[3] {0.01, 0.02, 0.03}>() "
        "oz = Constant<value = int8[3] {0, 0, 0}>() wd = DequantizeLinear<axis = 1>(w, o, oz) "
        "e = Conv<pads = [1, 1, 1, 1]>(xd, wd)",
        id="a-weight-with-scales-of-inputs",
    ),
    pytest.param(
        f"r = ReduceMean<axes = [0, 1, 2, 3], keepdims = 0>(x) n = Constant<value_ints = [16]>() "
        f"b = Expand(r, n) {CONV.replace('wbd = DequantizeLinear<axis = 0>(wb, wbs, wbz) ', '')}"
        .replace("xd, wd, wbd", "xd, wd, b"),
        id="a-bias-of-the-run",
    ),
]  # fmt: skip


@pytest.mark.parametrize("body", FOREIGN)
def test_channels_that_cannot_all_be_widened_are_left_alone(body: str) -> None:
    """What other tools write in Q/DQ form, and data movement on integers."""
    text = body if "nq =" in body else f"{pair('x')} {body}"
    before = model(f"{text} {pair('e')} y = Identity(ed)", 3, w=(16, 3, 3, 3))
    outputs(before, "off")
    assert not WidenChannels(TARGET)(before)


def test_operands_of_other_ranks_do_not_widen() -> None:
    """The second axis of the one are channels, of the other rows."""
    body = (
        f"{pair('x')} {conv('m', 'xd', 'w')} {pair('m')} r = ReduceMax<axes = [0], keepdims = 0>(x)"
        f" rq = QuantizeLinear(r, s, z) rd = DequantizeLinear(rq, s, z) a = Add(md, rd) {pair('a')}"
        f" {conv('e', 'ad', 'v')} {pair('e')} y = Identity(ed)"
    )
    before = model(body, 6, "6, 900", large=99_000, w=(6, 6, 3, 3), v=(16, 6, 3, 3))
    after = before.copy()
    WidenChannels(TARGET)(after)
    for one, two in zip(outputs(before, "off"), outputs(after, "off"), strict=True):
        np.testing.assert_array_equal(one, two)


def test_float_convolutions_are_left_alone() -> None:
    body = f"{pair('x')} {conv('y', 'xd', 'w')}"
    assert not WidenChannels(TARGET)(model(body, 3, w=(16, 3, 3, 3)))


def test_integers_that_are_an_output_keep_their_channels() -> None:
    body = f"{pair('x')} {conv('e', 'xd', 'w')} eq = QuantizeLinear(e, s, z)"
    before = model(body, 16, outputs="uint8[a, b, c, d] eq", w=(3, 16, 3, 3))
    assert not WidenChannels(TARGET)(before)


def test_zeros_may_only_be_a_small_share_of_the_file() -> None:
    body = f"{pair('x')} {conv('e', 'xd', 'w')} {pair('e')} y = Identity(ed)"
    assert WidenChannels(TARGET)(model(body, 16, w=(3, 16, 3, 3)))
    assert not WidenChannels(TARGET)(model(body, 16, large=100, w=(3, 16, 3, 3)))


def test_a_target_without_such_a_kernel() -> None:
    body = f"{pair('x')} {conv('e', 'xd', 'w')} {pair('e')} y = Identity(ed)"
    assert not WidenChannels(replace(TARGET, costs=None))(model(body, 3, w=(16, 3, 3, 3)))
    plain = replace(TARGET.costs, input_lanes=1, output_lanes=1)  # type: ignore[type-var]
    assert not WidenChannels(replace(TARGET, costs=plain))(model(body, 3, w=(16, 3, 3, 3)))
