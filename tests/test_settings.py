"""Options as flags, and overrides for single layers: Python, recipes and the command line agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

import onnxq
from onnxq import Settings
from onnxq.cli import main
from onnxq.errors import RecipeError
from onnxq.recipes import Recipe, load_recipe
from onnxq.settings import configured

MODELS = Path(__file__).parent.parent / "models"
CNN, DATA = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn.calib.npz"


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def options(recipe: Recipe) -> dict[str, dict[str, Any]]:
    return {name: dict(chosen) for name, chosen in recipe.options.items()}


def test_a_setting_goes_to_each_pass_that_has_it() -> None:
    asked = Settings(weights="int4", range="mse", activation_range="entropy", activations="a16")
    own = options(load_recipe("int8"))
    assert options(configured(load_recipe("int8"), asked)) == {
        "quantize_static": {
            **own["quantize_static"],
            "range": "entropy", "weight_range": "mse", "weights": "int4", "activations": "a16",
        },
        "smooth_activations": {
            "range": "entropy", "weight_range": "mse", "weights": "int4", "activations": "a16",
        },
        "reconstruct_weights": {**own["reconstruct_weights"], "format": "int4", "range": "mse"},
        "quantize_weights": {**own["quantize_weights"], "format": "int4", "range": "mse"},
    }  # fmt: skip


@pytest.mark.parametrize("recipe", ["int8", "int8-accurate", "a8w4"])
def test_bits_are_those_of_codebooks_alone(recipe: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe {recipe} has no pass that takes --bits"):
        configured(load_recipe(recipe), Settings(bits=4))


def test_ranges_by_outputs_are_a_setting_of_all_that_round_activations() -> None:
    found = configured(load_recipe("int8"), Settings(activation_range="output")).options
    assert {found[n]["range"] for n in ("quantize_static", "smooth_activations")} == {"output"}


def test_what_runs_before_quantization_is_told_what_comes() -> None:
    asked = Settings(weights="int4", range="mse", activation_range="entropy")
    before, own = ("reconstruct_weights", "scale_salient"), "smooth_activations"
    found = options(configured(Recipe("a", "b", (*before, own), {}), asked))
    assert all(found[name] == {"format": "int4", "range": "mse"} for name in before)
    assert found[own] == {"weights": "int4", "weight_range": "mse", "range": "entropy"}


def test_nothing_asked_nothing_changed() -> None:
    for name in ("int8", "auto", "cleanup"):
        assert configured(load_recipe(name), Settings()) == load_recipe(name)


def test_overrides_go_behind_those_of_the_recipe() -> None:
    base = load_recipe("int8-weights")
    own = Recipe(
        base.name, base.description, base.passes, {"quantize_weights": {"layers": ["a=int4"]}}
    )
    found = configured(own, None, ("a=float", "last=int8"))
    assert found.options["quantize_weights"]["layers"] == ["a=int4", "a=float", "last=int8"]
    assert own.options["quantize_weights"]["layers"] == ["a=int4"]


def test_of_a_choice_what_takes_all_settings_is_left() -> None:
    auto = load_recipe("auto")
    names = [r.name for r in configured(auto, Settings(activations="a16")).candidates]
    assert "int8" in names
    assert "int8-weights" not in names
    found = configured(auto, Settings(weights="int4"), ("first=float",))
    for one in found.candidates:
        own = {t for o in one.options.values() for t in o.get("layers", ())}
        before = load_recipe(one.name).options.values()
        assert own == {"first=float"} | {t for o in before for t in o.get("layers", ())}


MISTYPED = [
    ({"weights": 4}, "weights = 4 is not str"),
    ({"group_size": "32"}, "group_size = '32' is not int"),
    ({"group_size": True}, "group_size = True is not int"),
    ({"symmetric": "yes"}, "symmetric = 'yes' is not bool"),
    ({"granularity": ["group"]}, "granularity = .* is not str"),
]


@pytest.mark.parametrize(("given", "reason"), MISTYPED)
def test_settings_of_a_wrong_type(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=f"^setting {reason}$"):
        Settings(**given)


@pytest.mark.parametrize("settings", ["int4", {"weights": "int4"}, Settings])
def test_settings_that_are_none(settings: Any) -> None:
    with pytest.raises(RecipeError, match=r"settings are a Settings\("):
        onnxq.optimize(CNN, recipe="int8-weights", settings=settings)


def test_layers_are_overrides_or_one() -> None:
    found = [
        configured(load_recipe("int8-weights"), None, layers).options["quantize_weights"]["layers"]
        for layers in ("first=float", ["first=float"])
    ]
    assert found[0] == found[1] == ["first=float"]
    with pytest.raises(RecipeError, match="layers are overrides such as 'op:LSTM=float', not 5"):
        onnxq.optimize(CNN, recipe="int8-weights", layers=5)  # type: ignore[arg-type]


def test_a_choice_is_refused_before_any_work(tmp_path: Path) -> None:
    """Where none of its recipes can be planned; the first one's reason is enough."""
    with pytest.raises(
        RecipeError, match=r"^smooth_activations: weights = 'w4' is not one of [^;]*$"
    ):
        onnxq.optimize(tmp_path / "not.onnx", settings=Settings(weights="w4"))


def test_a_dry_run_tells_which_recipes_the_target_cannot_run() -> None:
    done = run("optimize", CNN, "never.onnx", "--target", "tensorrt", "--dry-run")
    assert done.exit_code == 0
    assert "would run int8:" in done.output
    assert "would run int8-dynamic:" not in done.output
    assert "int8-dynamic is left out: tensorrt does not quantize" in " ".join(done.output.split())


WRONG = [
    ("cleanup", Settings(weights="int4"), (), "no pass that takes --weights: use .*int4-weights"),
    ("int8-weights", Settings(activation_range="mse"), (), "takes --activation-range: use .*int8"),
    ("cleanup", None, ("first=float",), "no pass that takes --layer: use .*int8"),
    ("int8", None, ("first",), "write PATTERN=FORMAT"),
    ("int8", Settings(group_size=8), (), "--group-size needs --granularity group"),
    ("int8-weights", Settings(group_size=8), (), "--group-size needs --granularity group"),
    ("int4-weights", Settings(granularity="channel", group_size=8), (), "needs --granularity"),
]


@pytest.mark.parametrize(("recipe", "settings", "layers", "reason"), WRONG)
def test_wrong_settings(
    recipe: str, settings: Settings | None, layers: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(RecipeError, match=reason):
        configured(load_recipe(recipe), settings, layers)


def formats(path: Path) -> set[str]:
    kinds = onnx.TensorProto.DataType
    return {kinds.Name(t.data_type) for t in onnx.load(path).graph.initializer}


def test_flags_python_and_a_recipe_file_give_the_same_bytes(tmp_path: Path) -> None:
    layer = "/3/conv1/Conv=a8w4"
    flags, python, file, plan = (tmp_path / n for n in ("f.onnx", "p.onnx", "r.onnx", "mine.toml"))
    common = ["--data", DATA, "--no-validate", "--quiet"]
    done = run("optimize", CNN, flags, *common, "--recipe", "int8", "--bias", "float",
               "--layer", layer, "--layer", "last=float", "--save-plan", plan)  # fmt: skip
    assert (done.exit_code, done.output) == (0, "")
    onnxq.optimize(
        CNN, python, data=DATA, recipe="int8", validate=False, settings=Settings(bias="float"),
        layers=(layer, "last=float"),
    )  # fmt: skip
    assert run("optimize", CNN, file, *common, "--recipe", plan).exit_code == 0
    assert flags.read_bytes() == python.read_bytes() == file.read_bytes()
    assert {"INT4", "INT8", "FLOAT"} <= formats(flags)
    assert "INT32" not in formats(flags)


def test_weights_in_another_format(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    done = run("optimize", CNN, out, "--recipe", "int8-weights", "--weights", "int4", "--encoding",
               "storage", "--granularity", "group", "--group-size", 16, "--no-validate",
               "--layer", "first=float")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "INT4" in formats(out)
    assert "INT8" not in formats(out)  # who asks for 4 bits gets them
    assert "INT16" not in formats(out)


def test_an_override_that_matches_nothing_is_a_warning(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run("optimize", CNN, tmp_path / "out.onnx", "--recipe", "int8-weights", "--no-validate",
               "--layer", "op:Covn=float", "--layer", "op:Gemm=int4", "--json", report)  # fmt: skip
    (warning,) = json.loads(report.read_text())["warnings"]
    assert warning == (
        "--layer 'op:Covn=float' matches no layer of the model; did you mean 'op:Conv'?"
    )
    assert warning in done.output


def test_the_dry_run_shows_them(tmp_path: Path) -> None:
    done = run("optimize", CNN, tmp_path / "x.onnx", "--data", DATA, "--recipe", "int8",
               "--weights", "int4", "--layer", "first=a16", "--dry-run")  # fmt: skip
    shown = " ".join(done.output.split())
    assert "raise_opset(version=21)" in shown
    assert "weights=int4" in shown
    assert "layers=('first=a16',)" in shown


ERRORS = [
    (["--layer", "op:Conv=int5"], "--layer 'op:Conv=int5': unknown format 'int5'"),
    (["--recipe", "cleanup", "--bias", "float"], "recipe cleanup has no pass that takes --bias"),
    (["--recipe", "int8", "--range", "best"], "'best' is not one of"),
    (["--recipe", "a16w8", "--target", "tensorrt"], "tensorrt executes no activations of 16 bits"),
    (["--recipe", "a8w4", "--target", "openvino"], "openvino executes no int4 weights"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "reason"), ERRORS)
def test_errors_are_one_line_and_nothing_is_written(
    flags: list[str], reason: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.onnx"
    done = run("optimize", CNN, out, "--data", DATA, *flags)
    assert done.exit_code == 2
    assert reason in done.output
    assert len(done.output.splitlines()) == 1
    assert not out.exists()


def test_a_calibration_of_wide_activations_is_used_again(tmp_path: Path) -> None:
    stats, one, two = (tmp_path / n for n in ("stats.npz", "1.onnx", "2.onnx"))
    flags = ["--data", DATA, "--recipe", "int8", "--activations", "a16", "--layer", "last=float"]
    assert run("calibrate", CNN, stats, *flags).exit_code == 0
    for out, more in ((one, ["--calibration", stats]), (two, [])):
        assert run("optimize", CNN, out, *flags, *more, "--no-validate").exit_code == 0
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("target", ["qnn-htp", "qnn-htp-u16"])
@pytest.mark.parametrize("recipe", ["a16w8", "a8w4"])
def test_results_conform_to_the_target(target: str, recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = onnxq.optimize(CNN, out, data=DATA, recipe=recipe, target=target)
    assert not report.warnings
    assert report.fidelity is not None
    assert report.fidelity.sqnr_db > (35 if recipe == "a16w8" else 15)
    assert onnxq.check(out, target=target).violations == ()


def test_the_worst_layer_in_a_better_format_on_a_real_model() -> None:
    def reached(*layers: str) -> float:
        report = onnxq.optimize(CNN, data=DATA, recipe="a8w4", layers=layers)
        assert report.fidelity is not None
        return report.fidelity.sqnr_db

    low = reached("op:Conv=w4")  # the first, too: the recipe gives it 8 bits
    for asked in ("int8", "float", "a16w8"):
        assert reached("op:Conv=w4", f"first={asked}") > low, asked
    layers = [node.name for node in onnxq.load(CNN).nodes("Conv")]
    assert max(reached("op:Conv=w4", f"{layer}=int8") for layer in layers) > low + 0.5


def test_completion_of_overrides() -> None:
    env = {"_ONNXQ_COMPLETE": "bash_complete", "COMP_CWORD": "3"}
    for typed, offered in (("op:Conv=a16", "op:Conv=a16w4"), ("fir", "first=")):
        words = {**env, "COMP_WORDS": f"onnxq optimize --layer {typed}"}
        done = CliRunner().invoke(main, [], prog_name="onnxq", env=words)
        assert offered in done.output
