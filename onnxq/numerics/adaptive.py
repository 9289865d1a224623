"""Rounding weights so that a layer's results, behind its Relu, keep to what they were.

    least   sum |f(W x + b) - f(Q x' + b)|^2        Q = k s, k integers;  f: Relu, Clip or nothing

x is what the layer meets in the float model and x' what it meets behind layers that are rounded
already (Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization",
arXiv:2004.10568, equation 25). There the rounding is relaxed and learned by gradients; here each
integer is set in turn, given all others, by steps of any size while f is left out, which makes the
error a quadratic form of Q, then by single steps under the whole error (block coordinate descent:
Behdin et al. 2023, "QuantEase", arXiv:2309.01885). Measured: closer, in a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
Places = tuple[NDArray[np.intp], NDArray[np.intp]]

DAMPINGS = (1.0, 0.1, 0.01)  # of the mean square of x': what keeps Q near W where x' says little
SWEEPS, CLAMPED = 4, 3  # over all columns, at most: of the quadratic form, under the whole error
BLOCK = 64  # columns whose changes reach the others together, by one matrix product


@dataclass(frozen=True, slots=True, eq=False)
class Meeting:
    """What a layer meets and has to make of it, over some places.

    inputs: x' [blocks, values, places]. results: W x + b [blocks, rows, places]. bias: [blocks,
    rows, 1]. least, greatest: what f clamps to.
    """

    inputs: Values
    results: Values
    bias: Values
    least: float = -np.inf
    greatest: float = np.inf

    @classmethod
    def of(
        cls, weight: Values, bias: Values, exact: Values, inputs: Values, clamp: tuple[float, float]
    ) -> Meeting:
        """Of a weight [blocks, rows, values], met by `exact` x and `inputs` x'."""
        return cls(inputs, weight @ exact + bias, bias, *clamp)

    @property
    def is_clamped(self) -> bool:
        """Whether f is anything."""
        return self.least > -np.inf or self.greatest < np.inf

    def clamped(self, results: Values) -> Values:
        """What f makes of results."""
        if not self.is_clamped:
            return results
        return np.clip(results, np.float32(self.least), np.float32(self.greatest))

    @property
    def signal(self) -> float:
        """The sum of squares of the exact results."""
        return float(np.square(self.clamped(self.results), dtype=np.float64).sum())

    def errors(self, weight: Values) -> NDArray[np.float64]:
        """The squared error of each row's results [blocks, rows], of a rounded weight."""
        made = self.clamped(weight @ self.inputs + self.bias)
        made -= self.clamped(self.results)
        return np.asarray(np.square(made, dtype=np.float64).sum(2))

    def gradient(self, weight: Values) -> Values:
        """Half of the derivative of the sum of `errors` by the weight."""
        made = weight @ self.inputs + self.bias
        return self.slopes(made)[0] @ self.inputs.swapaxes(1, 2)

    def passes(self, made: Values) -> Values:
        """1 where f lets a result through, 0 elsewhere."""
        return ((made > self.least) & (made < self.greatest)).astype(np.float32)

    def slopes(self, made: Values) -> tuple[Values, Values]:
        """The error of each result, where f lets it through; and where that is."""
        passes = self.passes(made)
        return (self.clamped(made) - self.clamped(self.results)) * passes, passes


@dataclass(frozen=True, slots=True, eq=False)
class Rounding:
    """Integers `steps` (zero point taken off) of [blocks, rows, values], and their scales.

    scale, lowest, highest: of the same shape; the least and the greatest step.
    """

    steps: Values
    scale: Values
    lowest: Values
    highest: Values

    @property
    def weight(self) -> Values:
        """The values."""
        weight: Values = self.steps * self.scale
        return weight


def adapted(
    weight: Values,
    start: Rounding,
    fitting: Meeting,
    judging: Meeting,
    dampings: Sequence[float] = DAMPINGS,
) -> Rounding:
    """Set each integer of a weight [blocks, rows, values] so that results are closer.

    Where places are few for so many values, what is fitted to them fits no others: so each damping
    is tried, the strongest first, and then what f changes, as long as the places that judge get
    closer. What they are closest with is returned, be it the start.
    """
    best, least, damping = start, float(judging.errors(start.weight).sum()), dampings[0]
    found = start
    for strength in dampings:
        found = _Quadratic.of(weight, found, fitting, strength).solved()
        error = float(judging.errors(found.weight).sum())
        if error < least:
            best, least, damping = found, error, strength
        elif best is not start:
            break
    if fitting.is_clamped:
        found = _Clamped.of(weight, best, fitting, damping).solved()
        if float(judging.errors(found.weight).sum()) < least:
            return found
    return best


def _penalty(meeting: Meeting, damping: float) -> Values:
    """What the square of a weight's change costs, [blocks, 1, 1]."""
    square = np.square(meeting.inputs).sum(2).mean(1)
    return np.asarray(np.float32(damping) * square[:, None, None], np.float32)


@dataclass(slots=True, eq=False)
class _Quadratic:
    """tr(Q H Q^T) - 2 tr(Q C^T), with H = sum x' x'^T [blocks, K, K], C [blocks, rows, K]."""

    rounding: Rounding
    gram: Values
    target: Values
    steps: Values

    @classmethod
    def of(cls, weight: Values, start: Rounding, meeting: Meeting, damping: float) -> _Quadratic:
        x = meeting.inputs
        added = _penalty(meeting, damping)
        gram: Values = x @ x.swapaxes(1, 2)
        gram += added * np.eye(gram.shape[1], dtype=np.float32)
        target = (meeting.results - meeting.bias) @ x.swapaxes(1, 2) + added * weight
        return cls(start, gram, np.asarray(target, np.float32), start.steps.copy())

    def solved(self) -> Rounding:
        for _ in range(SWEEPS):
            if not self._sweep():
                break
        return replace(self.rounding, steps=self.steps)

    def _sweep(self) -> bool:
        """Set each column anew, given all others; whether an integer changed."""
        diagonal = np.einsum("bii->bi", self.gram)
        diagonal = np.where(diagonal > 0, diagonal, np.inf)
        moved = False
        pull = (self.steps * self.rounding.scale) @ self.gram - self.target
        for first in range(0, self.steps.shape[2], BLOCK):
            at = slice(first, first + BLOCK)
            near, inner = pull[:, :, at], self.gram[:, at, at]
            changes = np.zeros_like(near)
            for i in range(near.shape[2]):
                j = first + i
                slope = near[:, :, i]
                if i:
                    slope = slope + (changes[:, :, :i] @ inner[:, :i, i, None])[..., 0]
                scale = self.rounding.scale[:, :, j]
                best = self.steps[:, :, j] - slope / (diagonal[:, j, None] * scale)
                low, high = self.rounding.lowest[:, :, j], self.rounding.highest[:, :, j]
                best = np.clip(np.rint(best), low, high)
                changes[:, :, i] = (best - self.steps[:, :, j]) * scale
                self.steps[:, :, j] = best
            if changes.any():
                moved = True
                pull += changes @ self.gram[:, at]
        return moved


@dataclass(slots=True, eq=False)
class _Clamped:
    """Single steps under the error behind f. made: the results; added: see `_penalty`."""

    weight: Values
    rounding: Rounding
    meeting: Meeting
    made: Values
    added: Values

    @classmethod
    def of(cls, weight: Values, start: Rounding, meeting: Meeting, damping: float) -> _Clamped:
        rounding = replace(start, steps=start.steps.copy())
        made = rounding.weight @ meeting.inputs + meeting.bias
        return cls(weight, rounding, meeting, made, _penalty(meeting, damping))

    def solved(self) -> Rounding:
        for _ in range(CLAMPED):
            if not self._sweep():
                break
        return self.rounding

    def _sweep(self) -> bool:
        moved = False
        slopes, passes = self.meeting.slopes(self.made)
        for j in range(self.rounding.steps.shape[2]):
            x = self.meeting.inputs[:, j, :, None]
            off = self.rounding.steps[:, :, j] * self.rounding.scale[:, :, j] - self.weight[:, :, j]
            slope = (slopes @ x)[..., 0] + self.added[..., 0] * off
            bend = (passes @ np.square(x))[..., 0] + self.added[..., 0]
            at, change = self._tried(j, slope, bend)
            if len(at[0]):
                moved |= self._step(j, at, change, off[at], slopes, passes)
        return moved

    def _tried(self, j: int, slope: Values, bend: Values) -> tuple[Places, Values]:
        """Where one step downhill is shorter than to the other side, and the step."""
        rounding = self.rounding
        steps, scale = rounding.steps[:, :, j], rounding.scale[:, :, j]
        change = -np.sign(slope * scale)
        after = steps + change
        free = (after >= rounding.lowest[:, :, j]) & (after <= rounding.highest[:, :, j])
        at = np.nonzero(free & (np.abs(slope) > bend * np.abs(scale) / 2))
        return (at[0], at[1]), change[at]

    def _step(
        self, j: int, at: Places, change: Values, off: Values, slopes: Values, passes: Values
    ) -> bool:
        """Make the steps that lower the error; whether there is one."""
        meeting, rounding = self.meeting, self.rounding
        delta = change * rounding.scale[(*at, j)]
        before, wanted = self.made[at], meeting.clamped(meeting.results[at])
        after = before + delta[:, None] * meeting.inputs[at[0], j]
        was, now = (np.square(meeting.clamped(z) - wanted).sum(1) for z in (before, after))
        further = self.added[at[0], 0, 0] * (np.square(off + delta) - np.square(off))
        helps = now + further < was
        at, after, wanted = (at[0][helps], at[1][helps]), after[helps], wanted[helps]
        rounding.steps[(*at, j)] += change[helps]
        self.made[at] = after
        passes[at] = meeting.passes(after)
        slopes[at] = (meeting.clamped(after) - wanted) * passes[at]
        return bool(helps.any())
