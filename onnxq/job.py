"""A run in progress: time spent, warnings, where progress goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from onnxq.core import Note, Pass
from onnxq.model import Model

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(slots=True)
class Job:
    """What one run keeps."""

    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    now: str = ""

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

    def run(self, pass_: Pass, model: Model) -> Sequence[Note]:
        """Run a pass."""
        with self.stage(pass_.name):
            return pass_(model)
