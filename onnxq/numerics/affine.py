"""Affine (uniform integer) quantization, in ONNX's own semantics.

    q  = saturate(round_half_even(x / scale) + zero_point)          QuantizeLinear
    x' = (q - zero_point) * scale                                   DequantizeLinear

x / scale is a float32 division, as in ONNX Runtime's kernels: results agree bit by bit (a property
test holds it). Source: the ONNX operator specification, QuantizeLinear-13 and later.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

SMALLEST_SCALE = np.finfo(np.float32).tiny  # the least normal number: kernels may flush less to 0


def quantize(
    x: NDArray[Any], scale: ArrayLike, zero_point: NDArray[Any], *, axis: int | None = None
) -> NDArray[Any]:
    """Return x as integers of zero_point's dtype, same shape as x.

    scale and zero_point are scalars (axis None) or 1-D of length x.shape[axis]. Infinities
    saturate; x must hold no NaN (its integer is undefined in ONNX too).
    """
    zp = np.asarray(zero_point)
    info = np.iinfo(zp.dtype)
    s, z = _along(np.asarray(scale, np.float32), x, axis), _along(zp, x, axis)
    with np.errstate(over="ignore"):  # x / scale beyond float32 is infinite, and saturates
        y = np.rint(np.asarray(x, np.float32) / s)
    if info.bits > 16:  # float32 holds no 32-bit integer exactly
        y = y.astype(np.float64)
    # Saturated values aside, every sum is below 2^18: exact in float32.
    y += z.astype(y.dtype)
    return np.asarray(np.clip(y, info.min, info.max).astype(zp.dtype))


def dequantize(
    q: NDArray[Any], scale: ArrayLike, zero_point: NDArray[Any], *, axis: int | None = None
) -> NDArray[np.float32]:
    """Return integers as float32, same shape as q; scale and zero_point as for `quantize`."""
    s = _along(np.asarray(scale, np.float32), q, axis)
    z = _along(np.asarray(zero_point), q, axis)
    # The difference is exact in 64 bits and rounds once, to float32, as the kernels do it.
    return np.asarray((np.asarray(q, np.int64) - z.astype(np.int64)).astype(np.float32) * s)


def affine_params(
    lo: ArrayLike,
    hi: ArrayLike,
    *,
    qmin: int,
    qmax: int,
    dtype: DTypeLike,
    symmetric: bool,
    power_of_two: bool = False,
) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Scale (float32) and zero point (`dtype`) that cover [lo, hi]; each of lo's shape.

    The range is widened to include 0.0, which is always exactly representable (padding, ReLU).

        asymmetric:  scale = (hi - lo) / (qmax - qmin),   zero_point = round(qmin - lo / scale)
        symmetric:   zero_point = middle (0 if signed),   scale = max(|lo|, |hi|) / (qmax - middle)

    so symmetric int8 spans [-127, 127], symmetric uint8 [1, 255] around 128. (Jacob et al. 2018,
    arXiv:1712.05877, section 2.1; ONNX Runtime's compute_scale_zp.)

    An all-zero range gets scale 1.0 and represents 0 exactly; a constant range [c, c] becomes
    [0, c], so c is the end of the grid. A scale is never subnormal: tiny ranges get the smallest
    normal float32. Use `ranges.weight_range` to lift dead channels relative to live ones.

    power_of_two: the scale is the next 2^k that is not smaller, the zero point is that scale's.

    Raises ValueError when lo or hi is NaN or infinite, or lo > hi.
    """
    low, high = np.asarray(lo, np.float64), np.asarray(hi, np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("a range must be finite to be quantized")
    if (low > high).any():
        raise ValueError("a range needs lo <= hi")
    low, high = np.minimum(low, 0), np.maximum(high, 0)  # 0.0 must be exactly representable
    middle = (qmin + qmax + 1) // 2
    span = np.maximum(-low, high) / (qmax - middle) if symmetric else (high - low) / (qmax - qmin)
    scale = np.where(span == 0, 1.0, np.maximum(span, SMALLEST_SCALE)).astype(np.float32)
    if power_of_two:
        scale = next_power_of_two(scale)
    if symmetric:
        return scale, np.full(scale.shape, middle, dtype)
    zero_point = np.clip(np.rint(qmin - low / scale.astype(np.float64)), qmin, qmax)
    return scale, zero_point.astype(dtype)


def next_power_of_two(x: ArrayLike) -> NDArray[np.float32]:
    """Return the least powers of two that are not below x (positive), as float32."""
    fraction, exponent = np.frexp(np.asarray(x, np.float32))
    return np.asarray(np.ldexp(np.float32(1), exponent - (fraction == 0.5)), np.float32)


def _along(p: NDArray[Any], x: NDArray[Any], axis: int | None) -> NDArray[Any]:
    """Shape p to broadcast against x along `axis` (None: one element)."""
    if axis is None:
        return p.reshape(())
    shape = [1] * np.ndim(x)
    shape[axis] = -1
    return p.reshape(shape)
