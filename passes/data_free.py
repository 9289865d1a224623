"""Ranges of activations without data: from what BatchNormalizations remember of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_graphsurgeon as gs

from onnxq.model import Model
from onnxq.passes.moments import GUESSED, moments
from onnxq.passes.ops import activation_inputs, is_constant
from onnxq.passes.placement import Placement
from onnxq.statistics import Histogram

UNKNOWN = (
    "no BatchNormalization tells the range of {}: give --data, and another recipe, to quantize it"
)


def expected(model: Model) -> dict[str, Histogram]:
    """What tensors are expected to hold, by name; those that could only be guessed are left out.

    Ends are `onnxq.passes.moments.SIGMAS` deviations from the mean, as far as operators let values
    through.
    """
    found = moments(model)
    tensors = {id(t): t for node in model.nodes() for t in node.outputs}
    tensors |= {id(t): t for t in model.graph.inputs}
    return {
        tensors[key].name: one.histogram()
        for key, one in found.items()
        if key in tensors and one.trust > GUESSED
    }


def unknown(placement: Placement, known: Mapping[str, Histogram]) -> dict[int, str]:
    """Nodes that read or make a tensor of unknown range: ids, and why they have to stay float."""
    return {
        key: UNKNOWN.format(missing[0])
        for key, node in placement.nodes.items()
        if (missing := [n for n in _sources(placement, node) if n not in known])
    }


def _sources(placement: Placement, node: gs.Node) -> Iterator[str]:
    read = (node.inputs[i] for i in activation_inputs(node))
    for tensor in (*(t for t in read if not is_constant(t)), placement.result(node)):
        yield from sorted(placement.sources.get(tensor.name, ()))
