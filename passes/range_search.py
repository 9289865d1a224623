"""Ranges of activations by what they cost at the outputs, not by their own histograms alone.

What clipping costs next to rounding differs from net to net and from its beginning to its end:
`careful` guesses that it counts three times. Here the price is found by measuring. The model with
all its tensors quantized is simulated with other prices for a block of tensors, first for all of
them, then for each half in graph order, for quarters, and so on. A price is taken only where the
error of the outputs falls by clearly more than samples differ in that. What one tensor costs alone
is not measured: with the few samples that time allows its best range there is mostly chance.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq import runtime
from onnxq.data import Feed, Samples
from onnxq.model import Model
from onnxq.passes.range_simulation import Key, Outputs, Ranges, Simulation, errors, run
from onnxq.sampling import divided
from onnxq.schemes import QParams
from onnxq.statistics import Method

LADDER: tuple[Method | float, ...] = (
    0.003, 0.03, 0.3, "mse", "careful", 10.0, 100.0, "minmax",
)  # fmt: skip
"""Prices of clipping, ascending: wider and wider ranges."""
START = LADDER.index("careful")
TOGETHER = [LADDER.index(step) for step in ("minmax", "mse", 100.0, 10.0, 0.3, 0.03, 0.003)]
"""In which order steps are tried for all tensors at once."""
SAMPLES = 12  # that a candidate is run on, at most; and that judge
ROUNDS, VERDICTS = 6, 2  # measurements that there are passes for, of these for the verdict
MEMORY = 1 << 28  # bytes of reference outputs that are kept
GAIN = 0.02  # of an error: less is not worth a change
EXACT, LARGEST = 1e-12, 100.0  # an error that is none, and the greatest logarithm
HOPELESS = 2.0  # times the least error: further on the ladder it will not be better
SIGMAS = 2.0  # standard errors by which a gain has to be above zero, among so many attempts
SIGMAS_OF_ALL = 1.0  # the same where all tensors move together: few attempts, and more to gain
Errors = NDArray[np.float64]
Steps = NDArray[np.int64]
Expected = list[tuple[Feed, Outputs]]


@dataclass(frozen=True, slots=True)
class Found:
    """Ranges, and what they cost: mean relative squared errors before and after."""

    ranges: Ranges
    changed: int
    groups: int
    before: float
    after: float
    judging: int
    passes: int

    @property
    def text(self) -> str:
        """For a note."""
        cost = f"{self.passes} simulated passes"
        if not self.groups:
            return "ranges: there is none to choose"
        if not self.changed:
            return f"ranges: none of {self.groups} is clearly better than careful ({cost})"
        return (
            f"ranges: {self.changed} of {self.groups} tensors changed by the error of the outputs: "
            f"{told(self.before)} -> {told(self.after)} on {self.judging} held-out "
            f"samples ({cost})"
        )


def search(
    model: Model,
    simulation: Simulation,
    candidates: Sequence[Ranges],
    samples: Samples,
    passes: int,
) -> Found:
    """Choose for each group among the candidates, one for each step of LADDER.

    passes: how often the simulated model is run on a sample, at most (but once on one).
    Three quarters of the samples choose, the rest judges.
    """
    reference = runtime.session(model)
    start = candidates[START]
    groups = [
        key for key in simulation.pairs if any(_differ(c[key], start[key]) for c in candidates)
    ]
    if not groups:
        return Found(start, 0, len(simulation.pairs), 0.0, 0.0, 0, 0)
    chosen, judging = (_expected(reference, part, passes) for part in divided(samples))
    work = _Search(simulation, candidates, groups, passes - VERDICTS * len(judging))
    steps = work.descend(chosen)
    work.limit = passes
    before = after = (
        work.errors(judging, work.start) if (steps != START).any() else np.zeros((1, 1))
    )
    if (steps != START).any():
        steps, after = work.judged(judging, steps, before)
    changed = np.flatnonzero(steps != START)
    return Found(
        work.ranges(steps), len(changed), len(simulation.pairs),
        total(before), total(after), len(judging), work.passes,
    )  # fmt: skip


@dataclass(slots=True)
class _Search:
    """Steps are of each group, where it is on the ladder."""

    simulation: Simulation
    candidates: Sequence[Ranges]
    groups: Sequence[Key]
    limit: int
    passes: int = 0

    @property
    def start(self) -> Steps:
        """Where all groups begin."""
        return np.full(len(self.groups), START, np.int64)

    def ranges(self, steps: Steps) -> Ranges:
        """Parameters of all tensors; those of a group are one object, and move together."""
        start = self.candidates[START]
        found = {id(start[key]): int(n) for key, n in zip(self.groups, steps, strict=True)}
        return {
            key: self.candidates[found.get(id(params), START)][key] for key, params in start.items()
        }

    def errors(self, samples: Expected, steps: Steps) -> Errors:
        """Of each sample."""
        self.passes += len(samples)
        ranges = self.ranges(steps)
        made = [self.simulation.run(feed, ranges) for feed, _ in samples]
        return errors([outputs for _, outputs in samples], made)

    def descend(self, samples: Expected) -> Steps:
        """All groups, halves, quarters: each to where on the ladder the error is clearly least."""
        steps = self.start
        error = self.errors(samples, steps)
        if not error.size:
            return steps
        steps, error = self._together(samples, steps, error)
        blocks = deque(_halves(slice(0, len(steps))))
        while blocks and self.has_passes(samples):
            block, origin = blocks.popleft(), steps
            for way in (1, -1):
                for there in self._further(origin, block, way):
                    if not self.has_passes(samples):
                        return steps
                    made = self.errors(samples, there)
                    if not is_clearly_better(made, error):
                        break
                    steps, error = there, made
                if steps is not origin:
                    break
            blocks += _halves(block)
        return steps

    def has_passes(self, samples: Expected) -> bool:
        """Whether one more measurement is within the limit."""
        return self.passes + len(samples) <= self.limit

    def _together(self, samples: Expected, steps: Steps, error: Errors) -> tuple[Steps, Errors]:
        """All groups at the step that is best for them together."""
        tried, narrow = [START], error
        for here in TOGETHER:
            if not self.has_passes(samples):
                break
            if here < TOGETHER[1] and narrow.sum() > HOPELESS * error.sum():
                break
            if not all(self._differ(here, there, self.groups) for there in tried):
                continue
            tried.append(here)
            there = np.full_like(steps, here)
            made = self.errors(samples, there)
            narrow = made if here < START else narrow
            if is_clearly_better(made, error, SIGMAS_OF_ALL):
                steps, error = there, made
        return steps, error

    def _differ(self, one: int, other: int, groups: Sequence[Key]) -> bool:
        """Whether some group has another range at one step than at the other."""
        now, then = self.candidates[one], self.candidates[other]
        return any(_differ(now[key], then[key]) for key in groups)

    def _further(self, steps: Steps, block: slice, way: int) -> Iterator[Steps]:
        """The block, all on one step, at the next ones where some range is another."""
        before = here = int(steps[block.start])
        while 0 <= (here := here + way) < len(LADDER):
            if self._differ(here, before, self.groups[block]):
                before, there = here, steps.copy()
                there[block] = here
                yield there

    def judged(self, samples: Expected, steps: Steps, before: Errors) -> tuple[Steps, Errors]:
        """What is better on samples that had no say: all changes, a half of them, or none."""
        changed = np.flatnonzero(steps != START)
        best = self.start, before
        for part in (changed, *np.array_split(changed, 2)):
            if not self.has_passes(samples):
                break
            there = self.start
            there[part] = steps[part]
            made = self.errors(samples, there)
            if gains(made, best[1]).mean() > 0 and made.sum() < best[1].sum():
                best = there, made
            if part is changed and best[0] is there:
                break
        return best


def _halves(block: slice) -> Iterator[slice]:
    if block.stop - block.start > 1:
        middle = (block.start + block.stop + 1) // 2
        yield from (slice(block.start, middle), slice(middle, block.stop))


def gains(made: Errors, before: Errors) -> NDArray[np.float64]:
    """By how much the error of each sample falls: natural logarithms, the mean of all outputs."""
    with np.errstate(invalid="ignore", divide="ignore"):
        fallen = np.log((before + EXACT) / (made + EXACT))
    return np.asarray(np.nan_to_num(fallen, nan=0.0, posinf=LARGEST, neginf=-LARGEST).mean(1))


def is_clearly_better(made: Errors, before: Errors, sigmas: float = SIGMAS) -> bool:
    """Whether errors fall: altogether, and in samples by more than chance and enough to care."""
    gain = gains(made, before)
    spread = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else 0.0
    return bool(made.sum() < before.sum() and gain.mean() > max(GAIN, sigmas * spread))


def _expected(session: Any, samples: Samples, passes: int) -> Expected:
    """Some of the samples, spread over all, and what the float model makes of them."""
    limit = min(SAMPLES, max(1, passes // ROUNDS))
    found: Expected = []
    for feed in islice(samples, 0, None, -(-len(samples) // limit)):
        found.append((feed, run(session, feed)))
        size = sum(v.nbytes for v in found[0][1] if isinstance(v, np.ndarray))
        if (len(found) + 1) * size > MEMORY:
            break
    return found


def _differ(one: QParams, other: QParams) -> bool:
    return bool(one.scale != other.scale or one.zero_point != other.zero_point)


def total(errors: Errors) -> float:
    """Mean relative squared errors of all samples, outputs added up."""
    return float(errors.mean(0).sum())


def told(error: float) -> str:
    """An error relative to the signal, as text."""
    return f"{-10 * np.log10(error):.2f} dB" if 0 < error < np.inf else f"{error:g}"
