"""Choose integers anew for weights beside quantized activations: their errors cancel in results.

    y = Conv(DQ(Q(x)), DQ(Wq))    =>    y = Conv(DQ(Q(x)), DQ(Wq'))

It stands behind quantize_static: formats, scales and what stays float are in the graph, what layers
are multiplied with has the errors of the layers before, and the weights as they were are in the
model that quantize_static left. Scales, zero points and biases stay; see
`onnxq.numerics.reconstruction` for how integers are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Note, Skip
from onnxq.data import Samples
from onnxq.model import Model, values_of
from onnxq.numerics import grids
from onnxq.numerics.reconstruction import rounded_again, squared_error
from onnxq.numerics.saturation import saturates
from onnxq.options import require_range
from onnxq.packed import Grid
from onnxq.passes.grams import Layer, Seen, db
from onnxq.passes.layouts import Held, held_by
from onnxq.passes.observing import Observing
from onnxq.passes.ops import OPS, kernel_rows, paired_rows
from onnxq.passes.packed_weights import stands_for, uses_of
from onnxq.schemes import FORMATS
from onnxq.targets import Target

NAME = "reconstruct_static"
UNKNOWN = "nothing tells what weights were: quantize_static comes first"


@dataclass(frozen=True, slots=True)
class ReconstructStatic:
    """Weights that quantize_static has quantized, where the layers' results get closer.

    Each layer is judged by the squared error of its results on the last quarter of the samples:
    where reconstruction does not lower it, the integers stay.

    most_bits: weights of more are left alone. damping, sweeps, rounds, memory_mb: as in
    reconstruct_weights. target: where its sums of pairs saturate, no integer is chosen with which
    they can.
    """

    samples: Samples = field(repr=False)
    most_bits: int = 8
    damping: float = 0.01
    sweeps: int = 3
    rounds: int = 1
    memory_mb: int = 1024
    target: Target | None = None
    progress: Callable[[int], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_range("most_bits", self.most_bits, 2, 16)
        require_range("damping", self.damping, 0)
        require_range("sweeps", self.sweeps, 0)
        _ = self.observing

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    @property
    def observing(self) -> Observing:
        """What is run to see what weights are multiplied with."""
        return Observing(NAME, self.samples, self.rounds, self.memory_mb, self.progress)

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Replace integers in place; a note for each weight, or why not.

        Raises DataError without samples, or with ones that do not fit.
        """
        why = self.observing.why_not() or (None if model.unquantized else UNKNOWN)
        if why is not None:
            return [Note(NAME, model.graph.name, why, changed=False)]
        before = {node.name: node for node in model.unquantized[-1].nodes()}
        notes, tasks = [], []
        for uses in _found(model):
            try:
                tasks.append(_task(self, model, uses, before))
            except Skip as reason:
                notes.append(self.observing.declined(uses[0][0], reason))
        return [*notes, *self.observing.solve(model, tasks)]


Uses = list[tuple[gs.Node, Held]]


def _found(model: Model) -> Iterable[Uses]:
    """Layers with quantized weights; those of one weight together."""
    found: dict[int, Uses] = {}
    for node in model.nodes(*(op for op, spec in OPS.items() if spec.role == "linear")):
        for held in held_by(node):
            stands = stands_for(node.inputs[held.index])
            if stands is not None and stands.form in ("qdq", "storage"):
                found.setdefault(id(stands.numbers), []).append((node, held))
    return found.values()


def _task(
    options: ReconstructStatic, model: Model, uses: Uses, before: Mapping[str, gs.Node]
) -> _Task:
    node, held = uses[0]
    stands = stands_for(node.inputs[held.index])
    assert stands is not None
    numbers = stands.numbers
    if len({h.key for _, h in uses}) > 1 or uses_of(numbers) != len(uses):
        raise Skip("its weight has other readers, which use it in another way")
    grid = stands.read() if stands.read is not None else None
    old = before.get(node.name)
    weight = None if old is None else values_of(old.inputs[held.index])
    if grid is None or weight is None or grid.numbers.shape != weight.shape:
        raise Skip(UNKNOWN)
    if (bits := FORMATS[str(numbers.dtype)].bits) > options.most_bits:
        raise Skip(f"weights of {bits} bits, more than {options.most_bits}")
    layers = options.observing.layers(model, uses)
    return _Task(options, numbers, grid, np.asarray(weight, np.float32), layers)


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """Integers, the float weight that they stand for, and the layers multiplied with it."""

    options: ReconstructStatic
    numbers: gs.Constant
    grid: Grid
    weight: NDArray[np.float32]
    layers: tuple[Layer, ...]

    def solve(self, seen: Seen, /) -> Note:
        """Replace the integers where results get closer."""
        held, grid, options = self.layers[0].held, self.grid, self.options
        rows, parts = held.rows(self.weight), grid.map(held.rows)
        zero = np.zeros((1, 1)) if parts.zero is None else parts.zero
        found = rounded_again(
            rows, seen.trusted, _limits(self.numbers, grid), parts.scale,
            np.broadcast_to(zero, rows.shape), damping=options.damping, sweeps=options.sweeps,
        )  # fmt: skip
        made = self._safe(held.unrolled(found.numbers))
        before, after = (
            squared_error(rows - held.rows(replace(grid, numbers=n).values()), seen.judging)
            for n in (grid.numbers, made)
        )
        whole, helps = squared_error(rows, seen.judging), after < before
        if helps:
            self.numbers.values = np.ascontiguousarray(made, self.numbers.dtype)
        text = (
            f"weights as {self.numbers.dtype}: results within {db(whole, after)} on samples kept "
            f"back, rounded to nearest {db(whole, before)}{'' if helps else ': undone'}"
        )
        return Note(NAME, self.layers[0].node.name, text, changed=helps)

    def _safe(self, made: NDArray[Any]) -> NDArray[Any]:
        """The integers; columns of them as they were where sums of pairs could now saturate."""
        target = self.options.target
        if target is None or not target.saturates or made.dtype != np.int8:
            return made
        old = self.grid.numbers
        places = np.arange(made.size).reshape(made.shape)
        for layer in self.layers:
            rows, where = paired_rows(layer.node, made), kernel_rows(layer.node, places)
            if rows is None or where is None:
                continue
            risky = saturates(rows).reshape(len(rows), -1)
            back = np.zeros(made.size, np.bool_)
            back[where.swapaxes(1, 2)[risky]] = True
            made = np.where(back.reshape(made.shape), old, made)
        return made


def _limits(numbers: gs.Constant, grid: Grid) -> grids.Grid:
    """The integers that may be used: symmetric weights without the least one, as they are made."""
    lowest, greatest = grids.limits(np.dtype(numbers.dtype))
    if grid.zero is None:
        lowest = max(lowest, -greatest)
    return grids.Grid(grid.numbers.dtype, lowest, greatest, symmetric=False)
