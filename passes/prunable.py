"""Which weights may be pruned, and why others stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Note, Skip
from onnxq.layers import WEIGHTS as LAYERS
from onnxq.layers import Layers, is_lookup, is_packed
from onnxq.model import Model, values_of
from onnxq.passes.layouts import WEIGHTS, Held, held_by
from onnxq.passes.ops import is_constant
from onnxq.passes.streamed import NOT_FINITE
from onnxq.weights import Weight

TABLE = "a table: its rows are looked up, and zeros in them save no products"
QUANTIZED = "its weight is quantized already: prune before that, or requantize"
FEW = 3  # input channels of a convolution, so few that none makes up for another
FLOATS = (np.float16, np.float32, np.float64)


@dataclass(frozen=True, slots=True)
class Prunable:
    """A float weight, and all nodes that use it, in the same way."""

    uses: tuple[tuple[gs.Node, Held], ...]

    @property
    def node(self) -> gs.Node:
        """The first that uses it."""
        return self.uses[0][0]

    @property
    def held(self) -> Held:
        """How its values lie."""
        return self.uses[0][1]

    @property
    def tensor(self) -> gs.Tensor:
        """The weight."""
        tensor: gs.Tensor = self.node.inputs[self.held.index]
        return tensor

    @property
    def size(self) -> int:
        """How many values it has."""
        return prod(self.held.shape)

    def rows(self) -> NDArray[np.float32]:
        """Its values as rows [channels, values]. Raises Skip where one is not finite."""
        rows = np.asarray(self.held.rows(np.asarray(values_of(self.tensor))), np.float32)
        if not np.isfinite(rows).all():
            raise Skip(NOT_FINITE)
        return rows

    def put(self, model: Model, rows: NDArray[Any]) -> None:
        """A constant of these rows in its place, under its name."""
        old = self.tensor
        values = np.ascontiguousarray(self.held.unrolled(rows).astype(old.dtype))
        new = Weight(model.unique(old.name), model.scratch.put(values))
        for node, held in self.uses:
            node.inputs[held.index] = new
        old.name, new.name = new.name, old.name


def find_prunable(
    model: Model, layers: Sequence[str], smallest: int, rule: str
) -> tuple[list[Prunable], list[Note]]:
    """Weights that may be pruned, bodies included; and notes under `rule` for all others.

    layers: overrides; smallest: values that a weight has to have.
    """
    dense = Layers.parse(layers).dense(model)
    sharing: dict[int, list[tuple[gs.Node, Held]]] = {}
    notes = []
    for node in model.nodes(*dict.fromkeys((*WEIGHTS, *LAYERS))):
        if is_lookup(node):
            continue
        if is_packed(node):
            notes.append(Note(rule, node.name, QUANTIZED, changed=False))
            continue
        for held in held_by(node):
            tensor = node.inputs[held.index]
            if is_constant(tensor) and tensor.dtype in FLOATS and len(held.shape) >= 2:
                sharing.setdefault(id(tensor), []).append((node, held))
    found = []
    for uses in sharing.values():
        node, held = uses[0]
        choice = next((dense[id(n)] for n, _ in uses if id(n) in dense), None)
        why = choice.reason if choice is not None else _why_not(model, uses, smallest)
        if why is None:
            found.append(Prunable(tuple(uses)))
        else:
            notes.append(Note(rule, node.name, why, changed=False))
    return found, notes


def _why_not(model: Model, uses: Sequence[tuple[gs.Node, Held]], smallest: int) -> str | None:
    """Why a weight stays dense; None: it may be pruned."""
    node, held = uses[0]
    if model.is_output(node.inputs[held.index]):
        return "its weight is an output of the model, too"
    if any(n.op == "Gather" for n, _ in uses):
        return TABLE
    readers = node.inputs[held.index].outputs
    if other := next((r for r in readers if all(r is not n for n, _ in uses)), None):
        return f"its weight is also read by {other.op}, as it is"
    if any(h.key != held.key for _, h in uses):
        return "its weight is used in another way elsewhere"
    inputs = held.length // held.taps
    if node.op == "ConvTranspose":  # its rows are over all groups
        inputs //= int(node.attrs.get("group", 1))
    if node.op in ("Conv", "ConvTranspose") and inputs <= FEW:
        which = "one input channel makes" if inputs == 1 else f"{inputs} input channels make"
        return f"{which} a result: few weights, and none that makes up for a zero"
    if (size := prod(held.shape)) < smallest:
        return f"{size} weights: those of fewer than {smallest} stay dense"
    return None
