"""fill_blocks: the same floats from whole blocks of channels; what is widened, and what is left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser

from onnxq.model import Model
from onnxq.passes import FillBlocks
from onnxq.targets import load_target
from onnxq.testing import check

TARGET = load_target("ort-cpu")
PASS = FillBlocks(TARGET)
RNG = np.random.default_rng(5)


def proto(
    body: str, size: str = "1, 16, 40, 40", out: str = "a, b, c, d", large: int = 90_000,
    others: str = "", **shapes: tuple[int, ...],
) -> onnx.ModelProto:  # fmt: skip
    """A model with weights of the given shapes; large: elements of another constant."""
    found = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[{size}] x) => '
        f"(float[{out}] y, float[n] rest{others}) {{ {body} rest = Identity(large) }}"
    )
    for name, shape in {**shapes, "large": (large,)}.items():
        values = RNG.normal(0, 0.2, shape).astype(np.float32)
        found.graph.initializer.append(numpy_helper.from_array(values, name))
    return found


def weights(model: Model) -> dict[str, tuple[int, ...]]:
    """Of each convolution, by its output's name."""
    return {n.outputs[0].name: tuple(n.inputs[1].shape) for n in model.nodes("Conv")}


POOL = "MaxPool<kernel_shape = [2, 2], strides = [2, 2]>"
SCALES = "scales = Constant<value_floats = [1., 1., 2., 2.]>()"
RESIZE = 'Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric">'
BETWEEN: dict[str, Any] = {"w": (24, 16, 1, 1), "wb": (24,), "v": (16, 24, 3, 3)}
POOLED = proto(f"a = Conv(x, w, wb) r = Relu(a) p = {POOL}(r) y = Conv(p, v)", **BETWEEN)
GATE = (
    "a = Conv(x, w, wb) g = GlobalAveragePool(a) s = Conv(g, u) t = Relu(s) f = Conv(t, k) "
    "h = HardSigmoid(f) m = Mul(a, h) y = Conv(m, v)"
)

WIDENED = [
    pytest.param(
        POOLED, {"a": (32, 16, 1, 1), "y": (16, 32, 3, 3)}, id="pool",
    ),
    pytest.param(
        proto("a = Conv(x, w) r = Relu(a) y = Conv(r, v)", w=(8, 16, 3, 3), v=(32, 8, 1, 1)),
        {"a": (16, 16, 3, 3), "y": (32, 16, 1, 1)}, id="less-than-a-block",
    ),
    pytest.param(
        proto("a = Conv(x, w) r = Relu(a) y = Conv(r, v)", w=(22, 16, 1, 1), v=(16, 22, 3, 3)),
        {"a": (32, 16, 1, 1), "y": (16, 32, 3, 3)}, id="no-multiple-of-four",
    ),
    pytest.param(
        proto(f"{SCALES} a = Conv(x, w, wb) d = Conv<group = 24, pads = [1, 1, 1, 1]>(a, u, wb) "
              f"r = HardSwish(d) e = {RESIZE}(r, , scales) f = {RESIZE}(a, , scales) "
              f"z = Add(e, f) y = Conv(z, v)",
              u=(24, 1, 3, 3), **BETWEEN),
        {"a": (32, 16, 1, 1), "d": (32, 1, 3, 3), "y": (16, 32, 3, 3)}, id="depthwise-resize-sum",
    ),
    pytest.param(
        proto(GATE, u=(8, 24, 1, 1), k=(24, 8, 1, 1), **BETWEEN),
        {"a": (32, 16, 1, 1), "s": (16, 32, 1, 1), "f": (32, 16, 1, 1), "y": (16, 32, 3, 3)},
        id="squeeze-and-excite",
    ),
    pytest.param(
        proto(f"a = Conv(x, w, wb) h = Mul(half, a) p = {POOL}(h) y = Conv(p, v)",
              half=(), **BETWEEN),
        {"a": (32, 16, 1, 1), "y": (16, 32, 3, 3)}, id="by-a-number",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("before", "widths"), WIDENED)
def test_the_floats_are_the_same(
    before: onnx.ModelProto, widths: dict[str, tuple[int, ...]]
) -> None:
    checked = check(PASS, before)
    assert weights(checked.model) == widths
    assert checked.notes
    assert all(note.changed for note in checked.notes)


def kernels(model: onnx.ModelProto, folder: Path) -> list[str]:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options)
    return [n.op_type for n in onnx.load(folder / "optimized.onnx").graph.node]


def test_pooling_stays_in_blocks(tmp_path: Path) -> None:
    """There is one change of layout on the way in and one on the way out."""
    assert kernels(POOLED, tmp_path).count("ReorderOutput") == 2
    assert kernels(check(PASS, POOLED).model.to_proto(), tmp_path).count("ReorderOutput") == 1


PLAIN: dict[str, Any] = {"w": (24, 16, 1, 1), "v": (16, 24, 3, 3)}
LEFT = [
    pytest.param(
        proto(f"a = Conv(x, w) p = {POOL}(a) y = Conv(p, v)", w=(32, 16, 1, 1), v=(16, 32, 3, 3)),
        id="whole-blocks",
    ),
    pytest.param(proto("a = Conv(x, w) y = Conv(a, v)", **PLAIN), id="filled-by-the-kernel"),
    pytest.param(
        proto("a = Conv(x, w) y = Conv(a, v)", w=(8, 16, 1, 1), v=(16, 8, 3, 3)),
        id="too-many-products-with-zeros",
    ),
    pytest.param(
        proto(f"a = Conv(x, w) p = {POOL}(a) y = Conv(p, v)", others=", float[e, f, g, h] p",
              **PLAIN),
        id="an-output",
    ),
    pytest.param(
        proto(f"a = Conv(x, w) p = {POOL}(a) q = Conv<pads = [1, 1, 1, 1]>(p, v) "
              "s = Softmax<axis = 1>(p) y = Concat<axis = 1>(q, s)", **PLAIN),
        id="also-read-by-others",
    ),
    pytest.param(
        proto(f"a = Conv(x, w) n = Softmax<axis = 1>(a) p = {POOL}(n) y = Conv(p, v)", **PLAIN),
        id="made-by-others",
    ),
    pytest.param(
        proto(f"a = Conv(x, w) b = Mul(a, k) p = {POOL}(b) y = Conv(p, v)", k=(24, 1, 1), **PLAIN),
        id="a-constant-for-each-channel",
    ),
    pytest.param(
        proto(f"a = Conv(x, w) p = {POOL}(a) y = Conv<group = 2>(p, v)",
              w=(24, 16, 1, 1), v=(16, 12, 3, 3)),
        id="groups",
    ),
    pytest.param(
        proto(f"a = Conv(x, w) p = {POOL}(a) i = Neg(v) y = Conv(p, i)", **PLAIN),
        id="computed-weight",
    ),
    pytest.param(
        proto("a = Conv(x, w) p = MaxPool<kernel_shape = [2]>(a) y = Conv(p, v)",
              size="1, 16, 900", out="a, b, c", w=(24, 16, 1), v=(16, 24, 3)),
        id="one-axis",
    ),
    pytest.param(
        proto("sizes = Constant<value_ints = [1, 12, 80, 80]>() "
              f"a = Conv(x, w) r = {RESIZE}(a, , , sizes) y = Conv(r, v)",
              w=(24, 16, 1, 1), v=(16, 12, 3, 3)),
        id="resized-channels",
    ),
    pytest.param(
        proto(f"a = Conv(x, w) p = {POOL}(a) y = Conv(p, v)", large=100, **PLAIN),
        id="a-large-share-of-the-file",
    ),
]  # fmt: skip


@pytest.mark.parametrize("before", LEFT)
def test_left_alone(before: onnx.ModelProto) -> None:
    assert not check(PASS, before).notes


def test_a_target_without_such_kernels() -> None:
    assert not check(FillBlocks(replace(TARGET, costs=None)), POOLED).notes
    plain = replace(TARGET.costs, block=1)  # type: ignore[type-var]
    assert not check(FillBlocks(replace(TARGET, costs=plain)), POOLED).notes
