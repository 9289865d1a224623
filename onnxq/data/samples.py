"""Samples: a sequence of feeds that is read anew each time it is gone through."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

Feed = dict[str, NDArray[Any]]
LABELS = "labels"


@dataclass(frozen=True, slots=True)
class Samples:
    """A sequence of feeds that is read anew each time it is gone through.

    labels: one row a sample, sample axis first, kept for metrics; None without. counts: how many
    true samples each feed holds when the model's batch is larger than 1. preprocess: of images,
    what is done with their pixels.
    """

    read: Callable[[int, int], Iterator[Feed]]  # (start, stop)
    size: int
    description: str
    labels: NDArray[Any] | None = None
    synthetic: bool = False
    start: int = 0
    batch: int = 1
    preprocess: Mapping[str, Any] | None = None

    def __iter__(self) -> Iterator[Feed]:
        return self.read(self.start, self.start + self.size)

    def __len__(self) -> int:
        return self.size

    def fingerprint(self) -> str:
        """What tells these samples from others: how many they are, and the first one's values."""
        digest = hashlib.blake2b(f"{self.size} {self.batch}".encode(), digest_size=16)
        for name, values in sorted(next(iter(self), {}).items()):
            digest.update(f"{name} {values.dtype} {values.shape}".encode())
            digest.update(values.tobytes() if values.dtype.kind != "O" else repr(values).encode())
        return digest.hexdigest()

    def take(self, n: int) -> Samples:
        """The first n feeds."""
        n = min(n, self.size)
        labels = None if self.labels is None else self.labels[: n * self.batch]
        return replace(self, size=n, labels=labels)

    def skip(self, n: int) -> Samples:
        """All but the first n feeds."""
        n = min(n, self.size)
        labels = None if self.labels is None else self.labels[n * self.batch :]
        return replace(self, start=self.start + n, size=self.size - n, labels=labels)
