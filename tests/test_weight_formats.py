"""Every format and granularity: bit for bit as ONNX Runtime dequantizes it, and through a Model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, parser

import onnxq.model
from onnxq import runtime
from onnxq.model import Model
from onnxq.numerics.affine import quantize
from onnxq.schemes import (
    FORMATS,
    FloatFormat,
    Granularity,
    Method,
    PerChannel,
    PerGroup,
    PerTensor,
    QParams,
    QuantScheme,
    quantize_weight,
)

RNG = np.random.default_rng(11)
WEIGHTS = [name for name in FORMATS if name != "int32"]
FLOAT8 = ["float8e4m3fn", "float8e5m2"]


def kind_of(name: str) -> int:
    return int(TensorProto.DataType.Value(name.upper()))


def opset_of(name: str, *, latest: bool = False) -> int:
    return 25 if "int2" in name else 23 if latest else 21


def unpacker(q: NDArray[Any], params: QParams, name: str, opset: int) -> Any:
    """A model that is one DequantizeLinear of constants."""
    attributes: dict[str, int] = {} if params.axis is None else {"axis": params.axis}
    if params.group_size is not None and params.scale.shape != (1,):
        # ONNX Runtime 1.31 takes a scale of shape [1] for that of a tensor, and wants no blocks.
        attributes["block_size"] = params.group_size
    node = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes)  # type: ignore[arg-type]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, q.shape)
    constants = [
        numpy_helper.from_array(v, n)
        for n, v in (("q", q), ("s", params.scale), ("z", params.zero_point))
    ]
    assert constants[0].data_type == kind_of(name)
    graph = helper.make_graph([node], "g", [], [out], constants)
    ir = 13 if opset == 25 else 11 if opset == 23 else 10
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def unpacked(q: NDArray[Any], params: QParams, name: str, opset: int) -> NDArray[np.float32]:
    session = runtime.session(unpacker(q, params, name, opset), optimize="off")
    return np.asarray(session.run(None, {})[0])


values = st.one_of(
    st.floats(-2, 2, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1e38, -3e38, 1e-45, -1e-40, 1.5]),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[Any], int, int, bool, str]:
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=7))
    dtype = draw(st.sampled_from([np.float32, np.float16]))
    w = draw(hnp.arrays(np.float32, shape, elements=values))
    w = np.clip(w, -6e4, 6e4).astype(np.float16) if dtype == np.float16 else w
    axis = draw(st.integers(0, len(shape) - 1))
    rounding = draw(st.sampled_from(["even", "stochastic"]))
    return w, axis, draw(st.integers(1, 8)), draw(st.booleans()), rounding


@pytest.mark.parametrize("name", WEIGHTS)
@settings(derandomize=True, deadline=None, max_examples=40)
@given(case=cases(), granularity=st.sampled_from(["tensor", "channel", "group"]))
def test_dequantizes_as_onnxruntime_does(name: str, case: Any, granularity: str) -> None:
    w, axis, size, symmetric, rounding = case
    symmetric = symmetric or isinstance(FORMATS[name], FloatFormat)
    grains: dict[str, Granularity] = {"channel": PerChannel(), "group": PerGroup(size)}
    grain = grains.get(granularity, PerTensor())
    scheme = QuantScheme(name, grain, symmetric=symmetric)
    q, params = quantize_weight(w, scheme, axis, rounding=rounding)
    assert q.dtype == params.zero_point.dtype == FORMATS[name].dtype
    assert q.shape == w.shape
    magnitude = np.abs(params.scale)
    assert (magnitude >= np.finfo(np.float32).tiny).all()
    assert np.isfinite(magnitude).all()
    opset = opset_of(name, latest=bool(size % 2))
    np.testing.assert_array_equal(params.dequantize(q), unpacked(q, params, name, opset))


def test_the_greatest_floats_do_as_onnxruntime_does() -> None:
    w = np.array([np.finfo(np.float32).max, -3.3e38], np.float32)
    for scheme in (QuantScheme("int8"), QuantScheme("uint8", symmetric=False)):
        q, params = quantize_weight(w, scheme)
        back = unpacked(q, params, scheme.format, 21)
        np.testing.assert_array_equal(params.dequantize(q), back)


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_is_rounded_and_saturated_as_onnxruntime_does(name: str) -> None:
    every = np.arange(256, dtype=np.uint8).view(FORMATS[name].dtype).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    between = (every[:-1] + every[1:]) / 2
    x = np.concatenate(
        [
            *(np.nextafter(v, np.float32(d)) for v in (every, between) for d in (-1e9, 1e9)),
            every,
            between,
            RNG.normal(size=5000).astype(np.float32) * 100,
            np.array([1e30, -1e30, 464, 465, 480, 61440, 70000], np.float32),
        ]
    ).astype(np.float32)
    session = runtime.session(
        parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[A] x, float s) => (float[A] y)
            <{name} z = {{0}}> {{
            q = QuantizeLinear <saturate = 1> (x, s, z)
            y = DequantizeLinear (q, s, z)
        }}"""),
        optimize="off",
    )
    for scale in (np.array(1, np.float32), np.array(0.37, np.float32)):
        params = QParams(scale, np.zeros((), FORMATS[name].dtype))
        ours = params.dequantize(params.quantize(x))
        np.testing.assert_array_equal(ours, session.run(None, {"x": x, "s": scale})[0])


@pytest.mark.parametrize("external", [False, True], ids=["inside", "data-file"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_constants_survive_a_model_packed(
    name: str, external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if external:
        monkeypatch.setattr(onnxq.model, "EXTERNAL_ABOVE", 0)
    w = RNG.normal(size=(67, 129)).astype(np.float32)  # an odd count: the last byte is not full
    scheme = QuantScheme(name, PerGroup(16), symmetric=name in FLOAT8)
    q, params = quantize_weight(w, scheme, 0)
    proto = unpacker(q, params, name, opset_of(name))
    model = Model.from_proto(proto)
    node = model.nodes("DequantizeLinear")[0]
    node.inputs[0] = model.constant("made", q)  # as a pass makes it
    node.inputs[2] = model.constant("zeros", params.zero_point)
    for path in (tmp_path / "a.onnx", tmp_path / "b.onnx"):
        model.save(path)
        model = Model.load(path)
    node = model.nodes("DequantizeLinear")[0]
    back = node.inputs[0].values
    assert back.dtype == q.dtype
    np.testing.assert_array_equal(back.view(np.uint8), q.view(np.uint8))
    bits = FORMATS[name].bits
    stored = sum(p.stat().st_size for p in tmp_path.glob("b.onnx*"))
    groups = params.scale.size
    assert stored < w.size * bits / 8 + groups * (4 + bits / 8) + 4 * 4096 + 1000
    result = runtime.session(tmp_path / "b.onnx", optimize="off").run(None, {})[0]
    np.testing.assert_array_equal(result, params.dequantize(q))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
@pytest.mark.parametrize("grain", [PerTensor(), PerChannel(0), PerChannel(-1), PerGroup(2, -1)])
def test_no_values_at_all(shape: tuple[int, ...], grain: Granularity) -> None:
    methods: tuple[Method, ...] = ("minmax", "mse", "standardized", "hqq")
    for method in methods:
        w = np.zeros(shape, np.float32)
        q, params = quantize_weight(w, QuantScheme("int4", grain), None, method)
        assert q.shape == params.dequantize(q).shape == shape
        assert (params.scale == 1).all()


def test_short_groups_have_a_scale_of_their_own() -> None:
    w = np.array([[7, 1, 7, 70, 700]], np.float32)
    q, params = quantize_weight(w, QuantScheme("int8", PerGroup(2)), 1)
    assert params.scale.shape == (1, 3)
    np.testing.assert_allclose(params.scale[0], np.array([7, 70, 700]) / 127)
    assert q.tolist() == [[127, 18, 13, 127, 127]]
    assert params.group_size == 2


def test_given_parameters_in_groups_quantize_any_float() -> None:
    x = RNG.normal(size=(3, 10, 2))
    scale = RNG.uniform(0.5, 1, (3, 3, 2)).astype(np.float32)
    zero = RNG.integers(0, 16, (3, 3, 2)).astype(FORMATS["uint4"].dtype)
    q = quantize(x, scale, zero, axis=1, group_size=4)
    wide = [np.repeat(p.astype(np.float32), 4, axis=1)[:, :10] for p in (scale, zero)]
    expected = np.clip(np.rint(x.astype(np.float32) / wide[0]) + wide[1], 0, 15)
    np.testing.assert_array_equal(q.astype(np.float32), expected)


@pytest.mark.parametrize("grain", [PerTensor(), PerChannel(1), PerGroup(4, 0), PerGroup(4, 2)])
def test_the_order_of_memory_makes_no_difference(grain: Granularity) -> None:
    w = RNG.normal(size=(9, 5, 6)).astype(np.float32)
    scheme = QuantScheme("uint4", grain, symmetric=False)
    q, params = quantize_weight(w, scheme)
    for other in (np.asfortranarray(w), w.transpose(2, 0, 1).copy().transpose(1, 2, 0)):
        same, _ = quantize_weight(other, scheme)
        np.testing.assert_array_equal(same, q)
    back = params.dequantize(q)
    for kind in (np.uint8, q.dtype):
        np.testing.assert_array_equal(params.dequantize(np.asfortranarray(q.astype(kind))), back)
