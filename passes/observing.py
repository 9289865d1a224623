"""Solve weights one after the other, given what their layers are multiplied with, in rounds.

For passes that choose integers: what a weight is, and how it is solved, is theirs (`Task`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import onnx_graphsurgeon as gs

from onnxq.core import Note, Skip
from onnxq.data import Samples
from onnxq.errors import DataError
from onnxq.model import Model
from onnxq.options import require_range
from onnxq.passes.grams import Layer, Seen, depths, in_rounds, observed_products
from onnxq.passes.layouts import Held

UNREAL = "synthetic samples do not tell what weights are multiplied with: give --data"
S = TypeVar("S", bound="Seeing")


class Seeing(Protocol):
    """Something that is to be known of a weight."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All that are multiplied with it; at least one."""
        ...


class Task(Seeing, Protocol):
    """A weight that is to be solved."""

    def solve(self, seen: Seen, /) -> Note:
        """Edit the model, given products of the layers together; raises Skip, or says what is."""
        ...


@dataclass(frozen=True, slots=True)
class Observing:
    """On which samples products are observed, and how many at once.

    rounds: how often the samples are run, about: later layers see what earlier ones have become.
    """

    rule: str
    samples: Samples
    rounds: int
    memory_mb: int
    progress: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        require_range("rounds", self.rounds, 1)
        require_range("memory_mb", self.memory_mb, 1)

    def why_not(self) -> str | None:
        """Why there is nothing to see. Raises DataError without samples."""
        if not len(self.samples):
            raise DataError("reconstruction looks at samples: give --data")
        return UNREAL if self.samples.synthetic else None

    def layers(self, model: Model, uses: Sequence[tuple[gs.Node, Held]]) -> tuple[Layer, ...]:
        """The layers of a weight; raises Skip where they cannot be seen or take too much."""
        layers = tuple(Layer.of(model, node, held) for node, held in uses)
        if (size := -(-_bytes(layers) >> 20)) > self.memory_mb:
            raise Skip(f"its products take {size} MB: memory_mb allows {self.memory_mb}")
        return layers

    def solve(self, model: Model, tasks: Sequence[Task]) -> list[Note]:
        """Solve all; a note for each, or why not."""
        notes = []
        for task, seen in self.each(model, tasks):
            try:
                if isinstance(seen, Skip):
                    raise seen
                notes.append(task.solve(seen))
            except Skip as reason:
                notes.append(self.declined(task.layers[0].node, reason))
        return notes

    def each(self, model: Model, tasks: Sequence[S]) -> Iterator[tuple[S, Seen | Skip]]:
        """What the layers of each are multiplied with, or why that is not known, by depth.

        The model may be edited in between: those of later rounds see it.
        """
        depth = depths(model, [layer.node for task in tasks for layer in task.layers])
        items = [
            (max(depth[id(layer.node)] for layer in task.layers), _bytes(task.layers), task)
            for task in tasks
        ]
        for batch in in_rounds(items, self.rounds, self.memory_mb << 20):
            layers = [layer for task in batch for layer in task.layers]
            seen = observed_products(model, layers, self.samples, self.progress)
            for task in batch:
                try:
                    found: Seen | Skip = Seen.of(task.layers, seen)
                except Skip as reason:
                    found = reason
                yield task, found

    def declined(self, node: gs.Node, why: Skip) -> Note:
        """A note that says why."""
        return Note(self.rule, node.name, str(why), changed=False)


def _bytes(layers: Sequence[Layer]) -> int:
    """What their products take, those that judge included."""
    return 2 * sum(layer.size_bytes for layer in layers)
