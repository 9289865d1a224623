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
    PerGroup,
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
    with pytest.raises(ValueError, match="float8e5m2 has no zero point: use symmetric=True"):
        QuantScheme("float8e5m2", symmetric=False)
    with pytest.raises(ValueError, match="no levels to count"):
        QuantScheme("float8e4m3fn", levels=16)
    for levels in (1, 17):
        with pytest.raises(ValueError, match=f"int4 has 2 to 16 levels, not {levels}"):
            QuantScheme("int4", levels=levels)
    with pytest.raises(ValueError, match="at least one value, not 0"):
        PerGroup(0)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        pytest.param(QuantScheme("int8"), (-127, 127), id="int8"),
        pytest.param(QuantScheme("int8", symmetric=False), (-128, 127), id="asymmetric"),
        pytest.param(QuantScheme("int16"), (-32767, 32767), id="int16"),
        pytest.param(QuantScheme("uint8"), (0, 255), id="uint8"),
        pytest.param(QuantScheme("int4"), (-8, 7), id="int4"),
        pytest.param(QuantScheme("int4", levels=15), (-7, 7), id="15-levels"),
        pytest.param(QuantScheme("uint4", levels=15), (1, 15), id="15-shifted-levels"),
        pytest.param(QuantScheme("uint4", symmetric=False, levels=11), (0, 10), id="from-0"),
        pytest.param(QuantScheme("int8", levels=3), (-1, 1), id="ternary"),
        pytest.param(QuantScheme("int2"), (-2, 1), id="int2"),
        pytest.param(QuantScheme("float8e4m3fn"), (-448, 448), id="float8"),
    ],
)
def test_numbers_that_weights_use(scheme: QuantScheme, expected: tuple[int, int]) -> None:
    assert (scheme.qmin, scheme.qmax) == expected


def test_params_in_groups() -> None:
    lo, hi = np.array([[-1.0, 0], [-2, -1]]), np.array([[0.5, 0], [8, 0]])
    params = QuantScheme("int4", PerGroup(4)).params(lo, hi, 1)
    assert (params.axis, params.group_size) == (1, 4)
    np.testing.assert_allclose(params.scale, np.array([[1 / 7, 1], [8 / 7, 1 / 7]]), rtol=1e-6)
    with pytest.raises(ValueError, match="does not fit"):
        QuantScheme("int4", PerGroup(4)).params(0.0, 1.0, 1)
    with pytest.raises(ValueError, match=r"per-group needs an axis: PerGroup\(axis=...\)"):
        QuantScheme("int4", PerGroup(4)).params(lo, hi)
    with pytest.raises(ValueError, match="groups have an axis"):
        QParams(params.scale, params.zero_point, None, 4)
    fewer = QuantScheme("int8", levels=15, symmetric=False).params(-7.0, 7.0)
    assert (float(fewer.scale), int(fewer.zero_point)) == (1, 0)


def test_extremes_of_few_bits_are_on_the_least_level() -> None:
    w = np.array([[1, -4, 3.5, 0], [-1, 4, -3.5, 0]], np.float32)
    q, params = quantize_weight(w, QuantScheme("int4", PerGroup(4)), 1)
    assert params.scale[:, 0].tolist() == [0.5, -0.5]
    assert q.astype(int).tolist() == [[2, -8, 7, 0]] * 2
    q, params = quantize_weight(w, QuantScheme("int4", PerGroup(4), power_of_two=True), 1)
    assert params.scale[:, 0].tolist() == [1, 1]  # shifts: no signs


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
