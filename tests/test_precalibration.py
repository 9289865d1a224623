"""`calibrate`: the same result as without, sooner; and what cannot be calibrated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import parser

import onnxq
from onnxq.calibration import load_calibration
from onnxq.cli import main
from onnxq.errors import BudgetError, DataError, RecipeError

MODELS = Path(__file__).parent.parent / "models"
MODEL, DATA = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn.calib.npz"


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.mark.parametrize("name", ["digits_cnn", "digits_mobilenet", "char_gpt", "lang_lstm"])
@pytest.mark.parametrize("target", ["ort-cpu", "generic"])
def test_the_result_is_the_same_as_without(name: str, target: str, tmp_path: Path) -> None:
    model, data = MODELS / f"{name}.onnx", MODELS / f"{name}.calib.npz"
    with_file, without, stats = (tmp_path / n for n in ("a.onnx", "b.onnx", "stats.npz"))
    common = ("--target", target, "--data", data, "--quiet")
    done = run("calibrate", model, stats, *common)
    if done.exit_code == 1:
        assert "nothing to calibrate" in done.stderr
        assert (name, target) == ("lang_lstm", "ort-cpu")  # its only layers are faster in floats
        return
    before = stats.read_bytes()
    quick = (*common, "--recipe", "int8", "--no-validate")
    assert run("optimize", model, with_file, *quick, "--calibration", stats).exit_code == 0
    assert run("optimize", model, without, *quick).exit_code == 0
    assert with_file.read_bytes() == without.read_bytes()
    assert stats.read_bytes() == before


def test_a_calibration_is_used_instead_of_the_samples(tmp_path: Path) -> None:
    """Other samples are given to optimize: they are compared on, not calibrated on.

    But for a search by the error of the outputs, which runs the model on them.
    """
    careful = onnxq.Settings(activation_range="careful")
    stats, other = tmp_path / "stats.npz", tmp_path / "other.npz"
    onnxq.calibrate(MODEL, stats, data=DATA)
    np.savez(other, image=np.load(DATA)["image"][:8] * 100)
    outs = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for out, data in zip(outs, (DATA, other), strict=True):
        onnxq.optimize(
            MODEL, out, data=data, recipe="int8", calibration=stats, validate=False,
            settings=careful,
        )  # fmt: skip
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_ranges_of_a_recipe_are_tried_on_one_calibration(tmp_path: Path) -> None:
    stats = tmp_path / "stats.npz"
    onnxq.calibrate(MODEL, stats, data=DATA)
    results = set()
    for method in ("minmax", "mse"):
        recipe = tmp_path / f"{method}.toml"
        text = run("recipes", "int8").stdout
        recipe.write_text(text.replace('\nrange = "output"', f'\nrange = "{method}"'))
        outs = [tmp_path / "with.onnx", tmp_path / "without.onnx"]
        for out, calibration in zip(outs, (stats, None), strict=True):
            onnxq.optimize(
                MODEL, out, data=DATA, recipe=str(recipe), calibration=calibration, validate=False
            )
        assert outs[0].read_bytes() == outs[1].read_bytes()
        results.add(outs[0].read_bytes())
    assert len(results) == 2


def test_what_is_kept_and_told(tmp_path: Path) -> None:
    stats = tmp_path / "stats.npz"
    stats.write_bytes(b"an old file is replaced, not used")
    done = run("calibrate", MODEL, stats, "--data", DATA, "--json", "-")
    told = json.loads(done.stdout)
    assert told["samples"].startswith("120 of")
    found, meta = load_calibration(stats)
    assert meta["samples"] == 120
    assert {name: tuple(ends) for name, ends in told["ranges"].items()} == {
        name: (s.lo, s.hi)  # type: ignore[attr-defined]
        for name, s in found.items()
    }
    assert "--calibration" in run("calibrate", MODEL, stats, "--data", DATA).stdout


def test_a_model_in_memory_stays_as_it_is(tmp_path: Path) -> None:
    model = onnxq.load(MODEL)
    before = model.to_proto().SerializeToString(deterministic=True)
    onnxq.calibrate(model, tmp_path / "stats.npz", data=DATA)
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_without_data_there_is_a_warning(tmp_path: Path) -> None:
    assert "synthetic samples" in run("calibrate", MODEL, tmp_path / "s.npz").stderr


def test_what_cannot_be_calibrated(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="recipe cleanup has no pass that calibrates"):
        onnxq.calibrate(MODEL, tmp_path / "s.npz", data=DATA, recipe="cleanup")
    text = (
        '<ir_version: 8, opset_import: ["": 17]>'
        " g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }"
    )
    onnx.save(parser.parse_model(text), tmp_path / "m.onnx")
    with pytest.raises(BudgetError, match="nothing to calibrate: the model has no layer"):
        onnxq.calibrate(tmp_path / "m.onnx", tmp_path / "s.npz", data={"x": np.ones((4, 4))})
    assert not (tmp_path / "s.npz").exists()


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    stats = tmp_path / "stats.npz"
    onnxq.calibrate(MODELS / "digits_mobilenet.onnx", stats, data=DATA)
    with pytest.raises(DataError, match="made from another model or target"):
        onnxq.optimize(MODEL, tmp_path / "out.onnx", data=DATA, calibration=stats)
