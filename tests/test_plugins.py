"""Passes by name: built in, installed by a distribution, in a user's module; their options."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import parser

from onnxq import catalog, options, recipes
from onnxq.cli import main
from onnxq.errors import RecipeError
from onnxq.passes import PASSES
from onnxq.plugins import find_pass, installed
from onnxq.recipes import Recipe, load_recipe

ROOT = Path(__file__).parent.parent
SOURCE = '''
from __future__ import annotations
from dataclasses import dataclass
from typing import Literal
from onnxq import Note, rewrites


@rewrites("Neg")
def drop_double_neg(model, node):
    """Neg(Neg(x)) => x."""
    inner = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if inner is None or inner.op != "Neg":
        return None
    model.replace(node.outputs[0], inner.inputs[0])
    return f"undid {inner.name}"


@dataclass(frozen=True, slots=True)
class RenameGraph:
    """Give the graph another name.

    to: the name.
    """

    to: str
    case: Literal["lower", "upper"] = "lower"
    times: int = 1
    share: float = 0.5
    only: tuple[str, ...] = ()
    strict: bool = False
    version: str = "mine"

    @property
    def name(self):
        return "rename_graph"

    def __call__(self, model, /):
        wanted = getattr(self.to, self.case)()
        if model.graph.name == wanted:
            return []
        model.graph.name = wanted
        return [Note(self.name, "", f"now {wanted}, {self.only}")]


@dataclass(frozen=True)
class Nameless:
    def __call__(self, model, /):
        return []


def function(model):
    return []


class NoCall:
    name = "no_call"


number = 3
'''
TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[2] x) => (float[2] y) { a = Neg (x)  b = Neg (a)  c = Relu (b)  y = Abs (c) }"""
Install = Callable[[str, str], None]


def run(*args: Any, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args], env=env)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a module `mine` and a model m.onnx."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("import no_such_module")
    (tmp_path / "m.onnx").write_bytes(parser.parse_model(TEXT).SerializeToString())
    for name in ("mine", "broken", "brought"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution on the path, as pip does: its module `brought`, and what tells of it."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "brought.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(site))

    def put(distribution: str, points: str) -> None:
        info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        )
        (info / "entry_points.txt").write_text(f"[onnxq.passes]\n{points}\n")
        importlib.invalidate_caches()

    return put


def recipe(folder: Path, passes: list[str], table: str = "") -> Path:
    path = folder / "r.toml"
    path.write_text(f'description = "mine"\npasses = {json.dumps(passes)}\n{table}')
    return path


def test_a_module_in_the_current_directory(folder: Path) -> None:
    names = ["mine:drop_double_neg", "cleanup", "mine:RenameGraph"]
    path = recipe(folder, names, '["mine:RenameGraph"]\nto = "Other"\nonly = ["a"]')
    done = run("optimize", "m.onnx", "out.onnx", "--recipe", path, "--json", "r.json", "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    graph = onnx.load("out.onnx").graph
    assert (graph.name, [n.op_type for n in graph.node]) == ("other", ["Relu", "Abs"])
    notes = {n["rule"]: n["text"] for n in json.loads(Path("r.json").read_text())["notes"]}
    assert notes["rename_graph"] == "now other, ('a',)"  # a list of TOML is a tuple
    assert notes["drop_double_neg"].startswith("undid")


def test_a_dry_run_shows_the_passes(folder: Path) -> None:
    path = recipe(folder, ["mine:RenameGraph"], '["mine:RenameGraph"]\nto = "Other"')
    done = run("optimize", "m.onnx", "out.onnx", "--recipe", path, "--dry-run")
    assert "rename_graph(to=Other, case=lower, times=1" in done.stdout
    assert not Path("out.onnx").exists()


def test_an_installed_distribution(folder: Path, install: Install) -> None:
    install(
        "onnxq-brought", "drop_double_neg = brought:drop_double_neg\nrename = brought:RenameGraph"
    )
    path = recipe(folder, ["drop_double_neg", "rename"], '[rename]\nto = "X"\ncase = "upper"')
    assert run("optimize", "m.onnx", "out.onnx", "--recipe", path, "--quiet").exit_code == 0
    assert onnx.load("out.onnx").graph.name == "X"
    listed = run("passes").stdout
    assert "Neg(Neg(x)) => x. (of onnxq-brought)" in " ".join(listed.split())
    told = json.loads(run("passes", "rename", "--json", "-").stdout)
    assert told["distribution"] == "onnxq-brought"
    assert told["text"].startswith("Give the graph another name.\n")


def test_pip_installs_such_a_distribution(tmp_path: Path) -> None:
    """With a real build: a folder with a pyproject.toml, and pip."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src/brought.py").write_text(SOURCE)
    (tmp_path / "src/pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "onnxq-brought"\nversion = "1.0"\n'
        '[project.entry-points."onnxq.passes"]\nrename = "brought:RenameGraph"\n'
        '[tool.setuptools]\npy-modules = ["brought"]\n'
    )
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    made = subprocess.run(
        [*pip, "--target", str(site), str(tmp_path / "src")], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("pip cannot build here")
    done = subprocess.run(
        [sys.executable, "-m", "onnxq", "passes", "rename"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{site}"}, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert "rename (of onnxq-brought)" in done.stdout
    assert "one of lower, upper" in done.stdout


CLASHES = [
    pytest.param("cleanup = brought:RenameGraph", "", "has the name of a pass of onnxq", id="ours"),
    pytest.param(
        "rename = brought:RenameGraph", "rename = brought:Nameless",
        "has the name of a pass of onnxq-", id="theirs",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("one", "two", "text"), CLASHES)
def test_names_do_not_clash(one: str, two: str, text: str, folder: Path, install: Install) -> None:
    install("onnxq-one", one)
    install("onnxq-two", two)
    done = run("optimize", "m.onnx", "out.onnx", "--recipe", "cleanup")
    assert done.exit_code == 2
    assert text in done.stderr
    assert "uninstall onnxq-" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_same_pass_twice_is_no_clash(install: Install) -> None:
    install("onnxq-one", "rename = brought:RenameGraph")
    install("onnxq-two", "rename = brought:RenameGraph")
    assert list(installed()) == ["rename"]


def test_an_installed_pass_that_does_not_load(folder: Path, install: Install) -> None:
    install("onnxq-one", "rename = brought:NoSuchPass")
    done = run("optimize", "m.onnx", "out.onnx", "--recipe", recipe(folder, ["rename"]))
    assert done.exit_code == 2
    assert "'rename' cannot be imported: AttributeError" in done.stderr
    assert run("optimize", "m.onnx", "out.onnx", "--recipe", "cleanup").exit_code == 0


WRONG = [
    pytest.param(["no.module:X"], "", "cannot be imported: ModuleNotFoundError", id="module"),
    pytest.param(["broken:X"], "", "No module named 'no_such_module'", id="broken"),
    pytest.param(["mine:Missing"], "", "cannot be imported: AttributeError", id="attribute"),
    pytest.param(["mine:"], "", "cannot be imported", id="no-attribute"),
    pytest.param([":X"], "", "cannot be imported: ValueError", id="no-module"),
    pytest.param(["mine:number"], "", "'mine:number' is not a pass", id="number"),
    pytest.param(["mine:function"], "", "onnxq.rewrites makes one of a function", id="function"),
    pytest.param(["mine:NoCall"], "", "'mine:NoCall' is not a pass", id="no-call"),
    pytest.param(["mine:Nameless"], "", "it has no name", id="no-name"),
    pytest.param(["mine:RenameGraph"], "", "missing 1 required", id="required"),
    pytest.param(["fold_bathcnorm"], "", "did you mean 'fold_batchnorm'?", id="typo"),
    pytest.param(["cleanup"], "[clean_up]\n", "did you mean 'cleanup'?", id="table-typo"),
    pytest.param(["cleanup"], "cleanup = 3\n", "its options go under", id="no-table"),
    pytest.param(["mine:RenameGraph"], '["mine:RenameGraph"]\ntoo = "x"', "did you mean 'to'?", id="option"),
    pytest.param(["mine:RenameGraph"], '["mine:RenameGraph"]\nto = 3', "to = 3 is not str", id="str"),
    pytest.param(["quantize_static"], '[quantize_static]\nrange = "mean"', "not one of minmax, perc", id="choice"),
    pytest.param(["quantize_static"], "[quantize_static]\nsamples = 3", "no option 'samples'", id="filled-in"),
    pytest.param(["quantize_weights"], "[quantize_weights]\nsmallest = true", "is not int", id="bool"),
    pytest.param(["quantize_weights"], "[quantize_weights]\nsmallest = 1.5", "is not int", id="float"),
]  # fmt: skip


@pytest.mark.parametrize(("passes", "table", "text"), WRONG)
def test_wrong_recipes_are_one_line(passes: list[str], table: str, text: str, folder: Path) -> None:
    done = run("optimize", "m.onnx", "out.onnx", "--recipe", recipe(folder, passes, table))
    assert done.exit_code == 2
    assert done.stderr.startswith("onnxq: error: ")
    assert done.stderr.count("\n") == 1
    assert text in done.stderr
    assert not Path("out.onnx").exists()


TYPES = [
    ("times", [2], ["2", 2.0, True]),
    ("share", [2, 0.5], ["2", True]),
    ("only", [[], ["a"]], ["a", [1]]),
    ("strict", [True], [1, "true"]),
    ("version", ["v"], [1]),
]


@pytest.mark.parametrize(("name", "good", "bad"), TYPES, ids=[t[0] for t in TYPES])
def test_options_are_checked_by_type(
    name: str, good: list[Any], bad: list[Any], folder: Path
) -> None:
    entry = find_pass("mine:RenameGraph")
    for value in good:
        made = options.build("x", entry, {"to": "x", name: value}, {"version": 17})
        assert getattr(made, name) == (tuple(value) if isinstance(value, list) else value)
    for value in bad:
        with pytest.raises(RecipeError, match=f"x: {name} = "):
            options.build("x", entry, {"to": "x", name: value}, {})
    made = options.build("x", entry, {"to": "x"}, {"version": 17})
    assert "version='mine'" in repr(made)  # its own option, with a default


# --- what is listed -------------------------------------------------------------------------------


def test_every_pass_is_listed_and_told() -> None:
    listed = {p["name"]: p for p in json.loads(run("passes", "--json", "-").stdout)["passes"]}
    assert set(listed) >= set(PASSES)
    for name in PASSES:
        told = json.loads(run("passes", name, "--json", "-").stdout)
        assert told.items() >= listed[name].items()
        assert len(told["text"].partition("\n")[0]) > 20
        assert run("passes", name).exit_code == 0


def test_a_pass_shows_its_mathematics_and_options() -> None:
    text = run("passes", "quantize_static").stdout
    assert "y = DQ(Q(Conv(DQ(Q(x)), DQ(Wq), DQ(bq))))" in text
    assert 'one of minmax, percentile, entropy, mse, careful, output, default "minmax"' in text
    assert "samples  " not in text
    assert "no options" in run("passes", "fold_add").stdout
    assert "fold_batchnorm" in run("passes", "cleanup").stdout


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_printed_as_a_file_that_can_be_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.toml"
    path.write_text(run("recipes", name).stdout)
    assert load_recipe(str(path)) == load_recipe(name)
    told = json.loads(run("recipes", name, "--json", "-").stdout)
    assert told["passes"] or told["choose"]
    assert name in run("recipes").stdout


def test_a_recipe_of_ones_own_is_printed_with_what_it_leaves_out(folder: Path) -> None:
    table = '["mine:RenameGraph"]\nto = "a \\"b\\" \\\\ ü"\nonly = ["x", "y"]\nstrict = true'
    path = recipe(folder, ["mine:RenameGraph"], table)
    text = catalog.describe_recipe(str(path)).recipe.to_toml()
    assert tomllib.loads(text) == tomllib.loads(path.read_text())
    assert "# share = 0.5\n" in text
    assert Recipe("r", "mine", ("cleanup",), {}).to_toml().endswith('passes = ["cleanup"]\n')


# --- completion -----------------------------------------------------------------------------------

COMPLETED = [
    ("onnxq optimize --recipe i", {"int8"}),
    ("onnxq optimize --target ort-c", {"ort-cpu"}),
    ("onnxq calibrate --recipe cl", {"cleanup"}),
    ("onnxq passes quantize_s", {"quantize_static"}),
    ("onnxq recipes int", {"int8"}),
    ("onnxq cal", {"calibrate"}),
    ("onnxq optimize --min", {"--min-sqnr"}),
]


@pytest.mark.parametrize(("line", "wanted"), COMPLETED, ids=[c[0] for c in COMPLETED])
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, line: str, wanted: set[str]) -> None:
    words = line.split()
    env = {
        "_ONNXQ_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": words[-1] if shell == "fish" else str(len(words) - 1),
    }
    done = CliRunner().invoke(main, [], prog_name="onnxq", env=env)
    assert done.exit_code == 0
    found = {part for row in done.stdout.splitlines() for part in row.replace("\t", ",").split(",")}
    assert wanted <= found


def test_completion_of_files_and_of_installed_passes(install: Install) -> None:
    install("onnxq-brought", "rename = brought:RenameGraph")
    env = {"_ONNXQ_COMPLETE": "bash_complete", "COMP_CWORD": "3"}
    line = {"COMP_WORDS": "onnxq optimize --recipe ./my"}
    assert CliRunner().invoke(main, [], prog_name="onnxq", env=env | line).stdout == "file,./my\n"
    line = {"COMP_WORDS": "onnxq passes ren", "COMP_CWORD": "2"}
    assert (
        CliRunner().invoke(main, [], prog_name="onnxq", env=env | line).stdout == "plain,rename\n"
    )
    install("onnxq-clash", "cleanup = brought:RenameGraph")
    done = CliRunner().invoke(main, [], prog_name="onnxq", env=env | line)
    assert (done.exit_code, done.stdout.strip()) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_the_shell(shell: str) -> None:
    done = run("completion", shell)
    assert done.exit_code == 0
    assert f"_ONNXQ_COMPLETE={shell}_complete" in done.stdout
    assert "eval" in run("completion", "--help").stdout
    assert "onnxq completion bash" in run("--help").stdout
