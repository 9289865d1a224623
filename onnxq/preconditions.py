"""What can be known before the work begins: minutes of work are not to end at a wrong path."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx

from onnxq import runtime
from onnxq.errors import BudgetError, ModelError, OnnxqError, RecipeError, RefusedError
from onnxq.files import check_writable
from onnxq.loading import ModelLike, PathLike, load
from onnxq.model import Model
from onnxq.parallel import resident

COPIES = 3  # of the weights, about, that running the original and the result takes


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


def check_reports(reports: Sequence[str], taken: Sequence[object]) -> None:
    """Raise for a report that cannot be written, or is a file that the run reads or writes.

    Those need not be there yet. Raises ModelError, RecipeError.
    """
    others = {os.path.realpath(p) for p in taken if isinstance(p, str | os.PathLike)}
    for report in reports:
        path = os.path.realpath(report)
        if path in others or any(_is_same(other, Path(path)) for other in taken):
            raise RecipeError(
                f"{report}: is a file that this run reads or writes; choose another output"
            )
        check_writable(report)
        others.add(path)


def _is_same(path: object, other: Path) -> bool:
    if not isinstance(path, str | os.PathLike):
        return False
    return os.path.exists(path) and other.exists() and other.samefile(path)


def require_outputs(model: Model, name: str) -> None:
    """Raise ModelError for a model that computes nothing."""
    if not model.graph.outputs:
        raise ModelError(f"{name}: has no outputs, it computes nothing; export it again")


def too_large_to_compare(model: Model, max_memory: int | None = None) -> str | None:
    """Why not to compare where the recipe does not run the model, and nobody asked for it."""
    size = sum(model.weight_sizes())
    if max_memory is not None and COPIES * size > max_memory - resident():
        return f"both in memory take {_taken(size)}, more than --max-memory"
    if size <= runtime.LARGE:
        return None
    return f"both in memory take some {COPIES * size / 1e9:.1f} GB; --validate does it"


def require_memory(model: Model, max_memory: int | None, recipe: str | None) -> None:
    """Raise RecipeError where the model has to be run, and that takes more than max_memory.

    recipe: the one that has to run it; None: a comparison was asked for.
    """
    size = sum(model.weight_sizes())
    if max_memory is None or COPIES * size <= max_memory - resident():
        return
    what = "the comparison" if recipe is None else f"recipe {recipe}"
    instead = "--no-validate" if recipe is None else "--recipe int4-weights or int8-weights"
    raise RecipeError(
        f"{what} has to run the model, which takes {_taken(size)}, more than --max-memory: "
        f"give more, or use {instead}"
    )


def _taken(size: int) -> str:
    """What running the original and the result takes, of so many bytes of weights."""
    return f"{COPIES * size / 1e6:,.1f} MB beside the {resident() / 1e6:,.0f} MB taken so far"


@contextmanager
def blames_the_model(original: ModelLike, name: str, recipe: str | None) -> Iterator[None]:
    """Let errors tell what is wrong with the model, if it is the model.

    A pass may stumble over what the standard does not allow; onnxruntime may not take the model.
    recipe: the one that has to run it; None where it need not be run. Raises ModelError.
    """
    try:
        yield
    except Exception as e:  # looked into below: it is raised again, or blamed on the model
        is_refused = isinstance(e, RefusedError)
        if isinstance(e, OnnxqError | OSError | MemoryError) and not is_refused:
            raise
        if reason := what_is_invalid(original):
            raise ModelError(f"{name}: not a valid model: {reason}; export it again") from e
        if is_refused and recipe is not None:
            raise ModelError(
                f"{e}; recipe {recipe} has to run the model, --recipe cleanup can do without"
            ) from e
        raise


def what_is_invalid(source: ModelLike) -> str | None:
    """What the checker has against a model; None if nothing, or if it is too large to say."""
    try:
        model = load(source)
        if sum(model.weight_sizes()) > runtime.LARGE:
            return None
        proto = model.to_proto()
        for value in (*proto.graph.input, *proto.graph.output):
            if value.type.WhichOneof("value") in (None, "tensor_type"):  # nobody misses these
                value.type.tensor_type.elem_type = value.type.tensor_type.elem_type or 1
                value.type.tensor_type.shape.SetInParent()
        onnx.checker.check_model(proto)
        onnx.shape_inference.infer_shapes(model.to_proto(), strict_mode=True)
    except onnx.checker.ValidationError as e:
        return runtime.one_line(e)
    except onnx.shape_inference.InferenceError:  # also for what onnxruntime only warns of
        return _refusal(model)
    except ModelError:
        return None
    return None


def _refusal(model: Model) -> str | None:
    """Why onnxruntime does not load the model; None: it does."""
    try:
        runtime.session(model)
    except ModelError as e:
        return str(e)
    return None
