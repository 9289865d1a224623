"""The recipe codebook-weights and its flags, on real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from click.testing import CliRunner, Result

import onnxq
from onnxq import Settings
from onnxq.cli import main
from onnxq.cli.setting import CODEBOOKS
from onnxq.codebooks import Kind
from onnxq.model import Model

MODELS = Path(__file__).parent.parent / "models"
CNN, LSTM, GPT = (MODELS / f"{name}.onnx" for name in ("digits_cnn", "lang_lstm", "char_gpt"))
DATA = MODELS / "digits_cnn.calib.npz"


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, ["optimize", *map(str, args)])


def report(*args: Any) -> dict[str, Any]:
    done = run(*args, "--recipe", "codebook-weights", "--json", "-")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def sqnr(result: dict[str, Any]) -> float:
    return min(float(f["sqnr_db"]) for f in result["fidelity"]["outputs"])


@pytest.mark.parametrize("model", [CNN, LSTM, GPT], ids=lambda path: path.stem)
def test_four_bits_are_usable(model: Path, tmp_path: Path) -> None:
    """A fifth of the size (the LSTM's state keeps 8 bits), 18 dB and more, without data."""
    found = report(model, tmp_path / "out.onnx")
    size = (tmp_path / "out.onnx").stat().st_size / model.stat().st_size
    assert size < (0.28 if model == LSTM else 0.22)
    assert sqnr(found) > 18
    covered = found["coverage"]
    assert covered["quantized_weight_bytes"] > 0.9 * covered["weight_bytes"]


def test_three_bits_in_groups_are_usable(tmp_path: Path) -> None:
    found = report(CNN, tmp_path / "out.onnx", "--bits", "3", "--data", DATA)
    assert sqnr(found) > 15


FLAGS = [
    pytest.param(["--codebook", "nf4", "--group-size", "32"], "nf4 codebook of 16 entries in groups of", id="nf4"),
    pytest.param(["--bits", "2", "--granularity", "channel"], "kmeans codebook of 4 entries per channel", id="bits"),
    pytest.param(["--codebook", "vector", "--dim", "2", "--bits", "6"], "vector codebook of 64 entries of 2 values", id="vector"),
    pytest.param(["--codebook", "logarithmic", "--layer", "first=float"], "logarithmic codebook of 16", id="layer"),
    pytest.param(["--range", "importance", "--data", DATA], "kmeans codebook of 16", id="importance"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "text"), FLAGS)
def test_flags(flags: list[Any], text: str, tmp_path: Path) -> None:
    found = report(CNN, tmp_path / "out.onnx", *flags)
    texts = [n["text"] for n in found["notes"] if n["rule"] == "quantize_codebook"]
    assert any(text in t for t in texts), texts


WRONG = [
    pytest.param(["--codebook", "nf4", "--bits", "3"], "nf4 has 4 bits, not 3", id="nf4-bits"),
    pytest.param(["--dim", "4"], "use vector", id="dim"),
    pytest.param(["--target", "tensorrt"], "does not unpack codebooks at load", id="target"),
    pytest.param(["--range", "hqq"], "is not one of mse, importance", id="range"),
    pytest.param(["--weights", "int4"], "no pass that takes --weights", id="weights"),
    pytest.param(["--bits", "9"], "1<=x<=8", id="bits"),
]


@pytest.mark.parametrize(("flags", "text"), WRONG)
def test_wrong_flags_are_one_line(flags: list[str], text: str, tmp_path: Path) -> None:
    done = run(CNN, tmp_path / "out.onnx", "--recipe", "codebook-weights", *flags)
    assert done.exit_code == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.onnx").exists()


def test_other_recipes_name_those_that_take_the_flag(tmp_path: Path) -> None:
    done = run(CNN, tmp_path / "out.onnx", "--recipe", "int8-weights", "--codebook", "nf4")
    assert done.exit_code == 2
    assert "codebook-weights" in done.stderr


def test_the_flag_knows_every_kind() -> None:
    assert set(CODEBOOKS) == set(get_args(Kind))


def test_python_takes_the_same_settings(tmp_path: Path) -> None:
    settings = Settings(codebook="nf4", group_size=32)
    onnxq.optimize(CNN, tmp_path / "a.onnx", recipe="codebook-weights", settings=settings)
    report(CNN, tmp_path / "b.onnx", "--codebook", "nf4", "--group-size", "32")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_codebooks_of_one_kind_are_stored_once(tmp_path: Path) -> None:
    report(CNN, tmp_path / "out.onnx", "--codebook", "nf4", "--granularity", "channel")
    tensors = Model.load(tmp_path / "out.onnx").graph.tensors().values()
    books = [t for t in tensors if t.shape == (16,) and t.dtype == np.float32 and not t.inputs]
    assert len([t for t in books if "codebook" in t.name]) == 1
