"""What integers stand for a weight, and weights that remember theirs.

    value = (number - zero) * scale        or, with a table,        value = table[number] * scale

A `Recovered` weight is float for all that look at its values. What quantizes it again asks for its
`Grid` and keeps the numbers where the format asked for holds them: no second rounding. A pass that
makes other values of it (folds a scale into it, say) makes a new constant, which remembers nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxq.codebooks import CodebookScheme, Codes, is_of
from onnxq.errors import ModelError
from onnxq.schemes import (
    FloatFormat,
    PerChannel,
    PerGroup,
    PerTensor,
    QParams,
    QuantScheme,
)
from onnxq.weights import data_type_of, stored_size

UNFIT = "scales or zero points of a quantized weight do not fit its shape; export the model again"
EXACT = 2  # bytes of integers whose differences float32 holds exactly


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Numbers, and the parameters of each: arrays of one shape, most of them broadcast views.

    zero: None where all are 0; integers, or floats (MatMulNBits may have them). table: of a
    codebook. dtype: of the values.
    """

    numbers: NDArray[Any]
    scale: NDArray[np.float32]
    zero: NDArray[Any] | None = None
    table: NDArray[np.float32] | None = None
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))

    @classmethod
    def of(
        cls,
        numbers: NDArray[Any],
        scale: NDArray[Any],
        zero: NDArray[Any] | None,
        *,
        axis: int = 0,
        block: int = 0,
        table: NDArray[np.float32] | None = None,
    ) -> Grid:
        """As DequantizeLinear has them: scalars, vectors along an axis, blocks along it.

        Raises ValueError when they do not fit the numbers.
        """
        spread = _spread(numbers, axis, block)
        if zero is not None and _is_zero(zero):
            zero = None
        wide = spread(scale.astype(np.float32, copy=False))
        point = None if zero is None else spread(zero)
        return cls(numbers, wide, point, table, scale.dtype)

    def map(self, move: Callable[[NDArray[Any]], NDArray[Any]]) -> Grid:
        """The grid with its values moved: transposed, reshaped, cut."""
        zero = None if self.zero is None else move(self.zero)
        return replace(self, numbers=move(self.numbers), scale=move(self.scale), zero=zero)

    def values(self) -> NDArray[Any]:
        """The weight in floats, to the bit as DequantizeLinear computes it."""
        if self.table is not None:
            wide = self.table[self.numbers.astype(np.int64)]
        else:
            wide = self._centred()
        with np.errstate(over="ignore"):
            return np.asarray((wide * self.scale).astype(self.dtype, copy=False))

    def _centred(self) -> NDArray[np.float32]:
        is_wide = self.numbers.dtype.itemsize > EXACT
        wide = self.numbers.astype(np.int64 if is_wide else np.float32)
        if self.zero is not None:
            wide = wide - self.zero.astype(np.float32 if _is_float(self.zero) else wide.dtype)
        return np.asarray(wide.astype(np.float32, copy=False))

    def fitted(
        self, scheme: QuantScheme, axis: int | None = None
    ) -> tuple[NDArray[Any], QParams] | None:
        """The same values as a scheme has them, exactly; None where it cannot.

        axis: the operator's, as for `onnxq.schemes.quantize_weight`.
        """
        if self.table is not None or not self.numbers.size or self.dtype != np.float32:
            return None
        axis = scheme._axis(axis)
        cells = _cells(self.scale, scheme, axis)
        if cells is None or (scheme.power_of_two and (np.frexp(cells)[0] != 0.5).any()):
            return None
        if not np.isfinite(cells).all() or (cells == 0).any():
            return None
        found = self._in(scheme, axis)
        if found is None:
            return None
        numbers, zeros, sign = found
        return numbers, QParams(cells * sign, zeros, axis, scheme.group_size)

    def coded(self, scheme: CodebookScheme) -> Codes | None:
        """Rows [channels, values] as a codebook's scheme has them, exactly; None where it cannot.

        Scales of 0 do not fit.
        """
        table, grain = self.table, scheme.granularity
        if table is None or self.numbers.ndim != 2 or self.dtype != np.float32:
            return None
        if not is_of(scheme, table):
            return None
        size = grain.size if isinstance(grain, PerGroup) else None
        axis = None if isinstance(grain, PerTensor) else 0 if size is None else 1
        cells = _cells(self.scale, QuantScheme("uint8", grain, symmetric=False), axis)
        if cells is None or not np.isfinite(cells).all() or (cells == 0).any():
            return None
        return Codes(self.numbers.astype(np.uint8), table, cells, size)

    def _in(
        self, scheme: QuantScheme, axis: int | None
    ) -> tuple[NDArray[Any], NDArray[Any], np.float32] | None:
        """Numbers and zero points in the scheme's format, and the sign that scales get."""
        numbers, own = scheme.numbers, self.numbers.dtype
        keeps = np.float32(1)
        blank = np.zeros_like(_cells(self.scale, scheme, axis), numbers.dtype)
        if isinstance(numbers, FloatFormat) or not _is_integer(own):
            same = own == numbers.dtype and self.zero is None
            return (self.numbers, blank, keeps) if same else None
        if self.zero is not None and _is_float(self.zero):
            return None
        zeros = blank if self.zero is None else _cells(self.zero, scheme, axis)
        if zeros is None:
            return None
        lowest = scheme.qmin if scheme.levels is not None else numbers.qmin
        middle = (numbers.qmin + numbers.qmax + 1) // 2
        same = own == numbers.dtype and scheme.levels is None
        if same and (not scheme.symmetric or (zeros.astype(np.int64) == middle).all()):
            return self.numbers, zeros.astype(numbers.dtype), keeps
        centred = self.numbers.astype(np.int32)
        if self.zero is not None:
            centred = centred - self.zero.astype(np.int32)
        if scheme.symmetric:
            if (self.scale < 0).all() and scheme.levels is not None:
                centred, keeps = -centred, np.float32(-1)
            to: Any = middle
        elif own.itemsize == numbers.dtype.itemsize and _bits(own) == numbers.bits:
            to = zeros.astype(np.int32) + (numbers.qmin - _least(own))
            to = _again(to, self.numbers, scheme, axis)
        else:
            return None
        moved = centred + to
        if moved.min() < lowest or moved.max() > scheme.qmax:
            return None
        point = np.full(blank.shape, middle) if scheme.symmetric else _cells(to, scheme, axis)
        assert point is not None
        return moved.astype(numbers.dtype), point.astype(numbers.dtype), keeps


class Recovered(LazyValues):  # type: ignore[misc]
    """Float values that are computed from their grid whenever they are looked at."""

    def __init__(self, grid: Callable[[], Grid], shape: tuple[int, ...], dtype: Any) -> None:
        self.grid = grid
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.nbytes = stored_size(data_type_of(self.dtype), self.shape)

    def read(self) -> Grid:
        """The grid; raises ModelError when its parts do not fit each other."""
        try:
            grid = self.grid()
        except (ValueError, IndexError) as e:
            raise ModelError(UNFIT) from e
        if grid.numbers.shape != self.shape:
            raise ModelError(UNFIT)
        return grid

    def load(self) -> NDArray[Any]:
        """The values, read-only."""
        values = np.ascontiguousarray(self.read().values())
        values.flags.writeable = False
        return values


def remembered(tensor: gs.Tensor) -> Grid | None:
    """The integers that a recovered weight had; None for other tensors."""
    held = tensor._values if isinstance(tensor, gs.Constant) else None
    return held.read() if isinstance(held, Recovered) else None


def fitted(
    tensor: gs.Tensor, scheme: QuantScheme, axis: int | None
) -> tuple[NDArray[Any], QParams] | None:
    """The numbers of a recovered weight as a scheme has them, exactly; None where it cannot."""
    grid = remembered(tensor)
    return None if grid is None else grid.fitted(scheme, axis)


def _spread(numbers: NDArray[Any], axis: int, block: int) -> Callable[[NDArray[Any]], NDArray[Any]]:
    shape = numbers.shape

    def spread(params: NDArray[Any]) -> NDArray[Any]:
        if params.size == 1:
            return np.broadcast_to(params.reshape(()), shape)
        at = axis % len(shape)
        if block:
            cut = [slice(None)] * len(shape)
            cut[at] = slice(shape[at])
            return np.repeat(params, block, axis=at)[tuple(cut)]
        if params.ndim == 1:
            params = params.reshape([-1 if i == at else 1 for i in range(len(shape))])
        return np.broadcast_to(params, shape)

    return spread


def _cells(full: NDArray[Any], scheme: QuantScheme, axis: int | None) -> Any:
    """One value for each of the scheme's scales; None where they differ within one."""
    granularity = scheme.granularity
    if isinstance(granularity, PerTensor):
        first = full[(0,) * full.ndim]
        return np.asarray(first) if (full == first).all() else None
    assert axis is not None
    at = axis % full.ndim
    if isinstance(granularity, PerChannel):
        index = tuple(slice(None) if i == at else slice(0, 1) for i in range(full.ndim))
        first = full[index]
        return np.ascontiguousarray(first).reshape(-1) if (full == first).all() else None
    assert isinstance(granularity, PerGroup)
    step = tuple(slice(None, None, granularity.size if i == at else None) for i in range(full.ndim))
    first = np.ascontiguousarray(full[step])
    same = _again(first, full, scheme, axis) == full
    return first if same.all() else None


def _again(cells: Any, like: NDArray[Any], scheme: QuantScheme, axis: int | None) -> NDArray[Any]:
    """The value of its cell beside each number."""
    if isinstance(scheme.granularity, PerTensor):
        return np.broadcast_to(cells, like.shape)
    assert axis is not None
    at = axis % like.ndim
    if isinstance(scheme.granularity, PerChannel):
        shape = [-1 if i == at else 1 for i in range(like.ndim)]
        return np.broadcast_to(np.asarray(cells).reshape(shape), like.shape)
    cut = tuple(slice(like.shape[at]) if i == at else slice(None) for i in range(like.ndim))
    return np.repeat(cells, scheme.group_size or 1, axis=at)[cut]


def _is_integer(dtype: np.dtype[Any]) -> bool:
    return "int" in str(dtype)


def _is_float(values: NDArray[Any]) -> bool:
    return not _is_integer(values.dtype)


def _is_zero(values: NDArray[Any]) -> bool:
    return not values.astype(np.float32).any()


def _bits(dtype: np.dtype[Any]) -> int:
    return int(str(dtype).rpartition("int")[2])


def _least(dtype: np.dtype[Any]) -> int:
    return 0 if str(dtype).startswith("u") else -(1 << (_bits(dtype) - 1))
