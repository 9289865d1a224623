"""Operands of very different ranges that meet in one scale: told, and mended where that can be.

    A small, B large:  y = Concat(A, B), z = Conv(A)

A target whose Concat has one scale for all would give A that of B, for the Conv as well. So A keeps
a scale of its own, and is requantized for the Concat alone. What comes out of the Concat (or of an
Add) has one scale whatever is done here; what helps is to bring the branches to one size before:
equalize_layers does that, through Concat too, where layers are in front of it and behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Note
from onnxq.model import producer, readers, values_of
from onnxq.passes.ops import OPS, activation_inputs, is_constant
from onnxq.passes.placement import RULE, Apart, Placement, keeps_scale
from onnxq.schemes import FORMATS
from onnxq.statistics import Histogram
from onnxq.targets import Target

MIXED = 4.0  # two bits
JOINS = ("Concat", "Add", "Sub")


@dataclass(frozen=True, slots=True)
class Mixed:
    """A node whose operands differ: the spans of the least and the greatest, by name."""

    node: gs.Node
    small: tuple[str, float]
    large: tuple[str, float]

    @property
    def ratio(self) -> float:
        """Above MIXED."""
        return self.large[1] / self.small[1]


def mixed(
    placement: Placement, statistics: Mapping[str, Histogram], target: Target
) -> Iterator[Mixed]:
    """Nodes in integers whose result has one scale for operands that differ by more than MIXED."""
    for node in placement.nodes.values():
        several = len(activation_inputs(node)) > 1
        if several and (node.op in JOINS or keeps_scale(node, target)):
            spans = _spans(node, statistics)
            small, large = (f(spans, key=spans.__getitem__, default="") for f in (min, max))
            if small and MIXED * spans[small] < spans[large]:
                yield Mixed(node, (small, spans[small]), (large, spans[large]))


def set_apart(
    placement: Placement, statistics: Mapping[str, Histogram], target: Target
) -> frozenset[Apart]:
    """Operands that had better have a scale of their own, for what else reads them in integers."""
    found = set[Apart]()
    for one in mixed(placement, statistics, target):
        if OPS[one.node.op].role == "move" or not keeps_scale(one.node, target):
            continue
        spans = _spans(one.node, statistics)
        for i in activation_inputs(one.node):
            tensor = one.node.inputs[i]
            is_small = MIXED * spans.get(tensor.name, np.inf) < one.large[1]
            if is_small and _is_read_elsewhere(tensor, one.node, placement):
                found.add((id(one.node), tensor.name))
    return frozenset(found)


def notes(
    placement: Placement,
    statistics: Mapping[str, Histogram],
    target: Target,
    apart: frozenset[Apart],
) -> list[Note]:
    """What users should know of it, one for each node."""
    return [_note(one, placement, apart) for one in mixed(placement, statistics, target)]


def _note(one: Mixed, placement: Placement, apart: frozenset[Apart]) -> Note:
    (small, less), (large, more) = one.small, one.large
    bits = FORMATS[placement.formats[id(one.node)]].bits
    left = max(0.0, bits - float(np.log2(one.ratio)))
    text = (
        f"{one.node.op}: {small} spans {less:.3g}, {large} {more:.3g}: in one scale the former has "
        f"{left:.1f} of {bits} bits"
    )
    own = sorted(name for key, name in apart if key == id(one.node))
    if own:
        text += f"; {', '.join(own)} requantized for it, with a scale of its own for other readers"
    helps = "; equalize_layers may bring them together" if one.node.op == "Concat" else ""
    return Note(RULE, one.node.name, text + helps, changed=bool(own))


def _spans(node: gs.Node, statistics: Mapping[str, Histogram]) -> dict[str, float]:
    """How far the values of each operand reach from the least to the greatest, 0 among them."""
    found = {}
    for i in activation_inputs(node):
        tensor = node.inputs[i]
        if is_constant(tensor):
            values = values_of(tensor)
            ends = [] if values is None or not values.size else [values.min(), values.max()]
        else:
            seen = _seen(tensor, statistics)
            ends = [] if seen is None else [seen.lo, seen.hi]
        if ends and (span := float(max(0.0, ends[1]) - min(0.0, ends[0]))) > 0:
            found[tensor.name] = span
    return found


def _seen(tensor: gs.Tensor, statistics: Mapping[str, Histogram]) -> Histogram | None:
    """What was seen of the tensor; of one that is moved, in front of that."""
    while tensor.name not in statistics:
        node = producer(tensor)
        if node is None or node.op not in OPS or OPS[node.op].role != "move":
            return None
        tensor = node.inputs[0]
    return statistics[tensor.name]


def _is_read_elsewhere(tensor: gs.Tensor, node: gs.Node, placement: Placement) -> bool:
    return any(
        reader is not node and id(reader) in placement.nodes and i in activation_inputs(reader)
        for reader, i in readers(tensor)
    )
