"""Which weights stay: masks with exact counts.

A mask is True where a weight stays. What has the least score goes; of equal scores the first goes
first, so that the count is exact and the result always the same. Scores have the shape of a
weight's rows [channels, values]; they are not negative.

N:M ("2:4"): of each M values beside each other along the input dimension at most N stay. In a row
of a convolution, over inputs and kernel positions, these are M inputs at one position. A last group
of fewer values is one of M with zeros at its end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

LARGEST = 256  # M of N:M: a mask takes as many steps a value
PIECES = 64  # that a weight is divided into, for an allocation
Mask = NDArray[np.bool_]


class Choice(Protocol):
    """How many values stay, and among which."""

    def mask(self, scores: NDArray[Any], /) -> Mask:
        """Those that stay, of rows [channels, values]."""
        ...


@dataclass(frozen=True, slots=True)
class Count:
    """So many zeros, anywhere."""

    zeros: int

    def mask(self, scores: NDArray[Any], /) -> Mask:
        """All but the `zeros` least."""
        return without_least(scores, self.zeros)


@dataclass(frozen=True, slots=True)
class RowCount:
    """So many zeros, evenly among rows: the first ones have one more where they must."""

    zeros: int

    def mask(self, scores: NDArray[Any], /) -> Mask:
        """Each row without its least."""
        rows, length = scores.shape
        each = np.full(rows, self.zeros // rows)
        each[: self.zeros % rows] += 1
        order = np.argsort(scores, 1, kind="stable")
        kept = np.empty(scores.shape, bool)
        np.put_along_axis(kept, order, np.arange(length) >= each[:, None], 1)
        return kept


@dataclass(frozen=True, slots=True)
class Fixed:
    """A mask that is given."""

    kept: Mask

    def mask(self, scores: NDArray[Any], /) -> Mask:
        """The mask, whatever the scores."""
        return self.kept


@dataclass(frozen=True, slots=True)
class Pattern:
    """N:M: `kept` of each `of` inputs stay. taps: values that a row has for each input."""

    kept: int
    of: int
    taps: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "2:4". Raises ValueError for what is none, or keeps nothing or all."""
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
        if found is None:
            raise ValueError(f"nm is N:M, such as 2:4 (2 of 4 weights stay), not {text!r}")
        if max(map(len, found.groups())) > len(str(LARGEST)) or int(found[2]) > LARGEST:
            raise ValueError(f"M of N:M is up to {LARGEST}, as in 2:4; a share is an amount")
        kept, of = map(int, found.groups())
        if not 0 < kept < of:
            raise ValueError(f"nm {text!r} has to keep at least one and fewer than all: try 2:4")
        return cls(kept, of)

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"

    @property
    def amount(self) -> float:
        """The share of zeros."""
        return 1 - self.kept / self.of

    def mask(self, scores: NDArray[Any], /) -> Mask:
        """Of each group the greatest."""
        groups = self._grouped(scores, -1)  # what is behind the end goes first
        parts = [groups[:, :, i] for i in range(self.of)]
        kept = np.empty(groups.shape, bool)
        for i, own in enumerate(parts):  # how many come before: much faster than to sort a few
            rank = np.zeros(own.shape, np.int16)
            for j, other in enumerate(parts):
                if j != i:
                    rank += other <= own if j < i else other < own
            kept[:, :, i] = rank >= self.of - self.kept
        rows, taps = len(scores), self.taps
        inputs = scores.shape[1] // taps
        back = kept.reshape(rows, -1, taps)[:, :inputs]
        return back.reshape(scores.shape)

    def holds(self, rows: NDArray[Any]) -> bool:
        """Whether values have as many zeros already."""
        return bool((np.count_nonzero(self._grouped(rows, 0), axis=2) <= self.kept).all())

    def _grouped(self, rows: NDArray[Any], beyond: float) -> NDArray[Any]:
        """[channels, groups, values of a group, taps]; beyond: what fills the last one."""
        count, length = rows.shape
        inputs = rows.reshape(count, length // self.taps, self.taps)
        short = -inputs.shape[1] % self.of
        if short:
            inputs = np.pad(inputs, ((0, 0), (0, short), (0, 0)), constant_values=beyond)
        return inputs.reshape(count, -1, self.of, self.taps)


def zeros_in(count: int, amount: float) -> int:
    """How many of `count` values are zero, for an amount."""
    return round(amount * count)


def without_least(scores: NDArray[Any], zeros: int) -> Mask:
    """All but the `zeros` least scores, in any shape."""
    flat = scores.reshape(-1)
    if zeros <= 0:
        return np.ones(scores.shape, bool)
    if zeros >= flat.size:
        return np.zeros(scores.shape, bool)
    bound = np.partition(flat, zeros - 1)[zeros - 1]
    kept = flat > bound
    kept[np.flatnonzero(flat == bound)[zeros - np.count_nonzero(flat < bound) :]] = True
    return np.asarray(kept.reshape(scores.shape))


def counts_together(scores: Sequence[NDArray[Any]], zeros: int) -> list[int]:
    """How many zeros each of several weights has, where the `zeros` least of all scores go."""
    whole = np.concatenate([s.reshape(-1) for s in scores])
    kept = without_least(whole, zeros)
    ends = np.cumsum([s.size for s in scores])[:-1]
    return [part.size - int(np.count_nonzero(part)) for part in np.split(kept, ends)]


def allocated(
    curves: Sequence[Sequence[tuple[float, float]]], sizes: Sequence[int], zeros: int
) -> list[int]:
    """How many values of each weight are zero, where `zeros` of all together cost least.

    curves: points (share of zeros, dB), ascending; errors of different weights add up. Between
    points dB are interpolated, below the first on from there; no weight goes beyond its last point
    while others have not reached theirs. Pieces go one after the other, those first that cost least
    for each value.
    """
    pieces = []
    for i, (curve, size) in enumerate(zip(curves, sizes, strict=True)):
        grid = np.linspace(0, curve[-1][0], PIECES + 1)
        error = _errors(curve, grid)
        counts = np.round(grid * size).astype(int)
        for first, last in _convex(counts, error):
            slope = (error[last] - error[first]) / (counts[last] - counts[first])
            pieces.append((slope, i, int(counts[last] - counts[first])))
    pieces.sort()
    found, left = [0] * len(sizes), zeros
    for _, i, count in pieces:
        taken = min(count, left)
        found[i] += taken
        left -= taken
    for i, size in enumerate(sizes):  # more than the curves reach
        more = min(left, size - found[i])
        found[i] += more
        left -= more
    return found


def _errors(curve: Sequence[tuple[float, float]], grid: NDArray[Any]) -> NDArray[np.float64]:
    """Relative squared errors at shares of zeros; none without zeros."""
    at, level = np.array(curve, np.float64).T
    level = np.minimum.accumulate(level)  # more zeros do not cost less
    slope = (level[1] - level[0]) / (at[1] - at[0]) if len(at) > 1 else 0.0
    levels = np.where(grid < at[0], level[0] + slope * (grid - at[0]), np.interp(grid, at, level))
    found = np.power(10.0, -levels / 10)
    found[grid == 0] = 0.0
    return np.asarray(np.maximum.accumulate(found))


def _convex(counts: NDArray[Any], error: NDArray[Any]) -> list[tuple[int, int]]:
    """The lower hull of errors over counts, as steps from one place to the next."""
    hull: list[int] = []
    for k in range(len(counts)):
        if hull and counts[k] == counts[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            before = (error[b] - error[a]) * (counts[k] - counts[a])
            if before < (error[k] - error[a]) * (counts[b] - counts[a]):
                break
            hull.pop()
        hull.append(k)
    return list(pairwise(hull))
