"""name_sizes: names for sizes that are equal, and what ONNX Runtime makes of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser

from onnxq.model import Model
from onnxq.passes import name_sizes
from onnxq.testing import check

RNG = np.random.default_rng(3)
# A residual block behind a gate: what the gate multiplies is not followed by ONNX Runtime.
BLOCK = (
    "a = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, w) g = Sigmoid(a) "
    "s = GlobalAveragePool(g) m = Mul(a, s) c = Conv<pads = [1, 1, 1, 1]>(m, v) "
    "b = Conv<pads = [2, 2, 2, 2], dilations = [2, 2]>(c, v) n = Mul(b, s) "
    "d = Conv(n, u) z = Add(c, d) y = Conv(z, u)"
)


def proto(body: str, size: str = "N, 16, h, w_", **more: tuple[int, ...]) -> onnx.ModelProto:
    found = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[{size}] x) => (float[A, B, C, D] y) '
        f"{{ {body} }}"
    )
    shapes = {"w": (16, 16, 3, 3), "v": (16, 16, 3, 3), "u": (16, 16, 1, 1), **more}
    for name, shape in shapes.items():
        values = RNG.normal(0, 0.1, shape).astype(np.float32)
        if any(name in node.input for node in found.graph.node):
            found.graph.initializer.append(numpy_helper.from_array(values, name))
    return found


def feeds(*sizes: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    return [{"x": RNG.normal(size=s).astype(np.float32)} for s in sizes]


def kernels(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options)
    return Counter(n.op_type for n in onnx.load(folder / "optimized.onnx").graph.node)


def dims(model: Model) -> dict[str, list[int | str]]:
    return {
        info.name: [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim]
        for info in model.to_proto().graph.value_info
    }


def test_the_sum_is_a_part_of_the_convolution(tmp_path: Path) -> None:
    before = proto(BLOCK)
    done = check(name_sizes, before, feeds=feeds((1, 16, 9, 12), (2, 16, 8, 8)))
    named = dims(done.model)
    assert named["c"] == named["d"] == named["m"] == named["n"]
    assert named["c"][:2] == ["N", 16]
    assert len(set(named["c"])) == 4
    assert kernels(before, tmp_path)["Add"] == 1
    after = kernels(done.model.to_proto(), tmp_path)
    assert after["Add"] == after["Reshape"] == 0


def test_names_survive_a_copy_and_saving(tmp_path: Path) -> None:
    model = Model.from_proto(proto(BLOCK))
    assert name_sizes(model)
    model.copy().save(tmp_path / "m.onnx")
    assert dims(Model.load(tmp_path / "m.onnx")) == dims(model) != {}


def test_names_that_the_model_has_are_not_taken() -> None:
    before = proto(BLOCK, size="N, 16, free_3, free_4")
    found = {d for shape in dims(check(name_sizes, before).model).values() for d in shape}
    assert not found & {"free_3", "free_4"}
    assert "N" in found


LEFT = [
    pytest.param(proto(BLOCK, size="1, 16, 12, 12"), id="sizes-are-numbers"),
    pytest.param(
        proto("a = Conv(x, u) g = GlobalAveragePool(a) c = Conv(g, u) y = Add(a, c)"),
        id="broadcast",
    ),
    pytest.param(
        proto("a = Conv<strides = [2, 2]>(x, w) b = Conv<strides = [2, 2]>(x, u) y = Add(a, b)",
              size="N, 16, 9, k"),
        id="not-known-to-be-equal",
    ),
    pytest.param(proto("a = Conv(x, u) c = Relu(a) y = Mul(a, c)"), id="no-sum"),
]  # fmt: skip


@pytest.mark.parametrize("before", LEFT)
def test_left_alone(before: onnx.ModelProto) -> None:
    model = Model.from_proto(before)
    assert not name_sizes(model)
    assert not dims(model)


SLIDES = [
    ("kernel_shape = [3, 3], pads = [1, 1, 1, 1]", "kernel_shape = [1, 1]", True),
    ('kernel_shape = [3, 3], auto_pad = "SAME_UPPER"', "kernel_shape = [1, 1]", True),
    ("kernel_shape = [3, 3], strides = [2, 2]", "kernel_shape = [3, 3], strides = [2, 2]", True),
    ("kernel_shape = [3, 3], strides = [2, 2]", "kernel_shape = [2, 2], strides = [2, 2]", False),
    (
        "kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1",
        "kernel_shape = [2, 2], strides = [2, 2]",
        False,
    ),
    (
        "kernel_shape = [2, 2], strides = [2, 2], pads = [1, 1, 0, 0]",
        "kernel_shape = [2, 2], strides = [2, 2]",
        False,
    ),
]


@pytest.mark.parametrize(("one", "other", "equal"), SLIDES)
def test_what_slides_in_the_same_way_is_equally_large(one: str, other: str, equal: bool) -> None:
    body = f"a = MaxPool<{one}>(x) b = MaxPool<{other}>(x) s = Add(a, b) y = Neg(s)"
    model = Model.from_proto(proto(body))
    assert bool(name_sizes(model)) == equal
