"""What a model's outputs would be with any ranges of its activations: one session for all of them.

A copy of the model is quantized as quantize_static would do it, but with switchable pairs
(`onnxq.passes.switches`), clamps that stay, and float biases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq import runtime
from onnxq.data import Feed
from onnxq.model import Model
from onnxq.numerics.metrics import ErrorSums
from onnxq.passes.insertion import Editor
from onnxq.passes.placement import Placement
from onnxq.passes.static_rounding import WeightMethod
from onnxq.passes.switches import Pair, switched
from onnxq.schemes import QParams, QuantScheme
from onnxq.targets import Target

Key = tuple[str, str]
"""A tensor's name and a format."""
Ranges = Mapping[Key, QParams]
Outputs = list[Any]


class _Simulator(Editor):
    """Inserts pairs that may be switched off: no clamp is left to their saturation."""

    def is_saturated(self, node: gs.Node, clamp: gs.Node) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Simulation:
    """A session, and the groups of tensors whose range can be fed to it: any key of each."""

    session: Any
    pairs: Mapping[Key, Pair]

    @classmethod
    def of(
        cls,
        model: Model,
        target: Target,
        placement: Placement,
        ranges: Ranges,
        schemes: Mapping[int, QuantScheme],
        weight_range: WeightMethod,
    ) -> Simulation:
        """Of a model that is about to be quantized; it is left as it is.

        Raises ModelError for one that does not fit into a proto.
        """
        copy = model.copy()
        theirs = {node.name: node for node in copy.nodes()}
        nodes = {id(node): theirs[node.name] for node in model.nodes()}
        editor = _Simulator(
            copy, target, _counterpart(placement, nodes, copy), ranges,
            {id(nodes[key]): scheme for key, scheme in schemes.items() if key in nodes},
            weight_range=weight_range, float_bias=True,
        )  # fmt: skip
        editor.edit()
        copy.sweep()
        key_of = {id(params): key for key, params in reversed(list(ranges.items()))}
        pairs = {
            Pair(scale.name, zero.name): key_of[id(params)]
            for params, (scale, zero) in editor.constants.items()
            if id(params) in key_of
        }
        proto = copy.to_proto()
        kept = switched(proto, list(pairs))
        return cls(runtime.session(proto), {pairs[pair]: pair for pair in kept})

    def run(self, feed: Feed, ranges: Ranges) -> Outputs:
        """The outputs with these parameters of each group."""
        fed = dict(feed)
        for key, pair in self.pairs.items():
            fed |= pair.fed(ranges[key], is_on=True)
        return run(self.session, fed)


def run(session: Any, feed: Feed) -> Outputs:
    """Outputs in their order. Raises DataError for a sample that does not run."""
    with runtime.blames_sample():
        return list(runtime.run(session, feed).values())


def errors(reference: Sequence[Outputs], made: Sequence[Outputs]) -> NDArray[np.float64]:
    """[samples, outputs]: squared errors over the mean square of the output in all samples.

    Only outputs of floats count, or where there are none, integers: the share that differs.
    Infinite where something is not finite that should be, or the other way round.
    """
    found = []
    for column in _columns(reference):
        pairs = zip(reference, made, strict=True)
        sums = [_sums(r[column], y[column]) for r, y in pairs]
        if signal := sum(one.signal for one in sums):
            found.append([one.noise * len(sums) / signal for one in sums])
    return np.array(found, np.float64).reshape(len(found), len(reference)).T


def _columns(reference: Sequence[Outputs]) -> list[int]:
    kinds = [v.dtype.kind if isinstance(v, np.ndarray) else "" for v in reference[0]]
    floats = [i for i, kind in enumerate(kinds) if kind == "f"]
    return floats or [i for i, kind in enumerate(kinds) if kind in ("i", "u", "b")]


def _sums(reference: NDArray[Any], made: NDArray[Any]) -> ErrorSums:
    """Of integers: how many differ; results of another shape are wholly wrong."""
    is_same = reference.shape == made.shape
    if reference.dtype.kind == "f":
        return ErrorSums.of(reference, made if is_same else np.zeros_like(reference))
    wrong = int((reference != made).sum()) if is_same else reference.size
    return ErrorSums(reference.size, float(reference.size), float(wrong))


def _counterpart(placement: Placement, nodes: Mapping[int, gs.Node], copy: Model) -> Placement:
    """The placement on a copy of the model; nodes: of the copy, by id of the model's own."""
    tensors = {t.name: t for t in _tensors(copy)}
    produced, read = (
        {id(tensors[t.name]): tensors[t.name] for t in own.values()}
        for own in (placement.produced, placement.read)
    )
    return replace(
        placement,
        nodes={id(nodes[key]): nodes[key] for key in placement.nodes},
        produced=produced,
        read=read,
        clamps={id(nodes[key]): nodes[id(clamp)] for key, clamp in placement.clamps.items()},
        formats={id(nodes[key]): name for key, name in placement.formats.items()},
    )


def _tensors(model: Model) -> Iterator[gs.Tensor]:
    for graph in model.graphs():
        yield from graph.inputs
        for node in graph.nodes:
            yield from (t for t in node.outputs if t.name)
