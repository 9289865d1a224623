"""Scales of short rows, such as groups of 32, in few bits: rounding and least squares in turn.

For integers k = q - zero point of a row x, the best scale and the error that it leaves are known:

    s = sum(k x) / sum(k k)             sum (x - s k)^2 = sum(x x) - sum(k x)^2 / sum(k k)

and the same for the zero point next to the one at hand, with k - d for k. So a start is looked at
once and its error is that of the best parameters for what it rounds to, no worse than its own. The
starts are ranges within the extremes, and where there are outliers that for a normal distribution
(`clipping.standardized`). (A search over scales takes eight times as long and finds
0.02 dB more in groups of 32 with 4 bits.) `hqq` goes on from there, in fewer steps.

Rows are columns here, x is [values, rows]: numpy adds whole lines. All is done in a few buffers of
a piece's size, which stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxq.numerics.clipping import normal_step
from onnxq.numerics.fitting import Fit, Problem, Values

# Where to begin: parts of both extremes (of the scale, with a sign, where zero is in the middle;
# both signs where the grid leans). For 4 bits, and for 2: wide steps are worth clipping more.
LEANING = {4: (1.0, -0.95, 0.92, -0.88, 0.85), 2: (1.0, -0.9, 0.8, -0.7, 0.6, -0.5)}
EVEN = {4: (1.0, 0.95, 0.9, 0.85), 2: (1.0, 0.85, 0.7, 0.55)}
ENDS = {
    4: ((1.0, 1.0), (1.0, 0.9), (0.9, 1.0)),
    2: ((1.0, 1.0), (0.75, 0.75), (0.6, 0.6), (1.0, 0.6), (0.6, 1.0)),
}
OUTLIERS = 0.55  # of the step for the extremes: below, the one for a normal distribution is tried
FEW = 4  # levels up to which it is the latter
AGAIN = 1  # steps from the best of them
LEVELS = 16  # of a grid, at most
MOVES = tuple(np.float32(d) for d in (0, -1, 1))  # of zero points, at a step
BETA, KAPPA = 1.0, 1.3  # as in `hqq`
STEPS = 1  # each takes as long as three of least squares; more bring 0.005 dB


def is_short(problem: Problem) -> bool:
    """Whether this is the way: one piece of columns, few levels, nothing to weigh or to round."""
    grid = problem.grid
    return (
        problem.held is not None
        and problem.rows.tall
        and problem.importance is None
        and not (grid.is_float or grid.power_of_two)
        and grid.levels <= LEVELS
    )


def least_squares(problem: Problem) -> Fit:
    """The fit of least squared error that a few starts lead to."""
    return _Columns(problem).least_squares()


def least_norm(problem: Problem) -> Fit:
    """The least p-norm, p = 1/2, from there on, whose squared error is no worse; see `hqq`."""
    columns = _Columns(problem)
    return columns.least_norm(columns.least_squares())


class _Columns:
    """The values of a problem, sums of them that do not change, and buffers."""

    def __init__(self, problem: Problem) -> None:
        assert problem.held is not None
        self.problem, self.grid = problem, problem.grid
        self.x = problem.held[0][0]
        take = problem.space.take
        self.k, self.r, self.a, self.b = (take(name, self.x.shape) for name in "krab")
        self.sum: Values | None = None if self.grid.symmetric else self.x.sum(0, keepdims=True)
        middle = self.grid.middle if self.grid.symmetric else 0
        self.least = np.float32(self.grid.qmin - middle)
        self.most = np.float32(self.grid.qmax - middle)

    def least_squares(self) -> Fit:
        best: Fit | None = None
        most = np.zeros(0, np.float32)
        for start in self._starts():
            self._round(start)
            fit, gain = self._solved(start, _dot(self.k, self.x), self.sum)
            if best is None:
                best, most = fit, gain
            else:
                best = best.where(gain <= most, fit)
                np.maximum(most, gain, out=most)
        assert best is not None
        for _ in range(AGAIN):
            self._round(best)
            best, _ = self._solved(best, _dot(self.k, self.x), self.sum)
        return best

    def _starts(self) -> Iterator[Fit]:
        problem, grid = self.problem, self.grid
        few = 2 if grid.levels <= FEW else 4
        if grid.symmetric:
            for factor in (LEANING if grid.leans else EVEN)[few]:
                scale = problem.cover.scale * np.float32(factor)
                yield Fit(scale, problem.cover.zero)
        else:
            for low, high in ENDS[few]:
                ends = problem.low * np.float32(low), problem.high * np.float32(high)
                yield problem.cover if low == high == 1 else self._covering(*ends)
        if (start := self._standardized()) is not None:
            yield start

    def _standardized(self) -> Fit | None:
        """As `clipping.standardized`; None where that is no narrower than the other starts."""
        problem, grid = self.problem, self.grid
        count = np.float32(max(len(self.x), 1))
        mean = np.float32(0) if self.sum is None else self.sum / count
        deviation = np.sqrt(np.maximum(_dot(self.x, self.x) / count - mean * mean, 0))
        step = np.float32(normal_step(grid.levels)) * deviation
        cover = np.abs(problem.cover.scale)
        if not (step < OUTLIERS * cover).any():
            return None
        if grid.symmetric:
            factor = np.minimum(step / cover, np.float32(1))
            factor = np.where(factor > 0, factor, np.float32(1))
            return Fit(problem.cover.scale * factor, problem.cover.zero)
        reach = step * np.float32((grid.levels - 1) / 2)
        low = np.clip(mean - reach, problem.low, 0)
        return self._covering(low, np.clip(mean + reach, 0, problem.high))

    def _covering(self, low: Values, high: Values) -> Fit:
        """As `fitting.covering`, of ranges that are neither tiny nor vast."""
        scale = (high - low) / np.float32(self.grid.levels - 1)
        scale = np.where(scale > 0, scale, np.float32(1))
        zero = np.rint(self.least - low / scale)
        return Fit(scale, np.clip(zero, self.least, self.most))

    def _round(self, fit: Fit) -> None:
        """Set k to what the grid holds of x / scale."""
        k = self.k
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            np.multiply(self.x, 1 / fit.scale, out=k)
        np.rint(k, out=k)
        if self.grid.symmetric:
            np.clip(k, self.least, self.most, out=k)
            return
        np.maximum(k, self.least - fit.zero, out=k)
        np.minimum(k, self.most - fit.zero, out=k)

    def _solved(self, fit: Fit, kt: Values, total: Values | None) -> tuple[Fit, Values]:
        """The best parameters for k and some targets, and how much these explain.

        kt: sums of k times target; total: of the targets (None: the zero point stays).
        """
        kk = _dot(self.k, self.k)
        if total is None:
            with np.errstate(divide="ignore", invalid="ignore"):
                scale = kt / kk
            right = scale * fit.scale > 0  # the same sign, and a number
            return Fit(np.where(right, scale, fit.scale), fit.zero), np.where(right, kt * scale, 0)
        k, count = self.k.sum(0, keepdims=True), np.float32(len(self.x))
        best, scale, zero = np.zeros_like(kt), fit.scale.copy(), fit.zero.copy()
        for move in MOVES:
            a, moved = kt - move * total, fit.zero + move
            with np.errstate(divide="ignore", invalid="ignore"):
                step = a / (kk - 2 * move * k + count * move * move)
                gain = a * step
            better = (step > 0) & (gain > best)
            better &= moved >= self.least if move < 0 else moved <= self.most
            for held, new in ((best, gain), (scale, step), (zero, moved)):
                np.copyto(held, new, where=better)
        return Fit(scale, zero), best

    def least_norm(self, start: Fit) -> Fit:
        fit = best = start
        norm = bound = np.zeros(0, np.float32)
        beta = BETA
        for step in range(STEPS + 1):
            self._round(fit)
            np.multiply(self.k, fit.scale, out=self.r)
            np.subtract(self.x, self.r, out=self.r)
            np.abs(self.r, out=self.a)
            np.sqrt(self.a, out=self.b)
            p, squares = self.b.sum(0, keepdims=True), _dot(self.r, self.r)
            if step == 0:
                norm, bound = p, squares
            else:
                better = (p < norm) & (squares <= bound)
                best, norm = fit.where(better, best), np.where(better, p, norm)
            if step == STEPS:
                break
            # the targets: what the grid holds, and of the errors what is not let go
            self._keep(np.abs(fit.scale), beta)
            kt = fit.scale * _dot(self.k, self.k) + _dot(self.k, self.r)
            total = None
            if self.sum is not None:
                total = fit.scale * self.k.sum(0, keepdims=True) + self.r.sum(0, keepdims=True)
            fit, _ = self._solved(fit, kt, total)
            beta *= KAPPA
        return best

    def _keep(self, step: Values, beta: float) -> None:
        """Take from the errors what is let go, as `hqq.kept_back`; a, b: sizes and their roots."""
        share = self.b
        share *= self.a
        limit = step * np.sqrt(step) / np.float32(beta)
        np.maximum(share, limit, out=share)
        with np.errstate(invalid="ignore"):
            np.divide(limit, share, out=share)
        self.r *= share


def _dot(a: Values, b: Values) -> Values:
    """Sums of products over each column, [1, rows]."""
    return np.asarray(np.einsum("ij,ij->j", a, b))[None]
