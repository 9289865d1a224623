"""Without data: distributions from BatchNormalizations, ranges and bias corrections from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import parser

from onnxq import optimize, runtime
from onnxq.data import open_samples
from onnxq.model import Model, values_of
from onnxq.numerics.metrics import sqnr_db
from onnxq.packed import remembered
from onnxq.passes import CorrectBias, QuantizeStatic, absorb_bias, cleanup, fold_batchnorm
from onnxq.passes.data_free import expected
from onnxq.passes.moments import DERIVED, GUESSED, KNOWN, moments
from onnxq.sampling import NO_SAMPLES
from onnxq.schemes import QParams
from onnxq.targets import load_target

CPU = load_target("ort-cpu")
BLOCK = (
    "a = Conv<pads=[1,1,1,1]>(x, w, b) n = BatchNormalization(a, g, e, m, s) r = Relu(n)"
    " c = Conv<pads=[1,1,1,1]>(r, v) o = BatchNormalization(c, g2, e2, m2, s2) {tail}"
)


def trained(
    tail: str, *, more: dict[str, NDArray[Any]] | None = None, rows: int = 2000
) -> onnx.ModelProto:
    """Two convolutions whose BatchNormalizations hold the statistics of N(0, 1) inputs."""
    rng = np.random.default_rng(11)
    arrays: dict[str, NDArray[Any]] = {
        "w": rng.normal(size=(32, 3, 3, 3)) / 5, "b": rng.normal(size=32),
        "g": np.exp(rng.normal(size=32) / 2), "e": rng.normal(size=32),
        "v": rng.normal(size=(32, 32, 3, 3)) / 17, "g2": np.exp(rng.normal(size=32) / 2), "e2": rng.normal(size=32),
        "m": np.zeros(32), "s": np.ones(32), "m2": np.zeros(32), "s2": np.ones(32), **(more or {}),
    }  # fmt: skip
    proto = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[N, 3, 16, 16] x) => (float[p, q, r1, s1] y)'
        f" {{ {BLOCK.format(tail=tail)} }}"
    )
    feed = {"x": rng.normal(size=(16, 3, 16, 16)).astype(np.float32)}
    for mean, variance, tensor in (("m", "s", "a"), ("m2", "s2", "c")):
        fill(proto, arrays)
        probe = onnx.ModelProto()
        probe.CopyFrom(proto)
        probe.graph.output.append(
            onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None)
        )
        seen = runtime.session(probe, optimize="off").run([tensor], feed)[0]
        arrays[mean], arrays[variance] = seen.mean((0, 2, 3)), seen.var((0, 2, 3))
    fill(proto, arrays)
    return proto


def fill(proto: onnx.ModelProto, arrays: dict[str, NDArray[Any]]) -> None:
    del proto.graph.initializer[:]
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))


def run(model: Model | onnx.ModelProto, feed: dict[str, NDArray[Any]]) -> NDArray[Any]:
    proto = model.to_proto() if isinstance(model, Model) else model
    return np.asarray(runtime.session(proto, optimize="off").run(None, feed)[0])


def feed(count: int = 8) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(23)
    return {"x": rng.normal(size=(count, 3, 16, 16)).astype(np.float32)}


TAILS = [
    pytest.param("y = Relu(o)", id="relu"),
    pytest.param("y = LeakyRelu<alpha=0.2>(o)", id="leaky-relu"),
    pytest.param("y = HardSwish(o)", id="hard-swish"),
    pytest.param("h = Sigmoid(o) y = Mul(o, h)", id="silu"),
    pytest.param("h = Relu(o) y = Add(h, r)", id="sum"),
    pytest.param("y = Sub(o, r)", id="difference"),
    pytest.param("y = Concat<axis=1>(o, r)", id="concat"),
    pytest.param("h = Relu(o) y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(h)", id="average"),
    pytest.param("h = Transpose<perm=[0,1,3,2]>(o) i = Clip(h) y = Tanh(i)", id="moved"),
    pytest.param("f = Constant<value_float=0.5>() h = Mul(f, o) y = Relu(h)", id="constant-factor"),
]  # fmt: skip


@pytest.mark.parametrize("tail", TAILS)
def test_distributions_are_those_that_data_show(tail: str) -> None:
    proto = trained(tail)
    model = Model.from_proto(proto).copy()
    cleanup(model)
    model.infer_shapes()
    found = moments(model)[id(model.graph.outputs[0])]
    seen = run(proto, feed(32))
    mean, deviation = seen.mean((0, 2, 3)), seen.std((0, 2, 3))
    slack = 0.1 * deviation.max()
    assert found.trust == KNOWN
    assert found.axis == 1
    np.testing.assert_allclose(found.mean, mean, atol=0.12 * deviation.max())
    assert (found.lo <= seen.min((0, 2, 3)) + slack).all()
    assert (1.3 * found.hi >= seen.max((0, 2, 3)) - slack).all()  # summands are not independent
    whole = expected(model)["y"]
    assert whole.lo <= seen.min() + 2e-3
    assert seen.max() - 2e-3 <= whole.hi < 10 * seen.max()


def test_maxima_are_greater_and_trust_counts_down() -> None:
    proto = trained("h = MaxPool<kernel_shape=[2,2], strides=[2,2]>(o) k = Conv(h, z) y = Conv(k, z)",
                    more={"z": np.eye(32)[:, :, None, None]})  # fmt: skip
    model = Model.from_proto(proto).copy()
    cleanup(model)
    model.infer_shapes()
    by_name = {t.name: moments(model).get(id(t)) for n in model.nodes() for t in n.outputs}
    trusts = [by_name[name].trust for name in ("o", "h", "k", "y")]  # type: ignore[union-attr]
    assert trusts == [KNOWN, KNOWN, DERIVED, GUESSED]
    assert (by_name["h"].mean > by_name["o"].mean).all()  # type: ignore[union-attr]
    np.testing.assert_allclose(by_name["k"].mean, by_name["h"].mean, rtol=1e-6)  # type: ignore[union-attr]
    assert "y" not in expected(model)


def test_folding_keeps_what_was_known_of_inputs_too() -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 2, 4, 4] x) => (float[N, 1, 4, 4] y)'
        " <float[2] g = {1.0, 2.0}, float[2] e = {0.0, 1.0}, float[2] m = {3.0, -1.0}, float[2] s = {4.0, 9.0},"
        " float[1, 2, 1, 1] w = {1.0, 1.0}>"
        " { r = Relu(x) n = BatchNormalization(r, g, e, m, s) y = Conv(n, w) }"
    )
    model = Model.from_proto(parser.parse_model(text)).copy()
    fold_batchnorm(model)
    assert {k: [v.tolist() for v in p] for k, p in model.moments.items()} == {
        "r": [[3.0, -1.0], [2.0, 3.0]]
    }


@pytest.mark.parametrize(("mean", "names"), [(1.0, {"x", "a", "y"}), (np.nan, set())])
def test_inputs_that_were_normalized_are_known(mean: float, names: set[str]) -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 2, 4, 4] x) => (float[N, 1, 4, 4] y)'
        " <float[2] g = {1.0, 2.0}, float[2] e = {0.0, 1.0}, float[2] s = {4.0, 9.0}, float[1, 2, 1, 1] w = {1.0, 1.0}>"
        " { n = BatchNormalization(x, g, e, m, s) a = Conv(n, w) y = Relu(a) }"
    )
    proto = parser.parse_model(text)
    means = np.array([mean, -1.0], np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(means, "m"))
    model = Model.from_proto(proto).copy()
    fold_batchnorm(model)
    model.infer_shapes()
    assert set(expected(model)) == names


def test_ranges_without_data_come_near_those_with() -> None:
    proto = trained("h = Conv<pads=[1,1,1,1]>(o, u) i = Relu(o) y = Conv(i, z)",
                    more={"z": np.random.default_rng(1).normal(size=(8, 32, 1, 1)), "u": np.ones((1, 32, 3, 3))})  # fmt: skip
    reference, sqnr = run(proto, feed()), {}
    for how in ("samples", "batchnorm"):
        model = Model.from_proto(proto).copy()
        cleanup(model)
        samples = open_samples({"x": feed(4)["x"]}, model) if how == "samples" else NO_SAMPLES
        notes = QuantizeStatic(
            CPU.with_costs(None) if hasattr(CPU, "with_costs") else CPU, samples, ranges_from=how
        )(model)
        sqnr[how] = sqnr_db(reference, run(model, feed()))
        if how == "batchnorm":
            told = [n.text for n in notes if "BatchNormalization" in n.text]
            assert told[0].startswith("no BatchNormalization tells the range of x")
            assert any(n.changed for n in notes)
    assert sqnr["batchnorm"] > max(sqnr["samples"] - 6, 25)


def test_a_model_without_statistics_stays_float_and_says_so() -> None:
    proto = trained("y = Relu(o)")
    model = Model.from_proto(proto).copy()
    cleanup(model)
    model.moments.clear()  # as exporters leave it that fold by themselves
    notes = QuantizeStatic(CPU, NO_SAMPLES, ranges_from="batchnorm")(model)
    assert not any(n.changed for n in notes)
    assert all("no BatchNormalization" in n.text or "floats are faster" in n.text for n in notes)
    assert not model.nodes("QuantizeLinear")


def test_the_recipe_looks_at_no_sample(tmp_path: Any) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(trained("h = Relu(o) y = Conv(h, z)", more={"z": np.ones((8, 32, 1, 1))}), source)
    report = optimize(source, out, recipe="int8-datafree", validate=False)
    assert not any("synthetic" in warning for warning in report.warnings)
    assert any(n.op_type == "QuantizeLinear" for n in onnx.load(out).graph.node)
    again = tmp_path / "again.onnx"
    optimize(source, again, recipe="int8-datafree", data=feed(16), validate=False)
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_means_come_back_when_biases_are_corrected(granularity: Any) -> None:
    tail = "h = Relu(o) y = Conv(h, z, zb)"
    rng = np.random.default_rng(2)
    proto = trained(tail, more={"z": rng.normal(size=(8, 32, 1, 1)), "zb": rng.normal(size=8)})
    reference = run(proto, feed(16)).mean((0, 2, 3))
    off = []
    for corrects in (False, True):
        model = Model.from_proto(proto).copy()
        cleanup(model)
        corrected = CorrectBias(CPU, weights="int4", granularity=granularity)
        notes = corrected(model)
        assert [n.changed for n in notes] == [False, True, True]
        assert notes[0].text == "no BatchNormalization tells the mean of x"
        last = model.nodes("Conv")[-1]
        assert remembered(last.inputs[1]) is not None
        assert values_of(last.inputs[1]) is not None
        if not corrects:  # the rounded weights with the biases that there were
            clean = Model.from_proto(proto).copy()
            cleanup(clean)
            for one, other in zip(model.nodes("Conv"), clean.nodes("Conv"), strict=True):
                one.inputs[2] = model.constant("old", np.asarray(values_of(other.inputs[2])))
        else:
            assert [n.changed for n in corrected(model)] == [False, False, False]
        off.append(np.abs(run(model, feed(16)).mean((0, 2, 3)) - reference).mean())
    assert off[1] < 0.5 * off[0]


def test_integers_of_a_corrected_layer_are_those_of_the_pass_behind() -> None:
    proto = trained(
        "h = Relu(o) y = Conv(h, z)",
        more={"z": np.random.default_rng(2).normal(size=(8, 32, 1, 1))},
    )
    stored = []
    for corrects in (False, True):
        model = Model.from_proto(proto).copy()
        cleanup(model)
        if corrects:
            CorrectBias(CPU)(model)
        QuantizeStatic(CPU, NO_SAMPLES, ranges_from="batchnorm", layers=("*=int8",))(model)
        kept = [n for n in model.nodes("DequantizeLinear") if n.inputs[0].dtype == np.int8]
        stored.append({n.inputs[0].shape: np.asarray(values_of(n.inputs[0])) for n in kept})
    assert stored[0].keys() == stored[1].keys()
    assert stored[0]
    for shape, integers in stored[0].items():
        np.testing.assert_array_equal(integers, stored[1][shape])


def test_a_product_needs_a_row_to_correct() -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 4] y)'
        " { n = BatchNormalization(x, g, e, m, s) h = Relu(n) a = MatMul(h, w) k = Add(a, row) i = Relu(k) y = MatMul(i, w2) }"
    )
    rng, proto = np.random.default_rng(9), parser.parse_model(text)
    ones = {"g": np.ones(4), "e": np.arange(4), "m": np.zeros(4), "s": np.ones(4)}
    fill(
        proto,
        {**ones, "w": rng.normal(size=(4, 4)), "row": np.zeros(4), "w2": rng.normal(size=(4, 4))},
    )
    model = Model.from_proto(proto)
    notes = CorrectBias(CPU)(model)
    assert [n.text.partition(":")[0] for n in notes if not n.changed] == [
        "a MatMul has no bias, and no row is added behind it"
    ]
    add = model.nodes("Add")[0]
    assert np.abs(np.asarray(values_of(add.inputs[1]))).max() > 0


def high(tail: str, more: dict[str, NDArray[Any]] | None = None) -> Model:
    """Half of the channels never come near 0."""
    lifted = {"e2": np.where(np.arange(32) % 2, 30.0, 0.0), "g2": np.ones(32)}
    model = Model.from_proto(trained(tail, more=lifted | (more or {}))).copy()
    cleanup(model)
    return model


def test_high_biases_go_into_the_layer_behind() -> None:
    more = {"z": np.random.default_rng(4).normal(size=(8, 32, 1, 1)), "zb": np.ones(8)}
    model = high("h = Relu(o) y = Conv(h, z, zb)", more)
    reference = run(model, feed())
    before = expected(model)["h"].hi
    assert [n.text for n in absorb_bias(model) if n.changed] == ["range up to 38 is one up to 11"]
    assert expected(model)["h"].hi < before / 3
    assert sqnr_db(reference, run(model, feed())) > 40
    assert not any(n.changed for n in absorb_bias(model))


STAYS = [
    pytest.param("h = Relu(o) y = Conv<pads=[1,1,1,1]>(h, z)", "pads with zeros, which would stand for what is taken off", id="pads"),
    pytest.param("h = Relu(o) k = Conv(h, z) y = Concat<axis=1>(k, h)", "Concat", id="other-reader"),
    pytest.param("y = Relu(o)", "y is a graph output", id="output"),
    pytest.param("h = Relu(o) k = Conv(h, z) y = Concat<axis=1>(k, o)", "o is also used elsewhere", id="two-readers"),
]  # fmt: skip


@pytest.mark.parametrize(("tail", "reason"), STAYS)
def test_where_high_biases_stay(tail: str, reason: str) -> None:
    model = high(tail, {"z": np.ones((8, 32, 1, 1))})
    notes = absorb_bias(model)
    assert not any(n.changed for n in notes)
    assert any(reason in n.text for n in notes)


def test_high_biases_stay_where_ranges_are_known() -> None:
    model = high("h = Relu(o) y = Conv(h, z)", {"z": np.ones((8, 32, 1, 1))})
    model.ranges["h"] = (QParams(np.array(0.1, np.float32), np.array(0, np.uint8)),)
    notes = absorb_bias(model)
    assert notes[-1].text == "its range is one that the model had before"
    assert not any(n.changed for n in notes)


def test_low_biases_are_not_worth_it() -> None:
    model = high(
        "h = Relu(o) y = Conv(h, z)", {"z": np.ones((8, 32, 1, 1)), "e2": np.full(32, 3.2)}
    )
    notes = absorb_bias(model)
    assert notes[-1].text == "its range would shrink by 2 % only"
    assert not any(n.changed for n in notes)
