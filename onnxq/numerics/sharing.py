"""Which values of rows [channels, values] share a scale, worked on in blocks that fit a cache.

Scales are kept in one shape, [1, 1] of a tensor, [channels, 1] or [channels, groups]; the last
group of a row may be short. A block is a view of the rows of three dimensions, channels x groups x
width, on which the scales of these groups broadcast. Nothing is copied but the block at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 17  # values worked on at once: 512 kB as float32


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the rows: all or a part of the values of some groups of some channels."""

    channels: slice
    groups: slice
    columns: slice
    count: int  # of groups
    whole: bool  # one scale for the tensor

    def of(self, x: NDArray[Any]) -> NDArray[Any]:
        """The block of an array [channels, values]: a view, channels x groups x width."""
        part = x[self.channels, self.columns]
        return part.reshape(len(part), self.count, -1)

    def params(self, p: NDArray[Any]) -> NDArray[Any]:
        """Parameters of the block's groups, to broadcast on `of`."""
        return p[:, :, None] if self.whole else p[self.channels, self.groups, None]

    def merge(self, function: np.ufunc, into: NDArray[Any], part: NDArray[Any]) -> None:
        """Merge what a block has for each of its groups into that of all (np.add, np.maximum)."""
        if self.whole:
            into[0, 0] = function(into[0, 0], function.reduce(part, axis=None))
        else:
            at = into[self.channels, self.groups]
            function(at, part, out=at)


@dataclass(frozen=True, slots=True)
class Sharing:
    """How the values of rows share scales.

    size: that many values of a row; None: all of a row. whole: all of the tensor.
    """

    channels: int
    values: int
    size: int | None = None
    whole: bool = False

    @property
    def width(self) -> int:
        """How many values of a row share a scale."""
        return max(1, min(self.size or self.values, self.values))

    @property
    def shape(self) -> tuple[int, int]:
        """The shape in which scales are kept here."""
        return (1, 1) if self.whole else (self.channels, max(1, -(-self.values // self.width)))

    @property
    def public_shape(self) -> tuple[int, ...]:
        """The shape that users see: (), [channels] or [channels, groups]."""
        if self.whole:
            return ()
        return (self.channels,) if self.size is None else self.shape

    def blocks(self) -> Iterator[Block]:
        """All values, in blocks of at most `BLOCK`."""
        full = self.values // self.width
        regions = [(0, full, self.width)] if full else []
        if rest := self.values - full * self.width:
            regions.append((full, 1, rest))
        for first, count, width in regions:
            step, many = min(width, BLOCK), min(count, max(1, BLOCK // width))
            tall = max(1, BLOCK // max(1, many * step))
            for c in range(0, self.channels, tall):
                for g in range(first, first + count, many):
                    n = min(many, first + count - g)
                    for v in range(0, width, step):
                        start = g * self.width + v
                        stop = start + (min(step, width - v) if n == 1 else n * width)
                        at = slice(c, min(c + tall, self.channels))
                        yield Block(at, slice(g, g + n), slice(start, stop), n, self.whole)

    def parts(self) -> Iterator[tuple[slice, Sharing]]:
        """Channels whose scales concern nobody else, some at a time: all that fit a cache."""
        tall = self.channels if self.whole else max(1, BLOCK // max(1, self.values))
        for c in range(0, self.channels, max(tall, 1)):
            at = slice(c, min(c + tall, self.channels))
            yield at, replace(self, channels=at.stop - at.start)
