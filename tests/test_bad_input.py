"""Bad files, samples, names and places: one line that says what to do next, and nothing lost."""

from __future__ import annotations

import gc
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, numpy_helper, parser

from onnxq import OnnxqError, optimize
from onnxq.cli import main

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models"
MODEL, DATA = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn.calib.npz"
HEAD = '<ir_version: 8, opset_import: ["": 17]> g '


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def refused(done: Result, code: int, *texts: str) -> None:
    """The run ended with `code` and one line of error that has the texts."""
    assert done.exit_code == code, done.output
    assert done.stderr.startswith("onnxq: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for text in texts:
        assert text in done.stderr
    assert done.stdout == ""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with an old output, which must still be there, and nothing beside it."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "out.onnx").write_bytes(b"old")
    yield folder / "out.onnx"
    assert (folder / "out.onnx").read_bytes() == b"old"
    assert os.listdir(folder) == ["out.onnx"]


def written(path: Path, text: str, *, weights: dict[str, Any] | None = None) -> Path:
    proto = parser.parse_model(text)
    for name, values in (weights or {}).items():
        if isinstance(values, TensorProto):
            proto.graph.initializer.append(values)
        else:
            proto.graph.initializer.append(numpy_helper.from_array(values, name))
    path.write_bytes(proto.SerializeToString())
    return path


# --- model files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 1e-5, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_a_truncated_model(share: float, tmp_path: Path, place: Path) -> None:
    data = MODEL.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(data[: int(share * len(data))])
    done = run("optimize", tmp_path / "cut.onnx", place, "--data", DATA)
    refused(done, 2, "cut.onnx: ", "export")


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"", "is empty"), (b"# A text\n" * 99, "not an ONNX model"), (b"\0" * 64, "not an ONNX")],
    ids=["empty", "text", "zeros"],
)
def test_files_that_are_no_models(content: bytes, text: str, tmp_path: Path, place: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    refused(run("optimize", tmp_path / "m.onnx", place), 2, "m.onnx: ", text, "export it again")


def test_a_folder_as_a_model(tmp_path: Path, place: Path) -> None:
    refused(run("optimize", tmp_path, place), 2, "is a folder; name the .onnx file in it")


def external(folder: Path, location: str) -> Path:
    """A model whose weight is said to be at `location`; 64 bytes of w.bin."""
    weight = TensorProto(name="w", dims=[4, 4], data_type=1, data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    text = HEAD + "(float[N, 4] x) => (float[N, 4] y) { y = MatMul (x, w) }"
    (folder / "w.bin").write_bytes(bytes(64))
    return written(folder / "m.onnx", text, weights={"w": weight})


def moved_outside(folder: Path) -> None:
    (folder / "w.bin").rename(folder.parent / "w.bin")
    (folder / "w.bin").symlink_to(folder.parent / "w.bin")


EXTERNAL: list[Any] = [
    pytest.param("w.bin", lambda d: (d / "w.bin").unlink(), "is missing beside", id="missing"),
    pytest.param("w.bin", lambda d: os.truncate(d / "w.bin", 60), "the file has 60", id="short"),
    pytest.param("/etc/passwd", lambda d: None, "put the data file beside", id="absolute"),
    pytest.param("../w.bin", lambda d: None, "put the data file beside", id="above"),
    pytest.param("a/../../w.bin", lambda d: None, "put the data file beside", id="hidden-above"),
    pytest.param("w.bin", moved_outside, "copy the real file there", id="link"),
]


@pytest.mark.parametrize(("location", "damage", "text"), EXTERNAL)
def test_external_data(
    location: str, damage: Callable[[Path], None], text: str, tmp_path: Path, place: Path
) -> None:
    (tmp_path / "in").mkdir()
    model = external(tmp_path / "in", location)
    damage(tmp_path / "in")
    refused(run("optimize", model, place, "--recipe", "cleanup"), 2, "m.onnx: tensor 'w'", text)


HUGE = 2**60
INVALID: list[Any] = [
    pytest.param("(float[2] x) => () { y = Relu (x) }", {}, "has no outputs", id="no-outputs"),
    pytest.param("() => () { }", {}, "has no outputs", id="nothing"),
    pytest.param("(float[2] x) => (float[2] y) { y = Relu (x)  y = Abs (x) }", {}, "not a valid", id="twins"),
    pytest.param("(float[2] x) => (float[2] y) { y = Add (x, q) }", {}, "not a valid model", id="undefined"),
    pytest.param("(float[2] x) => (float[2] y) { y = Add (x, z)  z = Abs (y) }", {}, "cycle", id="cycle"),
    pytest.param("(float[2] x) => (float[2] y) { y = Rely (x) }", {}, "No Op registered for Rely", id="op"),
    pytest.param("(float[1] x) => (float[2] y) { y = Squeeze <axes = 1.0> (x) }", {}, "axes", id="attribute"),
    pytest.param(
        "(float[2] x) => (float[2] y) { y = Add (x, w) }",
        {"w": TensorProto(name="w", dims=[-2], data_type=1, raw_data=bytes(8))},
        "shape (-2,)", id="negative",
    ),
    pytest.param(
        "(float[2] x) => (float[2] y) { y = Add (x, w) }",
        {"w": TensorProto(name="w", dims=[HUGE], data_type=1, raw_data=bytes(8))},
        "do not fit its shape", id="huge-weight",
    ),
    pytest.param(
        "(float[2] x) => (float[2] y) { y = Add (x, w) }",
        {"w": TensorProto(name="w", dims=[2**31, 2**31, 4], data_type=1)},
        "overflow", id="overflow",
    ),
]  # fmt: skip


@pytest.mark.parametrize("recipe", ["cleanup", "int8"])
@pytest.mark.parametrize(("text", "weights", "reason"), INVALID)
def test_models_that_are_not_valid(
    text: str, weights: dict[str, Any], reason: str, recipe: str, tmp_path: Path, place: Path
) -> None:
    model = written(tmp_path / "m.onnx", HEAD + text, weights=weights)
    refused(run("optimize", model, place, "--recipe", recipe), 2, reason, "export")


def test_a_pass_that_stumbles_over_an_invalid_model(tmp_path: Path, place: Path) -> None:
    """Nothing has looked at the model before the pass does: it is not run."""
    text = '<ir_version: 8, opset_import: ["": 11]> g '
    text += "(float[1, 2] x) => (float[2, 1] y) { z = Transpose <perm = 1.0> (x)  y = Relu (z) }"
    done = run(
        "optimize", written(tmp_path / "m.onnx", text), place, "--recipe", "cleanup",
        "--no-validate",
    )  # fmt: skip
    refused(done, 2, "m.onnx: not a valid model: Mismatched attribute type", "export it again")


LOOKED_AT = [
    pytest.param(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1, 2] x) => (float[2] y) '
        "{ z = Reshape ()  y = Flatten (z) }",
        "input size 0", id="check",
    ),
    pytest.param(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1, 2] x) => (float[2] y) '
        "{ y = Gemm (x) }",
        "input size 1", id="inspect",
    ),
    pytest.param(
        '<ir_version: 8, opset_import: ["": 17]> g (int64[1, 2] x) => (float[a, b] y) '
        "<float[2, 2] w = {1, 2, 3, 4}> { y = Gather <axis = 9> (w, x) }",
        "axis must be in", id="only-its-shapes",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), LOOKED_AT)
def test_models_that_are_not_valid_are_looked_at(text: str, reason: str, tmp_path: Path) -> None:
    """Commands that do not run the model tell its faults as the others do, if they stumble."""
    model = written(tmp_path / "m.onnx", text)
    commands = (
        ["inspect", model],
        ["check", model, "--target", "generic"],
        ["compare", model, model],
    )
    stumbled = [done for c in commands if (done := run(*c)).exit_code not in (0, 1)]
    for done in stumbled:
        refused(done, 2)
    assert any(reason in done.stderr for done in stumbled)


def test_a_call_of_a_function_that_does_not_fit(tmp_path: Path, place: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "own": 1]>
    g (float[4] x) => (float[4] y) { y = own.double (x, x) }
    <domain: "own", opset_import: ["": 21]> double (a) => (b) { b = Add (a, a) }"""
    model = written(tmp_path / "m.onnx", text)
    refused(run("optimize", model, place, "--recipe", "cleanup"), 2, "function cannot be inlined")
    refused(run("inspect", model), 2, "export")


def test_a_bug_of_ones_own_pass_is_no_fault_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "buggy.py").write_text(
        "from onnxq import rewrites\n@rewrites()\ndef fail(model, node): return 1 / 0"
    )
    (tmp_path / "r.toml").write_text('description = "x"\npasses = ["buggy:fail"]')
    done = run("optimize", MODEL, place, "--recipe", "r.toml")
    assert done.exit_code == 70
    assert "onnxq: bug: ZeroDivisionError: division by zero; run with --debug" in done.stderr
    done = run("optimize", MODEL, place, "--recipe", "r.toml", "--debug")
    assert isinstance(done.exception, ZeroDivisionError)


def test_an_opset_from_the_future(tmp_path: Path, place: Path) -> None:
    text = '<ir_version: 8, opset_import: ["": 99]> g (float[2] x) => (float[2] y) { y = Relu (x) }'
    model = written(tmp_path / "m.onnx", text)
    refused(run("optimize", model, place), 2, "opset 99 is newer", "install a newer onnx")


STRANGE: list[Any] = [
    pytest.param("() => (float[2] y) { y = Constant <value_floats = [1.0, 2.0]> () }", id="no-in"),
    pytest.param("(float[2] x) => (float[2] x) { }", id="no-nodes"),
]


@pytest.mark.parametrize("text", STRANGE)
def test_models_with_little_in_them(text: str, tmp_path: Path) -> None:
    model, out = written(tmp_path / "m.onnx", HEAD + text), tmp_path / "out.onnx"
    refused(run("optimize", model, out), 1, "nothing was quantized", "--allow-unchanged")
    assert not out.exists()
    for args in (["--allow-unchanged"], ["--recipe", "cleanup"]):
        done = run("optimize", model, out, *args)
        assert done.exit_code == 0, done.stderr
        assert "SQNR exact" in done.stdout
        onnx.checker.check_model(onnx.load(out), full_check=True)


CUSTOM = """<ir_version: 8, opset_import: ["": 17, "my.domain": 1]>
g (float[N, 4] x) => (float[N, 4] y) { a = Identity (x)  b = my.domain.Magic (a)  y = MatMul (b, w) }"""


def test_an_operator_that_onnxruntime_does_not_know(tmp_path: Path, place: Path) -> None:
    weights = {"w": np.eye(4, dtype=np.float32)}
    model, clean = written(tmp_path / "m.onnx", CUSTOM, weights=weights), tmp_path / "clean.onnx"
    done = run("optimize", model, clean, "--recipe", "cleanup")
    assert done.exit_code == 0
    assert "not compared with the original: onnxruntime cannot load" in done.stderr
    assert [n.op_type for n in onnx.load(clean).graph.node] == ["Magic", "MatMul"]
    refused(run("optimize", model, place), 2, "my.domain:Magic", "--recipe cleanup can do without")
    refused(run("calibrate", model, tmp_path / "s.npz"), 2, "--recipe cleanup can do without")
    refused(
        run("optimize", model, place, "--recipe", "cleanup", "--validate"), 2, "my.domain:Magic"
    )


def test_an_output_without_a_type_is_not_what_is_wrong(tmp_path: Path, place: Path) -> None:
    text = CUSTOM.replace("(float[N, 4] y)", "(y)")
    model = written(tmp_path / "m.onnx", text, weights={"w": np.eye(4, dtype=np.float32)})
    refused(run("optimize", model, place), 2, "my.domain:Magic", "--recipe cleanup can do without")


def test_inputs_too_large_for_made_up_samples(tmp_path: Path, place: Path) -> None:
    text = HEAD + f"(float[{HUGE}] x) => (float[{HUGE}] y) {{ y = Relu (x) }}"
    model = written(tmp_path / "m.onnx", text)
    refused(run("optimize", model, place), 2, "give samples with --data", f"'x' [{HUGE}] float32")
    done = run("optimize", model, tmp_path / "clean.onnx", "--recipe", "cleanup")
    assert done.exit_code == 0
    assert "not compared with the original: no synthetic input" in done.stderr


QLINEAR = (
    HEAD
    + """(float[1, 4] x) => (float[1, 4] y) {
    a = QuantizeLinear (x, s, z)  b = QLinearMatMul (a, s, z, w, s, z, s, z)
    y = DequantizeLinear (b, s, z) }"""
)


def test_a_model_of_integer_operators_is_left_alone(tmp_path: Path, place: Path) -> None:
    weights = {
        "s": np.float32(0.1), "z": np.int8(0), "w": np.ones((4, 4), np.int8),
    }  # fmt: skip
    model = written(tmp_path / "m.onnx", QLINEAR, weights=weights)
    refused(run("optimize", model, place), 1, "already quantized", "1 QLinearMatMul")
    done = run("optimize", model, tmp_path / "same.onnx", "--allow-unchanged")
    assert done.exit_code == 0
    ops = [n.op_type for n in onnx.load(tmp_path / "same.onnx").graph.node]
    assert ops == ["QuantizeLinear", "QLinearMatMul", "DequantizeLinear"]


def test_a_model_of_quantize_and_dequantize_is_left_alone(tmp_path: Path, place: Path) -> None:
    first, same = tmp_path / "first.onnx", tmp_path / "same.onnx"
    args = ("--data", DATA, "--recipe", "int8", "--no-validate", "--quiet")
    assert run("optimize", MODEL, first, *args).exit_code == 0
    refused(run("optimize", first, place, *args), 1, "already quantized", "DequantizeLinear")
    assert run("optimize", first, same, *args, "--allow-unchanged").exit_code == 0
    assert same.stat().st_size <= first.stat().st_size


# --- samples --------------------------------------------------------------------------------------

IMAGES = np.zeros((8, 1, 28, 28), np.float32)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def cut(path: Path) -> Path:
    data = npz(path, image=np.random.default_rng(0).random((8, 1, 28, 28), np.float32)).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


SAMPLES: list[Any] = [
    pytest.param(lambda d: d / "no.npz", "no such file or folder; give", id="missing"),
    pytest.param(lambda d: d, "", id="an-empty-folder"),
    pytest.param(lambda d: MODEL, "onnx", id="a-model"),
    pytest.param(lambda d: cut(d / "a.npz"), "cannot be read as .npz", id="truncated"),
    pytest.param(lambda d: npz(d / "a.npz", x=IMAGES), "'x' is no input; the model's", id="name"),
    pytest.param(lambda d: npz(d / "a.npz", image=IMAGES[..., :9]), "the model wants", id="shape"),
    pytest.param(lambda d: npz(d / "a.npz", image=IMAGES[:0]), "no samples", id="none"),
    pytest.param(lambda d: npz(d / "a.npz", image=IMAGES.astype("U")), "wants float32", id="text"),
    pytest.param(lambda d: npz(d / "a.npz", image=IMAGES * 1j), "wants float32", id="complex"),
    pytest.param(lambda d: npz(d / "a.npz", image=IMAGES + np.nan), "has NaN", id="nan"),
    pytest.param(lambda d: npz(d / "a.npz", image=IMAGES + np.inf), "infinite", id="infinite"),
    pytest.param(lambda d: "no.such.module:feeds", "No module named", id="module"),
]


@pytest.mark.parametrize(("make", "text"), SAMPLES)
@pytest.mark.parametrize("command", ["optimize", "calibrate"])
def test_samples(make: Callable[[Path], Any], text: str, command: str, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    data, out = make(tmp_path / "samples"), tmp_path / "out"
    refused(run(command, MODEL, out, "--data", data), 2, text)
    assert not out.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # numpy leaves a truncated .npz open
        gc.collect()


# --- what is asked for ----------------------------------------------------------------------------

WRONG_USE: list[Any] = [
    pytest.param(["--recipe", "int88"], "did you mean 'int8'?", id="recipe"),
    pytest.param(["--recipe", "no.toml"], "no.toml", id="recipe-file"),
    pytest.param(["--target", "ort_cpu"], "did you mean 'ort-cpu'?", id="target"),
    pytest.param(["--min-sqnr", "high"], "'high' is not a valid float", id="no-number"),
    pytest.param(["--min-sqnr", "nan"], "nan is no number of decibels", id="nan"),
    pytest.param(["--min-sqnr", "inf"], "inf is no number of decibels", id="inf"),
    pytest.param(["--min-sqnr"], "--min-sqnr", id="no-value"),
    pytest.param(["--recipee", "int8"], "--recipe", id="option"),
    pytest.param(["--calibration", str(MODEL)], "not a calibration of onnxq", id="calibration"),
]


@pytest.mark.parametrize(("args", "text"), WRONG_USE)
def test_wrong_use(args: list[str], text: str, place: Path) -> None:
    refused(run("optimize", MODEL, place, "--data", DATA, *args), 2, text)


def test_a_budget_without_a_comparison(place: Path) -> None:
    args = ("--data", DATA, "--min-sqnr", "20", "--no-validate")
    refused(run("optimize", MODEL, place, *args), 1, "--min-sqnr needs the comparison")


def test_a_budget_of_no_number_in_python(tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match="give a number of decibels"):
        optimize(MODEL, tmp_path / "out.onnx", min_sqnr=float("nan"))


def test_an_unknown_command() -> None:
    refused(run("optimise", MODEL, "out.onnx"), 2, "Did you mean 'optimize'")
    refused(run("optimize", MODEL), 2, "Missing argument 'OUTPUT'", "--help")


# --- places to write to ---------------------------------------------------------------------------


def test_the_output_is_looked_at_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    for out in ("missing/out.onnx", "folder"):
        begun = time.perf_counter()
        refused(run("optimize", MODEL, tmp_path / out, "--data", DATA), 2, "choose another output")
        refused(run("calibrate", MODEL, tmp_path / out, "--data", DATA), 2, "choose another output")
        assert time.perf_counter() - begun < 1
    assert os.listdir(tmp_path) == ["folder"]


def test_the_output_is_not_an_input(tmp_path: Path) -> None:
    model = external(tmp_path, "big.onnx.data")
    (tmp_path / "w.bin").rename(tmp_path / "big.onnx.data")
    np.save(tmp_path / "d.npy", IMAGES)
    data = shutil.copy(DATA, tmp_path / "d.npz")
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    clean = ("--recipe", "cleanup")
    refused(run("optimize", model, tmp_path / "big.onnx.data", *clean), 2, "would overwrite")
    refused(run("optimize", MODEL, data, "--data", data), 2, "is an input of this run")
    assert before == {f: f.read_bytes() for f in tmp_path.iterdir()}


def test_the_data_file_of_the_output_is_not_that_of_the_input(tmp_path: Path) -> None:
    weights = {"w": np.ones((32, 32), np.float32)}
    text = HEAD + "(float[N, 32] x) => (float[N, 32] y) { y = MatMul (x, w) }"
    model = written(tmp_path / "m.onnx", text, weights=weights)
    onnx.save(onnx.load(model), model, save_as_external_data=True, location="out.onnx.data")
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    refused(run("optimize", model, tmp_path / "out.onnx"), 2, "would overwrite", "choose another")
    assert before == {f: f.read_bytes() for f in tmp_path.iterdir()}
    for _ in range(2):  # in place, the second time over a data file of its own
        assert run("optimize", model, model, "--recipe", "cleanup").exit_code == 0
    assert model.with_name("m.onnx.data").exists()
    onnx.checker.check_model(str(model), full_check=True)


LARGE = HEAD + "(float[N, 512] x) => (float[N, 512] y) { a = Identity (x)  y = MatMul (a, w) }"


@pytest.mark.parametrize("where", ["model", "data", "statistics", "report"])
def test_a_full_disk(where: str, tmp_path: Path, place: Path) -> None:
    weights = {"w": np.random.default_rng(0).random((512, 512), np.float32)}
    model = written(tmp_path / "m.onnx", LARGE, weights=weights)
    if where == "data":
        onnx.save(onnx.load(model), model, save_as_external_data=True, location="m.data")
    args = {
        "model": ["optimize", model, place, "--recipe", "cleanup"],
        "data": ["optimize", model, place, "--recipe", "cleanup"],
        "statistics": ["calibrate", MODEL, place, "--data", DATA],
        "report": ["passes", "--json", place],
    }[where]
    limit = 1024 if where in ("statistics", "report") else 65536
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores SIGXFSZ: a write beyond the limit is an error, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        done = run(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(done, 2, "cannot be written (File too large); choose another output")


def mounted(*args: str) -> bool:
    done = subprocess.run(["mount", *args], capture_output=True, check=False)
    return done.returncode == 0


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mounted"
    folder.mkdir()
    if not mounted("-t", "tmpfs", "-o", "size=128k", "onnxq", str(folder)):
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(tmp_path: Path, mountpoint: Path) -> None:
    (mountpoint / "out.onnx").write_bytes(b"old")
    done = run("optimize", MODEL, mountpoint / "out.onnx", "--recipe", "cleanup", "--no-validate")
    refused(done, 2, "No space left on device", "choose another output")
    assert os.listdir(mountpoint) == ["out.onnx"]
    assert (mountpoint / "out.onnx").read_bytes() == b"old"


def test_a_read_only_disk(tmp_path: Path, mountpoint: Path) -> None:
    (mountpoint / "out.onnx").write_bytes(b"old")
    assert mounted("-o", "remount,ro", str(mountpoint))
    for name in ("out.onnx", "new.onnx"):
        done = run("optimize", MODEL, mountpoint / name, "--data", DATA)
        refused(done, 2, "Read-only file system", "choose another output")
    assert (mountpoint / "out.onnx").read_bytes() == b"old"


NOT_ROOT = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]  # whom permissions bind


@pytest.mark.parametrize("name", ["out.onnx", "new.onnx"], ids=["file", "folder"])
def test_what_is_read_only(name: str, place: Path) -> None:
    args = [sys.executable, "-m", "onnxq", "optimize", MODEL, place.with_name(name), "--data", DATA]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and setpriv is not there to make it less")
        args = [*NOT_ROOT, *args]
    (place if name == place.name else place.parent).chmod(0o500)
    try:
        done = subprocess.run(
            list(map(str, args)), cwd=ROOT, capture_output=True, text=True, check=False
        )
    finally:
        place.parent.chmod(0o700)
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be written (Permission denied); choose another output" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_place_where_nothing_can_be_made() -> None:
    refused(
        run("optimize", MODEL, "/proc/out.onnx", "--data", DATA), 2, "/proc/out.onnx: cannot be"
    )
    refused(run("optimize", MODEL, "/dev/null", "--data", DATA), 2, "not a regular file")


# --- stopped --------------------------------------------------------------------------------------

FEEDS = """
import time
from pathlib import Path
import numpy as np
rounds = []
def feeds():
    rounds.append(0)  # the first round counts the samples
    for i in range(8):
        if len(rounds) > 1 and i == 3:
            Path("begun").touch()
            time.sleep(60)
        yield {"image": np.zeros((1, 1, 28, 28), np.float32)}
"""


def takes_interrupts() -> None:
    """For a child: its parent may have been told to ignore them, as behind nohup."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def begun(folder: Path, *args: Any, is_there: Callable[[int], bool]) -> subprocess.Popen[str]:
    """A run of the command, when it has come to where it is to be stopped."""
    process = subprocess.Popen(
        [sys.executable, "-m", "onnxq", *map(str, args)], cwd=folder, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=takes_interrupts,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not is_there(process.pid):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.001)
    return process


STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]


def stopped(process: subprocess.Popen[str], number: signal.Signals, code: int) -> None:
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "")
    if number != signal.SIGKILL:
        assert err == "onnxq: interrupted; no file was left half written\n"


@pytest.mark.parametrize(("number", "code"), STOPS)
@pytest.mark.parametrize("command", ["optimize", "calibrate"])
def test_stopped_while_calibrating(
    command: str, number: signal.Signals, code: int, tmp_path: Path, place: Path
) -> None:
    (tmp_path / "slow.py").write_text(FEEDS)
    process = begun(
        tmp_path, command, MODEL, place, "--data", "slow:feeds",
        is_there=lambda pid: (tmp_path / "begun").exists(),
    )  # fmt: skip
    stopped(process, number, code)


def is_writing(pid: int, folder: Path) -> bool:
    """Whether a process has written to a file without a name in the folder."""
    fds = Path(f"/proc/{pid}/fd")
    with_prefix = [fd for fd in fds.iterdir() if _link(fd).startswith(f"{folder}/#")]
    return any(fd.exists() and fd.stat().st_size > 1 << 24 for fd in with_prefix)


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="looks into /proc of Linux")
@pytest.mark.parametrize(("number", "code"), STOPS)
def test_stopped_while_writing(
    number: signal.Signals, code: int, tmp_path: Path, place: Path
) -> None:
    (tmp_path / "in").mkdir()
    model, side = external(tmp_path / "in", "w.bin"), 12288
    proto = onnx.load(model, load_external_data=False)
    proto.graph.initializer[0].dims[:] = [side, side]
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = side
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = side
    model.write_bytes(proto.SerializeToString())
    os.truncate(model.with_name("w.bin"), 4 * side * side)  # half a gigabyte of nothing
    process = begun(
        tmp_path, "optimize", model, place, "--recipe", "cleanup", "--no-validate",
        is_there=lambda pid: is_writing(pid, place.parent),
    )  # fmt: skip
    stopped(process, number, code)


def test_what_a_killed_run_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)  # a system where all files have names
    left, used = tmp_path / ".onnxq-0123456789abcdef.tmp", tmp_path / ".onnxq-fedcba9876543210.tmp"
    left.touch()
    with used.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as the run does that writes it
        done = run("optimize", MODEL, tmp_path / "out.onnx", "--recipe", "cleanup", "--no-validate")
        assert done.exit_code == 0
        assert sorted(os.listdir(tmp_path)) == [used.name, "out.onnx"]


def test_no_signal_comes_between_a_data_file_and_its_model(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; import onnxq.files as files\n"
        "replace = os.replace\n"
        "def slow(a, b): replace(a, b); os.kill(os.getpid(), signal.SIGINT)\n"
        "os.replace = slow\n"
        "with files.atomic_writes(*sys.argv[1:]) as both:\n"
        "    for file in both: file.write(b'new')"
    )
    names = [tmp_path / "m.onnx.data", tmp_path / "m.onnx"]
    for name in names:
        name.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, names)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False, preexec_fn=takes_interrupts,
    )  # fmt: skip
    assert "KeyboardInterrupt" in done.stderr
    assert [name.read_bytes() for name in names] == [b"new", b"new"]
    assert len(os.listdir(tmp_path)) == 2


# --- damaged at random ----------------------------------------------------------------------------


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes cut short, some flipped or left out; most often where the structure is."""
    out = bytearray(data)
    edge = min(4000, len(out))
    for _ in range(rng.randrange(1, 4)):
        at = rng.choice([rng.randrange(len(out)), rng.randrange(edge), -1 - rng.randrange(edge)])
        match rng.randrange(4):
            case 0:
                out[at] = rng.randrange(256)
            case 1:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                del out[at : at + rng.randrange(1, 64)]
            case _:
                del out[rng.randrange(len(out)) :]
                break
        if len(out) < 64:
            break
        edge = min(edge, len(out))
    return bytes(out)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_models_are_refused_or_work(seed: int, tmp_path: Path) -> None:
    """No other exception than ours, whatever a file holds; what is written can be read."""
    rng = random.Random(seed)
    small = written(tmp_path / "small.onnx", CUSTOM, weights={"w": np.eye(4, dtype=np.float32)})
    sources = [*sorted(MODELS.glob("*.onnx")), small, small, small, small]
    for source in sources:
        data, model, out = source.read_bytes(), tmp_path / "m.onnx", tmp_path / "out.onnx"
        for _ in range(3):
            model.write_bytes(damaged(data, rng))
            try:
                optimize(model, out, recipe="cleanup", validate=False)
            except OnnxqError:
                continue
            onnx.load(out)
