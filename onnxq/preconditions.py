"""What can be known before the work begins: minutes of work are not to end at a wrong path."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from onnxq import runtime
from onnxq.errors import BudgetError, ModelError, RecipeError, RefusedError
from onnxq.files import check_writable
from onnxq.model import Model

PathLike = str | os.PathLike[str]


def require_budget(min_sqnr: float | None, *, validate: bool | None) -> None:
    """Raise RecipeError for a budget that is no number, BudgetError for one that is not checked."""
    if min_sqnr is not None and not math.isfinite(min_sqnr):
        raise RecipeError(f"--min-sqnr is {min_sqnr}: give a number of decibels, such as 20")
    if min_sqnr is not None and validate is False:
        raise BudgetError("--min-sqnr needs the comparison that --no-validate leaves out")


def check_output(
    model: object, loaded: Model, output: PathLike, inputs: Sequence[object] = ()
) -> None:
    """Raise ModelError if the output cannot be written, RecipeError if that would lose an input.

    model: where `loaded` is from; it may itself be the output. inputs: other things that are read;
    those that are not paths are passed over.
    """
    check_writable(output)
    target = Path(output)
    beside = target.with_name(f"{target.name}.data")
    files = [] if _is_same(model, target) else loaded.data_files()
    for file in files:
        if _is_same(file, target) or (_is_same(file, beside) and loaded.wants_data_file()):
            raise RecipeError(
                f"{target}: would overwrite {file}, which holds weights of {model}; "
                "choose another output"
            )
    for read in inputs:
        if _is_same(read, target):
            raise RecipeError(f"{target}: is an input of this run; choose another output")


def _is_same(path: object, other: Path) -> bool:
    if not isinstance(path, str | os.PathLike):
        return False
    return os.path.exists(path) and other.exists() and other.samefile(path)


@contextmanager
def told_what_runs(recipe: str) -> Iterator[None]:
    """A model that onnxruntime does not take is told what can be done without running it."""
    try:
        yield
    except RefusedError as e:
        raise ModelError(
            f"{e}; recipe {recipe} has to run the model, --recipe cleanup can do without"
        ) from e


def why_not_compared(original: runtime.Source, edited: Model) -> str | None:
    """Why not to compare where nobody asked for it and the recipe itself does not run the model."""
    size = sum(edited.weight_sizes())
    if size > runtime.LARGE:
        return f"both models in memory take some {3 * size / 1e9:.1f} GB; --validate does it"
    try:
        runtime.session(original)
    except RefusedError as e:
        return str(e)
    return None
