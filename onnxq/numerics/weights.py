"""Scales and zero points of a weight by a named method; rows are independent of each other.

minmax        the extremes
mse           least squared error by clipping                       `clipping`
standardized  mean and deviation                                    `clipping`
hqq           half-quadratic: least p-norm of the errors, p < 1      `hqq`
importance    least squared error weighted by importance            `leastsquares`

Groups in few bits have mse and hqq by rounding and least squares in turn: `alternating`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.numerics import alternating
from onnxq.numerics.clipping import mse, standardized
from onnxq.numerics.fitting import Fit, Problem, Values, covering
from onnxq.numerics.grids import SMALLEST_SCALE, Grid
from onnxq.numerics.grouping import Layout, Rows, Space
from onnxq.numerics.hqq import hqq
from onnxq.numerics.leastsquares import importance as by_importance

METHODS: dict[str, Callable[[Problem], Fit]] = {
    "minmax": lambda problem: problem.cover,
    "mse": mse,
    "standardized": standardized,
    "hqq": hqq,
    "importance": by_importance,
}
SHORT: dict[str, Callable[[Problem], Fit]] = {
    "mse": alternating.least_squares,
    "hqq": alternating.least_norm,
}
"""How it is done where rows are short and levels few: much faster, and as good."""

DEAD = 2.0**-16  # the least range of a weight's channel, relative to the largest
TINY = 2.0**-120  # extremes below which scales come near the smallest normal number


def fit_weight(
    w: NDArray[Any],
    grid: Grid,
    layout: Layout,
    method: str = "minmax",
    importance: NDArray[Any] | None = None,
) -> tuple[Values, NDArray[Any]]:
    """Scale (float32) and zero point (of the grid's dtype), both of the layout's params_shape.

    A scale is never 0 or subnormal. Of channels, a dead one's range is lifted to 2^-16 of the
    largest: its weights are noise or 0, but its bias is often not, and int32 biases have scale
    s_x s_w and hold at most 2^31 of it; with s_w >= 2^-16 max(w) / 127 a bias of max(x) max(w)
    still fits. All-zero rows have scale 1. Raises ValueError for an unknown method, a weight with
    NaN or infinities, or an importance that is missing or does not fit.
    """
    m = normalized(importance, w.shape, method)
    low, high = _extremes(w, layout)
    require_finite(low, high)
    channels = layout.axis is not None and layout.size is None
    floor = dead_below(low, high) if channels else 0.0
    return fit_rows(w, grid, layout, method, m, (low, high), floor)


def fit_rows(
    w: NDArray[Any],
    grid: Grid,
    layout: Layout,
    method: str,
    importance: Values | None,
    extremes: tuple[Values, Values],
    floor: float,
    space: Space | None = None,
) -> tuple[Values, NDArray[Any]]:
    """`fit_weight` where the rows' extremes are known, and which range is a dead one's.

    importance: as `normalized` gives it; w may be a part of the weight.
    """
    low, high = extremes
    space = Space() if space is None else space
    scale = np.empty(layout.params_shape, np.float32)
    zero = np.empty(layout.params_shape, grid.dtype)
    importances = [None] * 2 if importance is None else layout.views(importance)
    params = [layout.params_views(p) for p in (scale, zero, low, high)]
    for view, weights, s, z, lo, hi in zip(layout.views(w), importances, *params, strict=False):
        for rows in Rows.cut(view):
            ends = rows.params(lo), rows.params(hi)
            cover, fixed = covered(grid, *ends, floor)
            if method == "minmax" or fixed.all():
                fit = cover
            else:
                problem = _problem(grid, rows, (view, weights), ends, cover, fixed, space)
                found = _method(method, problem)(problem)
                fit = cover.where(fixed, Fit(_bounded(found.scale / problem.factor), found.zero))
            rows.put(s, fit.scale)
            rows.put(z, fit.zero.astype(grid.dtype))
    return scale, zero


class NotFiniteError(ValueError):
    """A weight has NaN or infinities."""


def require_finite(low: Values, high: Values) -> None:
    """Raise NotFiniteError for extremes of values that are not finite."""
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise NotFiniteError("a weight must be finite to be quantized")


def dead_below(low: Values, high: Values) -> float:
    """The extent below which a channel is a dead one."""
    return DEAD * max(-float(low.min(initial=0)), float(high.max(initial=0)))


def _method(name: str, problem: Problem) -> Callable[[Problem], Fit]:
    short = SHORT.get(name) if alternating.is_short(problem) else None
    return short or METHODS[name]


def covered(grid: Grid, low: Values, high: Values, floor: float) -> tuple[Fit, NDArray[np.bool_]]:
    """The fit for the extremes, and the rows for which it stays: dead or tiny ones."""
    lo, hi = low.astype(np.float64), high.astype(np.float64)
    extent = np.maximum(-lo, hi)
    dead = extent < floor
    fit = covering(grid, np.where(dead & grid.symmetric, -floor, lo), np.where(dead, floor, hi))
    return fit, dead | (extent < TINY)


def normalized(
    importance: NDArray[Any] | None, shape: tuple[int, ...], method: str
) -> Values | None:
    """The importance of each value for the method, 1 at most; None where it wants none.

    Raises ValueError for an unknown method, and an importance that is missing or does not fit.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r} for weights: one of {', '.join(METHODS)}")
    if method != "importance":
        return None
    if importance is None:
        raise ValueError(
            "the method importance needs to know the layer's inputs: give data, or use hqq"
        )
    m = np.asarray(importance, np.float32)
    if not np.isfinite(m).all() or (m < 0).any():
        raise ValueError("an importance must be finite and not negative")
    if np.broadcast_shapes(m.shape, shape) != shape:
        raise ValueError(f"an importance of shape {m.shape} does not fit a weight of {shape}")
    top = float(m.max(initial=0))
    return np.broadcast_to(m / np.float32(top) if top else np.ones_like(m), shape)


def _extremes(w: NDArray[Any], layout: Layout) -> tuple[Values, Values]:
    """The least and greatest value of each row, 0 included; NaN where there is one."""
    low, high = (np.zeros(layout.params_shape, np.float32) for _ in range(2))
    views = zip(layout.views(w), layout.params_views(low), layout.params_views(high), strict=True)
    for view, lo, hi in views:
        for rows in Rows.cut(view, once=True):
            least = greatest = np.zeros(rows.params_shape, np.float32)
            for piece in rows.pieces:
                x = rows.read(view, piece)
                least = np.minimum(least, x.min(rows.axis, keepdims=True, initial=0))
                greatest = np.maximum(greatest, x.max(rows.axis, keepdims=True, initial=0))
            rows.put(lo, least)
            rows.put(hi, greatest)
    return low, high


def _problem(
    grid: Grid,
    rows: Rows,
    views: tuple[NDArray[Any], Values | None],
    extremes: tuple[Values, Values],
    cover: Fit,
    fixed: NDArray[np.bool_],
    space: Space,
) -> Problem:
    low, high = extremes
    exponent = np.clip(np.frexp(np.maximum(-low, high))[1], -126, 126)
    factor = np.ldexp(np.float32(1), -exponent)
    # Those that are fixed have scales of another size than theirs: far from 1, they overflow.
    one = np.ones_like(factor)
    start = Fit(np.where(fixed, one, cover.scale) * np.where(fixed, one, factor), cover.zero)
    ends = low * factor, high * factor
    return Problem(grid, rows, *views, factor, *ends, start, space=space).kept()


def _bounded(scale: Values) -> Values:
    return np.where(np.abs(scale) < SMALLEST_SCALE, np.copysign(SMALLEST_SCALE, scale), scale)
