"""The jobs of the command line as functions: optimize, inspect, compare."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq import runtime
from onnxq.core import Note, Pass
from onnxq.coverage import coverage
from onnxq.data import Samples, Spec, open_samples
from onnxq.errors import BudgetError, DataError, ModelError, RefusedError
from onnxq.loading import ModelLike, PathLike, load, name_of, size_of
from onnxq.model import Model
from onnxq.passes.placement import place
from onnxq.passes.sensitive import graph_rules
from onnxq.passes.work import macs
from onnxq.preconditions import (
    blames_the_model,
    check_output,
    require_budget,
    require_outputs,
    too_large_to_compare,
    what_is_invalid,
)
from onnxq.recipes import Recipe, load_recipe, plan, wants
from onnxq.report import Comparison, Inspection, Report
from onnxq.synthetic import synthetic_samples
from onnxq.targets import load_target
from onnxq.validation import compare as compare_outputs
from onnxq.validation import layer_fidelity

Progress = Callable[[str, int, int], None]  # stage, done, total

SYNTHETIC = 32  # samples drawn when there is no data
HELD_OUT = 256  # at most so many samples are kept from calibration
COMPARE_SECONDS, TIME_SECONDS = 5.0, 3.0
LAYERS_SAMPLES = 2
NO_SAMPLES = Samples(lambda start, stop: iter(()), 0, "none: the model was not run")
INTEGER = frozenset(
    "QLinearConv QLinearMatMul ConvInteger MatMulInteger QGemm QAttention MatMulNBits "
    "QLinearAdd QLinearMul DynamicQuantizeLSTM DequantizeLinear".split()
)
"""Operators that only a quantized model has."""
INVALID = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)


def optimize(
    model: ModelLike,
    output: PathLike | None = None,
    *,
    data: Spec | None = None,
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

    data: see `onnxq.data.open_samples`; synthetic samples without. The last quarter of 8 or more
    samples is kept from calibration and used for the comparison. calibration: a file; re-used when
    it is there, written when not. min_sqnr: dB that every output must reach. validate: whether to
    compare; None leaves it out where the recipe does not run the model anyway and that is large or
    nothing for onnxruntime. output None, or dry_run: nothing is written.

    Raises OnnxqError: ModelError, DataError, RecipeError for what cannot be used; BudgetError when
    min_sqnr is missed or nothing was quantized (nothing is written then).
    """
    require_budget(min_sqnr, validate=validate)
    job = Job(progress)
    with job.stage("load"):
        original = model if isinstance(model, str | os.PathLike) else load(model).copy()
        edited = load(original).copy() if isinstance(original, Model) else load(original)
        chosen, aim = load_recipe(recipe), load_target(target)
        if output is not None and not dry_run:
            check_output(model, edited, output, (data, calibration))
        require_outputs(edited, name_of(model))
        before = size_of(original, edited), len(edited.nodes()), edited.opset
        fits = wants(chosen, "samples")
        asked = bool(validate) or min_sqnr is not None
    path = None if calibration is None else Path(calibration)
    with blames_the_model(original, name_of(model), chosen.name if fits else None):
        with job.stage("load"):
            samples = NO_SAMPLES
            if fits or asked:
                samples = opened(data, edited, job, warn=fits)
            elif validate is None:
                samples = _to_compare(original, edited, data, job)
            fitting, held = split(samples)
        pipeline = plan(
            chosen, aim, fitting, calibration=path, progress=job.sample_progress(len(fitting))
        )
        notes = [note for pass_ in pipeline.passes for note in job.run(pass_, edited)]
    edited.infer_shapes()
    feed = next(iter(held), {})
    covered = coverage(edited, edited.shapes_for({k: np.shape(v) for k, v in feed.items()}))
    if not allow_unchanged and any(name.startswith("quantize") for name in chosen.passes):
        _require_quantized(notes, edited)
    fidelity = timing = None
    if validate is not False and len(held):
        with job.stage("validate"):
            _check(edited, original)
            fidelity = compare_outputs(
                original, edited, held, seconds=COMPARE_SECONDS,
                progress=job.sample_progress(len(held)),
            )  # fmt: skip
            if not all(o.is_finite for o in fidelity.outputs):
                raise BudgetError("the result has outputs that are not finite; nothing was written")
            timing = runtime.latency(original, edited, feed, seconds=TIME_SECONDS)
        if min_sqnr is not None and fidelity.sqnr_db < min_sqnr:
            _miss(original, edited, held, fidelity.sqnr_db, min_sqnr)
    with job.stage("write"):
        size = (
            _written(edited, output)
            if output is not None and not dry_run
            else size_of(edited, edited)
        )
    return Report(
        model=name_of(model),
        output=None if output is None or dry_run else os.fspath(output),
        recipe=chosen.name,
        target=aim.name,
        samples=_used(samples, fitting, chosen),
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
    )


@dataclass(slots=True)
class Job:
    """What one run of `optimize` keeps: time, warnings, where progress goes."""

    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    now: str = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.now, start = name, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def sample_progress(self, total: int) -> Callable[[int], None] | None:
        if self.progress is None:
            return None
        tell = self.progress
        return lambda done: tell(self.now, done, total)

    def run(self, pass_: Pass, model: Model) -> Sequence[Note]:
        """Run a pass."""
        with self.stage(pass_.name):
            return pass_(model)


def opened(data: Spec | None, model: Model, job: Job, *, warn: bool = True) -> Samples:
    """The samples; synthetic ones without data, with a warning where ranges come from them."""
    if data is not None:
        return open_samples(data, model)
    if warn:
        job.warnings.append(
            "no --data: ranges come from synthetic samples, expect a loss of accuracy; "
            "give real ones before you deploy"
        )
    return synthetic_samples(model, SYNTHETIC)


def _to_compare(original: ModelLike, edited: Model, data: Spec | None, job: Job) -> Samples:
    """Samples to compare on where the recipe needs none; with a warning none, if that cannot be."""
    reason = too_large_to_compare(edited)
    if reason is None:
        try:
            if data is not None:  # synthetic samples are tried in a session, too
                runtime.session(original)
            return opened(data, edited, job, warn=False)
        except RefusedError as e:
            if what_is_invalid(original):
                raise
            reason = str(e)
        except DataError as e:
            if data is not None:
                raise
            reason = str(e)
    job.warnings.append(f"not compared with the original: {reason}")
    return NO_SAMPLES


def _used(samples: Samples, fitting: Samples, recipe: Recipe) -> str:
    if wants(recipe, "samples"):
        return f"{len(fitting)} for calibration: {samples.description}"
    return samples.description


def split(samples: Samples) -> tuple[Samples, Samples]:
    """Samples to calibrate on, and to compare on: the same ones if there are few."""
    if len(samples) < 8:
        return samples, samples
    held = min(HELD_OUT, len(samples) // 4)
    return samples.take(len(samples) - held), samples.skip(len(samples) - held)


def _validated_on(samples: Samples, held: Samples, used: int) -> str:
    if not used:
        return "not compared"
    kind = (
        "samples not used for calibration"
        if len(held) < len(samples)
        else "the calibration samples"
    )
    return f"{used} {kind}"


def _require_quantized(notes: Sequence[Note], model: Model) -> None:
    if any(n.changed and n.rule.startswith("quantize") for n in notes):
        return
    raise BudgetError(
        f"nothing was quantized: {why_not(notes, model)}; "
        "nothing was written (--allow-unchanged writes the cleaned model)"
    )


def why_not(notes: Sequence[Note], model: Model) -> str:
    """Why nothing was quantized: that the model already is, or the commonest reasons."""
    ops = Counter(node.op for node in model.nodes() if node.op in INTEGER)
    if ops:
        listed = ", ".join(f"{count} {op}" for op, count in ops.most_common(3))
        return f"the model is already quantized ({listed}): start from the float model"
    reasons = Counter(n.text for n in notes if not n.changed and n.rule.startswith("quantize"))
    why = "; ".join(f"{text} ({count})" for text, count in reasons.most_common(3))
    return why or "the model has no layer with a weight"


def _check(model: Model, original: ModelLike) -> None:
    """Raise ModelError if the result is not valid: a bug of a pass, which must not reach a file.

    Where the checker does not take the original either, onnxruntime has the last word.
    """
    if sum(model.weight_sizes()) > runtime.LARGE:
        return  # the checker wants it in one proto or file; the session that follows checks as well
    try:
        onnx.checker.check_model(model.to_proto(), full_check=True)
    except INVALID as e:
        try:
            onnx.checker.check_model(load(original).to_proto(), full_check=True)
        except INVALID:
            return
        raise ModelError(
            f"the result is not valid, which is a bug of onnxq: {runtime.one_line(e)}"
        ) from e


def _miss(original: ModelLike, edited: Model, held: Samples, reached: float, wanted: float) -> None:
    layers = layer_fidelity(load(original), edited, held.take(LAYERS_SAMPLES))
    worst = sorted(layers, key=lambda layer: layer.sqnr_db)[:3]
    named = ", ".join(f"{layer.name} ({layer.op}, {layer.sqnr_db:.1f} dB)" for layer in worst)
    raise BudgetError(
        f"reached {reached:.1f} dB, --min-sqnr is {wanted:g}: nothing was written; "
        f"the layers furthest off are {named or 'not known'}"
    )


def _written(model: Model, output: PathLike) -> int:
    model.save(output)
    path = Path(output)
    data = path.with_name(path.name + ".data")
    return path.stat().st_size + (
        data.stat().st_size if model.has_data_file and data.exists() else 0
    )


def inspect(model: ModelLike, *, target: str = "ort-cpu") -> Inspection:
    """Say what a model is made of, and what a target could quantize of it.

    Raises ModelError for what is not a model, RecipeError for an unknown target.
    """
    aim, found = load_target(target), load(model)
    placement = place(found, aim, graph_rules(found, macs(found)), {})
    sizes: Counter[str] = Counter()
    parameters = 0
    for graph in found.graphs():
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Constant):
                count = math.prod(tensor.shape)
                parameters += count
                sizes[str(tensor.dtype)] += count * getattr(np.dtype(tensor.dtype), "itemsize", 1)
    return Inspection(
        model=name_of(model),
        target=aim.name,
        ir_version=found.envelope.ir_version,
        opset={o.domain: o.version for o in found.envelope.opset_import},
        inputs=tuple(_described(t) for t in found.graph.inputs),
        outputs=tuple(_described(t) for t in found.graph.outputs),
        ops=dict(Counter(node.op for node in found.nodes()).most_common()),
        functions=tuple(found.functions),
        parameters=parameters,
        bytes_by_type=dict(sizes.most_common()),
        coverage=coverage(found),
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
    progress: Progress | None = None,
) -> Comparison:
    """Compare two versions of a model on samples: each output, and each layer both have by name.

    Raises ModelError unless they are versions of one model, DataError for samples that do not fit.
    """
    one, two = load(original), load(result)
    samples = synthetic_samples(one, SYNTHETIC) if data is None else open_samples(data, one)
    tell = None if progress is None else Job(progress, now="compare").sample_progress(len(samples))
    fidelity = compare_outputs(original, result, samples, progress=tell)
    layers = layer_fidelity(one, two, samples.take(LAYERS_SAMPLES))
    return Comparison(
        name_of(original),
        name_of(result),
        fidelity,
        tuple(sorted(layers, key=lambda layer: layer.sqnr_db)),
    )


__all__: list[Any] = ["compare", "inspect", "load", "optimize"]
