"""Weights on their way from where they are stored to integers, a slab at a time.

Where a weight's summed axes are neighbours its integers lie as its values do, so slabs of values
become pieces of the result (`onnxq.numerics.slabs`). Others are read whole: transposed
convolutions, stochastic and balanced rounding, one scale for a tensor that is searched for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Skip
from onnxq.model import values_of
from onnxq.numerics.grouping import PIECE
from onnxq.numerics.slabs import STRIP, Read, Shape, quantize_slabs
from onnxq.numerics.weights import NotFiniteError
from onnxq.packed import remembered
from onnxq.parallel import Crew, Futures, Tick, Work
from onnxq.passes.encodings import Packed
from onnxq.passes.layouts import Held
from onnxq.schemes import (
    FloatFormat,
    Method,
    PerTensor,
    QParams,
    QuantScheme,
    balance,
    quantize_weight,
)
from onnxq.scratch import Scratch
from onnxq.weights import reader

Made = TypeVar("Made", covariant=True)

COPIES = 6  # arrays of a slab's size that a method has at once, about
NOT_FINITE = "its weight has NaN or infinite values"
WHOLE = 24  # bytes a value that a weight takes which is read whole, about


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A weight and how it is to be quantized. squares: of what it is multiplied with, if seen."""

    tensor: gs.Tensor
    held: Held
    scheme: QuantScheme
    method: Method
    rounding: Literal["even", "stochastic", "balanced"] = "even"
    seed: int = 0
    squares: NDArray[Any] | None = None

    @property
    def shape(self) -> Shape | None:
        """The weight as [before, summed, behind]; None where it has to be read whole."""
        held, size = self.held, self.scheme.group_size
        first, last = held.summed[0], held.summed[-1]
        if self.rounding != "even" or last - first + 1 != len(held.summed):
            return None
        is_tensor = isinstance(self.scheme.granularity, PerTensor)
        kind = "tensor" if is_tensor else "channel" if size is None else "group"
        dims = prod(held.shape[:first]), held.length, prod(held.shape[last + 1 :])
        shape = Shape(*dims, size, kind)  # type: ignore[arg-type]
        return shape if shape.is_streamed(self.method) else None

    def work(self) -> Work:
        """What it takes."""
        count, shape = prod(self.held.shape), self.shape
        size, name = count * np.dtype(self.tensor.dtype).itemsize, f"weight {self.tensor.name}"
        if shape is None:
            return Work(size, WHOLE * count, name)
        slab = max(PIECE, (shape.size or 1) * shape.behind)
        if shape.size is None:
            size *= 2  # extremes first
            slab = slab if self.method == "minmax" else max(STRIP, shape.length)
        params = 16 * prod(shape.params)
        return Work(size, min(4 * COPIES * slab, WHOLE * count) + params, name)

    def made(self, scratch: Scratch, tick: Tick) -> Packed:
        """The weight in integers. Raises Skip where a value is not finite."""
        shape, grid = self.shape, remembered(self.tensor)
        if grid is not None and (known := grid.map(self.held.rows).fitted(self.scheme)):
            return Packed(self.held, *known)
        try:
            return self._whole(tick) if shape is None else self._streamed(shape, scratch, tick)
        except NotFiniteError as e:
            raise Skip(NOT_FINITE) from e

    def _streamed(self, shape: Shape, scratch: Scratch, tick: Tick) -> Packed:
        """In slabs; the integers are stored as they lie in the weight."""
        draft = scratch.draft(self.scheme.numbers.dtype, self.held.shape)
        m = None if self.squares is None else self.held.importance(self.squares)
        if m is not None:
            beside = shape.behind if len(m) > 1 else 1
            m = np.moveaxis(m.reshape(-1, beside, shape.length), 1, 2)
        scale, zero = quantize_slabs(
            shape, self.scheme.grid, _told(reader(self.tensor._values), tick), draft.write,
            method=self.method, importance=m,
        )  # fmt: skip
        if shape.kind == "tensor":
            params = QParams(scale.reshape(()), zero.reshape(()))
        elif shape.kind == "channel":
            params = QParams(scale.reshape(-1), zero.reshape(-1), 0)
        else:
            scale, zero = (np.moveaxis(p, 1, 2).reshape(-1, shape.params[1]) for p in (scale, zero))
            params = QParams(scale, zero, 1, shape.size)
        return Packed(self.held, draft.values(), params)

    def _whole(self, tick: Tick) -> Packed:
        """At once; the integers are in memory."""
        held, scheme = self.held, self.scheme
        values = np.asarray(values_of(self.tensor))
        tick(0)
        rows = held.rows(values.astype(np.float32))
        is_balanced = self.rounding == "balanced" and not isinstance(scheme.numbers, FloatFormat)
        numbers, params = quantize_weight(
            rows, scheme, None, self.method,
            importance=None if self.squares is None else held.importance(self.squares),
            rounding="stochastic" if self.rounding == "stochastic" else "even",
            seed=self.seed,
        )  # fmt: skip
        if is_balanced:
            shape = rows.shape if params.group_size is not None else (len(rows), -1, held.taps)
            exact, near = rows.reshape(shape), numbers.reshape(shape)
            numbers = balance(exact, near, scheme, params, 0).reshape(rows.shape)
        tick(values.nbytes)
        return Packed(held, numbers, params)


class Making(Protocol[Made]):
    """Something that makes what one weight is stored as, on a thread of its own."""

    def work(self) -> Work:
        """What it takes."""
        ...

    def made(self, scratch: Scratch, tick: Tick, /) -> Made:
        """What is stored; raises Skip where the weight stays as it is."""
        ...


def each_made(
    crew: Crew, scratch: Scratch, keys: Sequence[object], sources: Sequence[Making[Made]]
) -> Futures[Made]:
    """What comes of each source, in their order; of those that share a key the first one is made.

    To be closed by who does not take all. Raises RecipeError as `Crew.run` does.
    """
    first: dict[object, Making[Made]] = {}
    for key, source in zip(keys, sources, strict=True):
        first.setdefault(key, source)
    todo, left, made = list(first.values()), Counter(keys), dict[object, Future[Made]]()
    with closing(
        crew.run([s.work() for s in todo], lambda n, tick: todo[n].made(scratch, tick))
    ) as results:
        for key in keys:
            if key not in made:
                made[key] = next(results)
            left[key] -= 1
            yield made[key] if left[key] else made.pop(key)


def rows_of(tensor: gs.Tensor, held: Held, tick: Tick) -> NDArray[np.float32]:
    """A weight's values as rows [channels, values]; nothing else holds them.

    Raises Skip where one is not finite.
    """
    first, last = held.summed[0], held.summed[-1]
    if last - first + 1 != len(held.summed):
        tick(0)
        rows = np.ascontiguousarray(held.rows(np.asarray(values_of(tensor))), np.float32)
        _require_finite(rows)
        return rows
    before, length, behind = prod(held.shape[:first]), held.length, prod(held.shape[last + 1 :])
    rows, read = np.empty((before, behind, length), np.float32), reader(tensor._values)
    if behind == 1:
        flat = rows.reshape(-1)
        for start in range(0, flat.size, PIECE):
            read(start, flat[start : start + PIECE])
            _require_finite(flat[start : start + PIECE])
            tick(0)
        return rows.reshape(-1, length)
    step = max(1, PIECE // max(behind, 1))
    for row in range(before):
        for start in range(0, length, step):
            x = np.empty((min(step, length - start), behind), np.float32)
            read((row * length + start) * behind, x.reshape(-1))
            _require_finite(x)
            rows[row, :, start : start + step] = x.T
            tick(0)
    return rows.reshape(-1, length)


def _require_finite(x: NDArray[np.float32]) -> None:
    if not np.isfinite(x).all():
        raise Skip(NOT_FINITE)


def _told(read: Read, tick: Tick) -> Read:
    def and_told(start: int, out: NDArray[np.float32]) -> None:
        read(start, out)
        tick(out.nbytes)

    return and_told
