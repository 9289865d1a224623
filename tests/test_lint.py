"""onnxq check: each kind of violation is found, by node, rule and source, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import parser
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import onnxq
from onnxq.cli import main
from onnxq.lint import conformance
from onnxq.model import Model
from onnxq.report import rendered
from onnxq.targets import load_target

MODELS = Path(__file__).parent.parent / "models"


COUNTED = ", ".join(str(i - 8) for i in range(16))


def proto(
    *,
    form: str = "int8",
    zero: int = 0,
    scale: str = "float s = {0.0625}",
    weight_form: str = "int8",
    weight_zero: int = 0,
    w: str = COUNTED,
    per_channel: int | None = 0,
    bias: str = "bd = DequantizeLinear(b, bs, bz)",
    bias_form: str = "int32",
    bias_scale: float = 0.0625 * 0.03125,
    b: str = "1, 2, 3, 4",
    tail: str = "cq = QuantizeLinear(c, s, z) y = DequantizeLinear(cq, s, z)",
    opset: int = 21,
    shape: str = "1, 4, 8, 8",
) -> onnx.ModelProto:
    """A convolution in Q/DQ form that every target with one zero point takes."""
    n = "[4]" if per_channel is not None else ""
    axis = f"<axis = {per_channel}>" if per_channel is not None else ""
    many = 4 if n else 1
    text = f"""
    <ir_version: 10, opset_import: ["": {opset}, "foreign": 1, "com.microsoft": 1]>
    g (float[{shape}] x) => (float y)
    <{scale}, {form} z = {{{zero}}}, {weight_form}[4, 4, 1, 1] w = {{{w}}},
     float{n} ws = {{{", ".join(["0.03125"] * many)}}},
     {weight_form}{n} wz = {{{", ".join([str(weight_zero)] * many)}}},
     {bias_form}[4] b = {{{b}}}, float bs = {{{bias_scale}}}, {bias_form} bz = {{0}},
     float[4] fb = {{1.0, 2.0, 3.0, 4.0}}>
    {{ xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z)
       wd = DequantizeLinear{axis}(w, ws, wz) {bias} c = Conv(xd, wd, bd) {tail} }}
    """
    made = parser.parse_model(text)
    del made.graph.output[0].type.tensor_type.shape.dim[:]
    made.graph.output[0].type.tensor_type.ClearField("shape")
    return made


FLOAT_BIAS = "bd = Identity(fb)"
UNARY = "cq = QuantizeLinear(c, s, z) cd = DequantizeLinear(cq, s, z) d = {op}(cd)"
JOINED = (
    "cq = QuantizeLinear(c, s, z) cd = DequantizeLinear(cq, s, z) d = Concat<axis = 1>(cd, cd)"
    " o = Constant<value_float = 0.5>() dq = QuantizeLinear(d, o, z) y = DequantizeLinear(dq, o, z)"
)
FIXED = f"{UNARY} dq = QuantizeLinear(d, s, z) y = DequantizeLinear(dq, s, z)"

# What is wrong, for whom, which rule says so, and a part of the text.
WRONG: list[Any] = [
    pytest.param(dict(form="uint8", zero=128), "tensorrt", "activations", "in uint8, not in int8", id="format"),
    pytest.param(dict(form="int16"), "tflite-int8", "activations", "in int16", id="16-bit"),
    pytest.param(dict(zero=3, bias=FLOAT_BIAS), "tensorrt", "activations", "the zero point must be 0", id="asymmetric"),
    pytest.param(dict(bias=FLOAT_BIAS, tail="cq = QuantizeLinear(c, s, z) o = Constant<value = int8 {3}>() y = DequantizeLinear(cq, s, o)"), "tensorrt", "activations", "the zero point must be 0", id="dequantized-otherwise"),
    pytest.param(dict(scale="float s = {0.05}"), "esp-dl", "activations", "a power of two", id="power-of-two"),
    pytest.param(dict(scale="float[4] s = {0.1, 0.1, 0.2, 0.2}", form="int8[4]", zero="0, 0, 0, 0"), "ort-cpu", "activations", "one scale a tensor", id="per-channel-activation"),
    pytest.param(dict(weight_zero=1), "tflite-int8", "weights", "the zero point must be 0", id="weight-zero-point"),
    pytest.param(dict(weight_form="uint8", w=", ".join(["1"] * 16)), "tflite-int8", "weights", "weights of Conv in uint8", id="weight-format"),
    pytest.param(dict(per_channel=0), "esp-dl", "weights", "must have one scale", id="per-channel"),
    pytest.param(dict(per_channel=1), "tflite-int8", "weights", "lie along axis 1, not 0", id="axis"),
    pytest.param(dict(w="-128" + ", 1" * 15), "tflite-int8", "narrow", "a weight is -128", id="narrow"),
    pytest.param(dict(), "tensorrt", "bias", "it must be float", id="int32-bias"),
    pytest.param(dict(bias=FLOAT_BIAS), "tflite-int8", "bias", "is not int32", id="float-bias"),
    pytest.param(dict(bias_form="int8"), "tflite-int8", "bias", "a bias in int8", id="bias-format"),
    pytest.param(dict(bias_scale=0.5), "tflite-int8", "bias", "input times weight", id="bias-scale"),
    pytest.param(dict(b="1, 2, 3, 600000", per_channel=None), "esp-dl", "bias_bits", "20 bits", id="bias-bits"),
    pytest.param(dict(tail=JOINED), "tflite-int8", "shared", "the same scale", id="shared"),
    pytest.param(dict(tail=FIXED.format(op="Sigmoid")), "tflite-int8", "fixed", "scale 0.00390625 and zero point -128", id="sigmoid"),
    pytest.param(dict(tail=FIXED.format(op="Tanh")), "tflite-int8", "fixed", "scale 0.0078125 and zero point 0", id="tanh"),
    pytest.param(dict(tail=FIXED.format(op="Softmax")), "tflite-int8", "fixed", "zero point -128", id="softmax"),
    pytest.param(dict(tail="y = Erf(c)", per_channel=None), "esp-dl", "floats", "no integer Erf", id="floats"),
    pytest.param(dict(tail="y = foreign.Thing(c)"), "generic", "domains", "does not know domain 'foreign'", id="domain"),
    pytest.param(dict(tail="y = Thing(c)"), "generic", "domains", "no such operator", id="operator"),
    pytest.param(dict(opset=26), "tensorrt", "max_opset", "opset 26", id="opset"),
    pytest.param(dict(tail="cq = QuantizeLinear(c, s, z) m = MaxPool<kernel_shape = [2, 2]>(cq) y = DequantizeLinear(m, s, z)"), "tensorrt", "integer_moves", "needs a Q/DQ pair", id="bare-move"),
    pytest.param(dict(tail="k = Cast<to = 1>(w) u = Mul(k, s) y = Conv(c, u)"), "tensorrt", "stored_weights", "does not compute that at load", id="stored"),
    pytest.param(dict(tail="k = Constant<value = uint8[4, 4, 1, 1] {1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0}>() j = Cast<to = 6>(k) e = Constant<value = float[4] {0.1, 0.2, 0.3, 0.4}>() u = Gather(e, j) y = Conv(c, u)"), "tensorrt", "stored_weights", "unpacked by Gather", id="codebook"),
    pytest.param(dict(tail="k = Constant<value = float16[4, 4, 1, 1] {1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0}>() u = Cast<to = 1>(k) y = Conv(c, u)"), "tensorrt", "stored_weights", "unpacked by Cast", id="stored-halves"),
    pytest.param(dict(tail="h = Cast<to = 10>(c) r = Relu(h) y = Cast<to = 1>(r)"), "tflite-int8", "halves", "has no float16", id="halves"),
    pytest.param(dict(tail="cq = QuantizeLinear(c, s, z) q = QLinearConv(cq, s, z, w, ws, wz, s, z) y = DequantizeLinear(q, s, z)"), "tensorrt", "integer_operators", "does not read QLinearConv", id="qoperator"),
    pytest.param(dict(weight_zero=1, tail="cq = QuantizeLinear(c, s, z) q = QLinearConv(cq, s, z, w, ws, wz, s, z) y = DequantizeLinear(q, s, z)"), "ort-cpu", "weights", "zero point must be 0", id="qoperator-weight"),
]  # fmt: skip


@pytest.mark.parametrize(("graph", "target", "rule", "text"), WRONG)
def test_finds_each_violation(graph: dict[str, Any], target: str, rule: str, text: str) -> None:
    aim = load_target(target)
    found = conformance(Model.from_proto(proto(**graph)), aim).violations
    hits = [f for f in found if f.rule == rule and text in f.text]
    assert hits, found
    assert hits[0].source
    assert hits[0].source in {*aim.sources.values(), *(r.source for r in aim.operators.values())}
    assert rule == "max_opset" or hits[0].node


GOOD = [
    pytest.param(dict(), "generic", id="generic"),
    pytest.param(dict(), "ort-arm64", id="ort-arm64"),
    pytest.param(dict(), "tflite-int8", id="tflite"),
    pytest.param(dict(bias=FLOAT_BIAS), "tensorrt", id="tensorrt"),
    pytest.param(dict(bias=FLOAT_BIAS), "openvino", id="openvino-float-bias"),
    pytest.param(dict(form="uint8", zero=100), "openvino", id="openvino"),
    pytest.param(dict(form="uint16", zero=100), "qnn-htp", id="qnn-16-bit"),
    pytest.param(dict(form="uint8", zero=100, weight_form="uint8", weight_zero=7, w=", ".join(["1"] * 16)), "ort-cpu", id="u8u8"),
    pytest.param(dict(per_channel=None), "esp-dl", id="esp-dl"),
    pytest.param(dict(tail="r = Relu(c) rq = QuantizeLinear(r, s, z) y = DequantizeLinear(rq, s, z)"), "tflite-int8", id="clamp"),
    pytest.param(dict(tail="r = Relu(c) rq = QuantizeLinear(r, s, z) y = DequantizeLinear(rq, s, z)", per_channel=None), "esp-dl", id="clamp-without-floats"),
]  # fmt: skip


@pytest.mark.parametrize(("graph", "target"), GOOD)
def test_finds_nothing_wrong_with_what_is_right(graph: dict[str, Any], target: str) -> None:
    found = conformance(Model.from_proto(proto(**graph)), load_target(target))
    assert found.violations == ()
    assert found.integer_nodes >= 1


FLOATS = [
    pytest.param(dict(tail="y = Erf(c)"), "Erf", "no integer Erf", id="no-kernel"),
    pytest.param(dict(tail="y = Relu(c)"), "Conv", "its result is not quantized", id="float-output"),
    pytest.param(dict(tail="cq = QuantizeLinear(c, s, z) y = Add(c, x)"), "Add", "input 0 is not", id="input"),
    pytest.param(dict(tail='o = Constant<value_floats = [1.0, 1.0, 2.0, 2.0]>() cq = QuantizeLinear(c, s, z) cd = DequantizeLinear(cq, s, z) r = Resize<mode = "cubic">(cd, , o) rq = QuantizeLinear(r, s, z) y = DequantizeLinear(rq, s, z)'), "Resize", "mode is cubic", id="attribute"),
]  # fmt: skip


@pytest.mark.parametrize(("graph", "op", "text"), FLOATS)
def test_what_falls_back_is_no_violation(graph: dict[str, Any], op: str, text: str) -> None:
    found = conformance(Model.from_proto(proto(**graph)), load_target("generic"))
    assert found.violations == ()
    assert [f for f in found.fallbacks if f.op == op and text in f.text]


def test_weights_that_are_unpacked_at_load_compute_nothing() -> None:
    stored = proto(tail="k = Cast<to = 1>(w) u = Mul(k, s) y = Conv(c, u)")
    found = conformance(Model.from_proto(stored), load_target("generic"))
    assert [f.op for f in found.fallbacks] == ["Conv", "Conv"]
    assert found.is_clean


def test_16_bit_floats_are_no_violation_where_they_are_computed() -> None:
    halves = proto(bias=FLOAT_BIAS, tail="h = Cast<to = 10>(c) r = Relu(h) y = Cast<to = 1>(r)")
    assert conformance(Model.from_proto(halves), load_target("tensorrt")).is_clean


@pytest.mark.parametrize("target", ["ort-cpu", "openvino", "qnn-htp", "tensorrt", "tflite-int8"])
@pytest.mark.parametrize("recipe", ["float16", "codebook-weights"])
def test_what_a_recipe_refuses_for_a_target_is_a_violation_there(
    recipe: str, target: str, tmp_path: Path
) -> None:
    onnxq.optimize(MODELS / "digits_cnn.onnx", tmp_path / "m.onnx", recipe=recipe, validate=False)
    found = onnxq.check(tmp_path / "m.onnx", target=target)
    assert found.is_clean == load_target(target).stored_weights
    assert {f.rule for f in found.violations} <= {"stored_weights"}


def test_free_dimensions_keep_a_model_off_the_htp() -> None:
    free = proto(form="uint8", zero=100, shape="N, 4, 8, 8")
    found = conformance(Model.from_proto(free), load_target("qnn-htp"))
    assert found.is_clean
    assert "free dimensions" in found.fallbacks[0].text


def test_a_float_model_breaks_nothing_but_runs_in_floats() -> None:
    found = onnxq.check(MODELS / "digits_cnn.onnx", target="openvino")
    assert found.is_clean
    assert found.integer_nodes == 0
    assert {f.op for f in found.fallbacks} >= {"Conv", "Gemm"}
    assert not onnxq.check(MODELS / "digits_cnn.onnx", target="esp-dl").is_clean


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        with np.load(MODELS / "digits_cnn.calib.npz") as archive:
            self.images = iter(archive["image"][:4])

    def get_next(self) -> dict[str, Any] | None:
        image = next(self.images, None)
        return None if image is None else {"image": image[None]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
def test_what_onnxruntime_itself_makes(form: QuantFormat, tmp_path: Path) -> None:
    path = tmp_path / "peer.onnx"
    quantize_static(
        MODELS / "digits_cnn.onnx", path, Reader(), quant_format=form, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    assert onnxq.check(path, target="ort-cpu").violations == ()
    assert onnxq.check(path, target="ort-cpu").integer_nodes >= 10
    rules = {f.rule for f in onnxq.check(path, target="tensorrt").violations}
    assert rules & {"activations", "integer_operators"}


def test_the_command(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    onnx.save(proto(), good)
    onnx.save(proto(zero=3), bad)
    run = CliRunner().invoke
    assert run(main, ["check", str(good), "--target", "tflite-int8"]).exit_code == 0
    done = run(main, ["check", str(bad), "--target", "tensorrt"])
    assert done.exit_code == 1
    assert "the zero point must be 0 [1]" in done.stdout
    assert "[1] github.com/onnx/onnx-tensorrt" in done.stdout
    done = run(main, ["check", str(bad), "--target", "tensorrt", "--json", "-"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["violations"][0]["rule"] == "activations"
    assert run(main, ["check", str(tmp_path / "none.onnx")]).exit_code == 2
    assert run(main, ["check", str(good), "--target", "abacus"]).exit_code == 2


def test_a_long_list_is_cut_for_people() -> None:
    found = onnxq.check(MODELS / "digits_cnn.onnx", target="esp-dl")
    text = rendered(found.print_to)
    assert "more (floats" in text
    assert len(found.violations) > 8
