"""Models that are quantized already: recover their floats, or say that they are left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from onnxq.core import Note
from onnxq.errors import BudgetError
from onnxq.job import Job
from onnxq.model import Model
from onnxq.passes.bitmaps import restored
from onnxq.passes.dequantize_model import DequantizeModel
from onnxq.passes.packed_weights import stored_weights
from onnxq.ports import restore_floats
from onnxq.recipes import Recipe

UNLIKE = (
    "compared on synthetic samples, which leave the ranges that the quantized model cuts "
    "values off at: give --data"
)


@contextmanager
def blames_noise(model: Model, data: object | None, job: Job) -> Iterator[None]:
    """Say that samples were synthetic ones, unlike those of the model: beside a missed budget, too.

    job: gets the warning, if there is no error.
    """
    is_unlike = bool(model.ranges) and data is None
    try:
        yield
        if is_unlike and "validate" in job.seconds:
            job.warnings.append(UNLIKE)
    except BudgetError as e:
        if not is_unlike or "nothing was quantized" in str(e):
            raise
        raise BudgetError(f"{e}; {UNLIKE}") from e


def begin(
    recipe: Recipe, model: Model, job: Job, *, requantize: bool, ranges: bool
) -> Sequence[Note]:
    """Recover floats in place if that is asked for, or warn of what is quantized already.

    ranges: keep those of activations. Floats that are stored without their zeros are recovered
    anyway for a recipe that looks at weights: nothing is lost by it.
    """
    if requantize:
        return recover(model, job, ranges=ranges)
    if any(one.is_quantizing or one.is_pruning for one in recipe.candidates):
        restored(model, floats=True)
    if any(one.is_quantizing for one in recipe.candidates):
        job.warnings += left_alone(model)
    return ()


def recover(model: Model, job: Job, *, ranges: bool) -> Sequence[Note]:
    """Recover floats in place; a warning for what could not be, or if there was nothing to do.

    ranges: keep those of activations.
    """
    with job.stage("load"):
        model.inline_functions()
        restore_floats(model)  # of an integer interface
    notes = job.run(DequantizeModel(ranges=ranges), model)
    declined = [note for note in notes if not note.changed]
    if not any(note.changed for note in notes):
        job.warnings.append("--requantize: nothing in the model is quantized")
    elif declined:
        first = declined[0]
        job.warnings.append(
            f"--requantize: {len(declined)} nodes stay as they are ({first.node}: {first.text})"
        )
    return notes


def left_alone(model: Model) -> list[str]:
    """A warning where a part of the model is quantized already: nothing is done to that."""
    every = [stands for _, _, stands in stored_weights(model)]
    found = Counter(
        f"{stands.numbers.dtype if stands.bits is None else f'uint{stands.bits}'} {stands.form}"
        for stands in every
        if stands.form != "float"
    )
    if not found:
        return []
    listed = ", ".join(f"{count} {form}" for form, count in found.most_common(3))
    return [
        f"{found.total()} of {len(every)} weights are quantized already and stay as they are "
        f"({listed}): --requantize recovers floats from them and starts over"
    ]
