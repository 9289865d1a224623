"""Work on many tensors at once: threads, bounded memory, results in order.

numpy lets other threads run while it computes. Nothing depends on how many there are: a piece of
work sees only its own tensor, and what edits the model takes the results in order.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from onnxq.errors import RecipeError

T = TypeVar("T")
Tick = Callable[[int], None]
"""To be called by work now and then with the bytes done since; ends it when others have failed."""

Tell = Callable[[int, int], None]  # bytes done, total

Futures = Generator[Future[T], None, None]
TOLD_EVERY = 0.1  # seconds


class Stopped(Exception):
    """Raised in work that nobody waits for any more."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one result takes: bytes that are read; memory in bytes; what it is called."""

    size: int
    memory: int
    name: str


@dataclass(frozen=True, slots=True)
class Crew:
    """How many threads work, and in how much memory (bytes; None: no bound). tell: progress."""

    threads: int = 1
    memory: int | None = None
    tell: Tell | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, memory: int | None = None, tell: Tell | None = None) -> Crew:
        """A thread for each core that this process may use; memory: of the process, all told."""
        return cls(cores(), None if memory is None else memory - resident(), tell)

    def run(self, work: Sequence[Work], do: Callable[[int, Tick], T]) -> Futures[T]:
        """Do each, by its number; yield what came of it, result or exception, in order.

        What a result holds counts as in use until the next one is asked for. When the iterator
        ends early, by an exception too, no thread goes on. Raises RecipeError, before anything is
        done, when one alone does not fit into the memory.
        """
        for one in work:
            if self.memory is not None and one.memory > self.memory:
                raise RecipeError(_too_little(one, self.memory))
        return self._run(work, do)

    def _run(self, work: Sequence[Work], do: Callable[[int, Tick], T]) -> Futures[T]:
        progress = _Progress(sum(one.size for one in work), self.tell)
        pool = ThreadPoolExecutor(max(1, self.threads), "onnxq")
        ahead: deque[tuple[Future[T], int]] = deque()
        taken, used = 0, 0
        try:
            while taken < len(work) or ahead:
                while taken < len(work) and self._fits(used + work[taken].memory, len(ahead)):
                    used += work[taken].memory
                    future = pool.submit(do, taken, progress.tick)
                    ahead.append((future, work[taken].memory))
                    taken += 1
                future, memory = ahead[0]
                while not wait((future,), TOLD_EVERY).done:
                    progress.told()
                ahead.popleft()
                progress.told()
                yield future
                used -= memory
        finally:
            progress.stop.set()
            pool.shutdown(cancel_futures=True)

    def _fits(self, memory: int, others: int) -> bool:
        """Whether one more may begin: results that wait for their turn are few."""
        if not others:
            return True
        return others <= self.threads and (self.memory is None or memory <= self.memory)


class _Progress:
    """Bytes done by all threads; told by the one that waits for them."""

    def __init__(self, total: int, tell: Tell | None) -> None:
        self.total, self.tell, self.done = total, tell, 0
        self.stop, self.lock = threading.Event(), threading.Lock()
        self.last = time.monotonic()

    def tick(self, done: int) -> None:
        if self.stop.is_set():
            raise Stopped
        with self.lock:
            self.done += done

    def told(self) -> None:
        if self.tell is not None:
            self.tell(min(self.done, self.total), self.total)


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resident() -> int:
    """Bytes of memory that this process has in use now, as far as the system tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _too_little(one: Work, memory: int) -> str:
    return (
        f"{one.name} takes {_mb(one.memory)} MB beside the {_mb(resident())} MB that are in use: "
        f"--max-memory has to be at least {_mb(one.memory + resident())}MB"
    )


def _mb(size: int) -> int:
    return -(-size // 1_000_000)
