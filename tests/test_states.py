"""Passes for states of streaming models: split_units and read_last_state."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxq.model import Model
from onnxq.passes import read_last_state, split_units
from onnxq.testing import check

RNG = np.random.default_rng(2)


def unpacked(
    *cuts: str, target: str = "1, 1, 8", size: str = "1, 2, 8, 2", opset: int = 17, more: str = "",
    axes: str = "0, 1, 3",
) -> str:  # fmt: skip
    """Parts of a tensor, each `start, start, start : end, end, end`, added with weights."""
    body, names = "", []
    for i, cut in enumerate(cuts):
        starts, ends = cut.split(":")
        body += (
            f"s{i} = Constant<value = int64[{starts.count(',') + 1}] {{{starts}}}>() "
            f"e{i} = Constant<value = int64[{starts.count(',') + 1}] {{{ends}}}>() "
            f"c{i} = Slice(x, s{i}, e{i}, axes) r{i} = Reshape(c{i}, target) "
        )
        names.append(f"r{i}")
    sizes = target.count(",") + 1
    return (
        f'<ir_version: 8, opset_import: ["": {opset}]> g (float[{size}] x) => (float[k, l, m] y'
        f"{', float[n, o, p, q] c0' if more == 'output' else ''}) "
        f"<int64[{axes.count(',') + 1}] axes = {{{axes}}}, int64[{sizes}] target = {{{target}}}> "
        f"{{ {body} {more if '=' in more else ''} y = Concat<axis = 1>({', '.join(names)}) }}"
    )


WHOLE = "9223372036854775807"
# In another order than that of the tensor.
GRID = (
    f"0, 1, 1 : {WHOLE}, 2, 2", "0, 1, 0 : 1, 2, 1", f"0, 0, -1 : 1, -1, {WHOLE}",
    "0, 0, 0 : 1, 1, 1",
)  # fmt: skip


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_a_grid_is_one_split(opset: int) -> None:
    ops = check(split_units, unpacked(*GRID, opset=opset)).ops
    assert (ops["Slice"], ops["Transpose"], ops["Reshape"], ops["Split"]) == (0, 1, 1, 1)


def test_one_axis_and_parts_of_another_shape() -> None:
    cuts = ["0 : 1", "1 : 2", "2 : 3"]
    proto = unpacked(*cuts, target="1, 2, 4", size="3, 4, 2", axes="0")
    assert check(split_units, proto).ops["Split"] == 1


LEFT = [
    pytest.param(unpacked(*GRID[:2], size="1, 2, 8, 2"), id="few"),
    pytest.param(unpacked(*GRID[:3]), id="not-all"),
    pytest.param(unpacked(*GRID[:3], GRID[0]), id="one-twice"),
    pytest.param(unpacked(*GRID, size="n, 2, 8, 2"), id="free-sizes"),
    pytest.param(unpacked(*GRID, target="0, 1, 8"), id="target-of-zeros"),
    pytest.param(unpacked(*GRID, more="output"), id="a-part-is-an-output"),
    pytest.param(unpacked(*GRID, more="z = Neg(c1)"), id="a-part-is-also-read-elsewhere"),
    pytest.param(
        unpacked("0 : 2", "2 : 4", "4 : 6", target="1, 1, 4", size="6, 2", axes="0"),
        id="more-than-an-element",
    ),
]  # fmt: skip


@pytest.mark.parametrize("proto", LEFT)
def test_left_alone(proto: str) -> None:
    if "float[n, 2" in proto:
        feeds = [{"x": RNG.normal(size=(1, 2, 8, 2)).astype(np.float32)}]
        assert not check(split_units, proto, feeds=feeds).notes
    else:
        assert not check(split_units, proto).notes


DECLINED = [
    pytest.param(unpacked(*GRID, target="2, 1, 4"), "leading axis", id="no-leading-one"),
    pytest.param(
        unpacked(*GRID, size="1, 2, 8192, 2", target="1, 1, 8192"), "x is large", id="large"
    ),
]


@pytest.mark.parametrize(("proto", "reason"), DECLINED)
def test_declined(proto: str, reason: str) -> None:
    (text,) = check(split_units, proto).declined
    assert reason in text


def recurrent(
    op: str = "LSTM", *, size: str = "1, 2, 3", target: str = "1, 2, 4", layout: int = 0,
    lengths: str = "", outputs: str = "Y", more: str = "",
) -> onnx.ModelProto:  # fmt: skip
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[{size}] x) => '
        f"(float[a, b, c] y{more}) <int64[3] target = {{{target}}}> {{ "
        f"{outputs} = {op}<hidden_size = 4, layout = {layout}>(x, W, R{lengths}) "
        f"r = Reshape(Y, target) y = Neg(r) }}"
    )
    for name, shape in {"W": (1, 4 * gates, 3), "R": (1, 4 * gates, 4)}.items():
        values = RNG.normal(0, 0.5, shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    if lengths:
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.int32), "n"))
    return proto


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("outputs", ["Y", "Y, H"])
def test_the_last_state_is_read(op: str, outputs: str) -> None:
    assert check(read_last_state, recurrent(op, outputs=outputs)).ops["Reshape"] == 0


def test_a_reshape_to_another_shape_stays() -> None:
    model = check(read_last_state, recurrent(target="1, -1, 2")).model
    (reshape,) = model.nodes("Reshape")
    (layer,) = model.nodes("LSTM")
    assert reshape.inputs[0] is layer.outputs[1]


NOT_LAST = [
    pytest.param(recurrent(size="5, 2, 3", target="5, 2, 4"), id="several-steps"),
    pytest.param(recurrent(target="0, 2, -1"), id="zeros-in-the-target"),
    pytest.param(recurrent(lengths=", , n"), id="lengths"),
    pytest.param(recurrent(layout=1, size="1, 1, 3", target="1, 1, 4"), id="layout"),
]


@pytest.mark.parametrize("proto", NOT_LAST)
def test_the_whole_is_read(proto: onnx.ModelProto) -> None:
    if any(a.name == "layout" and a.i for a in proto.graph.node[0].attribute):
        # ONNX Runtime's CPU kernels have no layout 1: it cannot be run

        assert not read_last_state(Model.from_proto(proto))
    else:
        assert not check(read_last_state, proto).notes
