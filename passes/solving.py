"""A weight that a later pass will store in few bits: its numbers, chosen from what it meets.

What comes of it stands in the weight's place: float values that remember their numbers
(`onnxq.packed`), which the later pass takes as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.codebooks import CodebookScheme, fit_codebook
from onnxq.core import Note, Skip
from onnxq.model import Model
from onnxq.numerics.codebooks import Table
from onnxq.numerics.reconstruction import reconstruct, rounded_again, squared_error
from onnxq.packed import Grid, Recovered
from onnxq.passes.grams import Layer, Seen, db
from onnxq.passes.layouts import Held
from onnxq.passes.observing import Observing
from onnxq.passes.streamed import NOT_FINITE
from onnxq.passes.weight_storage import Found, shared_by
from onnxq.schemes import Method, QParams, QuantScheme, quantize_weight
from onnxq.weights import Stored, Values, Weight

Scheme = QuantScheme | CodebookScheme


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """Rows as numbers, what they stand for; table: of a codebook, whose indices they are."""

    rows: NDArray[Any]
    params: QParams
    table: NDArray[np.float32] | None = None

    def grid(self) -> Grid:
        """The rows' values, and how they come about."""
        return _grid(self.rows, self.params, self.table)


@dataclass(frozen=True, slots=True)
class Solver:
    """How numbers are chosen: see `reconstruct_weights`."""

    range: Method
    damping: float
    sweeps: int
    seed: int = 0

    def nearest(self, rows: NDArray[Any], scheme: Scheme, gram: NDArray[np.float64]) -> Numbers:
        """Rows rounded to nearest, as the later pass does it by itself."""
        importance = None
        if self.range == "importance":
            squares = np.einsum("bii->bi", gram)
            importance = np.repeat(squares, len(rows) // len(squares), axis=0)
        if isinstance(scheme, QuantScheme):
            return Numbers(*quantize_weight(rows, scheme, None, self.range, importance=importance))
        codes = fit_codebook(rows, scheme, importance=importance, seed=self.seed)
        axis = None if not codes.scale.ndim else 0 if codes.group_size is None else 1
        zero = np.zeros(codes.scale.shape, np.uint8)
        params = QParams(codes.scale, zero, axis, codes.group_size)
        return Numbers(codes.indices, params, codes.codebook)

    def solved(
        self, rows: NDArray[Any], scheme: Scheme, gram: NDArray[np.float64], near: Numbers
    ) -> Numbers:
        """Rows as numbers whose errors make up for each other."""
        if isinstance(scheme, QuantScheme):
            axis = scheme._axis(None)
            found = reconstruct(
                rows, gram, scheme.grid, axis=axis, size=scheme.group_size, method=self.range,
                damping=self.damping, sweeps=self.sweeps,
            )  # fmt: skip
            return Numbers(found.numbers, QParams(found.scale, found.zero, axis, scheme.group_size))
        assert near.table is not None
        size = near.params.group_size
        found = rounded_again(
            rows, gram, Table.of(near.table), near.grid().scale, np.broadcast_to(0.0, rows.shape),
            size=size, is_free=near.params.axis is not None, damping=self.damping,
            sweeps=self.sweeps,
        )  # fmt: skip
        cells = found.scale[:, :: size or rows.shape[1]] if near.params.axis is not None else None
        scale = near.params.scale if cells is None else cells.reshape(near.params.scale.shape)
        params = QParams(scale, near.params.zero_point, near.params.axis, size)
        return Numbers(found.numbers, params, near.table)


@dataclass(frozen=True, slots=True)
class WeightTask:
    """A weight and the layers that are multiplied with it: a `Task` of `onnxq.passes.observing`."""

    model: Model
    rule: str
    solver: Solver
    weight: Found
    scheme: Scheme
    layers: tuple[Layer, ...]

    def solve(self, seen: Seen, /) -> Note:
        """Put the numbers in its place where they are better than the nearest ones."""
        scheme = self.scheme
        rows = np.asarray(self.weight.held.rows(self.weight.tensor.values), np.float32)
        if not np.isfinite(rows).all():
            raise Skip(NOT_FINITE)
        near = self.solver.nearest(rows, scheme, seen.fitted)
        found = self.solver.solved(rows, scheme, seen.trusted, near)
        before, after = (
            squared_error(rows - n.grid().values(), seen.judging) for n in (near, found)
        )
        whole, helps = squared_error(rows, seen.judging), after < before
        if helps:
            self._put(found)
        what = scheme.format if isinstance(scheme, QuantScheme) else f"{scheme.kind} codebook"
        text = (
            f"weights as {what} {shared_by(scheme.granularity)}: results within "
            f"{db(whole, after)} on samples kept back, rounded to nearest {db(whole, before)}"
        )
        text += "" if helps else ": undone"
        return Note(self.rule, self.weight.node.name, text, changed=helps)

    def _put(self, numbers: Numbers) -> None:
        """A constant that remembers the numbers, in the weight's place and under its name."""
        old, held, scratch = self.weight.tensor, self.weight.held, self.model.scratch
        lying = np.ascontiguousarray(held.unrolled(numbers.rows))
        kept = recovered(held, scratch.put(lying), numbers.params, numbers.table)
        new = Weight(self.model.unique(old.name), kept)
        for layer in self.layers:
            layer.node.inputs[layer.held.index] = new
        old.name, new.name = new.name, old.name


def reconstructed(
    model: Model, observing: Observing, solver: Solver, jobs: Sequence[tuple[Found, Scheme]]
) -> list[Note]:
    """Solve weights in place: those of one layer, or of several that use them alike."""
    sharing: dict[int, list[tuple[Found, Scheme]]] = {}
    for job in jobs:
        sharing.setdefault(id(job[0].tensor), []).append(job)
    notes, tasks = [], []
    for (first, scheme), *others in sharing.values():
        uses = [first, *(weight for weight, _ in others)]
        try:
            _require_alike(uses, {repr(scheme), *(repr(other) for _, other in others)})
            layers = observing.layers(model, [(w.node, w.held) for w in uses])
            _require_solvable(scheme)
        except Skip as reason:
            notes.append(observing.declined(first.node, reason))
        else:
            tasks.append(WeightTask(model, observing.rule, solver, first, scheme, layers))
    notes += observing.solve(model, tasks)
    if any(note.changed for note in notes):
        model.sweep()
    return notes


def _require_alike(uses: Sequence[Found], schemes: set[str]) -> None:
    first = uses[0]
    alike = all(weight.held.key == first.held.key for weight in uses) and len(schemes) == 1
    if not alike or len(uses) != len(first.tensor.outputs):
        raise Skip("its weight has other readers, which use it in another way")
    if first.tensor.dtype != np.float32:
        raise Skip("a weight of 16 bits: convert_float32 comes first")


def _require_solvable(scheme: Scheme) -> None:
    if isinstance(scheme, CodebookScheme) and scheme.dim > 1:
        raise Skip("indices of several values: nothing makes up for their errors")


def recovered(
    held: Held, numbers: Values, params: QParams, table: NDArray[np.float32] | None = None
) -> Recovered:
    """Float values of a weight that remember their numbers, given as they lie in the weight."""

    def read() -> Grid:
        rows = held.rows(numbers.load() if isinstance(numbers, Stored) else numbers)
        return _grid(rows, params, table).map(held.unrolled)

    return Recovered(read, held.shape, np.float32)


def _grid(rows: NDArray[Any], params: QParams, table: NDArray[np.float32] | None) -> Grid:
    zero = None if str(params.zero_point.dtype).startswith("float") else params.zero_point
    axis, block = params.axis or 0, params.group_size or 0
    return Grid.of(rows, params.scale, zero, axis=axis, block=block, table=table)
