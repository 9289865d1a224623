"""Which of several results is handed over: by what they lose, their time, their size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Objective = Literal["speed", "size"]

NOISE = 1.03
"""A ratio of times, or of times of two candidates, up to here is no difference."""

SAME_SIZE = 1.01
"""Files whose sizes differ by less are of one size."""

SLOWER = "slower than the original"

BUDGET = 20.0
"""dB that every output of a candidate must reach, where the caller does not say."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recipe that was tried: bytes, least SQNR (dB) of any output, time over the original's.

    None: not known, because it came to no result (`verdict` says why), was not compared, or cannot
    be timed on this machine.
    """

    recipe: str
    size_bytes: int | None = None
    sqnr_db: float | None = None
    time_ratio: float | None = None
    verdict: str = ""

    @property
    def is_open(self) -> bool:
        """Whether nothing speaks against it so far."""
        return not self.verdict

    def told(self) -> str:
        """The verdict with the figure that it rests on."""
        figures = []
        if self.sqnr_db is not None:
            figures.append(f"{self.sqnr_db:.1f} dB")
        if self.time_ratio is not None:
            figures.append(f"{self.time_ratio:.2f}x the time")
        return f"{self.verdict} ({', '.join(figures)})" if figures else self.verdict


def judged(candidate: Candidate, min_sqnr: float) -> Candidate:
    """The candidate with a verdict if it loses too much or is slower than the original."""
    if not candidate.is_open:
        return candidate
    if candidate.sqnr_db is not None and candidate.sqnr_db < min_sqnr:
        return replace(candidate, verdict=f"below {min_sqnr:g} dB")
    if candidate.time_ratio is not None and candidate.time_ratio > NOISE:
        return replace(candidate, verdict=SLOWER)
    return candidate


def choose(candidates: Sequence[Candidate], objective: Objective) -> int | None:
    """The index of the best open candidate; None without one.

    speed: the fastest, and of those within noise of it the smallest; the earliest where nothing is
    timed. size: the smallest, and of those of one size the fastest. What is left: the most exact.
    """
    best = [i for i, candidate in enumerate(candidates) if candidate.is_open]
    is_timed = all(candidates[i].time_ratio is not None for i in best)
    if not best or (objective == "speed" and not is_timed):
        return best[0] if best else None
    times = {i: candidates[i].time_ratio or 0.0 for i in best}
    sizes = {i: float(candidates[i].size_bytes or 0) for i in best}
    orders = [(times, NOISE), (sizes, SAME_SIZE)]
    for values, tolerance in orders if objective == "speed" else reversed(orders):
        least = min(values[i] for i in best)
        best = [i for i in best if values[i] <= tolerance * least]
    return max(best, key=lambda i: (candidates[i].sqnr_db or 0.0, -i))
