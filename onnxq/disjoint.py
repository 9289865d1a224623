"""Disjoint sets: what belongs together, found pair by pair."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class DisjointSets:
    """Sets of keys; a key that was never joined is a set of its own."""

    parent: dict[int, int] = field(default_factory=dict)

    def find(self, key: int) -> int:
        """The key that stands for the set."""
        while self.parent.setdefault(key, key) != key:
            key = self.parent[key]
        return key

    def join(self, a: int, b: int) -> None:
        """Make one set of those of two keys; the latter's stands for it."""
        self.parent[self.find(a)] = self.find(b)
