from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxq.schemes import (
    FORMATS,
    Format,
    IntFormat,
    PerChannel,
    PerTensor,
    QParams,
    QuantScheme,
    quantize_weight,
)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_formats_are_numpys(fmt: Format) -> None:
    of: Any = ml_dtypes.iinfo if isinstance(fmt, IntFormat) else ml_dtypes.finfo
    info = of(fmt.dtype)
    assert (fmt.qmin, fmt.qmax, fmt.bits) == (float(info.min), float(info.max), info.bits)
    assert fmt.signed == (float(info.min) < 0)


def test_illegal_schemes_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="unknown format 'int9'"):
        QuantScheme("int9")
    with pytest.raises(ValueError, match="symmetric=True"):
        QuantScheme("int32", symmetric=False)


@pytest.mark.parametrize(
    ("scale", "zero_point", "axis", "message"),
    [
        pytest.param(np.float32(1), np.zeros(2, np.int8), 0, "one shape", id="shapes"),
        pytest.param(np.ones(2, np.float32), np.zeros(2, np.int8), None, "axis", id="no-axis"),
        pytest.param(np.float32(1), np.int8(0), 1, "axis", id="scalar-with-axis"),
    ],
)
def test_illegal_parameters_cannot_be_built(
    scale: Any, zero_point: Any, axis: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        QParams(np.asarray(scale), np.asarray(zero_point), axis)


def test_params_per_tensor_ignore_the_operators_axis() -> None:
    params = QuantScheme("uint8", symmetric=False).params(-1.0, 3.0, 0)
    assert params.axis is None
    assert params.zero_point == 64
    assert params.scale == np.float32(4 / 255)


def test_params_per_channel_take_the_operators_axis_unless_they_name_one() -> None:
    lo, hi = np.array([-1.0, -2.0]), np.array([1.0, 0.5])
    assert QuantScheme(granularity=PerChannel()).params(lo, hi, 3).axis == 3
    params = QuantScheme(granularity=PerChannel(1)).params(lo, hi, 3)
    assert params.axis == 1
    assert params.scale.tolist() == [np.float32(1 / 127), np.float32(2 / 127)]


def test_params_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="needs an axis"):
        QuantScheme(granularity=PerChannel()).params([0.0], [1.0])
    with pytest.raises(ValueError, match="does not fit"):
        QuantScheme(granularity=PerTensor()).params([0.0], [1.0])
    with pytest.raises(ValueError, match="does not fit"):
        QuantScheme(granularity=PerChannel(0)).params(0.0, 1.0)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_quantized_weights_are_within_half_a_step(axis: int) -> None:
    w = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    q, params = quantize_weight(w, QuantScheme(granularity=PerChannel()), axis)
    assert q.dtype == np.int8
    assert q.min() >= -127
    assert params.scale.shape == (w.shape[axis],)
    step = np.moveaxis(np.broadcast_to(params.scale, np.moveaxis(w, axis, -1).shape), -1, axis)
    assert (np.abs(params.dequantize(q) - w) <= step * 0.5001).all()


def test_weights_with_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        quantize_weight(np.array([1, np.nan], np.float32), QuantScheme())
