"""A run in progress: time spent, warnings, where progress goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from onnxq.core import Note, Pass
from onnxq.layers import Choice, Layers, no_match
from onnxq.model import Model
from onnxq.parallel import Crew

Progress = Callable[[str, int, int], None]  # stage, done, total
MB = 1_000_000
MEGABYTES = "MB"
"""What ends the name of a stage whose progress is told in megabytes."""


@dataclass(slots=True)
class Job:
    """What one run keeps.

    asked: overrides for single layers that the caller has given. memory: bytes that the process
    may take, as far as work on weights goes (None: no bound).
    """

    progress: Progress | None
    asked: Sequence[str] = ()
    memory: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    now: str = ""
    matches: dict[Choice, str | None] = field(default_factory=dict)  # why there is none so far

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done under a name; a name may come again."""
        self.now, start = name, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def sample_progress(self, total: int) -> Callable[[int], None] | None:
        """What to call with the number of samples done in this stage."""
        if self.progress is None:
            return None
        tell = self.progress
        return lambda done: tell(self.now, done, total)

    def crew(self) -> Crew:
        """The threads that work on weights; they tell of megabytes done."""
        if self.progress is None:
            return Crew.of(self.memory)
        tell = self.progress
        return Crew.of(
            self.memory,
            lambda done, total: tell(f"{self.now} {MEGABYTES}", done // MB, total // MB),
        )

    @property
    def unmatched(self) -> list[str]:
        """Warnings for overrides that no pass found a layer for."""
        return [text for text in self.matches.values() if text is not None]

    def run(self, pass_: Pass, model: Model) -> Sequence[Note]:
        """Run a pass; see whether the caller's overrides match anything."""
        given = set(Layers.parse(self.asked).all)
        overrides = Layers.parse(getattr(pass_, "layers", ()))
        found = overrides.matched(model)
        for choice in given.intersection(overrides.all):
            known = self.matches.get(choice, "")
            is_matched = choice in found or known is None
            self.matches[choice] = None if is_matched else no_match(choice, model)
        with self.stage(pass_.name):
            return pass_(model)
