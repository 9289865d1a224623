"""Empirical correction of biases behind quantize_static: results, forms of biases, declines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.core import Note
from onnxq.data import Samples, open_samples
from onnxq.model import Model, producer
from onnxq.numerics.metrics import sqnr_db
from onnxq.passes import CorrectBias, QuantizeStatic, cleanup
from onnxq.sampling import NO_SAMPLES
from onnxq.synthetic import synthetic_samples
from onnxq.targets import Target, load_target

CPU = replace(load_target("ort-cpu"), costs=None)
ANY = replace(load_target("generic"), costs=None)
HEAD = """<ir_version: 8, opset_import: ["": {opset}]>
    g (float[N, 8, 12, 12] x) => (float[a, b, c, d] y)"""
DEEP = (
    "a = Conv<pads=[1,1,1,1]>(x, w0, b0) r = Relu(a)"
    " p = Conv<pads=[1,1,1,1]>(r, w1{bias}) s = Relu(p)"
    " t = ConvTranspose<group = 2>(s, wt{bias_t}) y = Conv(t, w2, b2)"
)


def built(body: str, opset: int = 17) -> onnx.ModelProto:
    """One weight a layer is so large that one scale for all of them is coarse: means move."""
    proto = parser.parse_model(f"{HEAD.format(opset=opset)} {{ {body} }}")
    rng = np.random.default_rng(5)
    shapes = {
        "w0": (16, 8, 3, 3), "w1": (16, 16, 3, 3), "wt": (16, 4, 2, 2), "w2": (6, 8, 1, 1),
        "b0": (16,), "b1": (16,), "bt": (8,), "b2": (6,),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = rng.normal(0.01, 0.1, shape).astype(np.float32)
        if len(shape) > 1:
            values.flat[0] = 6
        if name in {i for node in proto.graph.node for i in node.input}:
            proto.graph.initializer.append(numpy_helper.from_array(values, name))
    return proto


def data(proto: onnx.ModelProto, n: int = 32) -> Samples:
    x = np.random.default_rng(6).normal(1.0, 1.0, (n, 8, 12, 12)).astype(np.float32)
    return open_samples({"x": x}, Model.from_proto(proto))


def distance(proto: onnx.ModelProto, model: Model) -> float:
    """In dB, on samples that nothing else has seen."""
    x = np.random.default_rng(7).normal(1.0, 1.0, (16, 8, 12, 12)).astype(np.float32)
    one, two = (runtime.session(m).run(None, {"x": x})[0] for m in (proto, model.to_proto()))
    return sqnr_db(one, two)


def run(
    proto: onnx.ModelProto, granularity: Any = "tensor", target: Target = ANY, **options: Any
) -> tuple[Model, Model, list[Note]]:
    """The model before and behind correct_bias, and its notes."""
    model, samples = Model.from_proto(proto).copy(), data(proto)
    QuantizeStatic(target, samples, granularity=granularity, **options)(model)
    before = model.copy()
    bias = options.get("bias", "auto")
    return before, model, list(CorrectBias(target, samples=samples, bias=bias)(model))


@pytest.mark.parametrize("opset", [13, 17, 18])
@pytest.mark.parametrize("bias", ["int32", "float"])
@pytest.mark.parametrize("given", [True, False], ids=["with", "without"])
def test_results_come_closer(opset: int, bias: Any, given: bool) -> None:
    body = DEEP.format(bias=", b1" if given else "", bias_t=", bt" if given else "")
    proto = built(body, opset)
    before, after, notes = run(proto, bias=bias)
    assert distance(proto, after) > distance(proto, before) + 1
    assert [n.text for n in notes if not n.changed] == []
    assert all("dB on held-out samples" in n.text for n in notes)
    layers = after.nodes("Conv", "ConvTranspose")
    sources = [producer(n.inputs[2]) for n in layers]
    integers = [s is not None and s.inputs[0].dtype == np.int32 for s in sources]
    assert integers == [*[bias == "int32"] * 3, False]  # the last one computes in floats
    onnx.checker.check_model(after.to_proto(), full_check=True)


def test_integers_stay_on_the_accumulators_scale() -> None:
    _, after, _ = run(built(DEEP.format(bias="", bias_t="")))
    for node in after.nodes("Conv", "ConvTranspose")[:3]:
        x, w, b = (producer(t) for t in node.inputs)
        assert x is not None
        assert w is not None
        assert b is not None
        scale = x.inputs[1].values * w.inputs[1].values
        repeats = node.attrs.get("group", 1) if node.op == "ConvTranspose" else 1
        np.testing.assert_allclose(b.inputs[1].values, np.tile(scale, repeats), rtol=1e-6)
    _, after, _ = run(built(DEEP.format(bias="", bias_t="")), target=CPU)
    ops = runtime_ops(after)
    assert "QLinearConv" in ops
    assert "FusedConv" not in ops


def runtime_ops(model: Model) -> set[str]:
    import onnxruntime as ort

    from onnxq.leftovers import temporary_folder

    with temporary_folder() as folder:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(folder / "o.onnx")
        options.log_severity_level = 4
        ort.InferenceSession(model.to_proto().SerializeToString(), options)
        return {n.op_type for n in onnx.load(folder / "o.onnx").graph.node}


def test_it_is_deterministic_and_sees_errors_behind_clamps() -> None:
    proto = built(DEEP.format(bias=", b1", bias_t=", bt"))
    one, two = (run(proto)[1].to_proto() for _ in range(2))
    assert one == two


def test_what_does_not_help_is_left_alone() -> None:
    proto = built("y = Conv(x, w0, b0)")
    for tensor in proto.graph.initializer:  # on the grid: there is nothing to correct
        values = np.sign(numpy_helper.to_array(tensor)) / np.float32(8)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    before, after, notes = run(proto, granularity="channel")
    assert [n.changed for n in notes] == [False]
    assert notes[0].text.endswith("biases left as they were")
    assert after.to_proto() == before.to_proto()


@pytest.mark.parametrize("samples", [NO_SAMPLES, None, "synthetic"])
def test_without_real_samples_nothing_is_done(samples: Any) -> None:
    proto = built(DEEP.format(bias="", bias_t=""))
    model = Model.from_proto(proto).copy()
    QuantizeStatic(CPU, data(proto), granularity="tensor")(model)
    before = model.to_proto()
    given = synthetic_samples(model, 8) if samples == "synthetic" else samples
    (note,) = CorrectBias(CPU, samples=given)(model)
    assert "give --data" in note.text
    assert model.to_proto() == before


MATMUL = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 5, 32] x) => (float[N, 5, 32] y) {
    m = MatMul(x, w) %s }"""


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        ("s = Sigmoid(m) y = Mul(m, s)", "a MatMul has no bias"),
        ("y = Add(m, b)", None),
    ],
)
def test_rows_behind_a_product(tail: str, reason: str | None) -> None:
    proto = parser.parse_model(MATMUL % tail)
    rng = np.random.default_rng(8)
    arrays: dict[str, NDArray[Any]] = {
        "w": rng.normal(0.02, 0.1, (32, 32)),
        "b": rng.normal(size=32),
    }
    for name, values in arrays.items():
        if name in {i for node in proto.graph.node for i in node.input}:
            proto.graph.initializer.append(numpy_helper.from_array(values.astype("f4"), name))
    x = rng.gamma(1.0, 1.0, (32, 5, 32)).astype(np.float32)
    model = Model.from_proto(proto).copy()
    samples = open_samples({"x": x}, model)
    QuantizeStatic(CPU, samples, granularity="tensor", layers=("Add=float",))(model)
    before = runtime.session(model).run(None, {"x": x})[0]
    notes = CorrectBias(CPU, samples=samples)(model)
    exact = runtime.session(proto).run(None, {"x": x})[0]
    after = runtime.session(model).run(None, {"x": x})[0]
    if reason is not None:
        assert reason in notes[0].text
        np.testing.assert_array_equal(before, after)
    else:
        assert notes[0].changed
        assert sqnr_db(exact, after) > sqnr_db(exact, before) + 1


def test_an_uncleaned_model_and_its_bodies_go_into_one_graph() -> None:
    """A body of If reads an initializer of the main graph, which both models have."""
    proto = built(DEEP.format(bias=", b1", bias_t=", bt").replace(
        "y = Conv(t, w2, b2)",
        "k = Conv(t, w2, b2) m = ReduceMax<keepdims = 0>(x) z = Greater(m, one) "
        "y = If(z)<then_branch = th () => (float[a, b, c, d] u) { u = Mul(k, one) }, "
        "else_branch = el () => (float[a, b, c, d] v) { v = Add(k, one) }>",
    ))  # fmt: skip
    proto.graph.initializer.append(numpy_helper.from_array(np.array(1.5, np.float32), "one"))
    before, after, notes = run(proto)
    assert any(n.changed for n in notes)
    assert distance(proto, after) > distance(proto, before)


def test_before_quantization_it_stays_analytic() -> None:
    proto = built("y = Conv(x, w0, b0)")
    model = Model.from_proto(proto).copy()
    cleanup(model)
    (note,) = CorrectBias(CPU, samples=data(proto))(model)
    assert "BatchNormalization" in note.text


def test_where_nothing_was_quantized_nothing_is_corrected() -> None:
    proto = built(DEEP.format(bias="", bias_t=""))
    model, samples = Model.from_proto(proto).copy(), data(proto)
    QuantizeStatic(ANY, samples, layers=("*=float",))(model)
    (note,) = CorrectBias(ANY, samples=samples)(model)
    assert note.text == "nothing is quantized"
    assert not note.changed


def test_without_float_results_nothing_tells_whether_it_helps() -> None:
    proto = built(DEEP.format(bias=", b1", bias_t=", bt") + " i = ArgMax<axis = 1>(y)")
    proto.graph.output[0].CopyFrom(
        onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, None)
    )
    before, after, notes = run(proto)
    assert [n.text for n in notes] == [
        "no output is float: none tells whether corrected biases help"
    ]
    assert before.to_proto() == after.to_proto()


def test_an_output_that_is_infinite_elsewhere_leaves_the_others_a_say() -> None:
    """Its distance is -inf dB, before and after: that is no gain, and hides none."""
    proto = built(DEEP.format(bias=", b1", bias_t=", bt") + " u = Relu(y) v = Log(u)")
    proto.graph.output.append(
        onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, [None] * 4)
    )
    _, _, notes = run(proto)
    assert notes[-1].changed
    assert "inf" not in notes[-1].text


def test_outputs_of_16_bits_are_judged() -> None:
    proto = built(DEEP.format(bias=", b1", bias_t=", bt") + " h = Cast<to = 10>(y)")
    proto.graph.output[0].CopyFrom(
        onnx.helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT16, [None] * 4)
    )
    before, after, notes = run(proto)
    assert notes[-1].changed
    assert distance(proto, after) > distance(proto, before) + 1
