"""Recipes: named lists of passes with options, one TOML file each; `plan` makes them a Pipeline."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from onnxq.core import Pass, Pipeline
from onnxq.data import Samples
from onnxq.errors import RecipeError
from onnxq.passes import PASSES
from onnxq.targets import Target

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Recipe:
    """A list of pass names with options, and a one-line promise."""

    name: str
    description: str
    passes: tuple[str, ...]
    options: dict[str, dict[str, Any]]


def names() -> list[str]:
    """Names of the recipes that come with onnxq."""
    return sorted(path.stem for path in HERE.glob("*.toml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a TOML file by its path.

    Raises RecipeError for a name that is not known, a file that is no recipe, and unknown passes.
    """
    path = Path(name) if name.endswith(".toml") else HERE / f"{name}.toml"
    if not path.is_file():
        raise RecipeError(f"unknown recipe {name!r}: one of {', '.join(names())}, or a .toml file")
    try:
        table = tomllib.loads(path.read_text())
        description, passes = table.pop("description"), tuple(table.pop("passes"))
    except (tomllib.TOMLDecodeError, KeyError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: not a recipe: {e}") from e
    for pass_ in passes:
        if pass_ not in PASSES:
            raise RecipeError(f"{path}: unknown pass {pass_!r}: one of {', '.join(PASSES)}")
    if stray := sorted(set(table) - set(passes)):
        raise RecipeError(f"{path}: options for {stray[0]!r}, which is not among its passes")
    return Recipe(path.stem, description, passes, table)


def plan(
    recipe: Recipe,
    target: Target,
    samples: Samples | None,
    *,
    calibration: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Pipeline:
    """The recipe's passes with their options filled in; nothing runs.

    quantize_weights is left out where the target does not fold what it writes.

    Raises RecipeError for an option that a pass does not have or cannot take.
    """
    context: dict[str, Any] = {
        "target": target,
        "samples": samples,
        "calibration": calibration,
        "progress": progress,
        "version": target.opset,
        "integer_moves": target.integer_moves,
    }
    passes = [n for n in recipe.passes if target.stored_weights or n != "quantize_weights"]
    return Pipeline(
        recipe.name, tuple(_build(n, recipe.options.get(n, {}), context) for n in passes)
    )


def _build(name: str, options: dict[str, Any], context: dict[str, Any]) -> Pass:
    entry = PASSES[name]
    if not isinstance(entry, type):
        if options:
            raise RecipeError(f"{name} has no options, got {', '.join(options)}")
        return entry
    allowed = {f.name for f in fields(entry)} if is_dataclass(entry) else set()
    if unknown := sorted(set(options) - allowed):
        raise RecipeError(f"{name} has no option {unknown[0]!r}: {', '.join(sorted(allowed))}")
    try:
        made: Pass = entry(**{k: v for k, v in context.items() if k in allowed} | options)
    except (TypeError, ValueError) as e:
        raise RecipeError(f"{name}: {e}") from e
    return made
