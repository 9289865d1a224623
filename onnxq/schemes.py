"""Number formats, granularity, and the parameters of a quantized tensor.

Semantics are those of ONNX QuantizeLinear/DequantizeLinear: q = saturate(round_half_even(x / scale)
+ zero_point), x' = (q - zero_point) * scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray

from onnxq.numerics.affine import affine_params, dequantize, quantize
from onnxq.numerics.balancing import balanced
from onnxq.numerics.grids import Grid, limits
from onnxq.numerics.grouping import Layout
from onnxq.numerics.weights import fit_weight

Method = Literal["minmax", "mse", "standardized", "hqq", "importance"]
Rounding = Literal["even", "stochastic"]


def _dtype(name: str) -> np.dtype[Any]:
    kind = onnx.TensorProto.DataType.Value(name.upper())
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))


@dataclass(frozen=True, slots=True)
class IntFormat:
    """An integer number format: its width in bits, whether it has a sign."""

    name: str
    bits: int
    signed: bool

    @property
    def qmin(self) -> int:
        """The smallest representable integer."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest representable integer."""
        return (1 << (self.bits - self.signed)) - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype of the format (of ml_dtypes below 8 bits), one byte an element."""
        return _dtype(self.name)


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A float8 format, saturating: no zero point, only finite values are used."""

    name: str
    bits: int = 8
    signed: bool = True

    @property
    def qmin(self) -> float:
        """The least finite value."""
        return limits(self.dtype)[0]

    @property
    def qmax(self) -> float:
        """The greatest finite value."""
        return limits(self.dtype)[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype of the format, of ml_dtypes."""
        return _dtype(self.name)


Format = IntFormat | FloatFormat

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        IntFormat("int8", 8, signed=True),
        IntFormat("uint8", 8, signed=False),
        IntFormat("int16", 16, signed=True),
        IntFormat("uint16", 16, signed=False),
        IntFormat("int32", 32, signed=True),
        IntFormat("int4", 4, signed=True),
        IntFormat("uint4", 4, signed=False),
        IntFormat("int2", 2, signed=True),
        IntFormat("uint2", 2, signed=False),
        FloatFormat("float8e4m3fn"),
        FloatFormat("float8e5m2"),
    )
}


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale for each index of `axis`; None: the operator's output channels."""

    axis: int | None = None


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale for each `size` values along `axis`; the last group may be short.

    axis: the one that is summed over; None: the operator's. As ONNX DequantizeLinear-21's
    block_size.
    """

    size: int = 32
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a group has at least one value, not {self.size}")


Granularity = PerTensor | PerChannel | PerGroup


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How a tensor is quantized: number format, granularity, symmetric or not.

    Symmetric: the zero point is 0 for signed formats and the middle of the range (128 for uint8)
    for unsigned ones. Of 8 bits and more, signed weights use [-qmax, qmax], the least value not.
    Of fewer bits they use every value, the extreme of larger magnitude is put on the least one
    (llama.cpp's Q4_0 and ONNX Runtime's blockwise quantizer do so too), and the scale is negative
    where that extreme is positive: 1 dB less error with 4 bits, 2 to 3 dB with 2. An odd count of
    levels, 15 or 3, has no such extra value and only positive scales.
    power_of_two: scales are rounded up to 2^k, so that nothing is clipped that was not before.
    levels: use only so many of the format's integers, around the middle (asymmetric unsigned: from
    0 on).
    """

    format: str = "int8"
    granularity: Granularity = PerTensor()
    symmetric: bool = True
    power_of_two: bool = False
    levels: int | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}: one of {', '.join(FORMATS)}")
        numbers = self.numbers
        if self.format == "int32" and not self.symmetric:
            raise ValueError("int32 (biases, accumulators) has zero point 0: use symmetric=True")
        if isinstance(numbers, FloatFormat):
            if not self.symmetric:
                raise ValueError(f"{self.format} has no zero point: use symmetric=True")
            if self.levels is not None:
                raise ValueError(f"{self.format} has no levels to count: use an integer format")
        elif self.levels is not None and not 2 <= self.levels <= 2**numbers.bits:
            raise ValueError(
                f"{self.format} has 2 to {2**numbers.bits} levels, not {self.levels}: use a wider "
                "format, or fewer levels"
            )

    @property
    def numbers(self) -> Format:
        """The number format itself."""
        return FORMATS[self.format]

    @property
    def qmin(self) -> float:
        """The least number that weights use."""
        numbers = self.numbers
        if self.levels is None or isinstance(numbers, FloatFormat):
            narrow = self.symmetric and numbers.signed and numbers.bits >= 8
            return -numbers.qmax if narrow else numbers.qmin
        if not self.symmetric and not numbers.signed:
            return 0
        return (numbers.qmin + numbers.qmax + 1) // 2 - self.levels // 2

    @property
    def qmax(self) -> float:
        """The greatest number that weights use."""
        return self.numbers.qmax if self.levels is None else self.qmin + self.levels - 1

    @property
    def grid(self) -> Grid:
        """The numbers that weights use."""
        return Grid(self.numbers.dtype, self.qmin, self.qmax, self.symmetric, self.power_of_two)

    def params(self, lo: ArrayLike, hi: ArrayLike, axis: int | None = None) -> QParams:
        """Return the parameters that cover [lo, hi]: scalars, for PerChannel 1-D, else blocks.

        axis: where the granularity leaves it to the operator. Raises ValueError when lo and hi do
        not have the granularity's shape, are not finite, or lo > hi; or when axis is missing.
        """
        axis = self._axis(axis)
        fits = np.ndim(lo) == np.ndim(hi) == (0 if axis is None else 1)
        if isinstance(self.granularity, PerGroup):
            fits = np.shape(lo) == np.shape(hi) != ()
        if not fits:
            raise ValueError(f"a range of {np.ndim(lo)} dimensions does not fit {self.granularity}")
        numbers = self.numbers
        qmin, qmax = (numbers.qmin, numbers.qmax) if self.levels is None else (self.qmin, self.qmax)
        scale, zero_point = affine_params(
            lo,
            hi,
            qmin=qmin,
            qmax=qmax,
            dtype=numbers.dtype,
            symmetric=self.symmetric,
            power_of_two=self.power_of_two,
        )
        return QParams(scale, zero_point, axis, self.group_size)

    @property
    def group_size(self) -> int | None:
        """How many values share a scale along the axis; None if not PerGroup."""
        return self.granularity.size if isinstance(self.granularity, PerGroup) else None

    def _axis(self, axis: int | None) -> int | None:
        """Choose the axis, given the operator's; None for PerTensor."""
        if isinstance(self.granularity, PerTensor):
            return None
        axis = self.granularity.axis if self.granularity.axis is not None else axis
        if axis is None:
            kind = "per-group" if isinstance(self.granularity, PerGroup) else "per-channel"
            name = type(self.granularity).__name__
            raise ValueError(f"{kind} needs an axis: {name}(axis=...) or the operator's")
        return axis


@dataclass(frozen=True, slots=True, eq=False)
class QParams:
    """Scale (float32) and zero point (of the quantized dtype).

    Scalars; 1-D along `axis`; or with a group_size blocks: of the tensor's shape, but
    ceil(n / group_size) along the axis.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[Any]
    axis: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        if np.shape(self.scale) != np.shape(self.zero_point):
            raise ValueError("scale and zero point must have one shape")
        if self.group_size is not None:
            if self.axis is None or np.ndim(self.scale) == 0:
                raise ValueError("groups have an axis, and a scale for each")
        elif np.ndim(self.scale) != (0 if self.axis is None else 1):
            raise ValueError("scale and zero point are scalars, or 1-D along an axis")

    @property
    def ends(self) -> tuple[float, float]:
        """What one scale can represent: [(qmin - zero) scale, (qmax - zero) scale]."""
        numbers = FORMATS[str(self.zero_point.dtype)]
        scale, zero = float(self.scale), float(self.zero_point)
        return (numbers.qmin - zero) * scale, (numbers.qmax - zero) * scale

    def quantize(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return x as numbers of the zero point's dtype, same shape."""
        return quantize(x, self.scale, self.zero_point, axis=self.axis, group_size=self.group_size)

    def dequantize(self, q: NDArray[Any]) -> NDArray[np.float32]:
        """Return numbers as float32, same shape."""
        return dequantize(
            q, self.scale, self.zero_point, axis=self.axis, group_size=self.group_size
        )


def quantize_weight(
    w: NDArray[Any],
    scheme: QuantScheme,
    axis: int | None = None,
    method: Method = "minmax",
    *,
    importance: NDArray[Any] | None = None,
    rounding: Rounding = "even",
    seed: int = 0,
) -> tuple[NDArray[Any], QParams]:
    """Quantize a weight: numbers of the same shape, and the parameters.

    axis: the operator's output channels (PerChannel) or the axis that is summed over (PerGroup),
    used when the granularity does not name one. method: how scales and zero points are chosen, see
    `onnxq.numerics.weights`. importance: for the method of this name: not negative, broadcasts to
    w; mean squares of the layer's inputs along the axis that is summed over. rounding: half to
    even, or up and down at random so that the mean is right (`seed`; the same seed, the same
    bytes).

    Works on pieces: takes no memory to speak of beyond the result. Raises ValueError for NaN or
    infinities in the weight, and for an importance that is missing or does not fit.
    """
    if rounding not in ("even", "stochastic"):
        raise ValueError(f"unknown rounding {rounding!r}: even or stochastic")
    w, axis, size = np.asarray(w), scheme._axis(axis), scheme.group_size
    layout = Layout.of(w.shape, axis, size)
    scale, zero_point = fit_weight(w, scheme.grid, layout, method, importance)
    params = QParams(scale, zero_point, axis, size)
    rng = np.random.default_rng(seed) if rounding == "stochastic" else None
    return integers(w, scheme, params, rng=rng), params


def integers(
    w: NDArray[Any],
    scheme: QuantScheme,
    params: QParams,
    *,
    rng: np.random.Generator | None = None,
) -> NDArray[Any]:
    """A weight with given parameters, in [qmin, qmax] of the scheme; rng: rounds stochastically."""
    return quantize(
        w,
        params.scale,
        params.zero_point,
        axis=params.axis,
        group_size=params.group_size,
        grid=scheme.grid,
        rng=rng,
    )


def balance(
    w: NDArray[Any], q: NDArray[Any], scheme: QuantScheme, params: QParams, axis: int
) -> NDArray[Any]:
    """The integers q of a weight, some of them rounded the other way: see `numerics.balancing`.

    axis: the operator's output channels; params has one scale, one for each of them, or (w of shape
    [channels, values]) one for each group of values: then each group's sum is balanced.
    """
    if params.group_size is not None:
        return _balanced_groups(w, q, scheme, params)
    shape = [-1 if i == params.axis else 1 for i in range(w.ndim)]
    scale, zero = (a.astype(np.float64).reshape(shape) for a in (params.scale, params.zero_point))
    exact = np.moveaxis(w / scale + zero, axis, 0)
    rows = (*exact.shape[:2], -1)
    rounded = np.moveaxis(q, axis, 0).astype(np.float64)
    better = balanced(exact.reshape(rows), rounded.reshape(rows), scheme.qmin, scheme.qmax)
    return np.moveaxis(better.reshape(exact.shape), 0, axis).astype(q.dtype)


def _balanced_groups(
    w: NDArray[Any], q: NDArray[Any], scheme: QuantScheme, params: QParams
) -> NDArray[Any]:
    size = params.group_size
    assert size is not None
    scale, zero = (
        np.repeat(a.astype(np.float64), size, axis=1)[:, : w.shape[1]]
        for a in (params.scale, params.zero_point)
    )
    parts = (w / scale + zero, q.astype(np.float64))
    short = [(0, 0), (0, -w.shape[1] % size)]  # exact zeros, which nothing moves
    exact, rounded = (np.pad(part, short).reshape(-1, size, 1) for part in parts)
    better = balanced(exact, rounded, scheme.qmin, scheme.qmax).reshape(len(w), -1)
    return better[:, : w.shape[1]].astype(q.dtype)
