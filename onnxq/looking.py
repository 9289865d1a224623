"""Models looked at and compared, nothing changed: inspect, compare."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import onnx_graphsurgeon as gs

from onnxq.coverage import coverage
from onnxq.data import ImageOptions, Spec
from onnxq.demands import LAYERS_SAMPLES
from onnxq.job import Job, Progress
from onnxq.loading import ModelLike, load, name_of
from onnxq.model import Model
from onnxq.passes.convert_float32 import convert_float32
from onnxq.passes.placement import place
from onnxq.passes.sensitive import graph_rules
from onnxq.passes.work import macs
from onnxq.ports import Port, ports_of
from onnxq.preconditions import blames_the_model
from onnxq.report import Comparison, Inspection
from onnxq.sampling import samples_for
from onnxq.targets import Target, load_target
from onnxq.validation import compare as compare_outputs
from onnxq.validation import layer_fidelity
from onnxq.weight_table import weight_table
from onnxq.weights import bytes_in


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
    stored = weight_table(inside)
    convert_float32(inside)
    inside.separate_names()
    placement = place(inside, aim, graph_rules(inside, macs(inside)), {})
    sizes: Counter[str] = Counter()
    parameters, ports = 0, ports_of(found)
    for graph in found.graphs():
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Constant):
                count = math.prod(tensor.shape)
                parameters += count
                sizes[str(tensor.dtype)] += bytes_in(tensor)
    return Inspection(
        model=name,
        target=aim.name,
        ir_version=found.envelope.ir_version,
        opset={o.domain: o.version for o in found.envelope.opset_import},
        inputs=tuple(_described(t, ports) for t in found.graph.inputs),
        outputs=tuple(_described(t, ports) for t in found.graph.outputs),
        ops=dict(Counter(node.op for node in found.nodes()).most_common()),
        functions=tuple(found.functions),
        parameters=parameters,
        bytes_by_type=dict(sizes.most_common()),
        coverage=coverage(inside),
        stored=stored,
        quantizable=tuple(node.name for node in placement.nodes.values()),
        notes=placement.declined,
    )


def _described(tensor: gs.Tensor, ports: Mapping[str, Port]) -> str:
    shape = (
        "of any shape"
        if tensor.shape is None
        else [("?" if d is None else d) for d in tensor.shape]
    )
    text = f"{tensor.name} {shape} {tensor.dtype}".replace("'", "")
    if tensor.name not in ports:
        return text
    affine = ports[tensor.name].affine
    sign = "+" if affine.zero_point < 0 else "-"
    return f"{text}, x = (q {sign} {abs(affine.zero_point)}) * {affine.scale:.6g}"


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
