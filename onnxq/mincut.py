"""Minimum cut: the cheapest way to split things in two when keeping neighbours apart costs."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

INFINITE = float("inf")
EPSILON = 1e-9


class Network:
    """Capacities between named places; `cut` divides them (Dinic, 1970: blocking flows)."""

    def __init__(self) -> None:
        self.places: dict[Hashable, int] = {}
        self.edges: list[list[int]] = []  # of each place: indices into `to` and `room`
        self.to: list[int] = []
        self.room: list[float] = []

    def add(self, a: Hashable, b: Hashable, capacity: float) -> None:
        """Cutting between a (kept on the source's side) and b (on the sink's) costs `capacity`."""
        for x, y, room in ((a, b, capacity), (b, a, 0.0)):
            self.edges[self._index(x)].append(len(self.to))
            self.to.append(self._index(y))
            self.room.append(room)

    def _index(self, name: Hashable) -> int:
        if name not in self.places:
            self.places[name] = len(self.edges)
            self.edges.append([])
        return self.places[name]

    def cut(self, source: Hashable, sink: Hashable) -> set[Hashable]:
        """The places on the source's side of a cheapest cut; the smallest such set."""
        s, t = self._index(source), self._index(sink)
        while (level := self._levels(s))[t] >= 0:
            current = [0] * len(self.edges)
            while self._augment(s, t, level, current):
                pass
        return {name for name, i in self.places.items() if level[i] >= 0}

    def _levels(self, start: int) -> list[int]:
        level = [-1] * len(self.edges)
        level[start] = 0
        todo = deque([start])
        while todo:
            place = todo.popleft()
            for edge in self.edges[place]:
                if self.room[edge] > EPSILON and level[self.to[edge]] < 0:
                    level[self.to[edge]] = level[place] + 1
                    todo.append(self.to[edge])
        return level

    def _augment(self, s: int, t: int, level: list[int], current: list[int]) -> bool:
        """Push flow along one path that climbs the levels; False when there is none.

        current: of each place, the first edge that may still lead on; earlier ones are dead ends.
        """
        path: list[int] = []
        place = s
        while place != t:
            edges = self.edges[place]
            while current[place] < len(edges) and not self._leads_on(edges[current[place]], level):
                current[place] += 1
            if current[place] < len(edges):
                path.append(edges[current[place]])
                place = self.to[path[-1]]
            elif path:
                place = self.to[path.pop() ^ 1]
                current[place] += 1
            else:
                return False
        room = min(self.room[edge] for edge in path)
        if room == INFINITE:
            raise ValueError("source and sink are tied together by edges that may not be cut")
        for edge in path:
            self.room[edge] -= room
            self.room[edge ^ 1] += room
        return True

    def _leads_on(self, edge: int, level: list[int]) -> bool:
        climbs = level[self.to[edge]] == level[self.to[edge ^ 1]] + 1
        return climbs and self.room[edge] > EPSILON
