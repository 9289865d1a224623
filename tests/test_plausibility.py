"""Warnings about samples: each is given where it is due, and not given where it would be wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import parser

from onnxq import optimize
from onnxq.cli import main
from onnxq.data import open_samples
from onnxq.front import front
from onnxq.model import Model
from onnxq.plausibility import doubts, first, found, look
from onnxq.synthetic import synthetic_samples

MODELS = Path(__file__).parent.parent / "models"
HEAD = '<ir_version: 8, opset_import: ["": 17]>'
RNG = np.random.default_rng(0)


def model(inputs: str, body: str, inits: str = "") -> Model:
    text = f"{HEAD} g ({inputs}) => (float[a, b, c, d] y) {inits} {{ {body} }}"
    return Model.from_proto(parser.parse_model(text))


def warnings(wanted: Model, *arrays: Any, name: str = "x") -> list[str]:
    return list(found(wanted, [{name: np.asarray(array)} for array in arrays]))


IMAGE = "float[N, 3, H, W] x"
UNIT = RNG.random((2, 1, 3, 12, 12), np.float32)  # two images of 0..1
PIXELS = np.rint(UNIT * 255)
LAST = [u.transpose(0, 2, 3, 1) for u in UNIT]
# An edge filter and a mean of each channel, four output channels of 3 x 3.
WEIGHT = (
    "<float[4, 3, 3, 3] w = {"
    + ", ".join(["0.3, -0.1, 0.2, 0.1, -0.4, 0.2, -0.2, 0.1, 0.3"] * 12)
    + "}"
)
CONV, SMALL = WEIGHT + ">", "<float[4, 3, 3, 3] w = {" + ", ".join(["0.001"] * 108) + "}>"


def numbers(name: str, *values: float) -> str:
    return f"float[{len(values)}] {name} = {{{', '.join(map(str, values))}}}"


def statistics(mean: float, var: float) -> str:
    rows = (("g", 1.0), ("b", 0.0), ("m", mean), ("v", var))
    return ", ".join(numbers(name, *[value] * 4) for name, value in rows)


BN = "c = Conv(x, w) y = BatchNormalization(c, g, b, m, v)"
PER_CHANNEL = "<float[1, 3, 1, 1] k = {123.7, 116.3, 103.5}"
SCALES = [
    pytest.param("y = Conv(x, w)", CONV, PIXELS, "nothing in the graph scales them down", id="pixels"),
    pytest.param("y = Conv(x, w)", CONV, UNIT, None, id="unit"),
    pytest.param("y = Conv(x, w)", CONV, PIXELS - 120, None, id="centred-pixels"),
    pytest.param("y = Conv(x, w)", SMALL, PIXELS, None, id="weights-for-pixels"),
    pytest.param("c = Conv(x, w) y = InstanceNormalization(c, g, b)", f"{WEIGHT}, {statistics(0, 1)}>", PIXELS, None, id="instance-norm"),
    pytest.param("p = Pad(x, s) y = Conv(p, w)", WEIGHT + ", int64[8] s = {0, 0, 0, 0, 0, 0, 0, 0}>", PIXELS, None, id="not-followed"),
    pytest.param(BN, f"{WEIGHT}, {statistics(0, 0.05)}>", PIXELS, "spread .* times as far behind the first Conv", id="bn-pixels"),
    pytest.param(BN, f"{WEIGHT}, {statistics(0, 0.05)}>", UNIT, None, id="bn-unit"),
    pytest.param(BN, f"{WEIGHT}, {statistics(0, 3000)}>", PIXELS, None, id="bn-of-pixels"),
    pytest.param(BN, f"{WEIGHT}, {statistics(0, 3000)}>", UNIT, "spread 0.* times as far behind the first Conv", id="bn-of-pixels-unit"),
    pytest.param("d = Div(x, k) y = Conv(d, w)", f"{WEIGHT}, float k = {{255}}>", UNIT, "takes 0 off and divides by 255: feed pixels", id="div-unit"),
    pytest.param("d = Div(x, k) y = Conv(d, w)", f"{WEIGHT}, float k = {{255}}>", PIXELS, None, id="div-pixels"),
    pytest.param("d = Mul(x, k) y = Conv(d, w)", f"{WEIGHT}, float k = {{0.0039}}>", UNIT, "divides by 256", id="mul-unit"),
    pytest.param("d = Sub(x, k) y = Conv(d, w)", f"{PER_CHANNEL}, {WEIGHT[1:]}>", UNIT, "takes 114 off and divides by 1", id="sub-unit"),
    pytest.param("d = Sub(x, k) y = Conv(d, w)", f"{PER_CHANNEL}, {WEIGHT[1:]}>", PIXELS, None, id="sub-pixels"),
    pytest.param("d = Sub(x, k) e = Div(d, j) y = Conv(e, w)", f"{WEIGHT}, float k = {{0.45}}, float j = {{0.22}}>", PIXELS, "takes 0.45 off and divides by 0.22: feed values of 0 to 1", id="norm-pixels"),
    pytest.param("d = Sub(x, k) e = Div(d, j) y = Conv(e, w)", f"{WEIGHT}, float k = {{0.45}}, float j = {{0.22}}>", UNIT, None, id="norm-unit"),
    pytest.param("d = Mul(x, k) e = Sub(d, j) y = Conv(e, w)", f"{WEIGHT}, float k = {{255}}, float j = {{114}}>", UNIT, None, id="scaled-up-first"),
    pytest.param("d = BatchNormalization(x, g, b, m, v) y = Relu(d)", "<" + ", ".join(numbers(n, *[v] * 3) for n, v in (("g", 1.0), ("b", 0.0), ("m", 120.0), ("v", 4000.0))) + ">", UNIT, "takes 120 off and divides by 63.2", id="bn-first"),
    pytest.param("y = Relu(x)", "", PIXELS, None, id="no-layer"),
    pytest.param("d = Add(x, k) y = Conv(d, w)", f"{WEIGHT}, float k = {{-120}}>", UNIT, "takes 120 off", id="add"),
    pytest.param("d = Mul(x, x) y = Conv(d, w)", CONV, PIXELS, None, id="of-itself"),
    pytest.param("d = Transpose<perm = [0, 1, 3, 2]>(x) y = Conv(d, w)", CONV, PIXELS, None, id="other-axes"),
    pytest.param("y = Conv(x, w) z = Relu(x)", CONV, PIXELS, None, id="two-readers"),
    pytest.param("y = Conv(x, w)", CONV, PIXELS[..., :2], None, id="smaller-than-the-filter"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "inits", "arrays", "text"), SCALES)
def test_values_of_another_scale(body: str, inits: str, arrays: Any, text: str | None) -> None:
    said = warnings(model(IMAGE, body, inits), *arrays)
    if text is None:
        assert said == []
    else:
        (warning,) = said
        assert re.search(text, warning), warning


def test_a_forgotten_mean_and_deviation() -> None:
    imagenet = model(IMAGE, BN, f"{WEIGHT}, {statistics(0, 1.6)}>")
    assert "spread 0.3 times as far" in warnings(imagenet, *UNIT)[0]
    assert warnings(imagenet, *((UNIT - 0.45) / 0.3)) == []
    assert warnings(imagenet, *((UNIT - 0.45) / 0.8)) == []  # little contrast, but not 0..1
    assert warnings(imagenet, *UNIT * 0.89) == []  # not all of 0..1 is used


def test_large_samples_are_not_all_kept() -> None:
    large = model("float[N, T] x", "y = Relu(x)")
    row = np.zeros((1, 10_000_000), np.float32)
    assert len(first(open_samples([{"x": row}] * 8, large))) == 2
    assert len(first(open_samples([{"x": row[:, :9]}] * 20, large))) == 16


def test_one_channel_is_not_judged_by_its_first_layer() -> None:
    grey = model("float[N, 1, H, W] x", "y = Conv(x, w)", "<float[1, 1, 1, 2] w = {1, -2}>")
    assert warnings(grey, *PIXELS[:, :, :1]) == []


def test_channels_on_the_wrong_axis() -> None:
    first = model(IMAGE.replace("3", "C"), "y = Conv(x, w)", CONV)
    (warning,) = warnings(first, *LAST)
    assert warning.endswith(
        "[1, 12, 12, 3], but the first layer takes 3 channels first: "
        "transpose the samples by (0, 3, 1, 2)"
    )
    last = model(
        IMAGE.replace("3", "C"), "t = Transpose<perm = [0, 3, 1, 2]>(x) y = Conv(t, w)", CONV
    )
    assert warnings(last, *LAST) == []
    assert "channels last: transpose the samples by (0, 2, 3, 1)" in warnings(last, *UNIT)[0]


def test_fixed_shapes_say_that_channels_are_last() -> None:
    fixed = model("float[N, 3, 12, 12] x", "y = Conv(x, w)", CONV)
    with pytest.raises(Exception, match=r"its channels are last: transpose it by \(0, 3, 1, 2\)"):
        list(open_samples([{"x": LAST[0]}], fixed))


TABLE = model(
    "int64[N, T] x", "c = Cast<to = 6>(x) y = Gather(t, c)",
    "<float[5, 2] t = {0,1,2,3,4,5,6,7,8,9}>",
)  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        pytest.param([[0, 4, 2]], None, id="inside"),
        pytest.param([[0, 5, 2]], "has the id 5, its table has rows 0 to 4", id="above"),
        pytest.param([[0, -1, 2]], "has the id -1", id="below"),
    ],
)
def test_ids_outside_their_table(ids: Any, text: str | None) -> None:
    said = warnings(TABLE, np.array(ids))
    assert (not said) if text is None else text in said[0]


def test_samples_that_are_alike() -> None:
    relu = model(IMAGE, "y = Relu(x)")
    zeros, ones = np.zeros_like(UNIT[0]), np.ones_like(UNIT[0])
    assert "2 of 2 samples looked at are all zero" in warnings(relu, zeros, zeros)[0]
    assert "2 of 3 samples looked at are of one value" in warnings(relu, ones, ones * 2, UNIT[0])[0]
    assert "the 3 samples looked at are all the same" in warnings(relu, *[UNIT[0]] * 3)[0]
    assert warnings(relu, zeros, *UNIT) == []  # one black image among others
    assert warnings(relu, UNIT[0]) == []


def test_a_state_or_a_rate_may_be_constant() -> None:
    stream = model("float[1, 4] x, float[2, 3] state, int64 rate", "y = Relu(x)")
    feeds = [
        {"x": RNG.random((1, 4)), "state": np.zeros((2, 3)), "rate": np.array(8000)}
        for _ in range(3)
    ]
    assert list(found(stream, feeds)) == []
    step = model("int64[1] x", "y = Identity(x)")
    assert warnings(step, [3], [3]) == []  # a single value a sample says nothing


@pytest.mark.parametrize("name", ["digits_cnn", "digits_mobilenet", "lang_lstm", "char_gpt"])
def test_the_models_own_samples_are_not_doubted(name: str) -> None:
    loaded = Model.load(MODELS / f"{name}.onnx")
    assert doubts(loaded, open_samples(MODELS / f"{name}.calib.npz", loaded)) == ()


def test_synthetic_samples_are_not_doubted() -> None:
    wrong = model("float[N, 4] x", "z = Mul(x, k) y = Relu(z)", "<float k = {0}>")
    assert doubts(wrong, synthetic_samples(wrong, 4)) == ()


def test_what_is_seen() -> None:
    arrays = [np.array([[1.0, 2.0]]), np.array([[3.0, 6.0]]), np.zeros((2, 0))]
    (seen,) = look([{"x": a} for a in arrays])
    assert (seen.lo, seen.hi, seen.mean, seen.std) == (1.0, 6.0, 3.0, float(np.std([1, 2, 3, 6])))
    assert seen.shapes == ((1, 2), (2, 0))
    (nothing,) = look([{"x": np.zeros((2, 0))}])
    assert np.isnan(nothing.mean)


def test_front_of_constant_minus_x() -> None:
    inverted = model(IMAGE, "d = Sub(k, x) y = Conv(d, w)", f"{WEIGHT}, float k = {{255}}>")
    seen = front(inverted.graph.inputs[0])
    assert (seen.centre, seen.unit, seen.channels) == (255, 1, 3)


def test_warnings_are_in_the_report_and_the_preview(tmp_path: Path) -> None:
    path, data = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn.calib.npz"
    with np.load(data) as arrays:
        pixels = np.rint((arrays["image"][:12] * 0.3081 + 0.1307) * 255)
    report = optimize(path, data={"image": pixels}, recipe="int8", validate=False)
    assert "feed" not in report.warnings[0]
    assert "scale the samples as in training" in report.warnings[0]
    np.savez(tmp_path / "a.npz", image=pixels)
    args = ["optimize", path, tmp_path / "out.onnx", "--data", tmp_path / "a.npz", "--dry-run"]
    done = CliRunner().invoke(main, [*map(str, args), "--json", "-"])
    shown = json.loads(done.stdout)
    assert shown["warnings"] == list(report.warnings)
    assert shown["inputs"][0]["hi"] == 255
    assert shown["inputs"][0]["mean"] > 10
