"""Which values of a tensor share a scale, as rows; worked on in pieces that fit a cache.

A tensor has one row (axis None), one for each index of an axis, or one for each `size` values along
an axis, the last of which may be short: ONNX DequantizeLinear-21's `block_size`, whose scales have
the tensor's shape but ceil(n / size) along the axis. Nothing is copied but the piece at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

# Values worked on at once, 2 MB as float32. Of fewer, threads would wait for each other between the
# short operations on scales: int4 took 1.3 times as long with a quarter, HQQ 1.5 times.
PIECE = 1 << 19
TALL = 128  # rows of fewer values are laid out as columns, so that numpy adds whole lines

Box = tuple[slice, ...]


class Space:
    """Buffers that one thread uses again and again: fresh memory takes long to touch."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[np.float32]] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The buffer of that name, with anything in it."""
        size, held = prod(shape), self._held.get(name)
        if held is None or held.size < size:
            held = self._held[name] = np.empty(size, np.float32)
        return held[:size].reshape(shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the values of a tensor of `shape` share scales; axis is not negative."""

    shape: tuple[int, ...]
    axis: int | None = None
    size: int | None = None

    @classmethod
    def of(cls, shape: tuple[int, ...], axis: int | None, size: int | None = None) -> Layout:
        """Check the axis. Raises ValueError when the tensor has no such axis."""
        if axis is None:
            return cls(shape)
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"no axis {axis} in a tensor of shape {shape}")
        return cls(shape, axis % len(shape), size)

    @property
    def params_shape(self) -> tuple[int, ...]:
        """The shape of scale and zero point."""
        if self.axis is None:
            return ()
        n = self.shape[self.axis]
        if self.size is None:
            return (n,)
        return (*self.shape[: self.axis], -(-n // self.size), *self.shape[self.axis + 1 :])

    def views(self, x: NDArray[Any]) -> list[NDArray[Any]]:
        """Arrays of three dimensions of rows and two of the values in a row; then short groups.

        Views of x where it is contiguous.
        """
        if self.axis is None:
            return [x.reshape(1, 1, 1, 1, -1)]
        before, after = self._around()
        n = self.shape[self.axis]
        x = x.reshape(before, n, after)
        if self.size is None:
            return [x.transpose(1, 0, 2)[None, :, None]]
        full = n // self.size * self.size
        blocks = x[:, :full].reshape(before, n // self.size, self.size, after)
        parts = [blocks.transpose(0, 1, 3, 2)[..., None]]
        if full < n:
            parts.append(x[:, None, full:].transpose(0, 1, 3, 2)[..., None])
        return parts

    def params_views(self, p: NDArray[Any]) -> list[NDArray[Any]]:
        """Views of scales or zero points that broadcast against `views`."""
        if self.axis is None:
            return [p.reshape(1, 1, 1, 1, 1)]
        if self.size is None:
            return [p.reshape(1, -1, 1, 1, 1)]
        before, after = self._around()
        n = self.shape[self.axis]
        p = p.reshape(before, -(-n // self.size), after)[..., None, None]
        full = n // self.size
        return [p[:, :full]] if full * self.size == n else [p[:, :full], p[:, full:]]

    def _around(self) -> tuple[int, int]:
        assert self.axis is not None
        return prod(self.shape[: self.axis]), prod(self.shape[self.axis + 1 :])


def boxes(shape: tuple[int, ...], limit: int) -> Iterator[Box]:
    """Cut a shape into boxes of at most `limit` elements, as few as the last axes allow."""
    if not shape:
        yield ()
        return
    rest = prod(shape[1:])
    step = max(1, limit // max(rest, 1))
    for start in range(0, shape[0], step):
        for inner in boxes(shape[1:], limit) if rest > limit else [(slice(None),) * len(shape[1:])]:
            yield (slice(start, min(start + step, shape[0])), *inner)


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of one of `Layout.views`, and the pieces (of all rows) that make them up."""

    at: Box  # which rows
    pieces: tuple[Box, ...]  # which of the values in a row, one after the other
    shape: tuple[int, ...]  # of the rows: three dimensions
    tall: bool  # a row is a column: parameters are 1 x rows, else rows x 1

    @classmethod
    def cut(cls, view: NDArray[Any], *, once: bool = False) -> Iterator[Rows]:
        """All rows of a view, in pieces of at most `PIECE` values.

        A row is one piece if it can be. once: each piece is read but once, so rather as memory has
        them: where neighbours belong to different rows, many rows and strips of each.
        """
        count, length = prod(view.shape[:3]), prod(view.shape[3:])
        if not count:
            return
        strips = once and _stride(view, 0, 3) < _stride(view, 3, 5)
        span = min(length, TALL // 2) if strips else length
        for at in boxes(view.shape[:3], max(1, PIECE // max(span, 1))):
            shape = tuple(len(range(*s.indices(n))) for s, n in zip(at, view.shape, strict=False))
            pieces = tuple(boxes(view.shape[3:], max(1, PIECE // prod(shape)))) if length else ()
            yield cls(at, pieces, shape, strips or length < TALL)

    @property
    def axis(self) -> int:
        """The axis of a piece along which a row extends."""
        return 0 if self.tall else 1

    @property
    def params_shape(self) -> tuple[int, int]:
        """The shape of a parameter that broadcasts against a piece."""
        n = prod(self.shape)
        return (1, n) if self.tall else (n, 1)

    def read(
        self, view: NDArray[Any], piece: Box, space: Space | None = None
    ) -> NDArray[np.float32]:
        """A piece: values x rows if tall, else rows x values; a copy as float32.

        space: the copy goes into its buffer "x".
        """
        part = view[(*self.at, *piece)]
        length = prod(part.shape[3:])
        if self.tall:
            part = part.transpose(3, 4, 0, 1, 2)
        out = (space or Space()).take("x", part.shape)
        out[...] = part
        return out.reshape((length, -1) if self.tall else (-1, length))

    def write(self, view: NDArray[Any], piece: Box, values: NDArray[Any]) -> None:
        """Put a piece, as `read` gives it, into a view."""
        part = view[(*self.at, *piece)]
        if self.tall:
            part = part.transpose(3, 4, 0, 1, 2)
        part[...] = values.reshape(part.shape)

    def params(self, view: NDArray[Any], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """Parameters of these rows (of `Layout.params_views`), to broadcast against a piece."""
        return np.array(view[self.at], dtype).reshape(self.params_shape)

    def put(self, view: NDArray[Any], values: NDArray[Any]) -> None:
        """Set parameters of these rows."""
        part = view[self.at]
        part[...] = values.reshape(part.shape)


def _stride(view: NDArray[Any], first: int, last: int) -> int:
    """The least step in bytes along some axes."""
    steps = [abs(view.strides[i]) for i in range(first, last) if view.shape[i] > 1]
    return min(steps, default=view.nbytes)
