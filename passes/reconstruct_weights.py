"""Choose the integers of weights so that their errors cancel in the layers' results.

    W    =>    W', float values on the grid of a format, which remember their integers

Rounding each value to nearest is the best for none but uncorrelated inputs; here each makes up for
the errors of those before it (`onnxq.numerics.reconstruction`: GPTQ, Frantar et al. 2022). What the
layers are multiplied with is observed in samples, in rounds: later layers see the errors of earlier
ones. A pass that quantizes weights afterwards, with the same options, takes the integers as they
are (`onnxq.packed`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Note, Skip
from onnxq.data import Samples
from onnxq.errors import DataError
from onnxq.model import Model
from onnxq.numerics.reconstruction import reconstruct, squared_error
from onnxq.options import require_range
from onnxq.packed import Grid, Recovered
from onnxq.passes.encodings import Packed
from onnxq.passes.grams import Layer, Seen, depths, in_rounds, observed_products
from onnxq.passes.layouts import Held
from onnxq.passes.weight_plans import Job, WeightPlan
from onnxq.passes.weight_storage import shared_by
from onnxq.schemes import Method, QParams, QuantScheme, quantize_weight
from onnxq.targets import Target
from onnxq.weights import Stored, Values, Weight

NAME = "reconstruct_weights"
UNREAL = "synthetic samples do not tell what weights are multiplied with: give --data"


@dataclass(frozen=True, slots=True)
class ReconstructWeights:
    """Weights that quantize_weights stores with the same options, where its results get closer.

    Each layer is judged by the squared error of its results on the last quarter of the samples:
    where reconstruction does not lower it, the weight is rounded to nearest.

    range: how scales are chosen, for groups when their turn comes; importance weighs each value by
    what its error costs when the values behind it make up for it. damping: how far correlations are
    believed, as a share of the mean square that is added. sweeps: how often each integer and scale
    is set anew, given all others. rounds: how often the samples are run, about; 1: all layers see
    what they see in the float model. memory_mb: of the products that are observed at once; layers
    that need more are left alone. All others: see quantize_weights.
    """

    samples: Samples = field(repr=False)
    format: str = "uint4"
    granularity: Literal["tensor", "channel", "group"] = "group"
    group_size: int = 32
    symmetric: bool = False
    levels: int | None = None
    range: Method = "importance"
    damping: float = 0.01
    sweeps: int = 3
    rounds: int = 1
    memory_mb: int = 1024
    encoding: Literal["auto", "compute", "storage"] = "auto"
    smallest: int = 512
    recurrent_group: int = 16
    wide_share: float = 0.0
    layers: tuple[str, ...] = ()
    target: Target | None = None
    progress: Callable[[int], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_range("damping", self.damping, 0)
        require_range("sweeps", self.sweeps, 0)
        require_range("rounds", self.rounds, 1)
        require_range("memory_mb", self.memory_mb, 1)
        _ = self.plan

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    @property
    def plan(self) -> WeightPlan:
        """What decides about formats."""
        return WeightPlan(
            self.format, self.granularity, self.group_size, self.symmetric, self.levels,
            self.encoding, self.smallest, self.recurrent_group, self.wide_share, self.layers,
            self.target,
        )  # fmt: skip

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Put weights on their grids in place; a note for each, or why not.

        Raises DataError without samples, or with ones that do not fit.
        """
        if not len(self.samples):
            raise DataError("reconstruction looks at samples: give --data")
        if self.samples.synthetic:
            return [Note(NAME, model.graph.name, UNREAL, changed=False)]
        return _Work(self, model).run()


@dataclass(frozen=True, slots=True)
class _Task:
    """A weight, and the layers that are multiplied with it."""

    job: Job
    layers: tuple[Layer, ...]

    @property
    def size_bytes(self) -> int:
        """What its products take, those that judge included."""
        return 2 * sum(layer.size_bytes for layer in self.layers)


class _Work:
    """One run of the pass over one model."""

    def __init__(self, options: ReconstructWeights, model: Model) -> None:
        self.options, self.model = options, model
        self.notes: list[Note] = []

    def run(self) -> list[Note]:
        model, options = self.model, self.options
        model.separate_names()
        tasks = self._tasks()
        depth = depths(model, [layer.node for task in tasks for layer in task.layers])
        items = [
            (max(depth[id(layer.node)] for layer in task.layers), task.size_bytes, task)
            for task in tasks
        ]
        for batch in in_rounds(items, options.rounds, options.memory_mb << 20):
            layers = [layer for task in batch for layer in task.layers]
            seen = observed_products(model, layers, options.samples, options.progress)
            for task in batch:
                try:
                    self._reconstruct(task, seen)
                except Skip as reason:
                    self._declined(task.job.weight.node, str(reason))
        if any(note.changed for note in self.notes):
            model.sweep()
        return self.notes

    def _declined(self, node: gs.Node, why: str) -> None:
        self.notes.append(Note(NAME, node.name, why, changed=False))

    def _tasks(self) -> list[_Task]:
        """What is to be reconstructed: weights of one layer, or of several that lie alike."""
        jobs, _ = self.options.plan.jobs(self.model, self.options.samples, NAME)
        sharing: dict[int, list[Job]] = {}
        for job in jobs:
            sharing.setdefault(id(job.weight.tensor), []).append(job)
        tasks = []
        for alike in sharing.values():
            try:
                tasks.append(self._task(alike))
            except Skip as reason:
                self._declined(alike[0].weight.node, str(reason))
        return tasks

    def _task(self, jobs: list[Job]) -> _Task:
        first = jobs[0]
        same = all(
            (j.weight.held.key, j.scheme) == (first.weight.held.key, first.scheme) for j in jobs
        )
        if not same or len(jobs) != len(first.weight.tensor.outputs):
            raise Skip("its weight has other readers, which use it in another way")
        if first.weight.tensor.dtype != np.float32:
            raise Skip("a weight of 16 bits: convert_float32 comes first")
        layers = tuple(Layer.of(self.model, j.weight.node, j.weight.held) for j in jobs)
        task = _Task(first, layers)
        if (size := -(-task.size_bytes >> 20)) > self.options.memory_mb:
            raise Skip(f"its products take {size} MB: memory_mb allows {self.options.memory_mb}")
        return task

    def _reconstruct(self, task: _Task, seen: Mapping[tuple[int, int], Seen]) -> None:
        keys = [(id(layer.node), layer.held.index) for layer in task.layers]
        if not all(key in seen for key in keys):
            raise Skip("its inputs are zeros, or have NaN or infinite values")
        fitted = sum(seen[key].fitted for key in keys)
        judging = sum(seen[key].judging for key in keys)
        assert not isinstance(fitted, int)
        assert not isinstance(judging, int)
        weight, scheme = task.job.weight, task.job.scheme
        held = weight.held
        rows = held.rows(weight.tensor.values)
        plain = nearest(rows, scheme, self.options.range, fitted)
        found = self._solved(rows, scheme, fitted)
        before, after = (
            squared_error(rows - params.dequantize(numbers), judging)
            for numbers, params in (plain, found)
        )
        whole = squared_error(rows, judging)
        helps = after < before
        self._put(task, Packed(held, *(found if helps else plain)))
        text = (
            f"weights as {scheme.format} {shared_by(scheme.granularity)}: results within "
            f"{_db(whole, after)} on samples kept back, rounded to nearest {_db(whole, before)}"
        )
        text += "" if helps else ": undone"
        self.notes.append(Note(NAME, weight.node.name, text, changed=True))

    def _solved(
        self, rows: NDArray[Any], scheme: QuantScheme, gram: NDArray[np.float64]
    ) -> tuple[NDArray[Any], QParams]:
        axis, options = scheme._axis(None), self.options
        found = reconstruct(
            rows, gram, scheme.grid, axis=axis, size=scheme.group_size, method=options.range,
            damping=options.damping, sweeps=options.sweeps,
        )  # fmt: skip
        return found.numbers, QParams(found.scale, found.zero, axis, scheme.group_size)

    def _put(self, task: _Task, packed: Packed) -> None:
        """A constant that remembers the integers, in the weight's place and under its name."""
        old = task.job.weight.tensor
        lying = np.ascontiguousarray(packed.held.unrolled(packed.rows))
        kept = recovered(packed.held, self.model.scratch.put(lying), packed.params)
        new = Weight(self.model.unique(old.name), kept)
        for layer in task.layers:
            layer.node.inputs[layer.held.index] = new
        old.name, new.name = new.name, old.name


def nearest(
    rows: NDArray[Any], scheme: QuantScheme, method: Method, gram: NDArray[np.float64]
) -> tuple[NDArray[Any], QParams]:
    """Rows rounded to nearest, as quantize_weights does it."""
    importance = None
    if method == "importance":
        squares = np.einsum("bii->bi", gram)
        importance = np.repeat(squares, len(rows) // len(squares), axis=0)
    return quantize_weight(rows, scheme, None, method, importance=importance)


def recovered(held: Held, numbers: Values, params: QParams) -> Recovered:
    """Float values of a weight that remember their integers, given as they lie in the weight."""

    def read() -> Grid:
        rows = held.rows(numbers.load() if isinstance(numbers, Stored) else numbers)
        zero = None if str(params.zero_point.dtype).startswith("float") else params.zero_point
        axis, block = params.axis or 0, params.group_size or 0
        return Grid.of(rows, params.scale, zero, axis=axis, block=block).map(held.unrolled)

    return Recovered(read, held.shape, np.float32)


def _db(signal: float, noise: float) -> str:
    return f"{10 * np.log10(signal / noise):.1f} dB" if noise and signal else "no error"
