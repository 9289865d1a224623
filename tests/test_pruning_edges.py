"""Pruning where models and samples are unusual: found by trying to break it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.data import Samples, open_samples
from onnxq.model import Model, values_of
from onnxq.numerics.channel_pruning import Aim, Fitting
from onnxq.passes import PruneWeights, SparsifyStorage
from onnxq.passes.bitmaps import restored

ROWS, OUT = "float[20, 32] x", "float[20, 48] y"


def made(body: str, inputs: str = ROWS, outputs: str = OUT, **shapes: tuple[int, ...]) -> Model:
    """A model of opset 17 with random weights of these shapes."""
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    rng = np.random.default_rng(3)
    for name, shape in shapes.items():
        values = rng.normal(0, 0.2, shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    return Model.from_proto(proto)


def drawn(model: Model, count: int = 16) -> Samples:
    rng = np.random.default_rng(4)
    shape = model.graph.inputs[0].shape
    draws = rng.standard_normal((count, *shape), dtype=np.float32)
    return open_samples([{"x": draw} for draw in draws], model)


def test_a_layer_in_a_body_may_read_the_main_graph() -> None:
    before = made(
        "t = Constant<value_int = 1>() c = Cast<to = 9>(t) h = MatMul(x, k) y = If(c) "
        "<then_branch = p () => (float[20, 48] u) { u = MatMul(h, m) }, else_branch = q () => "
        "(float[20, 48] v) { e = Neg(h) v = MatMul(e, m2) }>",
        k=(32, 32), m=(32, 48), m2=(32, 48),
    )  # fmt: skip
    samples = drawn(before)
    after = before.copy()
    notes = PruneWeights(samples=samples, criterion="obs")(after)
    assert [("within" in n.text, "in a body" in n.text) for n in notes if n.changed] == [
        (False, True), (True, False), (True, False),
    ]  # fmt: skip
    runtime.session(after).run(None, next(iter(samples)))


def test_a_weight_that_is_an_output_stays() -> None:
    before = made(
        "h = MatMul(x, m) y = MatMul(h, k)", outputs="float[20, 48] y, float[32, 48] m",
        m=(32, 48), k=(48, 48),
    )  # fmt: skip
    after = before.copy()
    notes = PruneWeights()(after)
    assert [n.text for n in notes if not n.changed] == ["its weight is an output of the model, too"]
    assert any(n.changed for n in notes)
    assert [o.name for o in after.to_proto().graph.output] == ["y", "m"]
    feed = next(iter(drawn(before)))
    one, two = (runtime.session(m).run(["m"], feed)[0] for m in (before, after))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e25])
def test_fits_to_values_that_tell_nothing_are_silent(factor: float) -> None:
    x = np.random.default_rng(5).standard_normal((64, 8), dtype=np.float32) * np.float32(factor)
    rows = np.ones((4, 8), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows, bias = Fitting(rows, x, Aim((x @ rows.T).astype(np.float32))).solve(1e-3)
    assert np.isfinite(rows).all() or factor > 1
    assert np.isfinite(bias).all() or factor > 1


@pytest.mark.parametrize("external", [False, True])
def test_bitmaps_that_are_dense_again_are_stored_as_such(tmp_path: Path, *, external: bool) -> None:
    before = made("y = MatMul(x, m)", m=(32, 480), outputs="float[20, 480] y")
    PruneWeights()(before)
    dense = np.asarray(values_of(before.nodes("MatMul")[0].inputs[1]))
    SparsifyStorage(ratio=1.0)(before)
    assert before.nodes("Gather")
    path = tmp_path / "sparse.onnx"
    onnx.save(before.to_proto(), path, save_as_external_data=external, size_threshold=0)
    model = Model.load(path)
    assert restored(model, floats=True)
    model.save(tmp_path / "dense.onnx")
    session = runtime.session(tmp_path / "dense.onnx")
    assert session.run(None, {"x": np.eye(20, 32, dtype=np.float32)})[0].shape == (20, 480)
    found = onnx.load(tmp_path / "dense.onnx")
    np.testing.assert_array_equal(numpy_helper.to_array(found.graph.initializer[0]), dense)
    again = SparsifyStorage(ratio=1.0)(model)
    assert [note.changed for note in again] == [True]
