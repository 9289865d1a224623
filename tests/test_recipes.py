"""Recipes and targets: named, planned, and what a wrong file is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import parser

from onnxq import recipes, targets
from onnxq.data import open_samples
from onnxq.errors import RecipeError
from onnxq.model import Model
from onnxq.passes.ops import OPS
from onnxq.recipes import load_recipe, plan
from onnxq.targets import load_target

TEXT = (
    '<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }'
)
SAMPLES = open_samples({"x": np.zeros((2, 3))}, Model.from_proto(parser.parse_model(TEXT)))


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_can_be_planned(name: str) -> None:
    recipe = load_recipe(name)
    pipeline = plan(recipe, load_target("ort-cpu"), SAMPLES)
    assert recipe.description
    assert [p.name for p in pipeline.passes] == list(recipe.passes)
    assert "samples" not in repr(pipeline) or "QuantizeStatic(" in repr(pipeline)


@pytest.mark.parametrize("name", targets.names())
def test_every_target_is_of_known_operators(name: str) -> None:
    target = load_target(name)
    assert set(target.operators) <= set(OPS)
    assert target.description
    if target.costs is not None:
        assert set(target.costs.operators) <= {*target.operators, "depthwise"}


WRONG = [
    pytest.param('passes = ["cleanup"]', "not a recipe: it has no 'description'", id="no-description"),
    pytest.param('description = "x"\npasses = ["polish"]', "unknown pass 'polish': one of", id="pass"),
    pytest.param('description = "x"\npasses = ["cleanup"]\n[quantize_static]', "not among its passes", id="stray"),
    pytest.param("= 1", "not a recipe", id="no-toml"),
    pytest.param('description = "x"\npasses = ["raise_opset"]\n[raise_opset]\nversion = 99', "raise_opset: version is from 1 to 2., not 99", id="opset"),
    pytest.param('description = "x"\npasses = ["quantize_static"]\n[quantize_static]\ngroup_size = 0', "group_size is at least 1", id="group"),
    pytest.param('description = "x"\npasses = ["quantize_weights"]\n[quantize_weights]\nsize = 1', "no option 'size'", id="option"),
    pytest.param('description = "x"\npasses = ["fold_mul"]\n[fold_mul]\nsize = 1', "has no options", id="no-options"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), WRONG)
def test_wrong_recipes(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=reason):
        plan(load_recipe(str(path)), load_target("ort-cpu"), SAMPLES)


def test_a_target_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    good = (Path(targets.__file__).parent / "generic.toml").read_text()
    path.write_text(good)
    assert load_target(str(path)).name == "mine"
    for text in (
        good.replace('"int8", symmetric = false', '"int9", symmetric = false'),
        "x = 1",
        "=",
    ):
        path.write_text(text)
        with pytest.raises(RecipeError, match="not a target"):
            load_target(str(path))
