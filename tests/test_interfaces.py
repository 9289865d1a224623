"""Integer interfaces in a run: flags, files beside the model, comparing and timing through them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import parser
from PIL import Image

import onnxq
from onnxq import runtime
from onnxq.cheader import c_header
from onnxq.cli import main
from onnxq.core import Note
from onnxq.data import ImageOptions, open_samples
from onnxq.errors import BudgetError, ModelError, RecipeError
from onnxq.interfaces import coarse, require_integers, with_integer_io
from onnxq.model import Model
from onnxq.passes import IntegerIo
from onnxq.ports import Affine, Terminal, ports_of, restore_floats, with_float_inputs
from onnxq.recipes import load_recipe
from onnxq.validation import Fidelity, OutputFidelity, compare

MODELS = Path(__file__).parent.parent / "models"
MODEL, DATA = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn.calib.npz"
PAIRS = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] x, int64[N] ids) => (float[N, 4] y, int64[N] same)
<float s = {0.1}, uint8 z = {128}, float w = {0.5}> {
    q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) m = Mul(a, w)
    p = QuantizeLinear(m, s, z) y = DequantizeLinear(p, s, z) same = Identity(ids)
}"""


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("made")
    out = folder / "out.onnx"
    done = run("optimize", MODEL, out, "--data", DATA, "--recipe", "int8", "--integer-io", "int8",
               "--header", "--save-plan", folder / "plan.toml", "--json", "-")  # fmt: skip
    assert done.exit_code == 0, done.output
    return out, json.loads(done.stdout)


def test_files_beside_the_model_say_what_the_integers_mean(
    made: tuple[Path, dict[str, Any]],
) -> None:
    out, report = made
    beside = [str(out) + ".io.json", str(out.with_suffix(".h"))]
    assert report["also_written"] == beside
    told = json.loads(Path(beside[0]).read_text())
    assert (told["model"], told["schema"], told["preprocess"]) == ("out.onnx", 1, None)
    ports = ports_of(Model.load(out))
    for role in ("input", "output"):
        (entry,) = told[f"{role}s"]
        port = ports[entry["name"]]
        affine = port.affine
        assert port.role == role
        assert (entry["type"], entry["scale"], entry["zero_point"], entry["axis"]) == (
            "int8", affine.scale, affine.zero_point, None
        )  # fmt: skip
        assert (entry["least"], entry["greatest"]) == (-128, 127)
        assert entry["range"] == affine.dequantize(np.array([-128, 127], np.int8)).tolist()
    assert told["inputs"][0]["shape"] == ["N", 1, 28, 28]
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "out.h", "out.onnx", "out.onnx.io.json", "plan.toml"
    ]  # fmt: skip


def test_the_run_compares_and_times_through_the_interface(
    made: tuple[Path, dict[str, Any]],
) -> None:
    report = made[1]
    (output,) = report["fidelity"]["outputs"]
    assert output["sqnr_db"] > 30
    assert output["max_abs"] < 1
    assert report["fidelity"]["result_accuracy"] > 0.9
    if report["latency"] is not None:
        assert report["latency"]["result_ms"] > 0


def test_a_saved_plan_makes_the_same_interface(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = made[0]
    again = tmp_path / "out.onnx"
    done = run("optimize", MODEL, again, "--data", DATA, "--recipe", out.parent / "plan.toml",
               "--header", "--quiet")  # fmt: skip
    assert done.exit_code == 0, done.output
    for name in ("out.onnx", "out.onnx.io.json", "out.h"):
        assert (tmp_path / name).read_bytes() == (out.parent / name).read_bytes()


@pytest.mark.parametrize("turned", [False, True])
def test_compare_goes_through_the_metadata(
    made: tuple[Path, dict[str, Any]], *, turned: bool
) -> None:
    pair = (MODEL, made[0])
    done = run("compare", *(reversed(pair) if turned else pair), "--data", DATA, "--json", "-",
               "--min-sqnr", 30)  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["fidelity"]["original_accuracy"] > 0.9
    assert found["layers"]


def test_compare_takes_two_integer_interfaces(made: tuple[Path, dict[str, Any]]) -> None:
    found = onnxq.compare(made[0], made[0], data=DATA)
    assert found.fidelity.sqnr_db == float("inf")
    assert found.fidelity.original_accuracy > 0.9  # type: ignore[operator]


def test_inspect_and_the_report_tell_the_scales(made: tuple[Path, dict[str, Any]]) -> None:
    scale = ports_of(Model.load(made[0]))["image"].affine.scale
    (told,) = onnxq.inspect(made[0]).inputs
    assert told == f"image [N, 1, 28, 28] int8, x = (q + 95) * {scale:.6g}"
    report = onnxq.optimize(MODEL, data=DATA, recipe="int8", integer_io="int8", validate=False)
    assert f"input: int8, scale {scale:.6g}, zero point -95" in report.text()


def test_synthetic_samples_reach_integer_inputs(made: tuple[Path, dict[str, Any]]) -> None:
    assert onnxq.compare(MODEL, made[0]).fidelity.samples == 32


def test_a_second_run_leaves_the_interface_alone(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    done = run("optimize", made[0], tmp_path / "a.onnx", "--recipe", "cleanup", "--data", DATA)
    assert done.exit_code == 0, done.output
    assert ports_of(Model.load(tmp_path / "a.onnx")) == ports_of(Model.load(made[0]))
    done = run("optimize", made[0], tmp_path / "b.onnx", "--recipe", "int8", "--data", DATA,
               "--integer-io", "--allow-unchanged", "--no-validate")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert ports_of(Model.load(tmp_path / "b.onnx")) == ports_of(Model.load(made[0]))


def test_floats_come_back_where_integers_were_opened() -> None:
    floats = parser.parse_model(PAIRS)
    model = Model.from_proto(floats)
    model.envelope.metadata_props.add(key="other", value="kept")
    IntegerIo()(model)
    assert restore_floats(model) == ["x", "y"]
    assert [e.key for e in model.envelope.metadata_props] == ["other"]
    assert restore_floats(model) == []
    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    feed = {"x": np.array([[-1.04, 0.0, 0.26, 3.0]], np.float32), "ids": np.array([7])}
    (want, _), (got, _) = (runtime.session(p).run(None, feed) for p in (floats, proto))
    np.testing.assert_array_equal(got, want)


def test_requantizing_starts_from_a_float_interface(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    report = onnxq.optimize(made[0], tmp_path / "out.onnx", data=DATA, recipe="int8",
                            requantize=True)  # fmt: skip
    assert report.fidelity is not None
    assert report.fidelity.sqnr_db > 30
    again = Model.load(tmp_path / "out.onnx")
    assert [str(np.dtype(t.dtype)) for t in again.graph.inputs] == ["float32"]
    assert not ports_of(again)


def test_auto_chooses_among_those_with_fixed_ranges(tmp_path: Path) -> None:
    report = onnxq.optimize(MODEL, tmp_path / "out.onnx", data=DATA, integer_io="auto")
    assert [c.recipe for c in report.candidates] == ["int8", "int8-hybrid", "int8-mixed"]
    assert ports_of(Model.load(tmp_path / "out.onnx")).keys() == {"image", "logits"}
    assert (tmp_path / "out.onnx.io.json").exists()
    assert not (tmp_path / "out.h").exists()


REFUSED = [
    pytest.param(["--integer-io"], "give --data, or --recipe int8", id="auto-without-data"),
    pytest.param(["--integer-io", "--recipe", "int8-weights"], "fixes no ranges", id="no-ranges"),
    pytest.param(["--header", "--recipe", "int8"], "add --integer-io", id="header-alone"),
    pytest.param(["--integer-io=int4"], "'int4' is not one of", id="unknown-type"),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(
    flags: list[str], said: str, tmp_path: Path
) -> None:
    done = run("optimize", MODEL, tmp_path / "out.onnx", *flags)
    assert done.exit_code == 2
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


def test_no_file_of_the_run_is_overwritten(tmp_path: Path) -> None:
    data = tmp_path / "out.onnx.io.json"
    shutil.copy(DATA, data)
    with pytest.raises(RecipeError, match="a file that this run reads or writes"):
        onnxq.optimize(MODEL, tmp_path / "out.onnx", data=str(data), integer_io="auto")
    (tmp_path / "made.onnx.io.json").mkdir()
    with pytest.raises(ModelError, match="cannot be written"):
        onnxq.optimize(MODEL, tmp_path / "made.onnx", data=DATA, recipe="int8", integer_io="auto")
    assert not (tmp_path / "made.onnx").exists()
    with pytest.raises(RecipeError, match="a file that this run reads or writes"):
        onnxq.optimize(MODEL, tmp_path / "out.h", data=DATA, integer_io="auto", header=True)


def test_dry_run_shows_the_pass(tmp_path: Path) -> None:
    done = run("optimize", MODEL, tmp_path / "o.onnx", "--data", DATA, "--recipe", "int8",
               "--integer-io", "uint8", "--dry-run")  # fmt: skip
    assert "integer_io(target=ort-cpu, type=uint8" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_flag_sets_the_type_of_a_recipe_that_has_the_pass() -> None:
    recipe = load_recipe("int8")
    once = with_integer_io(recipe, "auto")
    assert once.passes == (*recipe.passes, "integer_io")
    again = with_integer_io(once, "int8")
    assert again.passes == once.passes
    assert again.options["integer_io"] == {"type": "int8"}
    assert with_integer_io(once, None) is once
    chosen = with_integer_io(replace(load_recipe("auto")), "int8")
    assert all("quantize_static" in one.passes for one in chosen.candidates)


def test_what_stays_float_is_told_or_refused() -> None:
    stays = Note("integer_io", "x", "input: stays float, no samples tell its range", changed=False)
    plain = Note("integer_io", "ids", "input: is of int64, no floats", changed=False)
    done = Note("integer_io", "y", "output: int8, scale 1, zero point 0")
    assert require_integers([stays, plain, done]) == [f"x: {stays.text}"]
    assert require_integers([plain]) == require_integers([]) == []
    with pytest.raises(BudgetError, match="no input or output can be an integer: x: input: stays"):
        require_integers([stays, plain])


def test_outputs_that_eight_bits_are_too_few_for_are_named() -> None:
    model = Model.from_proto(parser.parse_model(PAIRS))
    IntegerIo()(model)

    def seen(name: str, sqnr_db: float) -> OutputFidelity:
        return OutputFidelity(name, sqnr_db, 1.0, 0.1, None, is_finite=True)

    assert coarse(model, Fidelity((seen("y", 31.0), seen("same", 3.0)), 8)) == []
    (told,) = coarse(model, Fidelity((seen("y", 8.9),), 8))
    assert told == (
        "output 'y' keeps 8.9 dB as uint8: let it stay float (a recipe with "
        'keep = ["y"] under [integer_io]) or use --recipe a16w8'
    )


def test_images_are_described_for_the_device(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8)).save(folder / f"{i}.png")
    images = ImageOptions(mean=(0.1307,), std=(0.3081,))
    out = tmp_path / "out.onnx"
    onnxq.optimize(MODEL, out, data=str(folder), recipe="int8", integer_io="auto", images=images)
    told = json.loads((tmp_path / "out.onnx.io.json").read_text())["preprocess"]
    assert told == {
        "channels": "grey", "layout": "channels first", "resize": "stretch", "keep": None,
        "values": "x = (pixel * scale - mean) / std", "scale": 1 / 255, "mean": [0.1307],
        "std": [0.3081],
    }  # fmt: skip


def test_a_client_converts_what_the_metadata_explain_and_nothing_else() -> None:
    floats = parser.parse_model(PAIRS)
    model = Model.from_proto(floats)
    IntegerIo()(model)
    client = runtime.Client(runtime.session(model))
    x, ids = np.array([[-1.04, 0.0, 0.26, 3.0]], np.float32), np.array([7])
    fed = client.fed({"x": x, "ids": ids, "labels": ids})
    assert fed.keys() == {"x", "ids"}
    assert fed["x"].dtype == np.uint8
    assert fed["x"].tolist() == [[118, 128, 131, 158]]
    assert client.fed({"x": fed["x"], "ids": ids})["x"] is fed["x"]  # integers as they are
    y, same = client.run({"x": x, "ids": ids})
    (want, _) = runtime.session(floats).run(None, {"x": x, "ids": ids})
    np.testing.assert_array_equal(y, want)
    assert same.tolist() == [7]
    ratio = runtime.latency(floats, model, {"x": x, "ids": ids}, seconds=0.01).ratio
    assert ratio > 0


def test_comparing_without_metadata_says_that_a_sample_does_not_run() -> None:
    model = Model.from_proto(parser.parse_model(PAIRS))
    IntegerIo()(model)
    del model.envelope.metadata_props[:]
    floats = parser.parse_model(PAIRS)
    feeds = [{"x": np.zeros((1, 4), np.float32), "ids": np.array([1])}]
    given = open_samples(feeds, Model.from_proto(floats))
    with pytest.raises(onnxq.DataError, match="sample 0 does not run"):
        compare(floats, model, given)


def test_models_without_integer_inputs_are_sampled_as_they_are() -> None:
    model = Model.from_proto(parser.parse_model(PAIRS))
    assert with_float_inputs(model) is model
    IntegerIo()(model)
    seen = with_float_inputs(model)
    assert [str(np.dtype(t.dtype)) for t in seen.graph.inputs] == ["float32", "int64"]
    assert [t.name for t in seen.graph.inputs] == ["x", "ids"]
    assert np.dtype(model.graph.inputs[0].dtype) == np.uint8


NAMES = [
    "x",
    "X",
    "x:0",
    "x.0",
    "0",
    "int",
    "a/b*/c",
    'quote"\\',
    "eingäng",
    "??/",
    "",
    "x_quantize",
]
AFFINES = [
    Affine("int8", float(np.float32(0.1)), -95), Affine("uint8", 1.0, 0),
    Affine("int16", float(np.float32(3e-5)), 7), Affine("uint16", 2.0**-7, 65535),
]  # fmt: skip
SHAPES = [("N", 3, None, 4), (), (2, 3), None]


def header() -> tuple[str, list[Terminal]]:
    found = [
        Terminal(n, "input", AFFINES[i % 4].type, SHAPES[i % 4], AFFINES[i % 4])
        for i, n in enumerate(NAMES)
    ]
    found.append(Terminal("ids", "output", "int64", ("N", 5), None))
    return c_header(found, "my model-1.onnx"), found


def test_identifiers_are_unique_and_plain() -> None:
    text, found = header()
    names = [
        line.split()[1].removesuffix("_NAME") for line in text.splitlines() if "_NAME " in line
    ]
    assert len(names) == len({n.upper() for n in names}) == len(found)
    assert names[:4] == ["MY_MODEL_1_X", "MY_MODEL_1_X_2", "MY_MODEL_1_X_0", "MY_MODEL_1_X_0_2"]
    assert text.isascii()
    assert "#define MY_MODEL_1_IDS_SHAPE {-1, 5}" in text
    assert "IDS_SCALE" not in text


def program(text: str, terminals: list[Terminal]) -> tuple[str, list[str]]:
    """A C program that prints what the header's functions give, and what `Affine` gives."""
    prefixes = [line.split()[1].removesuffix("_NAME").lower() for line in text.splitlines()
                if "_NAME " in line]  # fmt: skip
    functions = {name.lower(): name for name in re.findall(r"\w+(?=_quantize\(float)", text)}
    rng = np.random.default_rng(0)
    calls, want = [], []
    for terminal, prefix in zip(terminals, prefixes, strict=True):
        if (affine := terminal.affine) is None:
            continue
        edges = [-0.5, 0.5, 1.5, 2.5, -1.5, 0, 1e9, -1e9, 127.5, 32767.5, 65535.5]
        steps = np.concatenate([edges, rng.normal(0, 90, 40)]).astype(np.float32)
        values = steps * np.float32(affine.scale)
        q = affine.quantize(values)
        bits = affine.dequantize(q).view(np.uint32)
        want += [f"{i} {b}" for i, b in zip(q, bits, strict=True)]
        name = functions[prefix]
        for value in map(float, values):
            made = f"{name}_quantize({value.hex()}f)"
            calls.append(f"    show({made}, {name}_dequantize({made}));")
    return PROGRAM.replace("CALLS", "\n".join(calls)), want


PROGRAM = r"""
#include <stdio.h>
#include <string.h>
#include "io.h"
#include "io.h"

static void show(int q, float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    printf("%d %lu\n", q, (unsigned long)bits);
}

int main(void)
{
CALLS
    return 0;
}
"""
GCC = shutil.which("gcc")
FLAGS = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
if GCC is not None:
    COMPILER: str = GCC

    def test_the_header_compiles_and_quantizes_as_onnx_does(tmp_path: Path) -> None:
        """On edges, halves and random values the bits are those of `Affine`, which is ONNX's."""
        text, found = header()
        code, want = program(text, found)
        (tmp_path / "io.h").write_text(text)
        (tmp_path / "main.c").write_text(code)
        for rest in (("main.c", "-o", "main"), ("-x", "c", "-fsyntax-only", "io.h")):
            done = subprocess.run(
                [COMPILER, *FLAGS, *rest], cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
        said = subprocess.run([tmp_path / "main"], capture_output=True, text=True).stdout
        assert said.splitlines() == want

    def test_the_header_of_a_real_model_compiles(made: tuple[Path, dict[str, Any]]) -> None:
        path = str(made[0].with_suffix(".h"))
        done = subprocess.run(
            [COMPILER, *FLAGS, "-fsyntax-only", "-x", "c", path], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
