"""Targets: facts with sources, inheritance; what is made for a target passes its own check."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import numpy_helper, parser

import onnxq
from onnxq import runtime, targets
from onnxq.cli import main
from onnxq.data import open_samples
from onnxq.errors import BudgetError, RecipeError
from onnxq.lint import conformance
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.ortformat import write_ort
from onnxq.passes import QuantizeStatic, RaiseOpset, SimplifyQdq
from onnxq.schemes import quantize_weight
from onnxq.targets import Target, facts, load_target
from onnxq.validation import compare

MODELS = Path(__file__).parent.parent / "models"
NAMES = targets.names()
PLAIN = (
    "name",
    "description",
    "sources",
    "costs",
    "machines",
    "activation_formats",
    "weight_formats",
)


# Files.


@pytest.mark.parametrize("name", NAMES)
def test_every_fact_has_a_source(name: str) -> None:
    target = load_target(name)
    assert {"activations", "weights", "operators", "opset"} <= set(target.sources)
    for f in fields(Target):
        default = f.default if f.default is not MISSING else None
        if f.name == "halves" and not target.halves:
            continue  # nothing is said
        if f.name not in PLAIN and getattr(target, f.name) != default:
            assert target.source(f.name), f.name
            assert f.name in target.sources, f.name
    assert all(len(text) > 10 for text in target.sources.values())


def test_the_sources_are_those_of_the_issue() -> None:
    wanted = (
        "ort-cpu-avx2 ort-arm64 ort-mobile tensorrt openvino qnn-htp tflite-int8 esp-dl generic"
    )
    assert set(wanted.split()) < set(NAMES)
    assert load_target("ort-cpu-avx2").saturates
    assert not load_target("ort-cpu").saturates


def test_a_file_extends_another(tmp_path: Path) -> None:
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text(
        'extends = "tflite-int8"\ndescription = "mine"\nactivations = { format = "int16" }\n'
        "opset = 21\n[operators]\nConv = { output = 'any' }\n[sources]\nopset = 'a long story'\n"
    )
    second.write_text("extends = 'first.toml'\nnarrow = false\n")
    target = load_target(str(second))
    base = load_target("tflite-int8")
    assert (target.name, target.description, target.opset) == ("second", "mine", 21)
    assert target.activations == replace(base.activations, format="int16")
    assert target.operators["Conv"].output == "any"
    assert target.operators["Softmax"] == base.operators["Softmax"]
    assert target.source("opset") == "a long story"
    assert target.source("weights") == base.source("weights")
    assert not target.narrow


WRONG = [
    pytest.param('extends = "me.toml"', "extends 'me.toml', which is not another target", id="itself"),
    pytest.param('extends = "abacus"', "extends 'abacus'", id="unknown-base"),
    pytest.param('extends = "generic"\ncolour = "red"', "unknown key colour", id="key"),
    pytest.param('extends = "generic"\nbias = "none"', "bias is one of 'int32', 'float', 'either'", id="bias"),
    pytest.param('description = "mine"', "it has no 'activations'", id="little"),
    pytest.param('extends = "generic"\nmax_opset = "a"', "max_opset = 'a' is not int | None", id="type"),
    pytest.param('extends = "generic"\nmachines = 3', "machines = 3 is not tuple[str, ...]", id="list"),
    pytest.param('extends = "generic"\n[operators]\nConv = { attributes = { group = 1 } }', "Conv: attribute group is a list", id="attribute"),
    pytest.param('extends = "generic"\n[operators]\nConv = { fixed = { int8 = [0, 0] } }', "Conv: fixed int8 is a scale above 0", id="fixed"),
    pytest.param('extends = "generic"\n[operators]\nConv = { fixed = { int8 = [1] } }', "Conv: fixed int8 is a scale above 0", id="pair"),
    pytest.param('extends = "generic"\nactivations = { accepts = ["int9"] }', "unknown format int9", id="format"),
    pytest.param('extends = "generic"\n[sources]\nspeed = "a guess at best"', "sources of speed", id="source"),
    pytest.param('extends = "generic"\n[operators]\nConv = { output = "float32" }', "Conv: output is one of", id="output"),
    pytest.param('extends = "generic"\n[operators]\nConv = { colour = 1 }', "colour", id="operator-key"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), WRONG)
def test_wrong_files(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "me.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=re.escape(reason)):
        load_target(str(path))


# Crafted graphs: what a target asks for beyond a plain convolution.

SHAPES = {"w": (8, 8, 3, 3), "v": (8, 8, 1, 1), "b": (8,), "t": (8, 8, 2, 2), "g": (16, 8), "gb": (16,),
          "m": (16, 12), "k": (1, 8, 1, 1), "join": (1, 8, 2, 10)}  # fmt: skip
TAIL = "p = GlobalAveragePool(e) f = Flatten(p) h = Gemm<transB = 1>(f, g, gb)"
CRAFTED = {
    "residual": f"c = Conv(x, w, b) d = Conv(c, v) s = Add(c, d) e = Relu(s) {TAIL} y = MatMul(h, m)",
    "sigmoid-joined": f"c = Conv(x, w, b) s = Sigmoid(c) u = Add(s, s) n = Concat<axis = 2>(s, u) e = Conv(n, v) {TAIL} y = Softmax(h)",
    "sigmoids-joined": f"c = Conv(x, w, b) s = Sigmoid(c) d = Conv(c, v) u = Sigmoid(d) n = Concat<axis = 2>(s, u) e = Conv(n, v) {TAIL} y = Tanh(h)",
    "constant-joined": f"c = Conv(x, w, b) n = Concat<axis = 2>(c, join) e = Conv(n, v) {TAIL} y = Relu(h)",
    "sigmoid-clamped": f"c = Conv(x, w, b) s = Sigmoid(c) r = Relu(s) e = Conv(r, v) {TAIL} y = Identity(h)",
    "softmax-clamped": f"c = Conv(x, w, b) s = Softmax<axis = 1>(c) r = Relu(s) e = Conv(r, v) {TAIL} y = Identity(h)",
    "mean": f"c = Conv(x, w, b) q = ReduceMean<axes = [2, 3]>(c) e = Conv(q, v) {TAIL} y = Identity(h)",
    "swish": f"c = Conv(x, w, b) s = HardSwish(c) d = Conv(s, v) u = HardSigmoid(d) e = Mul(d, u) {TAIL} y = Identity(h)",
    "gate": f"c = Conv(x, w, b) q = GlobalAveragePool(c) r = Conv(q, v, b) s = Sigmoid(r) e = Mul(c, s) {TAIL} y = Identity(h)",
    "pools": f"c = Conv(x, w, b) q = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(c) r = AveragePool<kernel_shape = [2, 2]>(q) e = Conv(r, v) {TAIL} y = Identity(h)",
    "transposed": f"c = Conv(x, w, b) e = ConvTranspose<strides = [2, 2]>(c, t, b) {TAIL} y = Identity(h)",
    "tanh": f"c = Conv(x, w) s = Tanh(c) l = LeakyRelu(s) e = Conv(l, v) {TAIL} y = Identity(h)",
    "moves": f"c = Conv(x, v) s = Transpose<perm = [0, 1, 3, 2]>(c) q, r = Split<axis = 2>(s) u = Sub(q, r) e = Conv(u, v) {TAIL} y = Identity(h)",
    "nothing-quantized-twice": f"c = Conv(x, w, b) r = Relu(c) d = Conv(r, v) u = Conv(r, v) s = Mul(d, k) o = Add(s, u) e = Relu(o) {TAIL} y = Identity(h)",
}  # fmt: skip
# dB that 8 bits (7 where scales are powers of two and whole weights share one) keep of these.
FLOOR = {"esp-dl": 12.0}


def crafted(body: str, opset: int = 17) -> Model:
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> '
        f"g (float[1, 8, 12, 12] x) => (float[a, d] y) {{ {body} }}"
    )
    rng = np.random.default_rng(3)
    used = set(re.findall(r"\w+", body))
    for name, shape in SHAPES.items():
        if name in used:
            values = rng.normal(0, 0.3, shape).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.checker.check_model(proto, full_check=True)
    return Model.from_proto(proto)


def feeds(count: int = 6) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(11)
    return [{"x": rng.normal(0, 1, (1, 8, 12, 12)).astype(np.float32)} for _ in range(count)]


def quantized(before: Model, target: Target) -> Model:
    after = before.copy()
    RaiseOpset(target.opset)(after)
    samples = open_samples(feeds(), before)
    QuantizeStatic(replace(target, costs=None), samples, range="mse")(after)
    SimplifyQdq(target.integer_moves)(after)
    onnx.checker.check_model(after.to_proto(), full_check=True)
    return after


def outputs(model: Model) -> np.ndarray:
    session = runtime.session(model, optimize="all")
    return np.stack([np.asarray(runtime.run(session, feed)["y"]) for feed in feeds()])


@pytest.mark.parametrize("graph", CRAFTED)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_made_for_a_target_passes_its_check(name: str, graph: str) -> None:
    before, target = crafted(CRAFTED[graph]), load_target(name)
    after = quantized(before, target)
    found = conformance(after, target)
    assert found.violations == ()
    assert found.integer_nodes >= 2
    assert sqnr_db(outputs(before), outputs(after)) > FLOOR.get(name, 20.0)


def test_fixed_outputs_are_rescaled_for_what_shares_a_scale() -> None:
    """Sigmoid has (1/256, -128); Concat with something wider needs one scale for all."""
    after = quantized(crafted(CRAFTED["sigmoid-joined"]), load_target("tflite-int8"))
    (sigmoid,) = after.nodes("Sigmoid")
    first = sigmoid.outputs[0].outputs[0]
    assert (float(first.inputs[1].values), int(first.inputs[2].values)) == (1 / 256, -128)
    (concat,) = after.nodes("Concat")
    scales = {float(t.inputs[0].inputs[1].values) for t in concat.inputs}
    assert len(scales) == 1
    assert scales != {1 / 256}
    # Two of the same kind need no rescaling.
    after = quantized(crafted(CRAFTED["sigmoids-joined"]), load_target("tflite-int8"))
    (concat,) = after.nodes("Concat")
    assert {float(t.inputs[0].inputs[1].values) for t in concat.inputs} == {1 / 256}


def test_a_fixed_output_stands_before_a_clamp() -> None:
    body = f"c = Conv(x, w, b) s = Tanh(c) r = Relu(s) e = Conv(r, v) {TAIL} y = Identity(h)"
    after = quantized(crafted(body), load_target("tflite-int8"))
    (tanh,) = after.nodes("Tanh")
    assert [n.op for n in tanh.outputs[0].outputs] == ["QuantizeLinear"]


def test_a_clamp_behind_another_operator_has_no_pair_of_its_own() -> None:
    after = quantized(crafted(CRAFTED["residual"]), load_target("esp-dl"))
    assert {n.inputs[0].inputs[0].op for n in after.nodes("Relu")} == {"Add"}


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_symmetric_weights_leave_the_least_value_out(method: Literal["minmax", "mse"]) -> None:
    w = np.append(np.random.default_rng(1).normal(0, 0.1, 5000), -1.0).astype(np.float32)
    q, _ = quantize_weight(w[None], load_target("tensorrt").weights, 0, method)
    assert q.min() == -127


def test_powers_of_two_never_clip_more() -> None:
    target = load_target("esp-dl")
    loose = replace(target.activations, power_of_two=False)
    for hi in (0.9, 1.0, 127.0, 127.1, 1e-3):
        one, two = loose.params(-hi, hi), target.activations.params(-hi, hi)
        assert np.frexp(two.scale)[0] == 0.5
        assert one.scale <= two.scale < 2 * one.scale
    after = quantized(crafted(CRAFTED["residual"]), target)
    constants = [n.inputs[1].values for n in after.nodes("QuantizeLinear", "DequantizeLinear")]
    assert all((np.frexp(scale)[0] == 0.5).all() for scale in constants)


def test_without_floats_even_very_different_ranges_are_joined() -> None:
    body = f"c = Conv(x, w, b) s = Sigmoid(c) u = Mul(c, k) n = Concat<axis = 2>(s, u) e = Conv(n, v) {TAIL} y = Identity(h)"
    before = crafted(body)
    (mul,) = before.nodes("Mul")
    mul.inputs[1].values = np.full(SHAPES["k"], 1000.0, np.float32)
    joined = {
        name: quantized(before, load_target(name)).nodes("Concat")[0].inputs[0].inputs[0].op
        for name in ("generic", "esp-dl")
    }
    assert joined == {"generic": "Sigmoid", "esp-dl": "DequantizeLinear"}
    assert conformance(quantized(before, load_target("esp-dl")), load_target("esp-dl")).is_clean


def test_biases_stay_within_what_the_accumulator_keeps() -> None:
    before = crafted(CRAFTED["residual"])
    (first, *_) = before.nodes("Conv")
    first.inputs[2].values = np.full(8, 300.0, np.float32)
    target = load_target("esp-dl")
    after = quantized(before, target)
    assert conformance(after, target).violations == ()
    stored = [
        n.inputs[0].values for n in after.nodes("DequantizeLinear") if n.inputs[0].dtype == np.int32
    ]
    assert max(np.abs(b).max() for b in stored) < 2**19


def test_tables_keep_values_that_no_sample_asked_for() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (int64[4] ids) => (float[a, b] y)
              <float[3, 2] table = {0.1, 0.2, 0.3, -0.1, 9.0, -9.0},
               float[2, 2] m = {1.0, 0.5, 0.25, 1.0}>
              { e = Gather(table, ids) y = MatMul(e, m) }"""
    before, target = Model.from_proto(parser.parse_model(text)), load_target("esp-dl")
    samples = open_samples([{"ids": np.array([0, 1, 0, 1])}], before)
    QuantizeStatic(target, samples)(before)
    assert conformance(before, target).violations == ()
    (gather,) = before.nodes("Gather")
    stored = gather.inputs[0].inputs[0].inputs
    table = stored[0].values * stored[1].values
    np.testing.assert_allclose(table[2], [9.0, -9.0], atol=0.07)


def test_float_biases_stay_as_they_are() -> None:
    before = crafted(CRAFTED["residual"])
    after = quantized(before, load_target("tensorrt"))
    assert {n.inputs[2].name for n in after.nodes("Conv") if len(n.inputs) > 2} == {"b"}


def test_sixteen_bits_need_opset_21() -> None:
    before, target = crafted(CRAFTED["residual"]), load_target("qnn-htp-u16")
    notes = QuantizeStatic(target, open_samples(feeds(), before))(before)
    assert {n.text for n in notes} == {"opset 17 has no uint16: opset 21 is needed"}
    after = quantized(before, target)
    assert after.opset == 21
    assert {str(n.outputs[0].dtype) for n in after.nodes("QuantizeLinear")} == {"uint16"}


def test_eight_bit_moves_stay_in_pairs_for_sixteen_bits(tmp_path: Path) -> None:
    target = replace(load_target("qnn-htp-u16"), integer_moves=True)
    after = quantized(crafted(CRAFTED["pools"]), target)
    (pool,) = after.nodes("MaxPool")
    assert pool.inputs[0].inputs[0].op == "DequantizeLinear"


# The models of this repository.

REFUSED = {("esp-dl", "char_gpt"), ("esp-dl", "lang_lstm")}
MODEL_FLOOR = {"esp-dl": 25.0}


@pytest.mark.parametrize("model", sorted(MODELS.glob("*.onnx")), ids=lambda p: p.stem)
@pytest.mark.parametrize("name", NAMES)
def test_optimized_models_pass_the_check(name: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    with np.load(model.with_suffix(".calib.npz")) as archive:
        data = {key: values[:24] for key, values in archive.items()}
    if (name, model.stem) in REFUSED:
        with pytest.raises(BudgetError, match=f"{name} computes nothing in floats"):
            onnxq.optimize(model, out, data=data, target=name, recipe="int8", validate=False)
        assert not out.exists()
        return
    report = onnxq.optimize(model, out, data=data, target=name, recipe="int8", validate=False)
    assert report.warnings == ()
    assert onnxq.check(out, target=name).violations == ()
    samples = open_samples(str(model.with_suffix(".eval.npz")), Model.load(model)).take(16)
    assert compare(model, out, samples).sqnr_db > MODEL_FLOOR.get(name, 30.0)


def test_a_target_without_floats_writes_only_on_request(tmp_path: Path) -> None:
    model, out = MODELS / "lang_lstm.onnx", tmp_path / "out.onnx"
    data = str(model.with_suffix(".calib.npz"))
    report = onnxq.optimize(
        model, out, data=data, recipe="int8", target="esp-dl", validate=False, allow_unchanged=True
    )
    assert out.exists()
    assert report.warnings == (
        "the result breaks rules of esp-dl (floats): onnxq check says where",
    )


def test_other_machines_are_not_timed(tmp_path: Path) -> None:
    model = MODELS / "digits_cnn.onnx"
    data = str(model.with_suffix(".calib.npz"))
    assert onnxq.optimize(model, data=data, target="tensorrt").latency is None


MOVED_INT8 = """<ir_version: 10, opset_import: ["": 21]> g (float[8, 8] x) => (float[4, 16] y)
<float s = {0.1}, int8 z = {5}, int64[2] shape = {4, 16}>
{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) r = Reshape(d, shape) y = Sigmoid(r) }
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="a bug of onnxruntime on x86")
def test_int8_that_onnxruntime_stumbles_over_on_x86(tmp_path: Path) -> None:
    proto = parser.parse_model(MOVED_INT8)
    with pytest.raises(Exception, match="INT8 does not match"):
        ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert runtime.needs_int8_allowed(proto)
    (y,) = runtime.session(proto).run(None, {"x": np.ones((8, 8), np.float32)})
    assert y == pytest.approx(1 / (1 + np.exp(-1)), abs=1e-6)
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    report = onnxq.optimize(path, recipe="cleanup")
    assert any("session.qdqisint8allowed is 1" in warning for warning in report.warnings)
    plain = onnxq.optimize(path, recipe="cleanup", validate=False)
    assert plain.warnings == ()


# The .ort file.


def test_ort_files(tmp_path: Path) -> None:
    model, out = MODELS / "digits_cnn.onnx", tmp_path / "small.onnx"
    data = str(model.with_suffix(".calib.npz"))
    report = onnxq.optimize(
        model, out, data=data, target="ort-mobile", recipe="int8", validate=False
    )
    beside = [tmp_path / "small.ort", tmp_path / "small.required_operators.config"]
    assert sorted(tmp_path.iterdir()) == sorted([out, *beside])  # nothing else is left
    assert report.also_written == tuple(map(str, beside))
    one, two = (
        ort.InferenceSession(p, providers=["CPUExecutionProvider"]) for p in (out, beside[0])
    )
    with np.load(model.with_suffix(".eval.npz")) as archive:
        images = archive["image"][:32]
    a, b = (np.stack([s.run(None, {"image": i[None]})[0] for i in images]) for s in (one, two))
    assert sqnr_db(a, b) > 60
    config = beside[1].read_text()
    assert "com.microsoft;1;QLinearAdd,QLinearConv" in config
    assert "/tmp" not in config
    write_ort(out)  # over what is there; onnxruntime's bytes differ from run to run
    assert beside[1].read_text() == config
    assert sorted(tmp_path.iterdir()) == sorted([out, *beside])


def test_ort_files_need_an_onnx_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"name it \*\.onnx"):
        onnxq.optimize(MODELS / "digits_cnn.onnx", tmp_path / "small.bin", target="ort-mobile")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(
        onnxq.ModelError, match=r"onnxruntime cannot convert .*broken\.onnx to \.ort"
    ):
        write_ort(broken)
    assert list(tmp_path.iterdir()) == [broken]


# The command.


def test_the_command_lists_and_describes() -> None:
    run = CliRunner().invoke
    listed = run(main, ["targets"])
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in NAMES)
    shown = run(main, ["targets", "tflite-int8"])
    assert "output has scale 0.0078125, zero point 0" in shown.stdout
    assert "quantization_spec" in shown.stdout
    told = json.loads(run(main, ["targets", "esp-dl", "--json", "-"]).stdout)
    assert told["facts"]["bias_bits"] == "20"
    assert told["operators"]["Softmax"] == "returns floats"
    assert run(main, ["targets", "abacus"]).exit_code == 2
    assert isinstance(facts.targets(), facts.TargetList)


def test_options_of_a_target_reach_the_passes(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "qnn-htp-u16"\nstatic_shapes = false\n')
    model = MODELS / "digits_mobilenet.onnx"
    out = tmp_path / "out.onnx"
    options: dict[str, Any] = dict(
        data=str(model.with_suffix(".calib.npz")), recipe="int8", validate=False
    )
    report = onnxq.optimize(model, out, target=str(path), **options)
    assert report.opset[1] == 21
    assert onnxq.check(out, target=str(path)).is_clean
    assert not onnxq.check(out, target="tensorrt").is_clean
