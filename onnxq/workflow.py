"""The jobs of the command line as functions: optimize, inspect, compare."""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import runtime
from onnxq.core import Note
from onnxq.coverage import Coverage, coverage
from onnxq.data import Feed, ImageOptions, Samples, Spec
from onnxq.demands import (
    LAYERS_SAMPLES,
    broken_rules,
    missed,
    require_quantized,
    require_valid,
)
from onnxq.errors import BudgetError
from onnxq.job import Job, Progress
from onnxq.loading import ModelLike, PathLike, load, name_of, size_of
from onnxq.model import Model
from onnxq.ortformat import check_name, write_ort
from onnxq.passes.convert_float32 import convert_float32
from onnxq.passes.placement import place
from onnxq.passes.sensitive import graph_rules
from onnxq.passes.work import macs
from onnxq.plausibility import doubts
from onnxq.preconditions import blames_the_model, check_output, require_budget, require_outputs
from onnxq.recipes import Recipe, load_recipe, plan, wants
from onnxq.report import Comparison, Inspection, Report
from onnxq.sampling import NO_SAMPLES, samples_for, samples_to_compare, split
from onnxq.targets import Target, load_target
from onnxq.validation import Fidelity, layer_fidelity
from onnxq.validation import compare as compare_outputs

COMPARE_SECONDS, TIME_SECONDS = 5.0, 3.0
SYNTHETIC_RANGES = (
    "no --data: ranges come from synthetic samples, expect a loss of accuracy; "
    "give real ones before you deploy"
)


def optimize(
    model: ModelLike,
    output: PathLike | None = None,
    *,
    data: Spec | None = None,
    images: ImageOptions | None = None,
    recipe: str = "int8",
    target: str = "ort-cpu",
    calibration: PathLike | None = None,
    min_sqnr: float | None = None,
    validate: bool | None = None,
    allow_unchanged: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Optimize a model by a recipe for a target, compare it with the original, and write it.

    data, images: see `onnxq.data.open_samples`; synthetic samples without. The last quarter of 8 or
    more samples is kept from calibration and used for the comparison. calibration: a file; re-used
    when it is there, written when not. min_sqnr: dB that every output must reach. validate: whether
    to compare; None leaves it out where the recipe does not run the model anyway and that is large
    or nothing for onnxruntime. output None, or dry_run: nothing is written.

    Raises OnnxqError: ModelError, DataError, RecipeError for what cannot be used; BudgetError when
    min_sqnr is missed, nothing was quantized, or the target has no floats and they are needed
    (nothing is written then).
    """
    require_budget(min_sqnr, validate=validate)
    job, written = Job(progress), None if dry_run else output
    with job.stage("load"):
        original = model if isinstance(model, str | os.PathLike) else load(model).copy()
        edited = load(original).copy() if isinstance(original, Model) else load(original)
        chosen, aim = load_recipe(recipe), load_target(target)
        if written is not None:
            check_output(model, edited, written, (data, calibration))
            if aim.file_format == "ort":
                check_name(written)
        require_outputs(edited, name_of(model))
        before = size_of(original, edited), len(edited.nodes()), edited.opset
    fits = wants(chosen, "samples")
    with blames_the_model(original, name_of(model), chosen.name if fits else None):
        with job.stage("load"):
            must = fits or bool(validate) or min_sqnr is not None
            if not must and validate is None:
                samples, why = samples_to_compare(original, edited, data, images)
                job.warnings += [f"not compared with the original: {why}"] if why else []
            else:
                samples = samples_for(edited, data, images) if must else NO_SAMPLES
            job.warnings += doubts(edited, samples)
            job.warnings += [SYNTHETIC_RANGES] if fits and data is None else []
            fitting, held = split(samples)
        notes = _rewritten(edited, chosen, aim, fitting, calibration, job)
        feed = next(iter(held), {})
        covered = _covered(edited, feed)
        if any(name.startswith("quantize") for name in chosen.passes):
            if not allow_unchanged:
                require_quantized(notes, edited)
            job.warnings += broken_rules(edited, aim, strict=not allow_unchanged)
    fidelity = timing = None
    if validate is not False and len(held):
        with job.stage("validate"):
            fidelity = _validated(original, edited, held, min_sqnr, job)
            if platform.machine() in aim.machines:
                timing = runtime.latency(original, edited, feed, seconds=TIME_SECONDS)
    with job.stage("write"):
        size, also = _written(edited, written, aim)
    used = f"{len(fitting)} for calibration: " if fits else ""
    return Report(
        model=name_of(model),
        output=None if written is None else os.fspath(written),
        recipe=chosen.name,
        target=aim.name,
        samples=f"{used}{samples.description}",
        validated_on=_validated_on(samples, held, fidelity.samples if fidelity else 0),
        size_bytes=(before[0], size),
        nodes=(before[1], len(edited.nodes())),
        opset=(before[2], edited.opset),
        notes=tuple(notes),
        coverage=covered,
        fidelity=fidelity,
        latency=timing,
        warnings=tuple(job.warnings),
        seconds=job.seconds,
        environment=runtime.environment(),
        also_written=tuple(map(str, also)),
    )


def _rewritten(
    edited: Model,
    recipe: Recipe,
    target: Target,
    fitting: Samples,
    calibration: PathLike | None,
    job: Job,
) -> list[Note]:
    """Run the recipe's passes on the model."""
    pipeline = plan(
        recipe, target, fitting,
        calibration=None if calibration is None else Path(calibration),
        progress=job.sample_progress(len(fitting)),
    )  # fmt: skip
    return [note for pass_ in pipeline.passes for note in job.run(pass_, edited)]


def _covered(edited: Model, feed: Feed) -> Coverage:
    edited.infer_shapes()
    return coverage(edited, edited.shapes_for({k: np.shape(v) for k, v in feed.items()}))


def _validated(
    original: ModelLike, edited: Model, held: Samples, min_sqnr: float | None, job: Job
) -> Fidelity:
    """Compare, and raise BudgetError for what must not be written."""
    require_valid(edited, original)
    fidelity = compare_outputs(
        original, edited, held, seconds=COMPARE_SECONDS, progress=job.sample_progress(len(held))
    )
    if edited.opset >= 21 and runtime.needs_int8_allowed(edited):
        job.warnings.append(
            "onnxruntime on x86 fails to load the result (a bug of its own, with int8 activations "
            f"from opset 21 on) unless its session option {runtime.INT8_ALLOWED} is 1; so it was "
            "compared"
        )
    if not all(o.is_finite for o in fidelity.outputs):
        raise BudgetError("the result has outputs that are not finite; nothing was written")
    if min_sqnr is not None and fidelity.sqnr_db < min_sqnr:
        raise missed(original, edited, held, fidelity.sqnr_db, min_sqnr)
    return fidelity


def _validated_on(samples: Samples, held: Samples, used: int) -> str:
    if not used:
        return "not compared"
    kind = (
        "samples not used for calibration"
        if len(held) < len(samples)
        else "the calibration samples"
    )
    return f"{used} {kind}"


def _written(model: Model, output: PathLike | None, target: Target) -> tuple[int, tuple[Path, ...]]:
    """Write the model and what the target wants beside it; bytes of the former, paths of those."""
    if output is None:
        return size_of(model, model), ()
    model.save(output)
    path = Path(output)
    data = path.with_name(path.name + ".data")
    size = path.stat().st_size
    if model.has_data_file and data.exists():
        size += data.stat().st_size
    return size, write_ort(output) if target.file_format == "ort" else ()


def inspect(model: ModelLike, *, target: str = "ort-cpu") -> Inspection:
    """Say what a model is made of, and what a target could quantize of it, functions inlined.

    Raises ModelError for what is not a model, RecipeError for an unknown target.
    """
    aim, found = load_target(target), load(model)
    with blames_the_model(model, name_of(model), None):
        return _inspected(found, aim, name_of(model))


def _inspected(found: Model, aim: Target, name: str) -> Inspection:
    inside = found.copy()  # as a recipe sees it
    inside.inline_functions()
    convert_float32(inside)
    inside.separate_names()
    placement = place(inside, aim, graph_rules(inside, macs(inside)), {})
    sizes: Counter[str] = Counter()
    parameters = 0
    for graph in found.graphs():
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Constant):
                count = math.prod(tensor.shape)
                parameters += count
                sizes[str(tensor.dtype)] += count * getattr(np.dtype(tensor.dtype), "itemsize", 1)
    return Inspection(
        model=name,
        target=aim.name,
        ir_version=found.envelope.ir_version,
        opset={o.domain: o.version for o in found.envelope.opset_import},
        inputs=tuple(_described(t) for t in found.graph.inputs),
        outputs=tuple(_described(t) for t in found.graph.outputs),
        ops=dict(Counter(node.op for node in found.nodes()).most_common()),
        functions=tuple(found.functions),
        parameters=parameters,
        bytes_by_type=dict(sizes.most_common()),
        coverage=coverage(inside),
        quantizable=tuple(node.name for node in placement.nodes.values()),
        notes=placement.declined,
    )


def _described(tensor: gs.Tensor) -> str:
    shape = (
        "of any shape"
        if tensor.shape is None
        else [("?" if d is None else d) for d in tensor.shape]
    )
    return f"{tensor.name} {shape} {tensor.dtype}".replace("'", "")


def compare(
    original: ModelLike,
    result: ModelLike,
    *,
    data: Spec | None = None,
    images: ImageOptions | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two versions of a model on samples: each output, and each layer both have by name.

    Raises ModelError unless they are versions of one model, DataError for samples that do not fit.
    """
    one, two = load(original), load(result)
    with (
        blames_the_model(original, name_of(original), None),
        blames_the_model(result, name_of(result), None),
    ):
        samples, job = samples_for(one, data, images), Job(progress, now="compare")
        tell = None if progress is None else job.sample_progress(len(samples))
        fidelity = compare_outputs(original, result, samples, progress=tell)
        layers = layer_fidelity(one, two, samples.take(LAYERS_SAMPLES))
    return Comparison(
        name_of(original),
        name_of(result),
        fidelity,
        tuple(sorted(layers, key=lambda layer: layer.sqnr_db)),
    )


__all__: list[Any] = ["compare", "inspect", "load", "optimize"]
