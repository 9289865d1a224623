"""Scales and zero points of a weight by a named method; rows are independent of each other.

minmax        the extremes
mse           least squared error by clipping                       `clipping`
standardized  mean and deviation                                    `clipping`
hqq           half-quadratic: least p-norm of the errors, p < 1      `hqq`
importance    least squared error weighted by importance            `leastsquares`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.numerics.clipping import mse, standardized
from onnxq.numerics.fitting import Fit, Problem, covering
from onnxq.numerics.grids import SMALLEST_SCALE, Grid
from onnxq.numerics.grouping import Layout, Rows
from onnxq.numerics.hqq import hqq
from onnxq.numerics.leastsquares import importance as by_importance

METHODS: dict[str, Callable[[Problem], Fit]] = {
    "minmax": lambda problem: problem.cover,
    "mse": mse,
    "standardized": standardized,
    "hqq": hqq,
    "importance": by_importance,
}
DEAD = 2.0**-16  # the least range of a weight's channel, relative to the largest
TINY = 2.0**-120  # extremes below which scales come near the smallest normal number


def fit_weight(
    w: NDArray[Any],
    grid: Grid,
    layout: Layout,
    method: str = "minmax",
    importance: NDArray[Any] | None = None,
) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Scale (float32) and zero point (of the grid's dtype), both of the layout's params_shape.

    A scale is never 0 or subnormal. Of channels, a dead one's range is lifted to 2^-16 of the
    largest: its weights are noise or 0, but its bias is often not, and int32 biases have scale
    s_x s_w and hold at most 2^31 of it; with s_w >= 2^-16 max(w) / 127 a bias of max(x) max(w)
    still fits. All-zero rows have scale 1. Raises ValueError for an unknown method, a weight with
    NaN or infinities, or an importance that is missing or does not fit.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r} for weights: one of {', '.join(METHODS)}")
    m = _importance(importance, w.shape) if method == "importance" else None
    low, high = _extremes(w, layout)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("a weight must be finite to be quantized")
    lifted_low, lifted_high, keep = _lifted(low, high, grid, layout)
    cover = covering(grid, lifted_low, lifted_high)
    scale, zero = np.array(cover.scale), np.array(cover.zero, grid.dtype)
    if method == "minmax":
        return scale, zero
    keep |= np.maximum(-low, high) < TINY
    views = layout.params_views
    params = [views(p) for p in (scale, zero, low, high, keep)]
    importances = [None] * 2 if m is None else layout.views(m)
    for view, weights, s, z, lo, hi, kept in zip(
        layout.views(w), importances, *params, strict=False
    ):
        for rows in Rows.cut(view):
            problem = _problem(grid, rows, view, weights, (lo, hi), (s, z))
            fit = METHODS[method](problem)
            fixed = rows.params(kept, bool)
            rows.put(s, np.where(fixed, rows.params(s), _bounded(fit.scale / problem.factor)))
            rows.put(z, np.where(fixed, rows.params(z), fit.zero))
    return scale, zero


def _importance(importance: NDArray[Any] | None, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if importance is None:
        raise ValueError(
            "the method importance needs to know the layer's inputs: give data, or use hqq"
        )
    m = np.asarray(importance, np.float32)
    if not np.isfinite(m).all() or (m < 0).any():
        raise ValueError("an importance must be finite and not negative")
    top = float(m.max(initial=0))
    return np.broadcast_to(m / np.float32(top) if top else np.ones_like(m), shape)


def _extremes(w: NDArray[Any], layout: Layout) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The least and greatest value of each row, 0 included; NaN where there is one."""
    low, high = (np.zeros(layout.params_shape, np.float32) for _ in range(2))
    views = zip(layout.views(w), layout.params_views(low), layout.params_views(high), strict=True)
    for view, lo, hi in views:
        for rows in Rows.cut(view):
            least = greatest = np.zeros(rows.params_shape, np.float32)
            for piece in rows.pieces:
                x = rows.read(view, piece)
                least = np.minimum(least, x.min(rows.axis, keepdims=True, initial=0))
                greatest = np.maximum(greatest, x.max(rows.axis, keepdims=True, initial=0))
            rows.put(lo, least)
            rows.put(hi, greatest)
    return low, high


def _lifted(
    low: NDArray[np.float32], high: NDArray[np.float32], grid: Grid, layout: Layout
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Ranges with those of dead channels lifted, and which these are."""
    lo, hi = low.astype(np.float64), high.astype(np.float64)
    extent = np.maximum(-lo, hi)
    dead = np.zeros(extent.shape, bool)
    if layout.axis is None or layout.size is not None:
        return lo, hi, dead
    floor = DEAD * extent.max(initial=0)
    dead = extent < floor
    return np.where(dead & grid.symmetric, -floor, lo), np.where(dead, floor, hi), dead


def _problem(
    grid: Grid,
    rows: Rows,
    view: NDArray[Any],
    importance: NDArray[np.float32] | None,
    extremes: tuple[NDArray[Any], NDArray[Any]],
    cover: tuple[NDArray[Any], NDArray[Any]],
) -> Problem:
    low, high = (rows.params(p) for p in extremes)
    exponent = np.clip(np.frexp(np.maximum(-low, high))[1], -126, 126)
    factor = np.ldexp(np.float32(1), -exponent)
    fit = Fit(rows.params(cover[0]) * factor, rows.params(cover[1]))
    problem = Problem(grid, rows, view, importance, factor, low * factor, high * factor, fit)
    return problem.kept()


def _bounded(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(np.abs(scale) < SMALLEST_SCALE, np.copysign(SMALLEST_SCALE, scale), scale)
