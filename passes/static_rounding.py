"""How quantize_static rounds the weight of a layer: in one place for all that have to know."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.model import values_of
from onnxq.numerics.saturation import safe_scale, saturates
from onnxq.packed import fitted
from onnxq.passes.ops import paired_rows, weight_axis
from onnxq.schemes import (
    PerGroup,
    PerTensor,
    QParams,
    QuantScheme,
    balance,
    integers,
    quantize_weight,
)

WeightMethod = Literal["minmax", "mse", "standardized", "hqq"]
NEGATIVE = 1 / 3  # the share of a range below 0 up to which values count as mostly positive


def rounded(
    tensor: gs.Tensor,
    scheme: QuantScheme,
    axis: int | None,
    method: WeightMethod,
    *,
    guarded: gs.Node | None = None,
    is_balanced: bool = False,
) -> tuple[NDArray[Any], QParams, int]:
    """Integers and parameters of a constant, and how many scales the guard has raised.

    Integers that it remembers stay where the scheme holds them. guarded: the layer whose kernel
    must not saturate. is_balanced: errors cancel in sums (`numerics.balancing`).
    """
    values = np.asarray(values_of(tensor))
    known = fitted(tensor, scheme, axis)
    q, params = known or quantize_weight(values, scheme, axis, method)
    raised = 0
    if guarded is not None:
        given, params = params, _guarded(guarded, values, params)
        raised = int((params.scale > given.scale).sum())
        if known is None or raised:
            q = integers(values, scheme, params)
    if is_balanced and params.group_size is None and known is None:
        near, q = q, balance(values, q, scheme, params, 0)
        if guarded is not None and (rows := paired_rows(guarded, q)) is not None:
            q[saturates(rows)] = near[saturates(rows)]
    return q, params, raised


def is_balanced(node: gs.Node, negative: float) -> bool:
    """Whether rounding errors should cancel: in convolutions of mostly positive values.

    negative: the share of the input's range that is below 0.
    """
    return node.op == "Conv" and negative <= NEGATIVE


def _guarded(node: gs.Node, values: NDArray[Any], params: QParams) -> QParams:
    """Scales with which no pair of products exceeds 16 bits, see `numerics.saturation`."""
    rows = paired_rows(node, values)
    if rows is None:
        return params
    if params.axis is None:
        scale = safe_scale(np.hstack(list(rows)), params.scale)
    else:
        parts = np.split(params.scale, len(rows))
        scale = np.hstack([safe_scale(r, s) for r, s in zip(rows, parts, strict=True)])
    return replace(params, scale=scale)


def scale_axis(node: gs.Node, index: int, scheme: QuantScheme) -> int | None:
    """The axis of the weight's scales, for groups that which is summed over; None: one scale.

    MatMul kernels take a scale a column of a matrix, not of a stack of matrices or of a left
    operand's rows.
    """
    if isinstance(scheme.granularity, PerTensor):
        return None
    if node.op == "MatMul" and (index == 0 or len(node.inputs[index].shape) != 2):
        return None
    axis = weight_axis(node, index)
    if isinstance(scheme.granularity, PerGroup) and axis is not None:
        return 1 - axis  # of a matrix's two axes, or a kernel's first two, the other one
    return axis
