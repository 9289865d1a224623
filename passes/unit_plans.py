"""How a model is pruned: rank, measure, allot, fit, remove."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq import runtime
from onnxq.core import Note
from onnxq.data import Samples
from onnxq.errors import DataError
from onnxq.model import Model
from onnxq.passes.removal import Structure, remove, structure
from onnxq.passes.unit_budget import LANES, Counts, Curve, Work, allotted, even
from onnxq.passes.unit_choice import norms
from onnxq.passes.unit_curves import Ranker, Ranking, measured, stops_of
from onnxq.passes.unit_readers import Reading, readings
from onnxq.passes.unit_repair import repair
from onnxq.passes.unit_trials import Trials
from onnxq.sampling import divided

LOOKED_AT = 256  # samples at most
JUDGES = 32
HALVINGS = 6  # of the share of work, in search of a size or a time
SECONDS = 1.0  # of timing, each time
COARSER = 2.0  # times the noise that counts may make which kernels like better
ENOUGH = 1.0  # of the share that is saved has to be saved in blocks of channels, too
NOTHING = "nothing makes up for what is removed without samples of real data: give --data"
HOW = {
    "norm": "by the norm of weights",
    "activation": "by activations",
    "reconstruction": "by what others can make up for",
}


@dataclass(frozen=True, slots=True)
class Aims:
    """What is to be saved: see `prune_channels`; block: of channels in the target's kernels."""

    amount: float | None
    macs: float | None
    size: float | None
    latency: float | None
    multiple: int | None
    least: float
    block: int

    def multiples(self, size: int, width: int) -> tuple[int, ...]:
        """Of how many units a group may be left; width: channels of a unit.

        One that is given, or what the target's kernels like, the finest first.
        """
        if self.multiple is not None or self.block == 1:
            own = self.multiple or 1
            return (own // gcd(own, width),)
        wanted = (LANES, 2 * LANES, self.block)
        return tuple(1 if size * width < 2 * step else step // gcd(step, width) for step in wanted)


@dataclass(frozen=True, slots=True)
class Pruning:
    """One run of the pass over one model."""

    rule: str
    model: Model
    found: Structure
    aims: Aims
    dense: frozenset[str]
    criterion: str
    compensation: bool
    samples: Samples | None
    memory: int
    progress: Callable[[int], None] | None = None

    def run(self) -> list[Note]:
        """Prune in place; notes of what was done."""
        samples = self._samples()
        criterion = self._criterion(samples)
        shapes = None
        if samples is not None:
            first = next(iter(samples))
            shapes = self.model.shapes_for({name: v.shape for name, v in first.items()})
        work = Work.of(self.model, self.found, shapes)
        groups = self._worth_it(work)
        found = list(readings(self.model, self.found))
        trials, curves = None, dict[int, Curve]()
        if samples is not None and not samples.synthetic:
            judging = divided(samples)[1].take(JUDGES)
            trials = Trials(self.model, self.found, judging, self.memory // 4)
        rankings = dict[int, Ranking]()
        for group, ranking in self._ranked(groups, found, criterion, samples):
            if self.aims.amount is None:
                curves[group] = (
                    measured(trials, group, ranking) if trials else self._guessed(group, ranking)
                )
            rankings[group] = replace(ranking, readings=(), solved=None)
        removed, told = self._removed(work, rankings, curves, samples)
        gone = self._gone(rankings, removed)
        if not gone.any():
            why = "nothing can go: groups of channels are too small, or are to be left alone"
            return [Note(self.rule, self.model.graph.name, why, changed=False)]
        text = self._repaired(trials, found, gone, samples)
        share = 1 - work.left(removed) / work.left(np.zeros_like(removed))
        changes = {} if trials is None else trials.fitted()
        nodes = self._nodes()
        later = {(n, i): v for (n, i), v in changes.items() if not _has_input(nodes[n], i)}
        self._write({key: v for key, v in changes.items() if key not in later})
        notes = list(remove(self.model, self.found, ~gone, self.rule))
        notes = self._with_curves(notes, curves if trials is not None else {})
        outputs = {reading.name: reading.outputs for reading in found}
        kept = np.append(~gone, True)
        self._write({(n, i): v[kept[outputs[n]]] for (n, i), v in later.items()})
        name = self.model.graph.name
        if trials is None:
            notes.append(Note(self.rule, name, NOTHING, changed=False))
            if self.aims.amount is not None:
                return notes
        whole = f"{share:.1%} of multiply-accumulates removed, {HOW[criterion]}{told}{text}"
        return [Note(self.rule, name, whole), *notes]

    def _nodes(self) -> dict[str, gs.Node]:
        return {node.name: node for node in self.model.nodes()}

    def _write(self, changes: Mapping[tuple[str, int], NDArray[Any]]) -> None:
        """New constants of nodes."""
        nodes = self._nodes() if changes else {}
        for (name, index), values in changes.items():
            node = nodes[name]
            made = self.model.constant(f"{name}_fitted", values)
            while len(node.inputs) <= index:
                node.inputs.append(made)
            node.inputs[index] = made

    def _repaired(
        self, trials: Trials | None, found: Sequence[Reading], gone: NDArray[np.bool_],
        samples: Samples | None,
    ) -> str:  # fmt: skip
        """Fit what is left, in the copy; what that has brought."""
        if trials is None or samples is None:
            return ""
        trials.switch_off(gone)
        before = trials.distance()
        if not self.compensation:
            return (
                f"; outputs within {before.db:.1f} dB on held-out samples, nothing makes up for it"
            )
        count = repair(trials, found, gone, samples, self.memory, self.progress)
        after = trials.distance()
        text = f"; outputs within {after.db:.1f} dB on held-out samples, {before.db:.1f} dB before"
        if after.noise < before.noise:
            return f"{text} {count} layers were fitted anew"
        trials.reset()
        return f"{text} layers were fitted anew: undone"

    def _with_curves(self, notes: Sequence[Note], curves: Mapping[int, Curve]) -> list[Note]:
        """The outputs' dB by the share of units that go, at the layer that makes them."""
        points: dict[str, tuple[tuple[float, float], ...]] = {}
        for group, curve in curves.items():
            size, made = len(self.found.groups[group]), self.found.producers(group)
            if made and curve:
                points[made[0].node.name] = tuple(
                    (stop / size, float(-10 * np.log10(max(noise, 1e-20))))
                    for stop, noise in sorted(curve.items())
                )
        found = [replace(n, curve=points.pop(n.node, n.curve)) for n in notes]
        why = "its channels stay: others cost the outputs less"
        rest = (Note(self.rule, n, why, changed=False, curve=c) for n, c in points.items())
        return [*found, *rest]

    def _samples(self) -> Samples | None:
        if self.samples is None or not len(self.samples):
            if self.criterion in ("activation", "reconstruction") or self.aims.latency is not None:
                raise DataError(f"{self.rule} looks at samples with these options: give --data")
            return None
        return self.samples.take(LOOKED_AT)

    def _criterion(self, samples: Samples | None) -> str:
        is_real = samples is not None and not samples.synthetic
        if self.criterion == "auto":
            return "reconstruction" if is_real else "norm"
        return self.criterion

    def _worth_it(self, work: Work) -> list[int]:
        """Groups that have enough work, or that all are to lose the same share of."""
        none = np.zeros_like(work.sizes)
        least = self.aims.least * work.left(none)
        return [
            g for g, size in enumerate(work.sizes.tolist())
            if size > 1 and (self.aims.amount is not None or work.saved(none, g, size) > least)
        ]  # fmt: skip

    def _ranked(
        self, groups: Sequence[int], found: Sequence[Reading], criterion: str,
        samples: Samples | None,
    ) -> Iterator[tuple[int, Ranking]]:  # fmt: skip
        """Group by group: what makes up for it takes memory."""
        scores, stops = norms(self.found), self._stops()
        is_plain = criterion == "norm" and not self.compensation
        if samples is None or samples.synthetic or is_plain:
            for g in groups:
                yield g, Ranking(np.argsort(scores[self.found.groups[g]], kind="stable"), stops[g])
            return
        solves = self.compensation and self.aims.amount is None
        fitted = divided(samples)[0]
        ranker = Ranker(self.model, self.found, found, fitted, criterion, solves, self.memory)
        yield from ranker.rank(groups, scores, stops)

    def _stops(self) -> list[tuple[int, ...]]:
        """For each group, how many of its units may go."""
        aims, found = self.aims, list[tuple[int, ...]]()
        for number, group in enumerate(self.found.groups):
            size, width = len(group), self.found.width(number)
            if aims.amount is not None:
                own = aims.multiple or 1
                gone = even(size, aims.amount, own // gcd(own, width))
                found.append((gone,) if gone else ())
                continue
            wanted = {n for m in aims.multiples(size, width) for n in stops_of(size, m)}
            found.append(tuple(sorted(wanted)))
        return found

    def _guessed(self, group: int, ranking: Ranking) -> Curve:
        """A curve without data: the share of the weights' squares that goes."""
        own = np.square(norms(self.found))[self.found.groups[group]][ranking.order]
        sums = np.cumsum(own) / max(float(own.sum()), 1e-30)
        return {stop: float(sums[stop - 1]) for stop in ranking.stops}

    def _removed(
        self, work: Work, rankings: Mapping[int, Ranking], curves: Mapping[int, Curve],
        samples: Samples | None,
    ) -> tuple[Counts, str]:  # fmt: skip
        """How many units of each group go, and what has to be said of it."""
        aims = self.aims
        if aims.amount is not None:
            removed = np.zeros_like(work.sizes)
            for group, ranking in rankings.items():
                removed[group] = max(ranking.stops, default=0)
            return removed, ""
        if aims.macs is not None:
            removed = self._allotted(work, curves, aims.macs)
            left = work.left(removed) / work.left(np.zeros_like(removed))
            missed = left > 1 - aims.macs + 1e-9
            return removed, f", fewer than the {aims.macs:.0%} asked for" if missed else ""
        low, high, best, share = 0.0, 1.0, np.inf, np.inf
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            left = self._left(rankings, self._allotted(work, curves, middle), samples)
            best = min(best, left)
            if left <= 1 - (aims.size or aims.latency or 0.0):
                high, share = middle, left
            else:
                low = middle
        what = "of the weights' bytes" if aims.size is not None else "of the time, measured"
        missed = np.isinf(share)
        text = f"; {best if missed else share:.0%} {what}{', not what was asked' if missed else ''}"
        return self._allotted(work, curves, high), text

    def _allotted(self, work: Work, curves: Mapping[int, Curve], share: float) -> Counts:
        """How many units go; of counts that kernels like where that costs little more.

        Counts are the finer ones, as long as what they save in blocks is about what they save.
        """
        none = np.zeros_like(work.sizes)
        best, least = none, np.inf
        block = self.aims.block
        for level in range(3 if self.aims.multiple is None and block > 1 else 1):
            each = [self._at(curves.get(g, {}), g, level) for g in range(len(work.sizes))]
            removed = allotted(work, each, share, block)
            noise = sum(curves[g].get(n, 0.0) for g, n in enumerate(removed.tolist()) if n)
            if level and (noise > COARSER * least or work.left(removed) > work.left(best) * 1.1):
                continue
            best, least = removed, min(least, noise)
            saved = [1 - work.left(removed, b) / work.left(none, b) for b in (1, block)]
            if saved[1] >= ENOUGH * saved[0]:
                break
        return best

    def _at(self, curve: Curve, group: int, level: int) -> Curve:
        """The points of a curve at which what is left is a multiple."""
        size = len(self.found.groups[group])
        multiples = self.aims.multiples(size, self.found.width(group))
        step = multiples[min(level, len(multiples) - 1)]
        return {stop: noise for stop, noise in curve.items() if (size - stop) % step == 0}

    def _left(
        self, rankings: Mapping[int, Ranking], removed: Counts, samples: Samples | None
    ) -> float:
        """What the model without these units has of the original's bytes, or of its time."""
        trial = self.model.copy()
        dense = [id(node) for node in trial.nodes() if node.name in self.dense]
        remove(trial, structure(trial, self.rule, dense), ~self._gone(rankings, removed), self.rule)
        if self.aims.size is not None:
            return sum(trial.weight_sizes()) / max(sum(self.model.weight_sizes()), 1)
        assert samples is not None
        feed = next(iter(samples))
        return runtime.latency(self.model, trial, feed, seconds=SECONDS).ratio

    def _gone(self, rankings: Mapping[int, Ranking], removed: Counts) -> NDArray[np.bool_]:
        gone = np.zeros(self.found.count, np.bool_)
        for group, ranking in rankings.items():
            gone[self.found.groups[group][ranking.order[: removed[group]]]] = True
        return gone


def _has_input(node: gs.Node, index: int) -> bool:
    """Whether there is a constant yet, which is cut to size with the units."""
    return index < len(node.inputs) and bool(node.inputs[index].name)
