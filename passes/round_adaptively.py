"""Round weights up or down anew, so that layers make up for what was lost in front of them.

    y = Conv(DQ(Q(x)), DQ(Wq))    =>    y = Conv(DQ(Q(x)), DQ(Wq'))

It stands behind quantize_static, as reconstruct_static does, and may refine what that has found:
formats, scales and what stays float are in the graph, and the model as it was is what
quantize_static left. Layer by layer, the integers are chosen by the results, behind the layer's
Relu or Clip, of both models on the same samples (`onnxq.numerics.adaptive`; Nagel et al. 2020, "Up
or Down? Adaptive Rounding for Post-Training Quantization").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Note, Skip
from onnxq.data import Samples
from onnxq.errors import DataError
from onnxq.model import Model, values_of
from onnxq.numerics.adaptive import Meeting, Rounding, adapted
from onnxq.numerics.saturation import saturates
from onnxq.options import require_range
from onnxq.packed import Grid
from onnxq.passes.grams import Layer, db, depths, in_rounds
from onnxq.passes.layouts import Held, held_by
from onnxq.passes.linear import LINEAR
from onnxq.passes.meetings import Met, blocks_of, meetings, rows_of, wanted_places
from onnxq.passes.ops import clamp_behind, paired_rows
from onnxq.passes.packed_weights import stands_for, uses_of
from onnxq.schemes import FORMATS, IntFormat
from onnxq.targets import Target

NAME = "round_adaptively"
UNREAL = "synthetic samples do not tell what layers have to make of them: give --data"
UNKNOWN = "nothing tells what the weight was: quantize_static comes first"
SHARED = "its weight has other readers"
NO_CLAMP = (-np.inf, np.inf)
Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RoundAdaptively:
    """Integers of weights behind quantize_static, where the layers' results get closer.

    Each layer is judged by the squared error of its results on the last quarter of the samples:
    where it does not get smaller, the integers stay.

    most_bits: weights of more are left alone. largest: as are those of more values. places: how
    many results of each output channel are looked at. memory_mb: of what is looked at at once;
    layers that need more are left alone. target: where its sums of pairs saturate, no integer is
    chosen with which they can.

    The samples are run for each depth: what several layers made up for at once, not knowing of each
    other, would be made up for several times.
    """

    samples: Samples = field(repr=False)
    most_bits: int = 8
    largest: int = 1 << 20
    places: int = 6144
    memory_mb: int = 1024
    target: Target | None = None
    progress: Callable[[int], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_range("most_bits", self.most_bits, 2, 16)
        for name in ("largest", "places", "memory_mb"):
            require_range(name, getattr(self, name), 1)

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Replace integers in place; a note for each weight, or why not.

        Raises DataError without samples, or with ones that do not fit.
        """
        if not len(self.samples):
            raise DataError("adaptive rounding looks at samples: give --data")
        why = UNREAL if self.samples.synthetic else None if model.unquantized else UNKNOWN
        if why is not None:
            return [Note(NAME, model.graph.name, why, changed=False)]
        before = {node.name: node for node in model.unquantized[-1].nodes(*LINEAR)}
        notes, tasks = list[Note](), list[_Task]()
        for node in model.nodes(*LINEAR):
            for held in held_by(node):
                try:
                    task = self._task(model, node, held, before)
                except Skip as reason:
                    notes.append(Note(NAME, node.name, str(reason), changed=False))
                else:
                    tasks += [] if task is None else [task]
        return [*notes, *self._solved(model, tasks)]

    def _task(
        self, model: Model, node: gs.Node, held: Held, before: Mapping[str, gs.Node]
    ) -> _Task | None:
        """None where the weight is none, or float."""
        stands = stands_for(node.inputs[held.index])
        if stands is None or stands.form not in ("qdq", "storage") or stands.read is None:
            return None
        numbers, format = stands.numbers, FORMATS.get(str(np.dtype(stands.numbers.dtype)))
        if not isinstance(format, IntFormat):
            raise Skip(f"a weight of {numbers.dtype}: integers alone are rounded up or down")
        if format.bits > self.most_bits:
            raise Skip(f"a weight of {format.bits} bits: most_bits allows {self.most_bits}")
        if (size := prod(held.shape)) > self.largest:
            raise Skip(f"a weight of {size} values: largest allows {self.largest}")
        if uses_of(numbers) != 1:
            raise Skip(SHARED)
        old = before.get(node.name)
        weight = None if old is None else values_of(old.inputs[held.index])
        if old is None or weight is None or weight.shape != held.shape:
            raise Skip(UNKNOWN)
        grid, source = stands.read(), model.unquantized[-1]
        if not np.array_equal(np.asarray(numbers.values), grid.numbers.astype(numbers.dtype)):
            raise Skip("its integers lie in another way than the weight: in groups")
        was = next(h for h in held_by(old) if h.index == held.index)
        clamp = clamp_behind(source, old) or NO_CLAMP
        task = _Task(
            self, numbers, grid, np.asarray(weight, np.float32), clamp,
            Layer.of(source, old, was), Layer.of(model, node, held),
        )  # fmt: skip
        if (size := -(-task.size_bytes >> 20)) > self.memory_mb:
            raise Skip(f"what it meets takes {size} MB: memory_mb allows {self.memory_mb}")
        return task

    def _solved(self, model: Model, tasks: Sequence[_Task]) -> list[Note]:
        depth = depths(model, [task.layer.node for task in tasks])
        items = [(depth[id(task.layer.node)], task.size_bytes, task) for task in tasks]
        models, notes = (model.unquantized[-1], model) if tasks else None, []
        for batch in in_rounds(items, len(items), self.memory_mb << 20):
            assert models is not None
            layers = [(task.exact, task.layer) for task in batch]
            seen = meetings(models, layers, self.samples, self.places, self.progress)
            for task in batch:
                try:
                    notes.append(task.solve(seen.pop(0)))
                except Skip as reason:
                    notes.append(Note(NAME, task.layer.node.name, str(reason), changed=False))
        return notes


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """Integers, the float weight that they stand for, what clamps its results, and its layer.

    exact: the layer in the model as it was.
    """

    options: RoundAdaptively
    numbers: gs.Constant
    grid: Grid
    weight: Values
    clamp: tuple[float, float]
    exact: Layer
    layer: Layer

    @property
    def size_bytes(self) -> int:
        """What is looked at: vectors of both models, and some times the results."""
        values = prod(self.weight.shape)
        rows = values // self.layer.held.length
        length = self.layer.held.length * self.layer.blocks
        places = min(self.options.places, wanted_places(self.layer)) * 4 // 3
        return 4 * places * (2 * length + 6 * rows)

    def solve(self, met: Met) -> Note:
        """Replace the integers where results get closer."""
        if not met.is_finite:
            raise Skip("its inputs have NaN or infinite values, or too large ones")
        held, layer = self.layer.held, self.layer
        start = self._start()
        weight = self._blocks(self.weight)
        fitting, judging = (
            self._meeting(weight, met.part(judging=judging)) for judging in (False, True)
        )
        found = adapted(weight, start, fitting, judging)
        found = self._safe(start, found)
        before, after = (float(judging.errors(r.weight).sum()) for r in (start, found))
        helps = after < before
        moved = int((found.steps != start.steps).sum())
        if helps:
            made = held.unrolled(rows_of(layer, found.steps))
            zero = 0 if self.grid.zero is None else self.grid.zero.astype(np.float32)
            self.numbers.values = np.ascontiguousarray((made + zero).astype(self.numbers.dtype))
        text = (
            f"{moved} of {self.weight.size} integers moved: results within "
            f"{db(judging.signal, after)} on samples kept back, before "
            f"{db(judging.signal, before)}{'' if helps else ': undone'}"
        )
        return Note(NAME, layer.node.name, text, changed=helps)

    def _blocks(self, values: NDArray[Any]) -> Values:
        rows = self.layer.held.rows(np.asarray(values, np.float32))
        return np.ascontiguousarray(blocks_of(self.layer, rows), np.float32)

    def _start(self) -> Rounding:
        """The integers that are there."""
        grid, format = self.grid, FORMATS[str(np.dtype(self.numbers.dtype))]
        zero = np.float32(0) if grid.zero is None else grid.zero.astype(np.float32)
        steps = self._blocks(grid.numbers.astype(np.float32) - zero)
        least = np.float32(format.qmin) - zero
        if grid.zero is None:  # symmetric: without the least one, unless that is used
            least = np.maximum(least, min(-np.float32(format.qmax), steps.min()))
        shape = grid.numbers.shape
        kept = self.weight != 0  # a pruned weight stays zero
        ends = (np.broadcast_to(e, shape) * kept for e in (least, np.float32(format.qmax) - zero))
        return Rounding(steps, self._blocks(grid.scale), *(self._blocks(e) for e in ends))

    def _meeting(self, weight: Values, met: tuple[Values, Values]) -> Meeting:
        exact, rounded = met
        one, other = (_bias(layer.node, weight.shape) for layer in (self.exact, self.layer))
        if one is None or other is None:
            return Meeting(rounded, weight @ exact, np.zeros((*weight.shape[:2], 1), np.float32))
        return Meeting(rounded, weight @ exact + one, other, *self.clamp)

    def _safe(self, start: Rounding, found: Rounding) -> Rounding:
        """The rounding; rows of it as they were where sums of pairs could now saturate."""
        target = self.options.target
        if target is None or not target.saturates or self.numbers.dtype != np.int8:
            return found
        made = self.layer.held.unrolled(rows_of(self.layer, found.steps))
        rows = paired_rows(self.layer.node, made.astype(np.int8))
        if rows is None:
            return found
        back = saturates(rows).reshape(*found.steps.shape[:2], 1)
        return Rounding(
            np.where(back, start.steps, found.steps), found.scale, found.lowest, found.highest
        )


def _bias(node: gs.Node, shape: tuple[int, ...]) -> Values | None:
    """The bias as [blocks, rows, 1], zeros where there is none; None where it is not simple."""
    none = np.zeros((*shape[:2], 1), np.float32)
    if node.op == "MatMul" or len(node.inputs) < 3 or not node.inputs[2].name:
        return none if float(node.attrs.get("alpha", 1.0)) == 1 else None
    if any(float(node.attrs.get(name, 1.0)) != 1 for name in ("alpha", "beta")):
        return None
    stands = stands_for(node.inputs[2])
    values = values_of(node.inputs[2])
    if stands is not None and stands.read is not None:
        values = stands.read().values()
    if values is None or values.size not in (1, none.size):
        return None
    return none + np.asarray(values, np.float32).reshape(-1 if values.size == 1 else none.shape)
