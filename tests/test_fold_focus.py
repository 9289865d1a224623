"""fold_focus: Slices that take blocks of pixels apart become strides of the convolution."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxq.passes import fold_focus
from onnxq.testing import check

RNG = np.random.default_rng(8)
# In the order in which detectors have it: columns last.
TWO = ("0, 0", "1, 0", "0, 1", "1, 1")
THREE = tuple(f"{y}, {x}" for x in range(3) for y in range(3))


def focus(
    *places: str, side: int = 2, size: str = "1, 3, 12, 18", attrs: str = "", kernel: int = 3,
    weight: str = "w", ends: str = "2147483647, 99", axes: str = "2, 3", steps: str = "",
    other: str = "x", more: str = "", group: int = 1,
) -> onnx.ModelProto:  # fmt: skip
    steps = steps or f"{side}, {side}"
    body = "".join(
        f"s{i} = Constant<value = int64[2] {{{place}}}>() "
        f"c{i} = Slice({other if i else 'x'}, s{i}, ends, axes, steps) "
        for i, place in enumerate(places)
    )
    parts = ", ".join(f"c{i}" for i in range(len(places)))
    computed = "v = Abs(w) " if weight == "v" else ""
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[{size}] x) => (float[a, b, c, d] y'
        f"{', float[e, f, g, h] z' if more else ''}) <int64[2] ends = {{{ends}}}, "
        f"int64[2] axes = {{{axes}}}, int64[2] steps = {{{steps}}}> {{ o = Neg(x) {body} {computed}"
        f"z = Concat<axis = 1>({parts}) y = Conv{attrs and f'<{attrs}>'}(z, {weight}, b) }}"
    )
    shape = (4, 3 * len(places) // group, kernel, kernel)
    for name, values in (("w", RNG.normal(0, 0.2, shape)), ("b", RNG.normal(0, 1, 4))):
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return proto


FOLDED = [
    pytest.param(focus(*TWO, attrs="pads = [1, 1, 1, 1]"), (4, 3, 6, 6), id="detector"),
    pytest.param(focus(*sorted(TWO)), (4, 3, 6, 6), id="another-order"),
    pytest.param(focus(*TWO, attrs="pads = [0, 2, 1, 0], strides = [2, 1]"), (4, 3, 6, 6),
                 id="strides-and-uneven-pads"),
    pytest.param(focus(*TWO, kernel=1), (4, 3, 2, 2), id="one-pixel"),
    pytest.param(focus(*THREE, side=3, attrs="pads = [1, 1, 1, 1]"), (4, 3, 9, 9), id="of-three"),
    pytest.param(focus(*TWO, axes="3, -2"), (4, 3, 6, 6), id="axes-the-other-way-round"),
    pytest.param(focus(*TWO, size="n, 3, h, w_", ends="2147483647, 2147483647"), (4, 3, 6, 6),
                 id="free-sizes"),
]  # fmt: skip


@pytest.mark.parametrize(("proto", "shape"), FOLDED)
def test_folded(proto: onnx.ModelProto, shape: tuple[int, ...]) -> None:
    feeds = [{"x": RNG.normal(size=(1, 3, 12, 18)).astype(np.float32)}]
    done = check(fold_focus, proto, feeds=feeds)
    assert (done.ops["Slice"], done.ops["Concat"]) == (0, 0)
    (conv,) = done.model.nodes("Conv")
    assert tuple(conv.inputs[1].shape) == shape


LEFT = [
    pytest.param(focus(*TWO[:3]), id="a-pixel-is-missing"),
    pytest.param(focus(*TWO[:3], TWO[0]), id="a-pixel-twice"),
    pytest.param(focus(*TWO, other="o"), id="of-two-tensors"),
    pytest.param(focus(*TWO, ends="10, 18"), id="a-part-of-the-image"),
    pytest.param(
        focus("0, 0", "0, 8", ends="99, 99", steps="9, 9", kernel=1), id="few-of-large-blocks"
    ),
]


@pytest.mark.parametrize("proto", LEFT)
def test_left_alone(proto: onnx.ModelProto) -> None:
    assert not check(fold_focus, proto).notes


DECLINED = [
    pytest.param(focus(*TWO, more="z"), "also used elsewhere", id="an-output"),
    pytest.param(focus(*TWO, weight="v"), "not constant", id="computed-weight"),
    pytest.param(focus(*TWO, attrs="dilations = [2, 1]"), "dilations", id="dilations"),
    pytest.param(focus(*TWO, attrs='auto_pad = "SAME_UPPER"'), "auto_pad", id="auto-pad"),
    pytest.param(focus(*TWO, attrs="group = 2", group=2), "groups", id="groups"),
]


@pytest.mark.parametrize(("proto", "reason"), DECLINED)
def test_declined(proto: onnx.ModelProto, reason: str) -> None:
    (text,) = check(fold_focus, proto).declined
    assert reason in text
