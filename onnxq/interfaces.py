"""Integer inputs and outputs as part of a run: which recipes have them, the files beside the model.

Integers at the interface need fixed ranges of activations, so a recipe with quantize_static; not
even for a target that computes nothing in floats are they made unless somebody asks: LiteRT's own
converter keeps floats by default, too (inference_input_type).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxq.cheader import c_header
from onnxq.choosing import BUDGET
from onnxq.core import Note
from onnxq.errors import BudgetError, RecipeError
from onnxq.model import Model
from onnxq.passes.integer_io import RULE, STAYS, Type
from onnxq.ports import ports_of, sidecar, terminals
from onnxq.preconditions import check_reports
from onnxq.recipes import Recipe
from onnxq.validation import Fidelity

SIDECAR = ".io.json"


def with_integer_io(recipe: Recipe, type: Type | None) -> Recipe:
    """The recipe with an integer interface at its end; of a choice, what can have one.

    Raises RecipeError for a recipe that cannot.
    """
    if type is None:
        return recipe
    fitting = [one for one in recipe.candidates if "quantize_static" in one.passes]
    if not fitting:
        raise RecipeError(
            f"recipe {recipe.name} fixes no ranges of activations, which integer inputs and "
            "outputs need: use --recipe int8 with --integer-io"
        )
    changed = tuple(_with(one, type) for one in fitting)
    return replace(recipe, choose=changed) if recipe.choose else changed[0]


def _with(recipe: Recipe, type: Type) -> Recipe:
    passes = recipe.passes if RULE in recipe.passes else (*recipe.passes, RULE)
    options = {**recipe.options, RULE: {**recipe.options.get(RULE, {}), "type": type}}
    return replace(recipe, passes=passes, options=options)


def has_integer_io(recipe: Recipe) -> bool:
    """Whether an integer interface is asked for."""
    return any(RULE in one.passes for one in recipe.candidates)


def require_integers(notes: Sequence[Note]) -> list[str]:
    """Warnings for inputs and outputs that stay float although integers were asked for.

    Raises BudgetError if all of them do.
    """
    told = [note for note in notes if note.rule == RULE]
    floats = [f"{note.node}: {note.text}" for note in told if STAYS in note.text]
    if floats and not any(note.changed for note in told):
        raise BudgetError(
            f"no input or output can be an integer: {'; '.join(floats[:3])}; nothing was written"
        )
    return floats


def coarse(model: Model, fidelity: Fidelity) -> list[str]:
    """Warnings for integer outputs that are far from the original's, and what would help."""
    ports = ports_of(model)
    found = [
        (o.name, o.sqnr_db, ports[o.name].affine.type)
        for o in fidelity.outputs
        if o.name in ports and o.sqnr_db < BUDGET
    ]
    wider = " or use --recipe a16w8" if any(type.endswith("8") for *_, type in found) else ""
    return [
        f"output {name!r} keeps {sqnr:.1f} dB as {type}: let it stay float (a recipe with "
        f"keep = [{json.dumps(name)}] under [{RULE}]){wider}"
        for name, sqnr, type in found
    ]


def require_possible(
    recipe: Recipe, *, has_data: bool, header: bool, validate: bool | None
) -> None:
    """Raise RecipeError for what contradicts the recipe, before the model is read.

    A choice that has to compare, or would have nothing to choose from without samples; a header of
    an interface that stays float.
    """
    if recipe.choose and validate is False:
        raise RecipeError(f"{recipe.name} has to compare its candidates: no --no-validate")
    if recipe.choose and has_integer_io(recipe) and not has_data:
        raise RecipeError(
            f"integer inputs and outputs need ranges, which recipe {recipe.name} takes from "
            "samples only: give --data, or --recipe int8 for synthetic ones"
        )
    if header and not has_integer_io(recipe):
        raise RecipeError("--header describes integer inputs and outputs: add --integer-io")


def paths_beside(recipe: Recipe, output: Path, *, header: bool) -> tuple[Path, ...]:
    """The files that are written with the model: OUTPUT.io.json, and the header."""
    if not has_integer_io(recipe):
        return ()
    return (output.with_name(output.name + SIDECAR), *([output.with_suffix(".h")] * header))


def check_beside(paths: Sequence[Path], taken: Sequence[object]) -> None:
    """Raise, before the work, for files that cannot be written or that the run reads or writes."""
    check_reports([str(path) for path in paths], taken)


def contents_beside(
    model: Model, output: Path, paths: Sequence[Path], preprocess: Mapping[str, Any] | None
) -> dict[Path, bytes]:
    """What is written to `paths_beside`."""
    contents = {}
    for path in paths:
        if path.suffix == ".h":
            text = c_header(terminals(model), output.name)
        else:
            text = sidecar(model, output.name, preprocess) + "\n"
        contents[path] = text.encode()
    return contents
