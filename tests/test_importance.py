"""Importance: mean squares of what weights are multiplied with, and what they bring."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.calibration import calibrate
from onnxq.data import open_samples
from onnxq.errors import DataError
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.passes import QuantizeWeights
from onnxq.statistics import Squares, SumOfSquares

SHAPES = {
    "w": (16, 8, 3, 3), "wg": (16, 4, 3, 3), "wt": (8, 16, 3, 3), "m": (32, 48), "mt": (48, 32),
    "left": (40, 20), "lw": (1, 64, 32), "lr": (1, 64, 16), "table": (40, 32),
}  # fmt: skip
IMAGE, ROWS, OUT = "float[1, 8, 6, 6] x", "float[20, 32] x", "float[a, b] y"
FOUR = "float[a, b, c, d] y"
CASES = {
    "MatMul": ("y = MatMul(x, m)", ROWS, OUT),
    "MatMul-left": ("y = MatMul(left, x)", ROWS, OUT),
    "Gemm": ("y = Gemm<transB = 1>(x, mt)", ROWS, OUT),
    "Gemm-transA": ("y = Gemm<transA = 1>(x, m)", "float[32, 20] x", OUT),
    "Conv": ("y = Conv(x, w)", IMAGE, FOUR),
    "Conv-groups": ("y = Conv<group = 2>(x, wg)", IMAGE, FOUR),
    "ConvTranspose": ("y = ConvTranspose(x, wt)", IMAGE, FOUR),
    "LSTM": ("y = LSTM<hidden_size = 16>(x, lw, lr)", "float[5, 1, 32] x", FOUR),
    "captured": (
        "t = Constant<value_int = 1>() c = Cast<to = 9>(t) y = If(c) <then_branch = p () => "
        "(float[20, 48] u) { u = MatMul(x, m) }, else_branch = q () => (float[20, 48] v) "
        "{ h = MatMul(x, m) v = Neg(h) }>", ROWS, OUT,
    ),
}  # fmt: skip


def model(body: str, inputs: str, outputs: str) -> Model:
    proto = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    rng = np.random.default_rng(2)
    for name, shape in SHAPES.items():
        if f"{name}," in body or f"{name})" in body:
            value = rng.normal(0, 0.2, shape).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(value, name))
    return Model.from_proto(proto)


def uneven(model: Model, axis: int, count: int = 8) -> Any:
    """Samples whose channels differ by factors of a hundred."""
    shape = [count, *model.graph.inputs[0].shape]
    rng = np.random.default_rng(5)
    sizes = np.geomspace(0.05, 5, shape[axis + 1])
    rng.shuffle(sizes)
    sides = [1] * len(shape)
    sides[axis + 1] = -1
    values = rng.normal(size=shape) * sizes.reshape(sides)
    feeds = [{"x": v.astype(np.float32)} for v in values]
    return open_samples(feeds, model)


AXES = {"MatMul-left": 0, "Gemm-transA": 0, "LSTM": 2}


@pytest.mark.parametrize("name", CASES)
def test_weighted_errors_are_smaller_where_it_counts(name: str) -> None:
    before = model(*CASES[name])
    axis = AXES.get(name, 1)
    samples = uneven(before, axis)
    after, plain = before.copy(), before.copy()
    options: Any = {"format": "int4", "layers": ("op:*=int4",)}
    notes = QuantizeWeights(**options, range="importance", samples=samples)(after)
    assert all(n.changed and "not observed" not in n.text for n in notes)
    QuantizeWeights(**options, range="mse")(plain)

    def error(model: Model) -> float:
        one, two = runtime.session(before), runtime.session(model)
        pairs = [(one.run(None, f)[0], two.run(None, f)[0]) for f in samples]
        return sqnr_db(np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]))

    assert error(after) > error(plain) + 0.5


def test_what_is_not_observed_falls_back_to_mse() -> None:
    table = model("e = Gather(table, x) y = Relu(e)", "int64[5] x", OUT)
    samples = open_samples({"x": np.zeros((3, 5), np.int64)}, table)
    (note,) = QuantizeWeights(range="importance", samples=samples)(table)
    assert "mse: its input was not observed" in note.text
    inside = model(
        "t = Constant<value_int = 1>() c = Cast<to = 9>(t) y = If(c) <then_branch = p () => "
        "(float[20, 48] u) { r = Relu(x) u = MatMul(r, m) }, else_branch = q () => "
        "(float[20, 48] v) { v = MatMul(x, m) }>", ROWS, OUT,
    )  # fmt: skip
    notes = QuantizeWeights(range="importance", samples=uneven(inside, 1))(inside)
    assert "not observed" in notes[0].text
    zeros = model(*CASES["MatMul"])
    samples = open_samples({"x": np.zeros((3, 20, 32), np.float32)}, zeros)
    (note,) = QuantizeWeights(range="importance", samples=samples)(zeros)
    assert "not observed" in note.text


def test_importance_needs_samples() -> None:
    with pytest.raises(DataError, match="give --data"):
        QuantizeWeights(range="importance")(model(*CASES["MatMul"]))


def test_sums_of_squares_are_those_of_numpy() -> None:
    before = model("y = Relu(x)", "float[1, 8, 6, 6] x", FOUR)
    samples = uneven(before, 1)
    for name, axis in (("x", 1), ("x", 3), ("y", 1)):
        seen = calibrate(before, {name: Squares(axis)}, samples)[name]
        values = np.concatenate([f["x"] for f in samples]).astype(np.float64)
        values = np.maximum(values, 0) if name == "y" else values
        others = tuple(a for a in range(4) if a != axis)
        assert isinstance(seen, SumOfSquares)
        assert seen.count == 8
        np.testing.assert_allclose(seen.sums, np.square(values).sum(others), rtol=1e-5)


def test_sums_merge_exactly() -> None:
    rng = np.random.default_rng(1)
    parts = [
        SumOfSquares.of(rng.normal(size=(50, 7)) * 10.0 ** rng.integers(-6, 9), 1)
        for _ in range(20)
    ]
    forwards, backwards = parts[0], parts[-1]
    for part in parts[1:]:
        forwards = forwards.merge(part)
    for part in reversed(parts[:-1]):
        backwards = part.merge(backwards)
    assert forwards == backwards
    assert (forwards.sums == backwards.sums).all()
    np.testing.assert_allclose(forwards.sums, sum(p.sums for p in parts), rtol=1e-12)
    x = rng.normal(size=(50, 7))
    np.testing.assert_allclose(SumOfSquares.of(x, 1).sums, np.square(x).sum(0), rtol=1e-12)
    assert SumOfSquares.of(np.array([[np.inf, 1.0]]), 1).has_nonfinite
    with pytest.raises(ValueError, match="3 sums beside 7"):
        SumOfSquares.of(np.ones((2, 3)), 1).merge(parts[0])
