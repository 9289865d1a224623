"""The command line: exit codes, one line of error, clean JSON, nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from onnxq.cli import main
from onnxq.looking import inspect

MODELS = Path(__file__).parent.parent / "models"
MODEL, DATA = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn.calib.npz"


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def optimized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("out")
    out, report = folder / "out.onnx", folder / "report.json"
    done = run("optimize", MODEL, out, "--data", DATA, "--json", report, "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    return out, json.loads(report.read_text())


def test_the_main_job(optimized: tuple[Path, dict[str, Any]]) -> None:
    out, report = optimized
    onnx.checker.check_model(str(out), full_check=True)
    assert out.stat().st_size < 0.5 * MODEL.stat().st_size
    assert report["size_bytes"] == [MODEL.stat().st_size, out.stat().st_size]
    (output,) = report["fidelity"]["outputs"]
    assert output["sqnr_db"] > 30
    assert output["is_finite"]
    assert report["fidelity"]["result_accuracy"] >= report["fidelity"]["original_accuracy"] - 0.02
    assert report["coverage"]["quantized_macs"] > 0.9 * report["coverage"]["macs"]
    assert "not used for calibration" in report["validated_on"]
    assert report["latency"]["original_ms"] > 0


def test_the_same_input_gives_the_same_bytes(
    optimized: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    again = tmp_path / "again.onnx"
    assert (
        run("optimize", MODEL, again, "--data", DATA, "--recipe", "int8", "--no-validate").exit_code
        == 0
    )
    assert again.read_bytes() == optimized[0].read_bytes()


def test_json_on_stdout_is_all_there_is(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    args = [
        "optimize",
        MODEL,
        out,
        "--data",
        DATA,
        "--json",
        "-",
        "--recipe",
        "int8",
        "--no-validate",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "onnxq", *map(str, args)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["schema"] == 1
    assert done.stderr == ""


def test_in_place(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(MODEL.read_bytes())
    assert (
        run("optimize", path, path, "--data", DATA, "--recipe", "int8", "--no-validate").exit_code
        == 0
    )
    assert path.stat().st_size < 0.5 * MODEL.stat().st_size
    assert list(tmp_path.iterdir()) == [path]


def test_without_data_there_is_a_warning(tmp_path: Path) -> None:
    done = run("optimize", MODEL, tmp_path / "out.onnx", "--recipe", "int8", "--no-validate")
    assert done.exit_code == 0
    assert "synthetic samples" in done.stderr


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = run("optimize", MODEL, tmp_path / "out.onnx", "--data", DATA, "--dry-run")
    assert "0x" not in done.stdout  # no address of a function
    assert done.exit_code == 0
    assert "quantize_static(" in done.output
    assert "image float32 [1, 1, 28, 28]" in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_is_written_and_used_again(tmp_path: Path) -> None:
    first, second, ranges = (tmp_path / n for n in ("a.onnx", "b.onnx", "ranges.npz"))
    for out in (first, second):
        args = ("--data", DATA, "--calibration", ranges, "--recipe", "int8", "--no-validate")
        assert run("optimize", MODEL, out, *args).exit_code == 0
    assert first.read_bytes() == second.read_bytes()


def test_a_missed_budget_writes_nothing_and_names_layers(tmp_path: Path) -> None:
    done = run("optimize", MODEL, tmp_path / "out.onnx", "--data", DATA, "--min-sqnr", "90")
    assert done.exit_code == 1
    assert "--min-sqnr is 90" in done.stderr
    assert "BatchNormalization" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_inspect() -> None:
    done = run("inspect", MODEL, "--json", "-")
    found = json.loads(done.output)
    assert found["parameters"] == 70538
    assert found["ops"]["BatchNormalization"] == 7
    assert found["inputs"] == ["image [N, 1, 28, 28] float32"]


def test_inspect_sees_inside_functions() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 17, "a": 1]>
        g (float[2, 4] x) => (float[2, 2] y)
        <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> { y = a.layer(x, w) }
        <domain: "a", opset_import: ["": 17]> layer (x, w) => (y) { y = MatMul(x, w) }""")
    found = inspect(proto, target="generic")
    assert found.functions == ("a::layer",)
    assert found.ops == {"layer": 1}
    assert len(found.quantizable) == 1
    assert found.coverage.macs == 16


def test_each_command_is_told_in_a_line() -> None:
    done = CliRunner().invoke(main, ["--help"], terminal_width=80)
    commands = done.output.split("Commands:\n")[1].split("\n\n")[0].splitlines()
    assert len(commands) == len(main.commands)
    assert not [line for line in commands if line.endswith("...") or not line.endswith(".")]


def test_compare(optimized: tuple[Path, dict[str, Any]]) -> None:
    done = run("compare", MODEL, optimized[0], "--data", DATA)
    assert done.exit_code == 0
    assert "layers, worst first" in done.output
    missed = run("compare", MODEL, optimized[0], "--data", DATA, "--min-sqnr", "90", "--quiet")
    assert (missed.exit_code, missed.stdout) == (1, "")


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def model_without_layers(path: Path) -> Path:
    text = (
        '<ir_version: 8, opset_import: ["": 17]>'
        " g (float[N, 1, 28, 28] image) => (float[N, 1, 28, 28] y) { y = Relu(image) }"
    )
    onnx.save(onnx.parser.parse_model(text), path)
    return path


IMAGES = np.zeros((4, 1, 28, 28), np.float32)
ERRORS = [
    pytest.param(lambda d: ("no.onnx", "out.onnx"), 2, "no.onnx", id="missing-file"),
    pytest.param(lambda d: (d, "out.onnx"), 2, "folder", id="folder-as-model"),
    pytest.param(lambda d: (DATA, "out.onnx"), 2, "model", id="no-model"),
    pytest.param(lambda d: (MODEL, d / "no" / "out.onnx"), 2, "no/out.onnx", id="no-folder"),
    pytest.param(lambda d: (MODEL, d), 2, "", id="output-is-a-folder"),
    pytest.param(
        lambda d: (MODEL, "out.onnx", npz(d / "a.npz", picture=IMAGES)), 2,
        "'picture' is no input; the model's inputs are 'image' [N, 1, 28, 28] float32", id="name",
    ),
    pytest.param(
        lambda d: (MODEL, "out.onnx", npz(d / "a.npz", image=IMAGES[..., :27])), 2,
        "sample 0: input 'image' is [1, 1, 28, 27], the model wants [N, 1, 28, 28]", id="shape",
    ),
    pytest.param(
        lambda d: (MODEL, "out.onnx", npz(d / "a.npz", image=IMAGES.astype(np.complex64))), 2,
        "is complex64, the model wants float32", id="dtype",
    ),
    pytest.param(
        lambda d: (MODEL, "out.onnx", npz(d / "a.npz", image=IMAGES * np.nan)), 2,
        "sample 0: input 'image' has NaN", id="nan",
    ),
    pytest.param(lambda d: (MODEL, "out.onnx", d), 2, "folder, it is empty", id="empty-folder"),
    pytest.param(lambda d: (MODEL, "out.onnx", MODEL), 2, "is no kind of samples", id="no-npz"),
    pytest.param(lambda d: (MODEL, "out.onnx", "no.npz"), 2, "no such file", id="no-data"),
    pytest.param(
        lambda d: (model_without_layers(d / "m"), "out.onnx", npz(d / "a.npz", image=IMAGES)), 1,
        "nothing was quantized", id="nothing-to-quantize",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("request_of", "code", "text"), ERRORS)
def test_mistakes_are_one_line(
    request_of: Any, code: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, output, *data = request_of(tmp_path)
    before = set(tmp_path.iterdir())
    done = run(
        "optimize", model, output, "--data", *(data or [DATA]), "--recipe", "int8", "--no-validate"
    )
    assert done.exit_code == code
    assert done.stderr.startswith("onnxq: error: ")
    assert done.stderr.count("\n") == 1
    assert text in done.stderr
    assert done.stdout == ""
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("flag", ["--save-plan", "--json"])
@pytest.mark.parametrize("name", ["model.onnx", "out.onnx", "./link.onnx", "calib.npz", "no/x"])
def test_reports_do_not_take_the_place_of_other_files(
    flag: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for source, copy in ((MODEL, "model.onnx"), (DATA, "calib.npz")):
        Path(copy).write_bytes(source.read_bytes())
    Path("link.onnx").symlink_to("model.onnx")
    done = run("optimize", "model.onnx", "out.onnx", "--data", "calib.npz", flag, name,
               "--recipe", "int8-weights", "--no-validate")  # fmt: skip
    assert done.exit_code == 2
    assert ("cannot be written" if name == "no/x" else "reads or writes") in done.stderr
    assert Path("model.onnx").read_bytes() == MODEL.read_bytes()
    assert not Path("out.onnx").exists()
    assert run("inspect", "model.onnx", "--json", "link.onnx").exit_code == 2
    assert Path("model.onnx").read_bytes() == MODEL.read_bytes()


def test_a_plan_and_a_report_have_a_file_each(tmp_path: Path) -> None:
    out, both = tmp_path / "out.onnx", tmp_path / "both"
    done = run("optimize", MODEL, out, "--save-plan", both, "--json", both)
    assert (done.exit_code, both.exists(), out.exists()) == (2, False, False)


def test_a_quantized_model_is_left_alone(
    optimized: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    done = run("optimize", optimized[0], tmp_path / "out.onnx", "--data", DATA)
    assert done.exit_code == 1
    assert "already quantized" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_allow_unchanged_writes_the_cleaned_model(tmp_path: Path) -> None:
    model, out = model_without_layers(tmp_path / "m.onnx"), tmp_path / "out.onnx"
    done = run("optimize", model, out, "--allow-unchanged", "--quiet")
    assert done.exit_code == 0
    assert out.exists()


@pytest.mark.parametrize(("option", "name"), [("--recipe", "int9"), ("--target", "ort-gpu")])
def test_unknown_names_list_the_known_ones(option: str, name: str, tmp_path: Path) -> None:
    done = run("optimize", MODEL, tmp_path / "out.onnx", option, name)
    assert done.exit_code == 2
    assert f"{name!r}: one of " in done.stderr


def test_debug_shows_the_traceback() -> None:
    done = run("inspect", "no.onnx", "--debug")
    assert type(done.exception).__name__ == "ModelError"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from onnxq.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'onnx', 'onnxruntime', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "onnxq optimize model.onnx small.onnx" in done.stdout
