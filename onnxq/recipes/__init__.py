"""Recipes: named lists of passes with options, one TOML file each; `plan` makes them a Pipeline."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.core import Pass, Pipeline
from onnxq.data import Samples
from onnxq.errors import RecipeError, meant
from onnxq.options import build, options_of
from onnxq.parallel import Crew
from onnxq.plugins import find_pass
from onnxq.targets import Target

HERE = Path(__file__).parent
NARROWING = ("quantize", "convert_float16")
"""What the names begin with of passes that write values in fewer bits."""
PRUNING = ("prune_",)
"""What the names begin with of passes that take weights or channels out."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A list of pass names with options, and a one-line promise; or a choice among recipes.

    choose: names of recipes, or files beside this one, that are tried; it has no passes then.
    """

    name: str
    description: str
    passes: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    choose: tuple[Recipe, ...] = ()

    @property
    def candidates(self) -> tuple[Recipe, ...]:
        """The recipes that are tried: the choice, or this one alone."""
        return self.choose or (self,)

    @property
    def is_quantizing(self) -> bool:
        """Whether one of its passes quantizes, or rounds to 16-bit floats."""
        return any(name.startswith(NARROWING) for name in self.passes)

    @property
    def is_pruning(self) -> bool:
        """Whether one of its passes prunes."""
        return any(name.startswith(PRUNING) for name in self.passes)

    @property
    def changes_work(self) -> bool:
        """Whether one of its passes makes a layer compute less."""
        return bool({"prune_channels", "factorize_weights"} & {*self.passes})

    def to_toml(self) -> str:
        """The recipe as a file that `load_recipe` reads; options left at their default commented.

        Raises RecipeError for passes that are not known.
        """
        lines = [f"description = {toml(self.description)}"]
        if self.choose:
            return "\n".join([*lines, f"choose = {toml([r.name for r in self.choose])}"]) + "\n"
        lines.append(f"passes = {toml(self.passes)}")
        for name in dict.fromkeys(self.passes):
            known, chosen = options_of(find_pass(name)), self.options.get(name, {})
            rows = [f"{o.name} = {toml(chosen[o.name])}" for o in known if o.name in chosen]
            rows += [
                f"# {o.name} = {toml(o.default)}"
                for o in known
                if o.name not in chosen and o.default is not None
            ]
            if rows:
                key = name if name.replace("_", "").isalnum() and name.isascii() else toml(name)
                lines += ["", f"[{key}]", *rows]
        return "\n".join(lines) + "\n"


def toml(value: Any) -> str:
    """A value as TOML: what recipes hold, texts, numbers and lists of them."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def names() -> list[str]:
    """Names of the recipes that come with onnxq."""
    return sorted(path.stem for path in HERE.glob("*.toml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a TOML file by its path.

    Raises RecipeError for a name that is not known, a file that is no recipe, and passes or options
    that are not known.
    """
    path = Path(name) if name.endswith(".toml") else HERE / f"{name}.toml"
    if not path.is_file():
        raise RecipeError(
            f"unknown recipe {name!r}: one of {', '.join(names())}, or a .toml file"
            f"{meant(name, names())}"
        )
    return _load(path, may_choose=True)


def _load(path: Path, *, may_choose: bool) -> Recipe:
    try:
        table = tomllib.loads(path.read_text())
        description = table.pop("description")
        if not isinstance(description, str):
            raise TypeError("description is a text")
        if "choose" not in table:
            return _recipe(path.stem, description, table.pop("passes"), table)
        if not may_choose:
            raise TypeError("it is itself a choice")
        return Recipe(path.stem, description, choose=_choice(path.parent, **table))
    except KeyError as e:
        raise RecipeError(f"{path}: not a recipe: it has no {e}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError) as e:
        raise RecipeError(f"{path}: not a recipe: {e}") from e
    except RecipeError as e:
        raise RecipeError(f"{path}: {e}") from e


def _choice(folder: Path, choose: Any, **rest: Any) -> tuple[Recipe, ...]:
    if rest:
        raise TypeError(f"beside choose it has {', '.join(rest)}: those of its recipes count")
    if not choose or not isinstance(choose, list) or not all(isinstance(n, str) for n in choose):
        raise TypeError("choose is a list of recipes")
    paths = [folder / n if n.endswith(".toml") else HERE / f"{n}.toml" for n in choose]
    for name, path in zip(choose, paths, strict=True):
        if not path.is_file():
            raise RecipeError(f"chooses {name!r}, which is not a recipe{meant(name, names())}")
    return tuple(_load(path, may_choose=False) for path in paths)


def _recipe(name: str, description: str, passes: Any, options: dict[str, Any]) -> Recipe:
    if not isinstance(passes, list) or not all(isinstance(p, str) for p in passes):
        raise TypeError("passes is a list of names")
    for pass_ in passes:
        find_pass(pass_)
    for key, value in options.items():
        if key not in passes:
            raise RecipeError(
                f"options for {key!r}, which is not among its passes{meant(key, passes)}"
            )
        if not isinstance(value, dict):
            raise RecipeError(f"{key} is a pass: its options go under [{toml(key)}]")
    return Recipe(name, description, tuple(passes), {k: v for k, v in options.items() if v})


def plan(
    recipe: Recipe,
    target: Target,
    samples: Samples | None,
    *,
    calibration: Path | None = None,
    progress: Callable[[int], None] | None = None,
    crew: Crew | None = None,
) -> Pipeline:
    """The recipe's passes with their options filled in; nothing runs.

    progress: told of samples that were run. crew: the threads that work on weights.

    A pass may say by `opset` which version of the operators it writes: raise_opset goes as far. And
    by `unfit` why the target can do nothing with what it writes: it is left out beside other passes
    that quantize, as quantize_dynamic is where the target has no kernels for it and other passes
    take its layers.

    Raises RecipeError for an option that a pass does not have or cannot take, and for a target that
    can do nothing with any of it.
    """
    context: dict[str, Any] = {
        "target": target,
        "samples": samples,
        "shapes": _input_shapes(samples),
        "calibration": calibration,
        "progress": progress,
        "crew": crew,
        "version": target.opset,
        "integer_moves": target.integer_moves,
    }

    def built(name: str) -> Pass:
        return build(name, find_pass(name), recipe.options.get(name, {}), context)

    passes = {name: built(name) for name in recipe.passes}
    unfit = {n: why for n, p in passes.items() if (why := getattr(p, "unfit", None)) is not None}
    if "quantize_dynamic" in unfit and _counts_on_dynamic(recipe):
        raise RecipeError(unfit["quantize_dynamic"])
    if unfit and all(n in unfit for n in passes if n.startswith(NARROWING)):
        raise RecipeError(next(iter(unfit.values())))
    kept = [n for n in recipe.passes if n not in unfit]
    needed = max([target.opset, *(getattr(passes[n], "opset", 0) for n in kept)])
    context["version"] = min(needed, target.max_opset or needed)
    return Pipeline(recipe.name, tuple(built(n) for n in kept))


def plans(
    recipe: Recipe, target: Target, samples: Samples | None
) -> dict[str, Pipeline | RecipeError]:
    """The plan of each recipe that is tried, or why there is none.

    Raises RecipeError, the first one, where there is none at all.
    """
    found: dict[str, Pipeline | RecipeError] = {}
    for one in recipe.candidates:
        try:
            found[one.name] = plan(one, target, samples)
        except RecipeError as e:
            found[one.name] = e
    errors = [e for e in found.values() if isinstance(e, RecipeError)]
    if len(errors) == len(found):
        raise errors[0]
    return found


def _counts_on_dynamic(recipe: Recipe) -> bool:
    """Whether there are layers that quantize_dynamic alone is for.

    All where nothing else quantizes activations; else those that only quantize_static leaves alone
    (int8-mixed). What nobody is to quantize is an override of both.
    """
    if "quantize_static" not in recipe.passes:
        return True
    static, dynamic = (
        recipe.options.get(name, {}).get("layers", ())
        for name in ("quantize_static", "quantize_dynamic")
    )
    return any(layer.endswith("=float") and layer not in dynamic for layer in static)


def _input_shapes(samples: Samples | None) -> dict[str, tuple[int, ...]] | None:
    """Of the first real sample: sizes of synthetic ones say nothing."""
    if samples is None or samples.synthetic or not len(samples):
        return None
    return {name: np.shape(values) for name, values in next(iter(samples)).items()}


def wants(recipe: Recipe, field: str) -> bool:
    """Whether one of its passes needs `samples`, or a `calibration`.

    One that takes them needs them, unless it says by `wants(field, options)` that with the recipe's
    options it does not.
    """
    for one in recipe.candidates:
        for name in one.passes:
            entry = find_pass(name)
            if field in getattr(entry, "__dataclass_fields__", {}):
                asked = getattr(entry, "wants", None)
                if asked is None or asked(field, one.options.get(name, {})):
                    return True
    return False
