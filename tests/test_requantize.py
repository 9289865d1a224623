"""--requantize: there and back is the identity; models of other tools; what is said without it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime.quantization as ort_quantization
import pytest
from click.testing import CliRunner
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType

from onnxq import check, inspect, load, optimize, runtime
from onnxq.cli import main
from onnxq.data import open_samples
from onnxq.errors import BudgetError
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.packed import remembered
from onnxq.passes import DequantizeModel
from onnxq.passes.packed_weights import stored_weights
from onnxq.preview import preview
from onnxq.settings import Settings
from onnxq.synthetic import synthetic_samples

MODELS = Path(__file__).parent.parent / "models"
WITH_DATA = ("int8", "a16w8", "a8w4", "int8-hybrid")
QUANTIZED = ("uantize", "Integer", "QLinear", "QGemm", "NBits")

Weights = list[tuple[str, str, bytes, list[bytes]]]


def weights(path: Path) -> Weights:
    """Each quantized weight: operator, format, integers, scales and zero points, all in bytes."""
    return sorted(
        (
            node.op,
            str(stands.numbers.dtype),
            np.asarray(stands.numbers.values).tobytes(),
            [np.asarray(constant.values).tobytes() for constant in stands.beside],
        )
        for node, _, stands in stored_weights(load(path))
        if stands.form != "float"
    )


def activations(path: Path) -> list[tuple[float, int]]:
    """Scale and zero point of each QuantizeLinear."""
    return sorted(
        (float(n.inputs[1].values.flat[0]), int(n.inputs[2].values.flat[0]))
        for n in load(path).nodes("QuantizeLinear")
    )


def outputs(path: Path, name: str, count: int = 3) -> Iterator[Mapping[str, np.ndarray]]:
    session = runtime.session(path)
    for feed in open_samples(MODELS / f"{name}.eval.npz", load(path)).take(count):
        yield runtime.run(session, feed)


def worst(one: Path, two: Path, name: str) -> float:
    pairs = zip(outputs(one, name), outputs(two, name), strict=True)
    return min(sqnr_db(a[k], b[k]) for a, b in pairs for k in a)


def left(path: Path) -> set[str]:
    return {n.op for n in load(path).nodes() if any(part in n.op for part in QUANTIZED)}


TRIPS = [
    *((name, r) for name in ("digits_cnn", "char_gpt") for r in WITH_DATA),
    ("digits_mobilenet", "int8"),
    *((name, "int8-dynamic") for name in ("char_gpt", "lang_lstm")),
    ("char_gpt", "int8-dynamic-rows"),
    *((name, r) for name in ("digits_cnn", "char_gpt", "lang_lstm") for r in ("int8-weights", "int4-weights")),
    ("lang_lstm", "int8-hybrid"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "recipe"), TRIPS)
def test_there_and_back_is_the_identity(name: str, recipe: str, tmp_path: Path) -> None:
    given, again, floats = (tmp_path / f"{n}.onnx" for n in ("given", "again", "floats"))
    data = MODELS / f"{name}.calib.npz" if recipe in WITH_DATA else None
    optimize(MODELS / f"{name}.onnx", given, recipe=recipe, data=data, validate=False)
    optimize(given, floats, recipe="cleanup", requantize=True, validate=False)
    assert not left(floats)
    assert worst(given, floats, name) > 28  # activations are rounded no more
    optimize(given, again, recipe=recipe, requantize=True, validate=False)
    assert weights(given) == weights(again) != []
    assert activations(given) == activations(again)
    for a, b in zip(outputs(given, name), outputs(again, name), strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_new_data_give_new_ranges(tmp_path: Path) -> None:
    given, again, other = (tmp_path / f"{n}.onnx" for n in ("given", "again", "other"))
    source, few = MODELS / "digits_cnn.onnx", tmp_path / "few.npz"
    np.savez(few, image=np.zeros((4, 1, 28, 28), np.float32) + 0.1)
    optimize(source, given, recipe="int8", data=MODELS / "digits_cnn.calib.npz", validate=False)
    shape = list(load(source).graph.inputs[0].shape)[1:]
    np.savez(few, image=np.full((4, *shape), 0.1, np.float32))
    kept = optimize(given, again, recipe="int8", requantize=True, validate=False)
    assert any("keep the ranges" in w for w in kept.warnings)
    report = optimize(given, other, recipe="int8", requantize=True, data=few, validate=False)
    assert not any("keep the ranges" in w for w in report.warnings)
    assert activations(given) == activations(again) != activations(other)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """A few samples, as onnxruntime wants them."""

    def __init__(self, name: str) -> None:
        source = load(MODELS / f"{name}.onnx")
        self.feeds = iter(open_samples(MODELS / f"{name}.calib.npz", source).take(6))

    def get_next(self) -> dict[str, Any] | None:
        feed = next(self.feeds, None)
        return None if feed is None else {key: np.asarray(value) for key, value in feed.items()}


U8, S8, U16 = QuantType.QUInt8, QuantType.QInt8, QuantType.QUInt16
QDQ, QOP = QuantFormat.QDQ, QuantFormat.QOperator
STATIC = {
    "u8s8-channels": {"quant_format": QDQ, "per_channel": True, "activation_type": U8, "weight_type": S8},
    "u8u8": {"quant_format": QDQ, "activation_type": U8, "weight_type": U8},
    "s8s8-reduced": {"quant_format": QDQ, "activation_type": S8, "weight_type": S8, "reduce_range": True},
    "u16s8": {"quant_format": QDQ, "activation_type": U16, "weight_type": S8},
    "float-weights": {"quant_format": QDQ, "activation_type": U8, "weight_type": S8, "extra_options": {"AddQDQPairToWeight": True}},
    "pairs-of-their-own": {"quant_format": QDQ, "activation_type": U8, "weight_type": S8, "extra_options": {"DedicatedQDQPair": True}},
    "operators-u8s8": {"quant_format": QOP, "per_channel": True, "activation_type": U8, "weight_type": S8},
    "operators-u8u8": {"quant_format": QOP, "activation_type": U8, "weight_type": U8},
    "operators-s8s8": {"quant_format": QOP, "activation_type": S8, "weight_type": S8},
}  # fmt: skip


def foreign(name: str, kind: str, path: Path) -> None:
    """A model as onnxruntime quantizes it."""
    source = MODELS / f"{name}.onnx"
    if kind in STATIC:
        ort_quantization.quantize_static(str(source), str(path), Reader(name), **STATIC[kind])
    else:
        ort_quantization.quantize_dynamic(
            str(source), str(path), weight_type=U8 if "u8" in kind else S8
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("digits_cnn", kind) for kind in (*STATIC, "dynamic-u8", "dynamic-s8")),
        *(("char_gpt", kind) for kind in ("u8s8-channels", "operators-u8u8", "dynamic-u8")),
    ],
)
def test_what_onnxruntime_quantized(name: str, kind: str, tmp_path: Path) -> None:
    """The recovered model is at least as near to the float original as the quantized one."""
    source, given, floats, again = (
        MODELS / f"{name}.onnx", *(tmp_path / f"{n}.onnx" for n in ("given", "floats", "again")),
    )  # fmt: skip
    foreign(name, kind, given)
    report = optimize(given, floats, recipe="cleanup", requantize=True, validate=False)
    assert not left(floats)
    assert not any("stay as they are" in w for w in report.warnings)
    assert check(floats).is_clean
    assert worst(source, floats, name) > worst(source, given, name) - 2
    optimize(given, again, recipe="int8-weights", requantize=True, validate=False)
    assert worst(floats, again, name) > 30


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["u8s8-channels", "operators-u8s8"])
def test_integers_of_onnxruntime_stay_as_they_are(kind: str, tmp_path: Path) -> None:
    given, again = tmp_path / "given.onnx", tmp_path / "again.onnx"
    foreign("char_gpt", kind, given)
    optimize(given, again, recipe="int8-weights", requantize=True, validate=False)
    before, after = ({w[2] for w in weights(p) if w[0] != "Gather"} for p in (given, again))
    assert len(before & after) >= 12
    static = tmp_path / "static.onnx"
    optimize(given, static, recipe="int8", requantize=True, validate=False)
    known = {*activations(given)} | {
        (float(p.scale), int(p.zero_point)) for ps in ranges(given).values() for p in ps
    }
    assert activations(static)
    assert set(activations(static)) <= known


def ranges(path: Path) -> Mapping[str, Any]:
    model = load(path).copy()
    DequantizeModel()(model)
    return model.ranges


def test_another_format_is_fitted_anew(tmp_path: Path) -> None:
    given, narrow = tmp_path / "given.onnx", tmp_path / "narrow.onnx"
    optimize(MODELS / "char_gpt.onnx", given, recipe="int8-weights", validate=False)
    optimize(given, narrow, recipe="int4-weights", requantize=True, validate=False)
    assert {w[1] for w in weights(narrow)} == {"uint4", "int8"}
    assert worst(given, narrow, "char_gpt") > 15
    wide = tmp_path / "wide.onnx"  # holds what 4 bits hold: the same values
    optimize(
        narrow, wide, recipe="int8-weights", requantize=True, validate=False,
        settings=Settings(granularity="group", group_size=32), layers=["*=int8"],
    )  # fmt: skip
    assert {w[1] for w in weights(wide)} == {"int8"}


def test_a_model_that_is_quantized_in_part(tmp_path: Path) -> None:
    part, rest = tmp_path / "part.onnx", tmp_path / "rest.onnx"
    optimize(
        MODELS / "char_gpt.onnx", part, recipe="int8-weights", validate=False,
        layers=["op:MatMul=float"],
    )  # fmt: skip
    report = optimize(part, rest, recipe="int4-weights", validate=False)
    (told,) = [w for w in report.warnings if "--requantize" in w]
    assert "of 14 weights are quantized already and stay as they are" in told
    whole = optimize(part, rest, recipe="int4-weights", requantize=True, validate=False)
    assert not any("--requantize" in w for w in whole.warnings)
    assert not any(row.form == "float" for row in whole.stored)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["u8s8-channels", "float-weights", "operators-u8u8", "dynamic-u8"])
def test_without_the_flag_it_is_left_alone(kind: str, tmp_path: Path) -> None:
    given, out = tmp_path / "given.onnx", tmp_path / "out.onnx"
    foreign("digits_cnn", kind, given)
    with pytest.raises(BudgetError, match=r"already quantized \(.*let --requantize recover floats"):
        optimize(given, out, recipe="int8-weights", validate=False)
    assert not out.exists()


def test_floats_have_nothing_to_recover(tmp_path: Path) -> None:
    report = optimize(
        MODELS / "lang_lstm.onnx", recipe="int8-weights", requantize=True, validate=False
    )
    assert any("nothing in the model is quantized" in w for w in report.warnings)


def test_the_command(tmp_path: Path) -> None:
    given, out, js = (str(tmp_path / n) for n in ("given.onnx", "out.onnx", "report.json"))
    optimize(MODELS / "lang_lstm.onnx", given, recipe="int8-dynamic", validate=False)
    run = CliRunner().invoke
    plan = run(
        main, ["optimize", given, out, "--requantize", "--dry-run", "--recipe", "int8-weights"]
    )
    assert "dequantize_model(ranges=True)" in plan.stdout
    done = run(
        main, ["optimize", given, out, "--requantize", "--recipe", "int8-weights", "--json", js]
    )
    assert done.exit_code == 0, done.output
    report = json.loads(Path(js).read_text())
    assert report["fidelity"]["outputs"][0]["sqnr_db"] > 30  # against the given model
    assert {row["form"] for row in report["stored"]} == {"storage"}
    assert any(note["rule"] == "dequantize_model" for note in report["notes"])
    assert not preview(given, recipe="cleanup").passes["cleanup"][0].startswith("dequantize_model")


def test_inputs_are_drawn_from_the_range_that_a_model_has(tmp_path: Path) -> None:
    given = tmp_path / "given.onnx"
    optimize(
        MODELS / "digits_cnn.onnx", given, recipe="int8", validate=False,
        data=MODELS / "digits_cnn.calib.npz",
    )  # fmt: skip
    model = load(given)
    (q,) = [n for n in model.nodes("QuantizeLinear") if n.inputs[0].name == "image"]
    scale, zero = float(q.inputs[1].values), int(q.inputs[2].values)
    drawn = np.concatenate([np.ravel(f["image"]) for f in synthetic_samples(model, 4)])
    assert drawn.min() >= (0 - zero) * scale - 1e-6
    assert drawn.max() <= (255 - zero) * scale + 1e-6
    assert drawn.max() > (255 - zero) * scale * 0.9


def test_a_missed_budget_tells_of_synthetic_samples(tmp_path: Path) -> None:
    given = tmp_path / "given.onnx"
    optimize(
        MODELS / "digits_cnn.onnx", given, recipe="int8", validate=False,
        data=MODELS / "digits_cnn.calib.npz",
    )  # fmt: skip
    with pytest.raises(BudgetError, match=r"leave the ranges .* give --data"):
        optimize(given, recipe="int4-weights", requantize=True, min_sqnr=90)


def test_external_data_are_recovered_piece_by_piece(tmp_path: Path) -> None:
    """Weights are computed when they are looked at: the model holds the integers only."""
    rng = np.random.default_rng(3)
    wide = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2, 512] x) => (float[2, 512] y) '
        "{ h = MatMul(x, a) y = MatMul(h, b) }"
    )
    for name in "ab":
        values = rng.normal(0, 0.05, (512, 512)).astype(np.float32)
        wide.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    source, given, again = (tmp_path / f"{n}.onnx" for n in ("source", "given", "again"))
    onnx.save(wide, source, save_as_external_data=True, location="source.data")
    optimize(source, given, recipe="int8-weights", validate=False)
    assert (tmp_path / "given.onnx.data").exists()
    model = Model.load(given)
    DequantizeModel()(model)
    grids = [remembered(n.inputs[1]) for n in model.nodes("MatMul")]
    assert all(g is not None and g.numbers.dtype == np.int8 for g in grids)
    optimize(given, again, recipe="int8-weights", requantize=True, validate=False)
    assert weights(given) == weights(again)
    assert [row.format for row in inspect(again).stored] == ["int8", "int8"]


def test_synthetic_samples_are_unlike_what_a_quantized_model_was_made_for(tmp_path: Path) -> None:
    path, out = tmp_path / "int8.onnx", tmp_path / "out.onnx"
    data = MODELS / "digits_cnn.calib.npz"
    optimize(MODELS / "digits_cnn.onnx", path, recipe="int8", data=data, integer_io="int8")
    for given, is_told in ((None, True), (data, False)):
        report = optimize(path, out, recipe="int4-weights", requantize=True, data=given)
        told = [w for w in report.warnings if w.startswith("compared on synthetic samples")]
        assert bool(told) == is_told
    report = optimize(path, out, recipe="int4-weights", requantize=True, validate=False)
    assert report.warnings == ()
