"""Which samples a run uses, and what for: calibration, comparison, none."""

from __future__ import annotations

from typing import Literal

from onnxq import runtime
from onnxq.data import ImageOptions, Samples, Spec, open_samples
from onnxq.errors import DataError, RefusedError
from onnxq.loading import ModelLike
from onnxq.model import Model
from onnxq.ports import with_float_inputs
from onnxq.preconditions import too_large_to_compare, what_is_invalid
from onnxq.synthetic import synthetic_samples

SYNTHETIC = 32  # samples drawn when there is no data
HELD_OUT = 256  # at most so many samples are kept from calibration
JUDGING = 4  # of those that a pass is given, one in so many judges what the others made
Need = Literal["must", "may", "no"]
NO_SAMPLES = Samples(
    lambda start, stop: iter(()), 0, "none: the model was not run", synthetic=True
)  # fmt: skip


def samples_for(model: Model, data: Spec | None, images: ImageOptions | None = None) -> Samples:
    """The samples that `data` stands for; synthetic ones when it is None.

    They are real values: those of an integer input are floats as well, if the model's metadata tell
    its scale. Raises DataError as `onnxq.data.open_samples` does.
    """
    model = with_float_inputs(model)
    if data is not None:
        return open_samples(data, model, images=images)
    if images is not None:
        raise DataError("image options without samples: give a folder of images as --data")
    return synthetic_samples(model, SYNTHETIC)


def samples_needed(
    need: Need,
    original: ModelLike,
    edited: Model,
    data: Spec | None,
    images: ImageOptions | None,
    max_memory: int | None = None,
) -> tuple[Samples, str | None]:
    """The samples of a run that must have some, or may compare on some; none, and why, if not.

    Raises DataError as `samples_for` does.
    """
    if need == "no":
        return NO_SAMPLES, None
    if need == "must":
        return samples_for(edited, data, images), None
    if reason := too_large_to_compare(edited, max_memory):
        return NO_SAMPLES, reason
    return _samples_to_compare(original, edited, data, images)


def _samples_to_compare(
    original: ModelLike, edited: Model, data: Spec | None, images: ImageOptions | None
) -> tuple[Samples, str | None]:
    """Samples where the recipe needs none; or none, and why nothing can be compared."""
    try:
        if data is not None:  # synthetic samples are tried in a session, too
            runtime.session(original)
        return samples_for(edited, data, images), None
    except RefusedError as e:
        if what_is_invalid(original):
            raise
        return NO_SAMPLES, str(e)
    except DataError as e:
        if data is not None or images is not None:
            raise
        return NO_SAMPLES, str(e)


def split(samples: Samples) -> tuple[Samples, Samples]:
    """Samples to calibrate on, and to compare on: the same ones if there are few."""
    if len(samples) < 8:
        return samples, samples
    held = min(HELD_OUT, len(samples) // 4)
    return samples.take(len(samples) - held), samples.skip(len(samples) - held)


def divided(samples: Samples) -> tuple[Samples, Samples]:
    """What a pass fits to, and the last quarter, which judges it; too few do for both."""
    size = len(samples) - len(samples) // JUDGING
    if size == len(samples):
        return samples, samples
    return samples.take(size), samples.skip(size)
