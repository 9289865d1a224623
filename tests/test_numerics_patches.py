"""Vectors that layers multiply their weights with: their products give the layers' errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.calibration import calibrate
from onnxq.errors import ModelError
from onnxq.model import Model
from onnxq.numerics.patches import Lay, Patches, Vectors, spacing
from onnxq.numerics.reconstruction import squared_error
from onnxq.passes.layouts import Held, held_by
from onnxq.statistics import Gram, Products

IMAGE, LINE, VOLUME = "float[2, 8, 9, 7] x", "float[3, 8, 11] x", "float[1, 2, 5, 4, 6] x"
FLAT = ((1, 1), (1, 1), (0, 0, 0, 0))


def conv(kernel: Any, strides: Any, dilations: Any, pads: Any, **more: Any) -> Patches:
    return Patches(kernel, strides, dilations, pads, **more)


CASES: dict[str, tuple[str, str, tuple[int, ...], Lay]] = {
    "matmul": ("MatMul(x, w)", "float[2, 5, 8] x", (8, 6), Vectors(-1)),
    "left": ("MatMul(w, x)", "float[2, 8, 5] x", (6, 8), Vectors(-2)),
    "gemm": ("Gemm<transA = 1, transB = 1>(x, w)", "float[8, 5] x", (6, 8), Vectors(0)),
    "conv": ("Conv(x, w)", IMAGE, (6, 8, 3, 2), conv((3, 2), *FLAT)),
    "strided": (
        "Conv<strides = [2, 3], pads = [1, 0, 2, 1]>(x, w)", IMAGE, (6, 8, 3, 2),
        conv((3, 2), (2, 3), (1, 1), (1, 0, 2, 1)),
    ),
    "dilated": (
        "Conv<dilations = [2, 3], pads = [1, 2, 1, 2]>(x, w)", IMAGE, (6, 8, 3, 2),
        conv((3, 2), (1, 1), (2, 3), (1, 2, 1, 2)),
    ),
    "groups": ("Conv<group = 2>(x, w)", IMAGE, (6, 4, 3, 3), conv((3, 3), *FLAT, groups=2)),
    "depthwise": (
        "Conv<group = 8, pads = [1, 1, 1, 1]>(x, w)", IMAGE, (8, 1, 3, 3),
        conv((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), groups=8),
    ),
    "upper": (
        'Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, w)', IMAGE, (6, 8, 4, 3),
        conv((4, 3), (2, 2), (1, 1), "SAME_UPPER"),
    ),
    "lower": (
        'Conv<auto_pad = "SAME_LOWER">(x, w)', IMAGE, (6, 8, 4, 3),
        conv((4, 3), (1, 1), (1, 1), "SAME_LOWER"),
    ),
    "line": ("Conv<pads = [2, 0]>(x, w)", LINE, (6, 8, 3), conv((3,), (1,), (1,), (2, 0))),
    "volume": (
        "Conv<strides = [1, 2, 1]>(x, w)", VOLUME, (6, 2, 2, 2, 3),
        conv((2, 2, 3), (1, 2, 1), (1, 1, 1), (0,) * 6),
    ),
    "transposed": (
        "ConvTranspose<strides = [2, 3], pads = [1, 0, 0, 2], dilations = [1, 2]>(x, w)", IMAGE,
        (8, 6, 3, 2), conv((3, 2), (2, 3), (1, 2), (1, 0, 0, 2), transposed=True),
    ),
    "transposed-groups": (
        "ConvTranspose<group = 2, pads = [3, 0, 3, 0]>(x, w)", IMAGE, (8, 3, 3, 2),
        conv((3, 2), (1, 1), (1, 1), (3, 0, 3, 0), groups=2, transposed=True),
    ),
    "transposed-same": (
        'ConvTranspose<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, w)', IMAGE, (8, 6, 3, 4),
        conv((3, 4), (2, 2), (1, 1), "SAME_UPPER", transposed=True),
    ),
}  # fmt: skip


def layer(text: str, inputs: str, weight: np.ndarray) -> Model:
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => (float[a] y) {{ y = {text} }}'
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return Model.from_proto(proto)


def made(name: str) -> tuple[Model, np.ndarray, list[dict[str, np.ndarray]], Held, Lay]:
    """A layer, an error of its weight, samples, and how both are laid out."""
    text, inputs, shape, lay = CASES[name]
    rng = np.random.default_rng(3)
    error = rng.normal(size=shape).astype(np.float32)
    model = layer(text, inputs, error)
    feeds = [
        {"x": rng.normal(size=model.graph.inputs[0].shape).astype(np.float32)} for _ in range(3)
    ]
    node = model.nodes()[0]
    held = next(h for h in held_by(node) if node.inputs[h.index].name == "w")
    return model, error, feeds, held, lay


@pytest.mark.parametrize("name", CASES)
def test_products_give_the_error_of_the_results(name: str) -> None:
    model, error, feeds, held, lay = made(name)
    gram = calibrate(model, {"any": Products("x", lay, limit=10**6)}, feeds)["any"]
    assert isinstance(gram, Gram)
    assert gram.count == 3
    session = runtime.session(model)  # the weight is the error: so are the results
    true = sum(float(np.square(session.run(None, f)[0].astype(np.float64)).sum()) for f in feeds)
    assert squared_error(held.rows(error), gram.whole(lay)) == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_some_vectors_stand_for_all(name: str) -> None:
    _, _, feeds, _, lay = made(name)
    whole, share = lay.of(feeds[0]["x"], 10**6, 0)
    assert share == 1
    some, stands_for = lay.of(feeds[0]["x"], 4, 1)
    assert some.shape[1] <= 5
    assert some.shape[1] * stands_for == pytest.approx(whole.shape[1])
    for block, taken in zip(whole, some, strict=True):
        for vector in taken:
            assert (block == vector).all(1).any()


def test_states_have_a_block_for_each_direction() -> None:
    x = np.random.default_rng(0).normal(size=(5, 2, 3, 4)).astype(np.float32)
    seen = Products("x", Vectors(-1, blocks=1)).of(x, 0).sums
    for d in range(2):
        rows = x[:, d].reshape(-1, 4)
        np.testing.assert_allclose(seen[d], rows.T @ rows, rtol=1e-5)


def test_steps_do_not_fall_into_line() -> None:
    for count, limit, line in ((3136, 500, 56), (10_000, 999, 100), (7, 100, 7), (12, 1, 4)):
        step = spacing(count, limit, line)
        assert -(-count // step) <= limit or step == 1
        assert step == 1 or (np.gcd(step, count) == 1 and np.gcd(step, line) == 1)


def test_samples_that_do_not_count_are_left_out() -> None:
    model, _, feeds, _, lay = made("matmul")
    wishes = {
        "all": Products("x", lay), "first": Products("x", lay, stop=1),
        "rest": Products("x", lay, start=1), "none": Products("x", lay, start=3),
    }  # fmt: skip
    seen = calibrate(model, wishes, feeds)
    assert isinstance(seen["first"], Gram)
    assert isinstance(seen["rest"], Gram)
    together = seen["first"].merge(seen["rest"])
    assert isinstance(seen["all"], Gram)
    np.testing.assert_allclose(together.sums, seen["all"].sums, rtol=1e-6)
    assert [seen[k].count for k in ("all", "first", "rest", "none")] == [3, 1, 2, 0]
    with pytest.raises(ValueError, match="beside"):
        together.merge(Gram(np.zeros((1, 3, 3))))


def test_what_is_not_finite_is_flagged() -> None:
    x = np.array([[1, np.inf], [2, 3]], np.float32)
    seen = Products("x", Vectors(-1)).of(x, 0)
    assert seen.has_nonfinite
    assert not seen.sums.any()


def test_products_beyond_float32_are_flagged() -> None:
    """Without a warning, which would be an error here."""
    x = np.full((4, 2), 1e25, np.float32)
    for lay in (Vectors(-1), Vectors(-1, blocks=0)):
        seen = Products("x", lay).of(x[None], 0)
        assert seen.has_nonfinite
        assert not seen.sums.any()


@pytest.mark.parametrize("name", ["matmul", "conv", "groups", "upper", "transposed", "volume"])
def test_a_sample_without_values_adds_nothing(name: str) -> None:
    _, _, feeds, _, lay = made(name)
    x = feeds[0]["x"]
    full, none = (Products("x", lay).of(v, 0) for v in (x, x[:0]))
    assert none.sums.shape == full.sums.shape
    assert not none.sums.any()
    assert not none.has_nonfinite


def test_states_of_no_samples_add_nothing() -> None:
    seen = Products("x", Vectors(-1, blocks=1)).of(np.zeros((0, 2, 3, 4), np.float32), 0)
    assert seen.sums.shape == (2, 4, 4)
    seen = Products("x", Vectors(-1, blocks=0)).of(np.zeros((2, 0, 3, 4), np.float32), 0)
    assert seen.sums.shape == (2, 4, 4)


def test_bodies_have_none() -> None:
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x, bool c) => (float[2] y) { '
        "y = If(c) <then_branch = p () => (float[2] u) { u = Neg(x) }, "
        "else_branch = q () => (float[2] v) { h = Abs(x) v = Neg(h) }> }"
    )
    feed = {"x": np.ones(2, np.float32), "c": np.array(False)}
    with pytest.raises(ModelError, match="no sums of products in bodies"):
        calibrate(Model.from_proto(proto), {"k": Products("h", Vectors(-1))}, [feed])
