from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import parser

from onnxq import runtime
from onnxq.numerics.affine import affine_params, dequantize, quantize
from onnxq.numerics.grids import SMALLEST_SCALE

DTYPES = ["int8", "uint8", "int16", "uint16"]
SESSIONS: dict[tuple[str, int | None], Any] = {}

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
scales = st.floats(2.0**-100, 2.0**100, width=32)


def onnx_quantize(
    x: NDArray[Any], scale: NDArray[Any], zero_point: NDArray[Any], axis: int | None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """What ONNX Runtime makes of it: quantized, and dequantized again."""
    kind = str(zero_point.dtype)
    p = "N" if axis is not None else ""
    attribute = f"<axis = {axis}>" if axis is not None else ""
    key = (kind, axis)
    if key not in SESSIONS:
        SESSIONS[key] = runtime.session(
            parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
            g (float[A,B,C] x, float[{p}] s, {kind}[{p}] z) => ({kind}[A,B,C] q, float[A,B,C] y) {{
                q = QuantizeLinear {attribute} (x, s, z)
                y = DequantizeLinear {attribute} (q, s, z)
            }}"""),
            optimize="off",
        )
    q, y = SESSIONS[key].run(None, {"x": x, "s": np.asarray(scale), "z": zero_point})
    return q, y


@settings(derandomize=True, deadline=None, max_examples=150)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), axis=st.sampled_from([None, 0, 1, 2]))
def test_agrees_with_onnxruntime_bit_by_bit(
    data: st.DataObject, dtype: str, axis: int | None
) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=4))
    x = data.draw(hnp.arrays(np.float32, shape, elements=finite))
    p_shape = () if axis is None else (shape[axis],)
    scale = data.draw(hnp.arrays(np.float32, p_shape, elements=scales))
    zero_point = data.draw(hnp.arrays(dtype, p_shape))
    q, y = onnx_quantize(x, scale, zero_point, axis)
    ours = quantize(x, scale, zero_point, axis=axis)
    assert ours.dtype == q.dtype
    np.testing.assert_array_equal(ours, q)
    back = dequantize(ours, scale, zero_point, axis=axis)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back.view(np.uint32) << 1, y.view(np.uint32) << 1)  # 0.0 == -0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [0, 3, -1], ids=["zero", "three", "middle"])
def test_halves_and_saturation_agree_with_onnxruntime(dtype: str, zero: int) -> None:
    info = np.iinfo(dtype)
    zero_point = np.array(zero if zero >= 0 else (int(info.max) + int(info.min) + 1) // 2, dtype)
    k = np.arange(-200, 200, dtype=np.float32) + np.float32(0.5)
    top = np.float32(info.max) + np.arange(-4, 4, dtype=np.float32) / 2
    x = np.concatenate(
        [k, top, -top, np.array([3e38, -3e38, 1e-45, -1e-45, 0.0, -0.0], np.float32)]
    )
    for scale in np.array([1, 0.1, 1 / 3, SMALLEST_SCALE, 1e38], np.float32):
        q, y = onnx_quantize(x[None, None], scale, zero_point, None)
        ours = quantize(x[None, None], scale, zero_point)
        np.testing.assert_array_equal(ours, q)
        np.testing.assert_array_equal(dequantize(ours, scale, zero_point), y)


def test_infinities_saturate() -> None:
    x = np.array([np.inf, -np.inf])
    assert quantize(x, 1.0, np.array(0, np.int8)).tolist() == [127, -128]


def test_int32_is_exact() -> None:
    x = np.array([2.0**30, -(2.0**31), 2.0**31, 5.0], np.float32)
    expected = [2**30, -(2**31), 2**31 - 1, 5]
    assert quantize(x, 1.0, np.array(0, np.int32)).tolist() == expected


ranges = st.tuples(finite, finite).map(sorted)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(bounds=ranges, dtype=st.sampled_from(DTYPES), symmetric=st.booleans())
def test_any_finite_range_has_sound_parameters(
    bounds: list[float], dtype: str, symmetric: bool
) -> None:
    info = np.iinfo(dtype)
    qmin, qmax = int(info.min), int(info.max)
    lo, hi = bounds
    scale, zero_point = affine_params(
        lo, hi, qmin=qmin, qmax=qmax, dtype=dtype, symmetric=symmetric
    )
    assert scale.dtype == np.float32
    assert zero_point.dtype == dtype
    assert SMALLEST_SCALE <= scale < np.inf
    assert (
        dequantize(quantize(np.array([0], np.float32), scale, zero_point), scale, zero_point) == 0
    )
    for end in np.array([lo, hi], np.float32):  # both ends are covered: no error above a step
        q = quantize(end, scale, zero_point)
        error = (int(q) - int(zero_point)) * float(scale) - float(end)
        assert abs(error) <= float(scale) * (1 + 2.0**-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_two_levels_and_the_greatest_floats_have_finite_scales(
    symmetric: bool, power_of_two: bool
) -> None:
    for greatest in (1.5, float(np.finfo(np.float32).max)):
        scale, _ = affine_params(
            -greatest, greatest, qmin=-1, qmax=0, dtype=np.int8, symmetric=symmetric,
            power_of_two=power_of_two,
        )  # fmt: skip
        assert np.isfinite(scale)
        assert float(scale) >= min(greatest, 2.0**127)


def test_constants_are_represented() -> None:
    for c in np.array([3.0, -0.7, 1e-20, 1e30], np.float32):
        scale, zp = affine_params(c, c, qmin=0, qmax=255, dtype="uint8", symmetric=False)
        back = dequantize(quantize(c, scale, zp), scale, zp)
        np.testing.assert_allclose(back, c, rtol=2e-7)


@pytest.mark.parametrize(
    ("dtype", "scale", "zero_point"), [("int8", 2 / 127, 0), ("uint8", 2 / 127, 128)]
)
def test_symmetric_ranges(dtype: str, scale: float, zero_point: int) -> None:
    info = np.iinfo(dtype)
    s, z = affine_params(-1, 2, qmin=info.min, qmax=info.max, dtype=dtype, symmetric=True)
    assert s == np.float32(scale)
    assert z == zero_point


def test_vectorised_over_channels_zeros_and_tiny_ranges_included() -> None:
    lo, hi = np.array([0.0, -1.0, 0.0]), np.array([0.0, 1.0, 1e-44])
    scale, zp = affine_params(lo, hi, qmin=-128, qmax=127, dtype="int8", symmetric=True)
    assert scale.tolist() == [1.0, np.float32(1 / 127), SMALLEST_SCALE]
    assert zp.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("lo", "hi", "message"),
    [
        pytest.param(np.nan, 1, "finite", id="nan"),
        pytest.param(0, np.inf, "finite", id="infinite"),
        pytest.param(1, -1, "lo <= hi", id="crossed"),
    ],
)
def test_refuses_what_is_no_range(lo: float, hi: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        affine_params(lo, hi, qmin=0, qmax=255, dtype="uint8", symmetric=False)
