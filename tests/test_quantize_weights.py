"""quantize_weights: a quarter of the bytes, float kernels after load, small errors."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.demands import why_not
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.passes import QuantizeWeights
from onnxq.passes.encodings import evened
from onnxq.passes.layouts import WEIGHTS, held_by
from onnxq.schemes import quantize_weight
from onnxq.synthetic import synthetic_samples

SHAPES = {
    "w": (16, 8, 3, 3), "wt": (8, 16, 3, 3), "m": (32, 48), "mt": (48, 32), "mt2": (48, 32), "left": (24, 32),
    "table": (40, 32), "lw": (1, 64, 32), "lr": (1, 64, 16), "gw": (1, 48, 32), "gr": (1, 48, 16),
    "rw": (1, 16, 32), "rr": (1, 16, 16), "b": (48,), "bn": (16,), "row": (32,),
}  # fmt: skip
IMAGE, ROWS = "float[1, 8, 6, 6] x", "float[32, 32] x"
SEQUENCE, STATES = "float[5, 1, 32] x", "float[a, b, c, d] y"
CASES = {
    "Conv": ("c = Conv(x, w) f = Flatten(c) k = Constant<value_ints = [-1, 32]>() r = Reshape(f, k) y = MatMul(r, m)", IMAGE, "float[a, b] y"),
    "ConvTranspose": ("c = ConvTranspose(x, wt) f = Flatten(c) k = Constant<value_ints = [-1, 32]>() r = Reshape(f, k) y = MatMul(r, m)", IMAGE, "float[a, b] y"),
    "Gemm": ("y = Gemm(x, m, b)", ROWS, "float[a, b] y"),
    "Gemm-transposed": ("y = Gemm<transB = 1>(x, mt, b)", ROWS, "float[a, b] y"),
    "MatMul": ("y = MatMul(x, m)", ROWS, "float[a, b] y"),
    "MatMul-left": ("y = MatMul(left, x)", ROWS, "float[a, b] y"),
    "Gather": ("y = Gather(table, x)", "int64[1, 7] x", "float[a, b, c] y"),
    "LSTM": ("y = LSTM<hidden_size = 16>(x, lw, lr)", SEQUENCE, STATES),
    "GRU": ("y = GRU<hidden_size = 16>(x, gw, gr)", SEQUENCE, STATES),
    "RNN": ("y = RNN<hidden_size = 16>(x, rw, rr)", SEQUENCE, STATES),
    "body": (
        "t = Constant<value_int = 1>() c = Cast<to = 9>(t) y = If(c) <then_branch = p () => (float[32, 48] u) "
        "{ u = MatMul(x, m) }, else_branch = q () => (float[32, 48] v) { h = MatMul(x, m) v = Neg(h) }>", ROWS, "float[a, b] y",
    ),
}  # fmt: skip


def model(
    body: str, inputs: str, outputs: str, dtype: type = np.float32, *, opset: int = 17
) -> Model:
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    rng = np.random.default_rng(2)
    for name, shape in SHAPES.items():
        if f"{name}," in body or f"{name})" in body:
            value: np.ndarray = rng.normal(0, 0.2, shape)
            proto.graph.initializer.append(numpy_helper.from_array(value.astype(dtype), name))
    return Model.from_proto(proto)


def outputs(model: Model) -> np.ndarray:
    session = runtime.session(model)
    return np.stack([session.run(None, f)[0] for f in synthetic_samples(model, 3)])


@pytest.mark.parametrize("name", CASES)
def test_every_operator(name: str, tmp_path: Path) -> None:
    before = model(*CASES[name])
    after = before.copy()
    notes = QuantizeWeights()(after)
    assert all(note.changed for note in notes)
    proto = after.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ByteSize() < 0.55 * before.to_proto().ByteSize()
    assert (
        sqnr_db(outputs(before), outputs(after)) > 38
    )  # 8 bits give 40 to 45 dB on normal weights
    assert not [n for n in QuantizeWeights()(after) if n.changed]
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = Model.load(tmp_path / "o.onnx").nodes("Mul", "DequantizeLinear")
    assert left == []  # unpacked when the model was loaded


@pytest.mark.parametrize("name", CASES)
def test_a_result_is_known_again(name: str) -> None:
    result, floats = model(*CASES[name]), model(*CASES[name])
    assert "too small" in why_not([], floats)
    QuantizeWeights()(result)
    assert "already quantized (" in why_not([], result)
    assert "of stored weights)" in why_not([], result)


def test_the_table_has_a_test_for_each_row() -> None:
    assert set(WEIGHTS) <= set(CASES)


def test_tied_weights_are_stored_once() -> None:
    after = model("a = MatMul(x, m) h = MatMul(x, m) y = Add(a, h)", ROWS, "float[a, b] y")
    QuantizeWeights()(after)
    kinds = [t.data_type for t in after.to_proto().graph.initializer]
    assert kinds.count(onnx.TensorProto.INT8) == 1


def test_float16_stays_float16() -> None:
    after = model("y = MatMul(x, m)", "float16[32, 32] x", "float16[a, b] y", np.float16)
    assert [n.changed for n in QuantizeWeights()(after)] == [True]
    onnx.checker.check_model(after.to_proto(), full_check=True)


def test_scales_that_float16_cannot_hold() -> None:
    """They are float32: half of what is near float16's least value would be lost, or all of it."""
    after = model("y = MatMul(x, m)", "float16[32, 32] x", "float16[a, b] y", np.float16)
    (weight,) = [n.inputs[1] for n in after.nodes("MatMul")]
    weight.values = np.full((32, 48), 1e-6, np.float16)
    before = after.copy()
    assert [n.changed for n in QuantizeWeights()(after)] == [True]
    x = np.full((32, 32), 1000, np.float16)
    exact, found = (runtime.session(m).run(None, {"x": x})[0] for m in (before, after))
    np.testing.assert_array_equal(found, exact)


def test_what_is_left_alone() -> None:
    small = model("y = MatMul(x, m)", ROWS, "float[a, b] y")
    assert not QuantizeWeights(smallest=10_000)(small)
    broken = model("y = MatMul(x, m)", ROWS, "float[a, b] y")
    (weight,) = [n.inputs[1] for n in broken.nodes("MatMul")]
    weight.values = np.full((32, 48), np.nan, np.float32)
    assert "NaN" in QuantizeWeights()(broken)[0].text


FORMS = [
    pytest.param({"format": "int8"}, id="int8"),
    pytest.param({"format": "uint8", "symmetric": False}, id="uint8"),
    pytest.param({"format": "int16"}, id="int16"),
    pytest.param({"format": "int4", "granularity": "group", "group_size": 16}, id="int4-group"),
    pytest.param(
        {"format": "uint4", "symmetric": False, "granularity": "group", "group_size": 19},
        id="uint4-short-group",
    ),
    pytest.param({"format": "int4", "granularity": "tensor"}, id="int4-tensor"),
    pytest.param(
        {"format": "uint2", "symmetric": False, "granularity": "group", "group_size": 16},
        id="uint2-group",
    ),
    pytest.param({"format": "int2"}, id="int2-channel"),
    pytest.param({"format": "float8e4m3fn"}, id="e4m3"),
    pytest.param({"format": "float8e5m2", "granularity": "group"}, id="e5m2-group"),
    pytest.param({"format": "int8", "levels": 63, "range": "mse"}, id="levels"),
    pytest.param({"format": "int4", "rounding": "stochastic", "seed": 3}, id="stochastic"),
]  # fmt: skip
UNPACKING = ("Cast", "Sub", "Mul", "Slice", "DequantizeLinear")


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_formats_are_unpacked_at_load_and_exact(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """ONNX Runtime folds all of it, and computes what the integers and scales say."""
    pass_ = QuantizeWeights(**options)
    before = model(*CASES[name])
    before.raise_opset(max(17, pass_.opset))
    after = before.copy()
    assert all(note.changed for note in pass_(after))
    assert any(options["format"] in str(t.dtype).replace("_", "") for t in constants(after))
    proto = after.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert optimized(proto, tmp_path, *UNPACKING) == []
    expected = before.copy()
    for node in expected.nodes(*WEIGHTS):
        for held in held_by(node):
            weight = node.inputs[held.index]
            if not isinstance(weight, gs.Constant) or prod(held.shape) < 512:
                continue
            scheme = evened(pass_.plan.scheme(node, held, None), held)
            method, seed = pass_.range, pass_.seed
            rows = held.rows(weight.values)
            if pass_.rounding == "stochastic":
                continue
            q, params = quantize_weight(rows, scheme, None, method, seed=seed)
            shape = [held.shape[a] for a in held.order]
            back = params.dequantize(q).reshape(shape).transpose(np.argsort(held.order))
            node.inputs[held.index] = expected.constant("back", np.ascontiguousarray(back))
    if pass_.rounding == "even":
        np.testing.assert_array_equal(outputs(after), outputs(expected))
    assert not [n for n in pass_(after) if n.changed]


def constants(model: Model) -> list[gs.Constant]:
    found = [t for g in model.graphs() for t in g.tensors().values()]
    return [t for t in found if isinstance(t, gs.Constant)]


def optimized(proto: onnx.ModelProto, folder: Path, *ops: str) -> list[str]:
    """What is left of some operators when ONNX Runtime has loaded the model."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op for node in Model.load(folder / "optimized.onnx").nodes(*ops)]


def test_groups_that_fill_a_channel_are_channels() -> None:
    after = model("y = MatMul(x, m)", ROWS, "float[a, b] y")
    (note,) = QuantizeWeights(granularity="group", group_size=64)(after)
    assert "per channel" in note.text
    assert not after.nodes("Reshape")


def test_a_short_last_group_is_evened_out() -> None:
    """72 values in groups of 32: three of 24, instead of two and one that is mostly filler."""
    after = model("y = Conv(x, w)", IMAGE, "float[a, b, c, d] y")
    (note,) = QuantizeWeights(granularity="group")(after)
    assert "in groups of 24" in note.text
    assert [t.shape for t in constants(after) if str(t.dtype) == "int8"] == [(16, 3, 24, 1)]


def test_scales_are_per_channel() -> None:
    before = model("y = Gather(table, x)", "int64[1, 7] x", "float[a, b, c] y")
    (gather,) = before.nodes("Gather")
    gather.inputs[0].values = np.outer(np.geomspace(1, 1e4, 40), np.ones(32)).astype(np.float32)
    QuantizeWeights()(before)
    (mul,) = before.nodes("Mul")
    assert mul.inputs[1].shape == (40, 1)


def test_batch_normalisation_still_folds(tmp_path: Path) -> None:
    """A DequantizeLinear would keep ONNX Runtime from folding it into the convolution."""
    after = model(
        "c = Conv(x, w) y = BatchNormalization(c, bn, bn, bn, bn)", IMAGE, "float[a, b, c, d] y"
    )
    after.raise_opset(21)
    for node in after.nodes("BatchNormalization"):
        node.inputs[1].values = np.full(16, 0.5, np.float32)  # the variance must not be negative
    assert [n.changed for n in QuantizeWeights("int4", "group", 16)(after)] == [True]
    assert optimized(after.to_proto(), tmp_path, "BatchNormalization", *UNPACKING) == []


def test_a_transposed_reader_takes_the_unpacked_weight(tmp_path: Path) -> None:
    """Tied weights: what goes through Transpose is not stored a second time, in floats."""
    body = "e = Gather(table, x) t = Transpose<perm = [1, 0]>(table) y = MatMul(e, t)"
    after = model(body, "int64[1, 7] x", "float[a, b, c] y")
    QuantizeWeights()(after)
    assert [str(t.dtype) for t in constants(after) if len(t.shape) == 2 and t.shape[1] > 1] == [
        "int8"
    ]
    assert optimized(after.to_proto(), tmp_path, *UNPACKING, "Transpose") == []


def test_recurrent_state_keeps_eight_bits() -> None:
    after = model(*CASES["LSTM"])
    after.raise_opset(21)
    notes = QuantizeWeights("int4", "group", 16)(after)
    assert ["int4" in notes[0].text, "int8" in notes[1].text] == [True, True]
    asked = model(*CASES["LSTM"])
    asked.raise_opset(21)
    notes = QuantizeWeights("int4", "group", 16, layers=("op:LSTM=int4",))(asked)
    assert all("int4" in note.text for note in notes)


DECLINES = [
    pytest.param({"format": "int4"}, 17, "opset 17 has no int4", id="opset-4"),
    pytest.param({"format": "int2"}, 21, "opset 25 has", id="opset-2"),
    pytest.param({"format": "float8e5m2"}, 17, "opset 19 has", id="opset-float8"),
    pytest.param({"granularity": "group", "group_size": 1}, 17, "save nothing", id="no-smaller"),
    pytest.param({"layers": ("op:MatMul=float",)}, 17, "asked for by the override", id="layer"),
]


@pytest.mark.parametrize(("options", "opset", "reason"), DECLINES)
def test_declines(options: dict[str, Any], opset: int, reason: str) -> None:
    before = model("y = MatMul(x, m)", ROWS, "float[a, b] y")
    before.raise_opset(opset)
    (note,) = QuantizeWeights(**options)(before)
    assert not note.changed
    assert reason in note.text
    assert [str(t.dtype) for t in constants(before)] == ["float32"]


WRONG = [
    pytest.param(
        {"format": "float4e2m1"},
        "'float4e2m1': .* use one of int8, uint8, int16, uint16, int4",
        id="unknown",
    ),
    pytest.param({"format": "int32"}, "cannot run weights in it", id="int32"),
    pytest.param({"format": "float8e5m2", "symmetric": False}, "no zero point", id="zero-point"),
    pytest.param({"format": "int4", "levels": 17}, "2 to 16 levels", id="levels"),
    pytest.param({"granularity": "group", "group_size": 0}, "at least 1, not 0", id="group"),
    pytest.param({"group_size": -1}, "group_size is at least 1, not -1", id="no-group"),
    pytest.param({"smallest": 0}, "smallest is at least 1, not 0", id="smallest"),
    pytest.param({"seed": -1}, "seed is at least 0", id="seed"),
    pytest.param({"recurrent_group": -1}, "recurrent_group is at least 0", id="recurrent"),
    pytest.param({"wide_share": 1.5}, "wide_share is from 0 to 1, not 1.5", id="share"),
    pytest.param({"wide_share": float("nan")}, "wide_share is from 0 to 1", id="NaN"),
]


@pytest.mark.parametrize(("options", "reason"), WRONG)
def test_wrong_options(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        QuantizeWeights(**options)


def test_layers_of_other_formats() -> None:
    after = model("h = MatMul(x, m) y = Gemm(h, mt2, row)", ROWS, "float[a, b] y")
    after.raise_opset(21)
    notes = QuantizeWeights("int4", "group", 16, symmetric=True, layers=("last=int8",))(after)
    assert "int4 in groups of 16" in notes[0].text
    assert "int8 per channel" in notes[1].text


def test_recurrent_weights_share_scales_in_groups() -> None:
    """Errors go round: fewer values a scale lose less. 0 asks for a channel's scales."""
    before = model(*CASES["LSTM"])
    db = []
    for group in (16, 0, 4):
        after = before.copy()
        QuantizeWeights(encoding="storage", recurrent_group=group)(after)
        db.append(sqnr_db(outputs(before), outputs(after)))
    by_16, by_channel, by_4 = db
    assert by_4 > by_16
    assert by_4 > by_channel + 3


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("form", ["int8", "uint8"])
def test_balanced_rounding_of_convolutions(granularity: Any, form: str) -> None:
    """No sum over a scale's values is off by more than half a step; to the nearest many are."""
    before, kinds = model("y = Conv(x, w)", IMAGE, "float[a, b, c, d] y"), {}
    weight = before.nodes("Conv")[0].inputs[1].values
    for rounding in ("even", "balanced"):
        after = before.copy()
        QuantizeWeights(form, granularity, rounding=rounding, symmetric=form == "int8")(after)
        (conv,) = after.nodes("Conv")
        (unpacked,) = runtime.session(fetching(after, conv.inputs[1])).run(None, feed(after))[-1:]
        (scale,) = (t.values.reshape(-1, 1) for t in constants(after) if "_scale" in t.name)
        error = (unpacked - weight).reshape(max(16, len(scale)), -1) / scale
        assert np.abs(error).max() < 1.01
        kinds[rounding] = np.abs(error.sum(1))
    assert kinds["balanced"].max() < 0.51
    assert kinds["even"].max() > 1


def fetching(model: Model, tensor: gs.Tensor) -> Model:
    model.graph.outputs.append(tensor)
    return model


def feed(model: Model) -> dict[str, np.ndarray]:
    return dict(next(iter(synthetic_samples(model, 1))))


def test_products_and_floats_are_not_balanced() -> None:
    """Balancing is for sums over neighbours that are alike, and moves by steps of one size."""
    for case, form in (("MatMul", "int8"), ("Gemm", "uint8"), ("Conv", "float8e4m3fn")):
        plain = model(*CASES[case])
        plain.raise_opset(21)
        other = plain.copy()
        layers = ("op:MatMul=float",) if case == "Conv" else ()
        QuantizeWeights(form, layers=layers)(plain)
        QuantizeWeights(form, rounding="balanced", layers=layers)(other)
        assert plain.to_proto() == other.to_proto()


TWO = "c = Conv(x, w) f = Flatten(c) k = Constant<value_ints = [-1, 32]>() r = Reshape(f, k) y = MatMul(r, m)"


def test_the_smallest_weights_have_16_bits() -> None:
    """w has 1152 of 2688 values (43 %), m the rest: w alone fits into a half."""

    def widened(share: float, form: str = "int8", **options: Any) -> list[str]:
        after = model(TWO, IMAGE, "float[a, b] y")
        after.raise_opset(21)
        notes = QuantizeWeights(form, wide_share=share, **options)(after)
        return [note.text.split()[2] for note in notes if note.changed]

    assert widened(0.0) == widened(0.42) == ["int8", "int8"]
    assert widened(0.5) == ["int16", "int8"]
    assert widened(1.0) == ["int16", "int16"]
    assert widened(0.5, "uint8", symmetric=False) == ["uint16", "uint8"]
    assert widened(0.5, "int4") == ["int4", "int4"]  # asked for
    assert widened(0.5, "int16") == ["int16", "int16"]  # nothing is wider
    assert widened(0.5, levels=63) == ["int8", "int8"]
    assert widened(0.5, layers=("op:Conv=int8",)) == ["int8", "int8"]
    assert widened(0.5, layers=("op:Conv=int4",)) == ["int4", "int8"]


def test_16_bits_lose_less() -> None:
    before, db = model(TWO, IMAGE, "float[a, b] y"), []
    for share in (0.0, 0.5):
        after = before.copy()
        QuantizeWeights(wide_share=share)(after)
        onnx.checker.check_model(after.to_proto(), full_check=True)
        db.append(sqnr_db(outputs(before), outputs(after)))
    assert db[1] > db[0] + 2, db


def test_twice_the_bits_have_to_save_something() -> None:
    """16 bits and scales are more than a float16 weight."""
    after = model("y = MatMul(x, m)", "float16[32, 32] x", "float16[a, b] y", np.float16)
    (note,) = QuantizeWeights(wide_share=1.0)(after)
    assert "int8" in note.text
