"""Fidelity and latency: figures that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, parser

from onnxq import runtime
from onnxq.data import open_samples
from onnxq.errors import ModelError
from onnxq.model import Model
from onnxq.validation import compare, layer_fidelity


def proto(body: str, outputs: str = "float[N, 4] y") -> ModelProto:
    return parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => ({outputs})'
        f" <float one = {{1.0}}, float tenth = {{1.1}}, float zero = {{0.0}}> {{ {body} }}"
    )


X = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
SAME = proto("h = Mul(x, one) y = Relu(h)")
OFF = proto("h = Mul(x, tenth) y = Relu(h)")


def test_a_tenth_more_is_20_db() -> None:
    samples = open_samples({"x": X, "labels": X.clip(0).argmax(1)}, Model.from_proto(SAME))
    fidelity = compare(SAME, OFF, samples)
    (output,) = fidelity.outputs
    assert fidelity.samples == 10
    assert output.sqnr_db == pytest.approx(20, abs=0.01)
    assert output.cosine == pytest.approx(1)
    assert output.max_abs == pytest.approx(0.1 * X.max(), rel=1e-3)
    assert output.top1_agreement == 1
    assert fidelity.original_accuracy == fidelity.result_accuracy == 1


def test_a_model_equals_itself() -> None:
    fidelity = compare(SAME, SAME, open_samples({"x": X}, Model.from_proto(SAME)))
    assert fidelity.sqnr_db == np.inf
    assert fidelity.original_accuracy is None


def test_what_becomes_infinite_is_seen() -> None:
    broken = proto("h = Div(x, zero) y = Relu(h)")
    fidelity = compare(SAME, broken, open_samples({"x": X}, Model.from_proto(SAME)))
    assert not fidelity.outputs[0].is_finite
    assert fidelity.sqnr_db == -np.inf


def test_layers_of_the_same_name_are_compared() -> None:
    samples = open_samples({"x": X}, Model.from_proto(SAME))
    layers = layer_fidelity(Model.from_proto(SAME), Model.from_proto(OFF), samples)
    assert {(layer.name, layer.op) for layer in layers} == {("h", "Mul"), ("y", "Relu")}
    assert all(layer.sqnr_db == pytest.approx(20, abs=0.01) for layer in layers)


def test_other_outputs_are_refused() -> None:
    samples = open_samples({"x": X}, Model.from_proto(SAME))
    with pytest.raises(ModelError, match="different outputs"):
        compare(SAME, proto("z = Relu(x)", "float[N, 4] z"), samples)
    with pytest.raises(ModelError, match=r"is \[4, 1\] in the result, \[1, 4\] in the original"):
        compare(SAME, proto("y = Transpose(x)", "float[4, N] y"), samples)


def test_labels_of_partial_batches_are_counted_once() -> None:
    fixed = proto("y = Relu(x)")
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    wrong = X.clip(0).argmax(1)
    wrong[-1] = (wrong[-1] + 1) % 4
    samples = open_samples({"x": X, "labels": wrong}, Model.from_proto(fixed))
    fidelity = compare(fixed, fixed, samples)
    assert fidelity.samples == 3
    assert fidelity.result_accuracy == pytest.approx(0.9)


def test_latency_of_a_model_against_itself() -> None:
    timed = runtime.latency(SAME, SAME, {"x": X[:1]}, seconds=0.2)
    assert timed.original_ms > 0
    assert timed.ratio == timed.result_ms / timed.original_ms


def test_a_first_run_that_had_to_wait_does_not_make_readings_shorter() -> None:
    """Readings of different lengths suffer differently from other work on the machine."""
    assert runtime._batch(lambda: None, once=runtime.CHUNK) > 1
    assert runtime._batch(lambda: None, once=2 * runtime.QUICK) == 1  # not run again


def test_what_onnxruntime_refuses_is_one_line() -> None:
    with pytest.raises(ModelError, match="onnxruntime cannot load the model: "):
        runtime.session(b"not a model")
