"""The main job: optimize."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from onnxq import runtime
from onnxq.attempts import Attempt, Setting, covered
from onnxq.choosing import Objective
from onnxq.data import ImageOptions, Samples, Spec
from onnxq.interfaces import (
    check_beside,
    contents_beside,
    paths_beside,
    require_possible,
    with_integer_io,
)
from onnxq.job import Job, Progress
from onnxq.leftovers import temporary_folder
from onnxq.loading import ModelLike, PathLike, load, name_of, size_of
from onnxq.model import Model
from onnxq.ortformat import check_name, write_ort
from onnxq.passes import cleanup
from onnxq.passes.integer_io import Type
from onnxq.passes.masks import survived
from onnxq.plausibility import doubts
from onnxq.preconditions import (
    blames_the_model,
    check_output,
    require_budget,
    require_memory,
    require_outputs,
)
from onnxq.pruning_rows import lost_zeros
from onnxq.recipes import Recipe, load_recipe, plans, wants
from onnxq.report import Report
from onnxq.requantizing import begin, blames_noise
from onnxq.sampling import NO_SAMPLES, Need, samples_needed, split
from onnxq.selection import select
from onnxq.settings import Settings, configured
from onnxq.targets import Target, load_target
from onnxq.weight_table import weight_table

COMPARE_SECONDS = 5.0
KEPT_RANGES = (
    "no --data: activations keep the ranges that the model had; those that had none get them from "
    "synthetic samples"
)
SYNTHETIC_RANGES = (
    "no --data: ranges come from synthetic samples, expect a loss of accuracy; "
    "give real ones before you deploy"
)
PRUNED_BLINDLY = (
    "no --data: what is pruned is chosen by weights alone, and nothing makes up for it; expect a "
    "loss of accuracy, which synthetic samples do not show"
)


def optimize(
    model: ModelLike,
    output: PathLike | None = None,
    *,
    data: Spec | None = None,
    images: ImageOptions | None = None,
    recipe: str = "auto",
    target: str = "ort-cpu",
    settings: Settings | None = None,
    layers: Sequence[str] = (),
    integer_io: Type | None = None,
    header: bool = False,
    calibration: PathLike | None = None,
    objective: Objective = "speed",
    min_sqnr: float | None = None,
    validate: bool | None = None,
    allow_unchanged: bool = False,
    requantize: bool = False,
    dry_run: bool = False,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Optimize a model by a recipe for a target, compare it with the original, and write it.

    data, images: see `onnxq.data.open_samples`; synthetic samples without. The last quarter of 8 or
    more samples is kept from calibration and used for the comparison. settings: options of the
    recipe's passes. layers: overrides for single layers, "PATTERN=FORMAT" (`onnxq.layers`).
    integer_io: integer inputs and outputs, of a sign or "auto" (as inside); what they mean is
    written to OUTPUT.io.json and, with header, to a C header. calibration: a file; re-used when it
    is there, written when not. objective: what a recipe that chooses (auto) looks at first.
    min_sqnr: dB that every output must reach; 20 where a recipe chooses. validate: whether to
    compare; None leaves it out where the recipe does not run the model anyway and that is large or
    nothing for onnxruntime. requantize: recover floats from what is quantized in the model already,
    and begin with them; its activations keep their ranges unless there is new data.
    max_memory: bytes for the process while it works on weights; a model that onnxruntime would need
    more for is not run. output None, or dry_run: nothing is written.

    Raises OnnxqError: ModelError, DataError, RecipeError for what cannot be used; BudgetError when
    min_sqnr is missed, nothing was quantized, or the target has no floats and they are needed
    (nothing is written then).
    """
    require_budget(min_sqnr, validate=validate)
    job, written = Job(progress, layers, max_memory), None if dry_run else output
    with job.stage("load"):
        chosen, aim = configured(load_recipe(recipe), settings, layers), load_target(target)
        chosen = with_integer_io(chosen, integer_io)
        plans(chosen, aim, None)  # what cannot be is refused before the model is read
        require_possible(chosen, has_data=data is not None, header=header, validate=validate)
        original, edited = _opened(model)
        beside = _beside(model, edited, written, chosen, aim, (data, calibration), header=header)
        require_outputs(edited, name_of(model))
        before = size_of(original, edited), len(edited.nodes()), edited.opset
    recovered = begin(chosen, edited, job, requantize=requantize, ranges=data is None)
    has_ranges = data is not None or bool(edited.ranges)
    fits = _is_fitted(chosen, data) and (has_ranges or not chosen.choose)
    runs = chosen.name if fits or chosen.choose else None
    with blames_the_model(original, name_of(model), runs), blames_noise(edited, data, job):
        with job.stage("load"):
            must = runs is not None or bool(validate) or min_sqnr is not None
            need: Need = "must" if must else "may" if validate is None else "no"
            if must:
                require_memory(edited, max_memory, runs)
            samples, why = samples_needed(need, original, edited, data, images, max_memory)
            job.warnings += [f"not compared with the original: {why}"] if why else []
            job.warnings += doubts(edited, samples)
            if fits and data is None:
                job.warnings.append(KEPT_RANGES if edited.ranges else SYNTHETIC_RANGES)
            if data is None and _prunes(chosen):
                job.warnings.append(PRUNED_BLINDLY)
            fitting, held = split(samples)
            compared = NO_SAMPLES if validate is False else held
        with _statistics_file(calibration) as statistics:
            setting = Setting(
                original, aim, fitting, compared, statistics, COMPARE_SECONDS, allow_unchanged, job
            )
            found = select(
                chosen, edited, setting, objective=objective, min_sqnr=min_sqnr, has_data=has_ranges
            )
    done = found.attempt
    pruned = survived(done.model)
    with job.stage("write"):
        size, also = _written(done.model, written, aim, beside, samples)
    used = f"{len(fitting)} for calibration: " if _is_fitted(done.recipe, data) else ""
    return Report(
        model=name_of(model),
        output=None if written is None else os.fspath(written),
        recipe=chosen.name,
        plan=done.recipe,
        target=aim.name,
        samples=f"{used}{samples.description}",
        validated_on=_validated_on(samples, held, done.fidelity.samples if done.fidelity else 0),
        size_bytes=(before[0], size),
        nodes=(before[1], len(done.model.nodes())),
        opset=(before[2], done.model.opset),
        notes=(*recovered, *done.notes),
        coverage=done.coverage,
        fidelity=done.fidelity,
        latency=found.latency,
        warnings=(*job.warnings, *done.warnings, *lost_zeros(pruned), *job.unmatched),
        seconds=job.seconds,
        environment=runtime.environment(),
        also_written=tuple(map(str, also)),
        candidates=found.candidates,
        stored=weight_table(done.model),
        pruned=pruned,
        macs=_work(original, done, samples) if done.recipe.changes_work else None,
    )


def _is_fitted(recipe: Recipe, data: object | None) -> bool:
    """Whether passes looked at samples; those that prune do where there are real ones."""
    return wants(recipe, "samples") or (data is not None and _prunes(recipe))


def _prunes(recipe: Recipe) -> bool:
    return any(one.is_pruning for one in recipe.candidates)


def _work(original: ModelLike, done: Attempt, samples: Samples) -> tuple[float, float]:
    """Multiply-accumulates of the original, on the first sample's shapes, and of the result.

    The original is cleaned up for it: only then are all shapes known.
    """
    before = load(original).copy()
    before.inline_functions()
    cleanup(before)
    return covered(before, next(iter(samples), {})).macs, done.coverage.macs


def _opened(model: ModelLike) -> tuple[ModelLike, Model]:
    """The original, which nobody changes, and a model to edit."""
    if isinstance(model, str | os.PathLike):
        return model, load(model)
    original = load(model).copy()
    return original, original.copy()


def _beside(
    model: ModelLike,
    edited: Model,
    written: PathLike | None,
    recipe: Recipe,
    target: Target,
    read: tuple[object, object],
    *,
    header: bool,
) -> tuple[Path, ...]:
    """What is written beside the model; raises for places that cannot be written, or are read."""
    if written is None:
        return ()
    beside = paths_beside(recipe, Path(written), header=header)
    check_output(model, edited, written, read)
    check_beside(beside, (model, written, *read))
    if target.file_format == "ort":
        check_name(written)
    edited.scratch.folder = Path(written).parent
    return beside


@contextmanager
def _statistics_file(calibration: PathLike | None) -> Iterator[Path]:
    """Where what was seen of the activations is kept: the caller's file, or one for this run."""
    if calibration is not None:
        yield Path(calibration)
        return
    with temporary_folder() as folder:
        yield folder / "calibration.npz"


def _validated_on(samples: Samples, held: Samples, used: int) -> str:
    if not used:
        return "not compared"
    kind = (
        "samples not used for calibration"
        if len(held) < len(samples)
        else "the calibration samples"
    )
    return f"{used} {kind}"


def _written(
    model: Model,
    output: PathLike | None,
    target: Target,
    beside: Sequence[Path],
    samples: Samples,
) -> tuple[int, tuple[Path, ...]]:
    """Write the model and what is to be beside it; bytes of the former, paths of those."""
    if output is None:
        return size_of(model, model), ()
    path = Path(output)
    model.save(output, also=contents_beside(model, path, beside, samples.preprocess))
    data = path.with_name(path.name + ".data")
    size = path.stat().st_size
    if model.has_data_file and data.exists():
        size += data.stat().st_size
    made = write_ort(output) if target.file_format == "ort" else ()
    return size, (*beside, *made)
