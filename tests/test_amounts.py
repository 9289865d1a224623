"""--prune, --prune-channels and --nm in any recipe: Python, files and the command line agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper, parser

import onnxq
from onnxq import Settings
from onnxq.cli import main
from onnxq.errors import BudgetError, RecipeError
from onnxq.recipes import Recipe, load_recipe
from onnxq.settings import configured
from onnxq.workflow import PRUNED_BLINDLY

MODELS = Path(__file__).parent.parent / "models"
CNN, DATA = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn.calib.npz"


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def with_amounts(recipe: str | Recipe, **asked: Any) -> Recipe:
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    return configured(chosen, Settings(**asked))


AMOUNTS = [
    ("0.5", {"amount": 0.5}),
    (0.25, {"amount": 0.25}),
    ("60%", {"amount": 0.6}),
    (".7:wanda", {"amount": 0.7, "criterion": "wanda"}),
    ("50%:magnitude", {"amount": 0.5, "criterion": "magnitude"}),
]


@pytest.mark.parametrize(("text", "options"), AMOUNTS)
def test_amounts_and_criteria(text: Any, options: dict[str, Any]) -> None:
    assert with_amounts("sparse", prune=text).options["prune_weights"] == options


WRONG = [
    ({"prune": "1.5"}, "--prune 1.5: a share of the weights, above 0 and below 1: 0.5, or 50%"),
    ({"prune": "half"}, "--prune half: a share"),
    ({"prune": "0"}, "--prune 0: a share"),
    ({"prune": "100%"}, "--prune 100%: a share"),
    ({"prune": "0.5:wand"}, "unknown criterion 'wand': magnitude, wanda, obs; did you mean"),
    ({"prune_channels": "2"}, "--prune-channels 2: a share of the multiply-accumulates"),
    ({"nm": "4:2"}, "--nm 4:2: N of each M weights stay, N below M, M up to 256, as in 2:4"),
    ({"nm": "1:257"}, "--nm 1:257: N of each M"),
    ({"nm": "1:" + "9" * 5000}, "N of each M weights stay"),
    ({"nm": "2"}, "--nm 2: N of each M"),
    ({"nm": "2:4", "prune": 0.3}, "--nm 2:4 makes 50% of the weights zero, --prune asks for 30%"),
    ({"nm": 24}, "setting nm = 24 is not str"),
]


@pytest.mark.parametrize(("asked", "why"), WRONG)
def test_what_is_no_amount(asked: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError) as error:
        Settings(**asked)
    assert why.split(";")[0] in str(error.value)
    assert "\n" not in str(error.value)


def test_patterns_say_how_much() -> None:
    assert with_amounts("sparse", nm="1:4").options["prune_weights"] == {"nm": "1:4"}
    both = with_amounts("sparse", nm="2:4", prune="50%:wanda")
    assert both.options["prune_weights"] == {"nm": "2:4", "criterion": "wanda"}
    assert with_amounts("sparse-2-4", nm="4:8").options["prune_weights"] == {"nm": "4:8"}
    with pytest.raises(RecipeError, match="recipe sparse-2-4 prunes 2:4: --nm changes that"):
        with_amounts("sparse-2-4", prune=0.7)


def test_other_recipes_get_the_pass_behind_their_clean_up() -> None:
    before = load_recipe("int8")
    at = before.passes.index("cleanup") + 1
    found = with_amounts(before, prune=0.5, prune_channels=0.3)
    assert found.passes[:at] == before.passes[:at]
    assert found.passes[at : at + 2] == ("prune_channels", "prune_weights")
    assert found.passes[at + 2 :] == before.passes[at:]
    assert found.options["prune_channels"] == {"macs": 0.3}
    assert found.is_pruning
    assert not before.is_pruning
    assert with_amounts("slim", prune=0.5).passes[-2:] == ("prune_channels", "prune_weights")
    assert with_amounts("sparse", prune_channels="20%").passes[4:6] == found.passes[at : at + 2]


def test_where_there_is_no_clean_up() -> None:
    bare = Recipe("mine", "x", ("raise_opset", "equalize_layers", "quantize_weights"))
    found = with_amounts(bare, nm="2:4")
    assert found.passes == ("raise_opset", "prune_weights", "equalize_layers", "quantize_weights")
    last = with_amounts(Recipe("mine", "x", ("raise_opset",)), prune=0.5)
    assert last.passes == ("raise_opset", "prune_weights")


def test_all_that_a_recipe_chooses_from_prune() -> None:
    found = with_amounts("auto", prune=0.5, weights="int8")
    assert len(found.choose) > 2
    for one in found.choose:
        assert one.options["prune_weights"] == {"amount": 0.5}
        assert one.passes[one.passes.index("cleanup") + 1] == "prune_weights"


def test_the_plan_shows_it_and_can_be_saved(tmp_path: Path) -> None:
    shown = run(
        "optimize", CNN, tmp_path / "x.onnx", "--recipe", "int8-weights", "--prune", "40%",
        "--layer", "first=dense", "--dry-run",
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert "prune_weights(amount=0.4" in shown.output
    plan, report = tmp_path / "plan.toml", tmp_path / "report.json"
    args = ["--data", DATA, "--recipe", "sparse", "--prune", "0.4:magnitude"]
    done = run("optimize", CNN, tmp_path / "x.onnx", *args, "--save-plan", plan, "--json", report)
    assert done.exit_code == 0, done.output
    saved = load_recipe(str(plan))
    assert saved.options["prune_weights"] == {"amount": 0.4, "criterion": "magnitude"}
    again = onnxq.optimize(CNN, tmp_path / "y.onnx", data=DATA, recipe=str(plan))
    assert (tmp_path / "x.onnx").read_bytes() == (tmp_path / "y.onnx").read_bytes()
    assert again.pruned
    assert "40.0% of their weights are zero; all still are in the result" in done.output
    found = json.loads(report.read_text())
    assert all(row["kept"] == row["zeros"] for row in found["pruned"])
    assert {row["node"] for row in found["pruned"]} == {p.node for p in again.pruned}
    assert found["stored"][1]["zeros"] == pytest.approx(0.4, abs=0.01)


def test_flags_and_settings_are_the_same(tmp_path: Path) -> None:
    args = ["--recipe", "int8-weights", "--nm", "2:4", "--data", DATA]
    done = run("optimize", CNN, tmp_path / "a.onnx", *args)
    assert done.exit_code == 0, done.output
    onnxq.optimize(
        CNN, tmp_path / "b.onnx", recipe="int8-weights", settings=Settings(nm="2:4"), data=DATA
    )
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    wrong = run("optimize", CNN, tmp_path / "a.onnx", "--nm", "2:4", "--prune", "0.3")
    assert wrong.exit_code == 2
    assert len(wrong.output.strip().splitlines()) == 1


RELU = parser.parse_model(
    '<ir_version: 8, opset_import: ["": 17]> g (float[2,8] x) => (float[2,8] y) { y = Relu(x) }'
)


@pytest.mark.parametrize("recipe", ["sparse", "slim"])
def test_nothing_pruned_is_a_broken_promise(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"nothing was pruned: .*--allow-unchanged"):
        onnxq.optimize(RELU, tmp_path / "x.onnx", recipe=recipe)
    assert not (tmp_path / "x.onnx").exists()
    report = onnxq.optimize(RELU, tmp_path / "x.onnx", recipe=recipe, allow_unchanged=True)
    assert not report.pruned
    assert (tmp_path / "x.onnx").exists()


def test_the_reasons_are_said(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"nothing was pruned: asked for by the .*\(10\)"):
        onnxq.optimize(CNN, tmp_path / "x.onnx", recipe="sparse", layers=("*=dense",))


def test_recipes_without_quantization_stay_float() -> None:
    for name in ("sparse", "sparse-2-4", "slim"):
        assert not load_recipe(name).is_quantizing
        assert load_recipe(name).is_pruning
    for name in ("slim-int8", "sparse-int4"):
        assert load_recipe(name).is_quantizing
        assert load_recipe(name).is_pruning
    assert not load_recipe("int4-accurate").is_pruning


def test_slim_is_smaller_and_says_what_work_is_left(tmp_path: Path) -> None:
    report = onnxq.optimize(CNN, tmp_path / "x.onnx", data=DATA, recipe="slim")
    assert report.macs is not None
    before, after = report.macs
    assert after <= 0.72 * before
    assert f"-> {after:,.0f} multiply-accumulates   {after / before:.2f}x" in report.text()
    assert report.size_bytes[1] < 0.9 * report.size_bytes[0]
    assert report.coverage.macs_share == 0
    curves = [note for note in json.loads(report.to_json())["notes"] if note["curve"]]
    assert all(len(point) == 2 for note in curves for point in note["curve"])
    assert ("most sensitive" in report.text()) == bool(curves)
    assert PRUNED_BLINDLY not in report.warnings


def test_slim_without_data_says_so(tmp_path: Path) -> None:
    """No curve either: the outputs were not looked at."""
    report = onnxq.optimize(CNN, tmp_path / "x.onnx", recipe="slim")
    assert PRUNED_BLINDLY in report.warnings
    assert not any(note.curve for note in report.notes)


def small(tmp_path: Path) -> Path:
    """Two layers; the first one's zeros go when a pass of one's own runs last."""
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[4,64] x) => (float[4,64] y)'
        "{ h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }"
    )
    rng = np.random.default_rng(0)
    for name in "ab":
        w = rng.standard_normal((64, 64)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(w, name))
    onnx.save(proto, tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


def test_lost_zeros_are_a_warning(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'description = "x"\npasses = ["cleanup", "prune_weights", "test_amounts:ShiftWeights"]\n'
    )
    report = onnxq.optimize(small(tmp_path), tmp_path / "x.onnx", recipe=str(recipe))
    blind, warning = [w for w in report.warnings if "pruned" in w]
    assert blind == PRUNED_BLINDLY
    assert warning.startswith("2048 weights that were pruned are not zero in the result, in ")
    assert "2048 of 4096 still are" in report.text()
    assert [row.kept == row.zeros for row in report.pruned] == [False, True]


class ShiftWeights:
    """Adds something to the first weight that it meets."""

    name = "shift_weights"

    def __call__(self, model: Any) -> list[Any]:
        node = model.nodes("MatMul")[0]
        values = np.array(node.inputs[1].values) + np.float32(0.01)
        node.inputs[1] = model.constant("shifted", values)
        return []


@pytest.mark.parametrize("recipe", ["int8", "int8-dynamic", "int4-weights", "codebook-weights"])
def test_zeros_are_found_again_in_each_form(recipe: str, tmp_path: Path) -> None:
    """Integers at their zero point, transposed or not, under other names of nodes."""
    path = small(tmp_path)
    settings = Settings(prune="0.5:magnitude")
    report = onnxq.optimize(path, tmp_path / "x.onnx", recipe=recipe, settings=settings)
    assert len(report.pruned) == 2
    assert all(row.kept == row.zeros == 2048 for row in report.pruned)
    assert all(row.zeros is not None and row.zeros >= 0.5 for row in report.stored)


@pytest.mark.parametrize("recipe", ["sparse", "slim"])
def test_samples_are_looked_at_though_nothing_is_compared(recipe: str, tmp_path: Path) -> None:
    report = onnxq.optimize(
        CNN, tmp_path / "out.onnx", data=DATA, recipe=recipe, validate=False
    )  # fmt: skip
    assert PRUNED_BLINDLY not in report.warnings
    assert report.fidelity is None
    assert any("others set anew" in n.text or "fitted anew" in n.text for n in report.notes)
