"""A weight's integers, slab by slab: nothing holds the weight, not even its integers.

A weight is looked at as [before, length, behind], as memory has it; the values along `length` share
scales: all of them (a channel), or so many at a time (a group). A slab is values that lie one after
the other, few enough for a cache. It is read, worked on in place, and its integers are written,
packed as ONNX stores them. Extremes of a channel are those of its slabs, so they are read twice.
What comes out is what `affine.quantize` and `weights.fit_weight` make of the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxq.numerics.grids import SMALL_INTEGERS, Grid
from onnxq.numerics.grouping import PIECE, Layout, Space
from onnxq.numerics.weights import covered, dead_below, fit_rows, normalized, require_finite

Values = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Read = Callable[[int, Values], None]  # from a place on (counted in values), as many as fit
Write = Callable[[int, Bytes], None]  # from a byte on

STRIP = 1 << 20  # values of a strip: whole channels that lie side by side
NARROW = 8  # channels side by side below which numpy's loops are too short to add up columns
SHORT = 128  # values beside each other below which they are compared in pairs


@dataclass(frozen=True, slots=True)
class Shape:
    """A weight as [before, length, behind]; size: of a group, None: all of `length` share a scale.

    kind: "tensor" has one scale for all.
    """

    before: int
    length: int
    behind: int
    size: int | None = None
    kind: Literal["tensor", "channel", "group"] = "channel"

    @property
    def params(self) -> tuple[int, int, int]:
        """The shape of scales, as they lie beside the values."""
        if self.kind == "tensor":
            return 1, 1, 1
        groups = 1 if self.size is None else -(-self.length // self.size)
        return self.before, groups, self.behind

    def is_streamed(self, method: str) -> bool:
        """Whether slabs will do: scales do not need more than a few channels or groups at once."""
        if self.kind == "tensor":
            return method == "minmax"
        return self.size is None or self.before == 1 or self.length % self.size == 0


@dataclass(frozen=True, slots=True)
class _Slab:
    """Values from `start` on, as [rows, count, behind], and where their scales are."""

    start: int
    shape: tuple[int, int, int]
    at: tuple[slice, slice]

    @property
    def size(self) -> int:
        return prod(self.shape)


def _slabs(shape: Shape) -> Iterator[_Slab]:
    """All values, in order."""
    before, length, behind = shape.before, shape.length, shape.behind
    if shape.kind == "tensor":
        before, length, behind = prod((before, length, behind)), 1, 1
    unit = shape.size or 1
    whole = length // unit * unit
    if length * behind <= PIECE and whole == length:  # several of `before`
        step = max(1, PIECE // max(length * behind, 1))
        for first in range(0, before if length * behind else 0, step):
            count = min(step, before - first)
            at = slice(first, first + count), slice(None)
            yield _Slab(first * length * behind, (count, length, behind), at)
        return
    step = max(1, PIECE // (unit * behind)) * unit
    for row in range(before):
        for begin, end in ((0, whole), (whole, length)):  # the last group may be short
            for first in range(begin, end, step):
                count = min(step, end - first)
                groups = slice(first // unit, -(-(first + count) // unit))
                at = slice(row, row + 1), groups if shape.size else slice(None)
                yield _Slab((row * length + first) * behind, (1, count, behind), at)


def quantize_slabs(
    shape: Shape,
    grid: Grid,
    read: Read,
    write: Write,
    *,
    method: str = "minmax",
    importance: NDArray[Any] | None = None,
) -> tuple[Values, NDArray[Any]]:
    """Write a weight's integers; return scales and zero points, both of shape `shape.params`.

    importance broadcasts to [before, length, behind]. Raises ValueError as `weights.fit_weight`
    does, and where `shape.is_streamed` says no.
    """
    if not shape.is_streamed(method):
        raise ValueError("this weight needs all of its values at once: use fit_weight")
    m = normalized(importance, (shape.before, shape.length, shape.behind), method)
    scale = np.empty(shape.params, np.float32)
    zero = np.empty(shape.params, np.float32)
    if shape.size is None:
        _fit_channels(shape, grid, read, method, m, (scale, zero))
    space, out = Space(), _Packer(grid, write)
    for slab in _slabs(shape):
        x = space.take("slab", (slab.size,))
        read(slab.start, x)
        if shape.kind == "tensor":
            wide, s, z = x.reshape(1, -1, 1), scale, zero
        else:
            wide, s, z = x.reshape(slab.shape), scale[slab.at], zero[slab.at]
        if shape.size is not None:
            part = m if m is None else _part(m, shape, slab)
            _fit_groups(shape.size, grid, wide, method, part, (s, z), space)
            size = min(shape.size, wide.shape[1])
            wide = wide.reshape(-1, size, shape.behind)
        integers = rounded(wide, s.reshape(-1, 1, s.shape[2]), z.reshape(-1, 1, s.shape[2]), grid)
        out.add(integers.reshape(-1))
    out.finish()
    return scale, zero.astype(grid.dtype)


@dataclass(slots=True)
class _Packer:
    """Writes integers one after the other, as whole bytes; what is short of one waits."""

    grid: Grid
    write: Write
    place: int = 0
    rest: NDArray[Any] | None = None

    def add(self, integers: NDArray[Any]) -> None:
        per_byte = _per_byte(self.grid)
        if self.rest is not None and self.rest.size:
            integers = np.concatenate([self.rest, integers])
        whole = integers.size // per_byte * per_byte
        self._put(integers[:whole])
        self.rest = integers[whole:]

    def finish(self) -> None:
        if self.rest is not None:
            self._put(self.rest)

    def _put(self, integers: NDArray[Any]) -> None:
        data = packed(integers, self.grid)
        self.write(self.place, data)
        self.place += data.size


def _per_byte(grid: Grid) -> int:
    name = grid.dtype.name
    return 1 if name not in SMALL_INTEGERS else 2 if name.endswith("4") else 4


def _part(m: Values, shape: Shape, slab: _Slab) -> Values:
    rows, count, _ = slab.shape
    first = slab.start // shape.behind % shape.length if rows == 1 else 0
    return m[slab.at[0], first : first + count]


def _fit_groups(
    size: int,
    grid: Grid,
    x: Values,
    method: str,
    m: Values | None,
    params: tuple[Values, Values],
    space: Space,
) -> None:
    """Set scales and zero points of groups; x: whole groups, or one that is short."""
    scale, zero = params
    groups = x.reshape(-1, min(size, x.shape[1]), x.shape[2])
    low, high = (e.reshape(scale.shape) for e in extremes(groups))
    require_finite(low, high)
    if method == "minmax":
        fit, _ = covered(grid, low, high, 0.0)
        scale[...], zero[...] = fit.scale, fit.zero
        return
    layout = Layout.of(x.shape, 1, size)
    scale[...], zero[...] = fit_rows(x, grid, layout, method, m, (low, high), 0.0, space)


def _fit_channels(
    shape: Shape,
    grid: Grid,
    read: Read,
    method: str,
    m: Values | None,
    params: tuple[Values, Values],
) -> None:
    """Set scales and zero points of channels, or of the tensor."""
    low, high = (np.zeros(shape.params, np.float32) for _ in range(2))
    space = Space()
    for slab in _slabs(shape):
        x = space.take("slab", (slab.size,))
        read(slab.start, x)
        at = (slice(None),) * 2 if shape.kind == "tensor" else slab.at
        wide = x.reshape((1, -1, 1) if shape.kind == "tensor" else slab.shape)
        lo, hi = extremes(wide)
        np.minimum(low[at], lo[:, None], out=low[at])
        np.maximum(high[at], hi[:, None], out=high[at])
    require_finite(low, high)
    floor = 0.0 if shape.kind == "tensor" else dead_below(low, high)
    if method == "minmax":
        fit, _ = covered(grid, low, high, floor)
        params[0][...], params[1][...] = fit.scale, fit.zero
        return
    for rows, columns in _strips(shape):
        x = _strip(shape, read, rows, columns)
        part = None if m is None else m[rows, :, columns]
        where = rows, 0, columns
        ends = low[where].reshape(-1), high[where].reshape(-1)
        whole = np.moveaxis(x, 1, 2).reshape(-1, shape.length)  # a view if one of both is 1
        weights = None if part is None else np.moveaxis(part, 1, 2).reshape(whole.shape)
        scale, zero = fit_rows(whole, grid, Layout(whole.shape, 0), method, weights, ends, floor)
        params[0][where] = scale.reshape(low[where].shape)
        params[1][where] = zero.reshape(low[where].shape)


def _strips(shape: Shape) -> Iterator[tuple[slice, slice]]:
    """Whole channels: some of `before`, or of one of them some that lie side by side."""
    each = max(1, STRIP // max(shape.length, 1))
    if shape.behind == 1:
        for first in range(0, shape.before, each):
            yield slice(first, min(first + each, shape.before)), slice(0, 1)
        return
    for row in range(shape.before):
        for first in range(0, shape.behind, each):
            yield slice(row, row + 1), slice(first, min(first + each, shape.behind))


def _strip(shape: Shape, read: Read, rows: slice, columns: slice) -> Values:
    width = columns.stop - columns.start
    x = np.empty((rows.stop - rows.start, shape.length, width), np.float32)
    start = rows.start * shape.length * shape.behind
    if width == shape.behind:
        read(start, x.reshape(-1))
        return x
    for i in range(shape.length):
        read(start + i * shape.behind + columns.start, x[0, i])
    return x


def extremes(x: Values) -> tuple[Values, Values]:
    """Least and greatest of [rows, count, behind] along count, 0 included; NaN where there is one.

    Both of shape [rows, behind].
    """
    found = []
    for f in (np.minimum, np.maximum):
        if x.shape[2] >= NARROW or x.shape[1] >= SHORT or not x.shape[1]:
            ends = f.reduce(x, axis=1, initial=0)
        else:
            ends = f(_in_pairs(f, x), 0)
        found.append(ends)
    return found[0], found[1]


def _in_pairs(f: np.ufunc, x: Values) -> Values:
    """Reduce short rows: what is beside each other first, in loops as long as the array."""
    rows, count, behind = x.shape
    if behind > 1:
        return np.asarray(f.reduce(x, axis=1))
    y = x.reshape(-1)
    while count % 2 == 0:
        y, count = f(y[0::2], y[1::2]), count // 2
    return np.asarray(f.reduce(y.reshape(rows, count), axis=1)).reshape(rows, 1)


def rounded(x: Values, scale: Values, zero: Values, grid: Grid) -> NDArray[Any]:
    """What the grid holds of x, as integers of 8 bits or more (or float8); x is overwritten.

    scale and zero broadcast. The same as `affine.quantize`, whose bounds are those around the zero
    point: integers this small are exact in float32, whichever way they are added.
    """
    with np.errstate(over="ignore"):  # beyond float32 it is infinite, and saturates
        np.divide(x, scale, out=x)
    if grid.is_float:
        return grid.stored(grid.snap(x, zero), zero)
    np.rint(x, out=x)
    if not grid.symmetric:
        x += zero
    elif grid.middle:
        x += np.float32(grid.middle)
    np.clip(x, np.float32(grid.qmin), np.float32(grid.qmax), out=x)
    return x.astype(carrier(grid.dtype))


def carrier(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype that numpy knows for integers of fewer than 8 bits; others as they are."""
    if dtype.name not in SMALL_INTEGERS:
        return dtype
    return np.dtype(np.int8 if SMALL_INTEGERS[dtype.name][0] < 0 else np.uint8)


def packed(integers: NDArray[Any], grid: Grid) -> Bytes:
    """The bytes that ONNX stores: little-endian; below 8 bits the first value in the lowest bits.

    (The ONNX specification, "Int4 and Int2 types".)
    """
    per_byte = _per_byte(grid)
    if per_byte == 1:
        little = integers.astype(grid.dtype.newbyteorder("<"), copy=False)
        return np.ascontiguousarray(little).reshape(-1).view(np.uint8)
    q = np.ascontiguousarray(integers).reshape(-1).view(np.uint8)
    if q.size % per_byte:
        q = np.concatenate([q, np.zeros(-q.size % per_byte, np.uint8)])
    if per_byte == 2:
        v = q.view("<u2") & np.uint16(0x0F0F)
        v |= v >> 4
        return v.astype(np.uint8)
    w = q.view("<u4") & np.uint32(0x03030303)
    w |= w >> 6
    w |= w >> 12
    return w.astype(np.uint8)
