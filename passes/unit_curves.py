"""Which units of each group go first, and what it costs a model's outputs when so many are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxq.data import Samples
from onnxq.model import Model
from onnxq.numerics.channel_pruning import Elimination, Moments, Reader, eliminated
from onnxq.passes.removal import Structure
from onnxq.passes.unit_readers import Reading
from onnxq.passes.unit_trials import Trials, vectors

POINTS = 8  # a curve's: each eighth of the units
LIMIT = 16384  # vectors of all samples that are looked at
Order = NDArray[np.int64]
Solved = Mapping[int, list[tuple[NDArray[np.float32], NDArray[np.float64]]]]
"""Rows and biases of readings, by how many units are gone."""


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Units of a group, the first to go first; stops: how many may go.

    solved: for these numbers the rows of layers that make up for it, and their new biases.
    """

    order: Order
    stops: tuple[int, ...]
    readings: tuple[Reading, ...] = ()
    solved: Solved | None = None


def stops_of(size: int, multiple: int) -> tuple[int, ...]:
    """Numbers of units that may go, of a group: what is left is a multiple, but never nothing."""
    wanted = {size - round(size * i / POINTS / multiple) * multiple for i in range(1, POINTS)}
    if multiple > 1 and size > multiple:
        wanted |= {size - size // multiple * multiple, size - multiple}
    return tuple(sorted(n for n in wanted if 0 < n < size))


@dataclass(frozen=True, slots=True)
class Ranker:
    """Ranks the units of all groups by what layers read.

    criterion: "reconstruction" or "activation"; compensates: whether rows are solved for. memory:
    bytes of products at once.
    """

    model: Model
    found: Structure
    readings: Sequence[Reading]
    samples: Samples
    criterion: str
    compensates: bool
    memory: int
    progress: Callable[[int], None] | None = None

    def rank(
        self, groups: Sequence[int], fallback: NDArray[np.float64], stops: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[int, Ranking]]:
        """Group by group. fallback: scores [units] where no reading tells anything."""
        for batch in self._batches(groups):
            needed = {id(r): r for group in batch for r in self.readers(group)}
            seen = {key: Moments() for key in needed}
            vectors(
                self.model, list(needed.values()), self.samples, LIMIT,
                lambda reading, x, seen=seen: seen[id(reading)].add(x),  # type: ignore[misc]
            )  # fmt: skip
            for group in batch:
                yield group, self._ranked(group, seen, fallback, stops[group])

    def readers(self, group: int) -> list[Reading]:
        """The readings that have units of the group."""
        units = self.found.groups[group]
        return [r for r in self.readings if np.isin(units, r.columns).any()]

    def _batches(self, groups: Sequence[int]) -> Iterator[list[int]]:
        batch, size = list[int](), 0
        for group in groups:
            own = sum(8 * r.columns.size**2 for r in self.readers(group))
            if batch and size + own > self.memory:
                yield batch
                batch, size = [], 0
            batch.append(group)
            size += own
        if batch:
            yield batch

    def _ranked(
        self, group: int, seen: Mapping[int, Moments], fallback: NDArray[np.float64],
        stops: tuple[int, ...],
    ) -> Ranking:  # fmt: skip
        units = self.found.groups[group]
        plain = Ranking(np.argsort(fallback[units], kind="stable"), stops)
        readings = [
            r for r in self.readers(group)
            if seen[id(r)].is_finite and r.at(units) is not None
            and 2 * 8 * r.columns.size**2 <= self.memory
        ]  # fmt: skip
        if not readings or not stops:
            return plain
        readers = [_reader(r, seen[id(r)], units) for r in readings]
        order = None
        if self.criterion == "norm":
            order = plain.order
        elif self.criterion == "activation":
            order = np.argsort(np.sum([_energy(r) for r in readers], axis=0), kind="stable")
        if order is not None and not self.compensates:
            return Ranking(order, stops)
        made = eliminated(readers, order=order, stops=stops)
        return Ranking(made.order, stops, tuple(readings), self._solved(made, readings, seen))

    def _solved(
        self, made: Elimination, readings: Sequence[Reading], seen: Mapping[int, Moments]
    ) -> Solved | None:
        if not self.compensates:
            return None
        return {
            stop: [
                (rows, r.bias_values() + (r.rows() - rows) @ seen[id(r)].mean)
                for r, rows in zip(readings, found, strict=True)
            ]
            for stop, found in made.rows.items()
        }


def _reader(reading: Reading, moments: Moments, units: NDArray[np.int64]) -> Reader:
    at, rows = reading.at(units), reading.rows().astype(np.float64)
    assert at is not None
    covariance = moments.covariance
    if reading.bias is None:  # nothing makes up for a mean
        covariance = covariance + np.outer(moments.mean, moments.mean)
    energy = float(((rows @ covariance) * rows).sum())
    return Reader(rows, covariance, at, 1 / energy if energy > 0 else 1.0)


def _energy(reader: Reader) -> NDArray[np.float64]:
    """The variance of each unit's values times the squares of the weights that read them."""
    each = np.diag(reader.covariance) * np.square(reader.rows).sum(0)
    return np.asarray(reader.weight * each[reader.at].sum(1))


def measured(trials: Trials, group: int, ranking: Ranking) -> dict[int, float]:
    """The noise at the model's outputs, by how many units of a group are gone.

    It never gets less with more of them: what seems to is chance.
    """
    curve, worst = {}, 0.0
    units = trials.found.groups[group]
    for stop in ranking.stops:
        gone = np.zeros(trials.found.count, np.bool_)
        gone[units[ranking.order[:stop]]] = True
        trials.switch_off(gone)
        if ranking.solved is not None:
            solved = zip(ranking.readings, ranking.solved[stop], strict=True)
            for reading, (rows, bias) in solved:
                trials.put(reading, rows, None if reading.bias is None else bias)
        worst = max(worst, trials.distance().noise)
        curve[stop] = worst
        trials.reset()
    return curve
