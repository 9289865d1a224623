"""Layers behind removed units, fitted anew to what they gave: one after the other, as they run.

    min || clamp(W' x' + b' + other') - clamp(W x + b + other) ||^2  +  ridge || W' - W ||^2

x, other: of the original, x', other': of the network as it is by then, so that each layer makes up
for what all before it have lost; also those that lost nothing themselves. How much the rows may
change is chosen by vectors that are kept back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from onnxq.data import Samples
from onnxq.model import Model
from onnxq.numerics.channel_pruning import Aim, Fitting
from onnxq.numerics.sequences import weyl
from onnxq.passes.unit_readers import Reading, Rows
from onnxq.passes.unit_trials import Trials, fetched
from onnxq.sampling import divided

LIMIT, LEAST, EACH = 32768, 4096, 32  # vectors of all samples: at most, at least, for each value
RIDGES = (0.01, 0.1, 1.0)
MOST = 96  # layers that are fitted in a network at most, one run of the samples for each


def repair(
    trials: Trials,
    readings: Sequence[Reading],
    gone: NDArray[np.bool_],
    samples: Samples,
    memory: int,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Fit layers of the copy from the first that reads what is gone on; how many were fitted.

    Units are switched off in the copy by then.
    """
    loses = [bool(np.append(gone, False)[r.columns].any()) for r in readings]
    first = loses.index(True) if True in loses else len(readings)
    chosen = list(range(first, len(readings)))
    if len(chosen) > MOST:
        chosen = [i for i in chosen if loses[i]]
    done = 0
    for count, i in enumerate(chosen):
        done += _fitted(trials, readings[i], gone, samples, memory)
        if progress is not None:
            progress(count + 1)
    return done


def _fitted(
    trials: Trials, reading: Reading, gone: NDArray[np.bool_], samples: Samples, memory: int
) -> bool:
    columns, outputs = reading.columns, len(reading.outputs)
    room = memory // (4 * (3 * columns.size + 6 * outputs))
    limit = min(LIMIT, max(LEAST, EACH * columns.size), room)
    if limit < min(LIMIT, columns.size):
        return False
    sight = _Sight(reading, limit, samples)
    aim = sight.values(trials.model, reading.aim.name)
    keep = ~np.append(gone, False)[columns]
    x, beside = sight.met(trials.copy)
    if not all(np.isfinite(v).all() for v in (aim, x)):
        return False
    values = aim if beside is None else aim - beside
    whole = Aim(values, beside, reading.clamp)
    rows = reading.rows()
    bias = reading.bias_values()
    fitted, judging = sight.divided()
    start = np.ascontiguousarray(rows[:, keep])
    met = np.ascontiguousarray(x[:, keep])
    problem = Fitting(start, met[fitted], whole.part(fitted), has_bias=reading.bias is not None)
    judge = whole.part(judging)

    def error(found: tuple[Rows, Rows]) -> float:
        return judge.error(met[judging] @ found[0].T + found[1])

    best = _best(problem, (start, bias), error)
    made = np.zeros_like(rows)
    made[:, keep] = best[0]
    trials.put(reading, made, None if reading.bias is None else best[1])
    return True


def _best(
    problem: Fitting, start: tuple[Rows, Rows], error: Callable[[tuple[Rows, Rows]], float]
) -> tuple[Rows, Rows]:
    """The fit of least error: of several ridges, and then with what stands behind the layer."""
    best, least, chosen = start, error(start), RIDGES[0]
    for ridge in RIDGES:
        found = problem.solve(ridge, 1)
        if (now := error(found)) < least:
            best, least, chosen = found, now, ridge
    if problem.aim.clamp is None or best is start:
        return best
    found = problem.solve(chosen)
    return found if error(found) < least else best


class _Sight:
    """The vectors that are looked at: of the same places in both models."""

    def __init__(self, reading: Reading, limit: int, samples: Samples) -> None:
        self.reading, self.samples = reading, samples
        self.each = -(-limit // max(1, len(samples)))
        self.counts = list[int]()
        self.shapes = list[tuple[int, ...]]()

    def met(self, model: Model) -> tuple[Rows, Rows | None]:
        """What the layer reads in a model, and what is added to what it gives."""
        reading, x, beside = self.reading, list[Rows](), list[Rows]()
        other = reading.beside
        names = [reading.source.name, *([] if other is None else [other.name])]
        for i, values in enumerate(fetched(model, names, self.samples)):
            x.append(reading.vectors(values[names[0]], self.each, weyl(i)))
            if other is not None:
                beside.append(self._results(values[other.name], values[names[0]].shape, i))
        self.counts = [len(v) for v in x]
        return np.concatenate(x), np.concatenate(beside) if beside else None

    def values(self, model: Model, name: str) -> Rows:
        """A tensor's values where the layer gives results."""
        source = self.reading.source.name
        return np.concatenate([
            self._results(values[name], values[source].shape, i)
            for i, values in enumerate(fetched(model, [name, source], self.samples))
        ])  # fmt: skip

    def divided(self) -> tuple[slice, slice]:
        """The vectors of the samples to fit to, and of those that judge."""
        first = sum(self.counts[: len(divided(self.samples)[0])])
        whole = sum(self.counts)
        return slice(0, first), slice(first if first < whole else 0, whole)

    def _results(self, value: NDArray[np.float32], source: tuple[int, ...], index: int) -> Rows:
        return self.reading.results(value, source, self.each, weyl(index))
