"""Affine (uniform integer) and float8 quantization, in ONNX's own semantics.

    q  = saturate(round_half_even(x / scale) + zero_point)          QuantizeLinear
    x' = (q - zero_point) * scale                                   DequantizeLinear

x / scale is a float32 division, as in ONNX Runtime's kernels: results agree bit by bit (a property
test holds it). Source: the ONNX operator specification, QuantizeLinear-13 and later; blocks along
an axis: version 21.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from onnxq.numerics.grids import SMALLEST_SCALE, Grid
from onnxq.numerics.grouping import Layout, Rows

GREATEST = np.finfo(np.float32).max
EXACT = 2  # bytes of integers that float32 holds exactly, with their differences


def quantize(
    x: NDArray[Any],
    scale: ArrayLike,
    zero_point: NDArray[Any],
    *,
    axis: int | None = None,
    group_size: int | None = None,
    grid: Grid | None = None,
    rng: np.random.Generator | None = None,
) -> NDArray[Any]:
    """Return x as numbers of zero_point's dtype, same shape as x.

    scale and zero_point are scalars (axis None), 1-D of length x.shape[axis], or with a group_size
    of x's shape but ceil(n / group_size) along axis. grid: the numbers to use (None: all of the
    dtype). rng: rounds stochastically. Infinities saturate; x must hold no NaN (its integer is
    undefined in ONNX too).
    """
    x, zp = np.asarray(x), np.asarray(zero_point)
    grid = grid or Grid.of(zp.dtype)
    layout = Layout.of(x.shape, axis, group_size)
    q = np.empty(x.shape, zp.dtype)
    wide = np.float32 if zp.dtype.itemsize <= EXACT else np.float64
    scales = layout.params_views(np.ascontiguousarray(scale, np.float32))
    zeros = layout.params_views(np.ascontiguousarray(zp))
    parts = zip(layout.views(x), layout.views(q), scales, zeros, strict=True)
    for source, target, scale_view, zero_view in parts:
        for rows in Rows.cut(source, once=True):
            s, z = rows.params(scale_view), rows.params(zero_view, wide)
            for piece in rows.pieces:
                t = rows.read(source, piece)
                with np.errstate(over="ignore"):  # beyond float32 it is infinite, and saturates
                    t /= s
                k = grid.snap(t.astype(wide, copy=False), z, rng)
                rows.write(target, piece, grid.stored(k, z))
    return q


def dequantize(
    q: NDArray[Any],
    scale: ArrayLike,
    zero_point: NDArray[Any],
    *,
    axis: int | None = None,
    group_size: int | None = None,
) -> NDArray[np.float32]:
    """Return numbers as float32, same shape as q; scale and zero_point as for `quantize`."""
    q, zp = np.asarray(q), np.ascontiguousarray(zero_point)
    layout = Layout.of(q.shape, axis, group_size)
    # The difference rounds once, to float32, as the kernels do it.
    wide = np.float32 if q.dtype.itemsize <= EXACT else np.int64
    x = q.astype(wide, order="C")
    scales = layout.params_views(np.ascontiguousarray(scale, np.float32))
    zeros = layout.params_views(zp)
    out = x.astype(np.float32, copy=False)
    for a, b, s, z in zip(layout.views(x), layout.views(out), scales, zeros, strict=True):
        b[...] = a - z.astype(wide)
        with np.errstate(over="ignore"):  # a step beyond the greatest float32: infinite, as there
            np.multiply(b, s, out=b)
    return out


def affine_params(
    lo: ArrayLike,
    hi: ArrayLike,
    *,
    qmin: float,
    qmax: float,
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
    normal float32, nor infinite. `weights.fit_weight` lifts dead channels relative to live ones.

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
    steps = max(qmax - middle, 1) if symmetric else qmax - qmin  # two levels: none is above
    span = (np.maximum(-low, high) if symmetric else high - low) / steps
    bounded = np.clip(span, SMALLEST_SCALE, GREATEST)
    scale = np.where(span == 0, 1.0, bounded).astype(np.float32)
    if power_of_two:
        scale = next_power_of_two(scale)
    if symmetric:
        return scale, np.full(scale.shape, middle, dtype)
    zero_point = np.clip(np.rint(qmin - low / scale.astype(np.float64)), qmin, qmax)
    return scale, zero_point.astype(dtype)


def next_power_of_two(x: ArrayLike) -> NDArray[np.float32]:
    """Return the least powers of two that are not below x (positive), as float32; 2^127 at most."""
    fraction, exponent = np.frexp(np.asarray(x, np.float32))
    exponent = np.minimum(exponent - (fraction == 0.5), 127)
    return np.asarray(np.ldexp(np.float32(1), exponent), np.float32)
