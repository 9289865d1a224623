"""What a recipe has made of a model: checked, compared with the original; nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxq import runtime
from onnxq.core import Note
from onnxq.coverage import Coverage, coverage
from onnxq.data import Feed, Samples
from onnxq.demands import broken_rules, require_pruned, require_quantized, require_valid, simulated
from onnxq.emulation import Emulator, emulator
from onnxq.errors import BudgetError, ModelError, RefusedError
from onnxq.interfaces import coarse, has_integer_io, require_integers
from onnxq.job import Job
from onnxq.loading import ModelLike
from onnxq.model import Model
from onnxq.ports import ports_of
from onnxq.recipes import Recipe
from onnxq.targets import Target
from onnxq.validation import Fidelity
from onnxq.validation import compare as compare_outputs

INT8_WARNING = (
    "onnxruntime on x86 fails to load the result (a bug of its own, with int8 activations from "
    f"opset 21 on) unless its session option {runtime.INT8_ALLOWED} is 1; so it was compared"
)
SATURATES = (
    "sums of pairs can exceed 16 bits in {} layers, where the target's machines saturate: outputs "
    "were compared as those would compute them (emulated)"
)


@dataclass(frozen=True, slots=True)
class Setting:
    """What all attempts of one run share.

    fitting, held: samples to calibrate on and to compare on (none: no comparison). seconds: for one
    comparison. allow_unchanged: whether a result in which nothing is quantized is one.
    """

    original: ModelLike
    target: Target
    fitting: Samples
    held: Samples
    calibration: Path | None
    seconds: float
    allow_unchanged: bool
    job: Job

    @property
    def feed(self) -> Feed:
        """One sample; empty where there is none."""
        return next(iter(self.held), {})


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """A recipe's result, and what it is like."""

    recipe: Recipe
    model: Model
    notes: tuple[Note, ...]
    coverage: Coverage
    fidelity: Fidelity | None
    warnings: tuple[str, ...] = ()


def attempt(recipe: Recipe, model: Model, notes: Sequence[Note], setting: Setting) -> Attempt:
    """Judge what a recipe has made of a model: valid, quantized, pruned, how far from the original.

    notes: of all passes that ran. Raises BudgetError if nothing was quantized or pruned, if the
    target cannot compute what is left in floats, and if outputs are not finite.
    """
    model.unquantized.clear()  # no pass comes any more: weights that are not needed
    warnings: list[str] = []
    if recipe.is_quantizing:
        if not setting.allow_unchanged:
            require_quantized(notes, model)
        warnings = broken_rules(model, setting.target, strict=not setting.allow_unchanged)
        warnings += simulated(model, setting.target)
    if recipe.is_pruning and not setting.allow_unchanged:
        require_pruned(notes, model)
    warnings += require_integers(notes)
    fidelity = None
    if len(setting.held):
        with setting.job.stage("validate"):
            emulated = _emulated(model, setting)
            fidelity = _compared(model, setting, emulated)
            warnings += [SATURATES.format(len(emulated.layers))] if emulated is not None else []
            warnings += coarse(model, fidelity) if has_integer_io(recipe) else []
            if model.opset >= 21 and runtime.needs_int8_allowed(model):
                warnings.append(INT8_WARNING)
    reached = covered(model, setting.feed)
    return Attempt(recipe, model, tuple(notes), reached, fidelity, tuple(warnings))


def covered(model: Model, feed: Feed) -> Coverage:
    """What of a model computes in integers, and its work, on the shapes of a sample."""
    model.infer_shapes()
    return coverage(model, model.shapes_for({k: np.shape(v) for k, v in feed.items()}))


def _emulated(model: Model, setting: Setting) -> Emulator | None:
    """The result as it runs on the target's machines, where sums of pairs can saturate there."""
    if not setting.target.saturates or ports_of(model):
        return None
    found = emulator(model)
    return found if found.layers else None


def _compared(model: Model, setting: Setting, emulated: Emulator | None) -> Fidelity:
    """Compare, and raise BudgetError for what must not be written."""
    require_valid(model, setting.original)
    try:
        fidelity = compare_outputs(
            setting.original, model, setting.held, seconds=setting.seconds,
            progress=setting.job.sample_progress(len(setting.held)), emulated=emulated,
        )  # fmt: skip
    except RefusedError as e:
        if setting.target.machines:
            raise
        raise ModelError(
            f"{e}; what is for {setting.target.name} alone is written with --no-validate"
        ) from e
    if not all(o.is_finite for o in fidelity.outputs):
        raise BudgetError("the result has outputs that are not finite; nothing was written")
    return fidelity
