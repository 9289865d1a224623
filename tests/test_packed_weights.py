"""Every form that a weight has in a file is found, and is what onnxruntime computes with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from ml_dtypes import int4, uint4
from onnx import TensorProto, helper, numpy_helper, parser

from onnxq import check, runtime
from onnxq.errors import ModelError
from onnxq.model import Model
from onnxq.packed import Grid, Recovered, remembered
from onnxq.passes import DequantizeModel, QuantizeCodebook
from onnxq.passes.packed_weights import stands_for, stored_weights
from onnxq.schemes import PerChannel, PerGroup, PerTensor, QuantScheme
from onnxq.testing import check as check_pass
from onnxq.weight_table import weight_table
from onnxq.weights import Weight

RNG = np.random.default_rng(11)
X = "float[3, 8] x"
HEAD = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'


def ints(*shape: int, kind: str = "int8", lo: int = -100, hi: int = 100) -> np.ndarray:
    return RNG.integers(0 if kind[0] == "u" else lo, hi, shape).astype(kind)


def scales(*shape: int) -> np.ndarray:
    return RNG.uniform(0.01, 0.05, shape).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Case:
    """A graph around one weight; what it computes in floats, and what is found of it."""

    body: str
    values: Mapping[str, np.ndarray]
    form: str
    op: str
    inputs: str = X
    outputs: str = "float[a, b] y"
    atol: float = 1e-5
    format: str = "int8"
    gone: tuple[str, ...] = field(default=("DequantizeLinear", "QuantizeLinear"))

    def proto(self) -> onnx.ModelProto:
        proto = parser.parse_model(
            f"{HEAD} g ({self.inputs}) => ({self.outputs}) {{ {self.body} }}"
        )
        for name, value in self.values.items():
            proto.graph.initializer.append(numpy_helper.from_array(value, name))
        return proto


S, Z8 = np.float32(0.02), np.uint8(7)
ACT: dict[str, np.ndarray] = {"xs": np.array(0.05, np.float32), "xz": np.array(120, np.uint8)}
OUT: dict[str, np.ndarray] = {"ys": np.array(0.2, np.float32), "yz": np.array(130, np.uint8)}
NBITS = (
    "y = com.microsoft.MatMulNBits<K = 40, N = 6, bits = {bits}, block_size = 16>(x, w, s{more})"
)
STATIC = ("q = QuantizeLinear(x, xs, xz) ", " y = DequantizeLinear(r, ys, yz)")
CASES = {
    "dq-tensor": Case("w = DequantizeLinear(q, s, z) y = MatMul(x, w)",
        {"q": ints(8, 5, kind="uint8"), "s": np.array(S), "z": np.array(Z8)}, "qdq", "MatMul", format="uint8"),
    "dq-channel": Case("w = DequantizeLinear<axis = 1>(q, s) y = MatMul(x, w)",
        {"q": ints(8, 5), "s": scales(5)}, "qdq", "MatMul"),
    "dq-blocks": Case("w = DequantizeLinear<axis = 0, block_size = 3>(q, s, z) y = MatMul(x, w)",
        {"q": ints(8, 5, kind="uint8", hi=15).astype(uint4), "s": scales(3, 5),
         "z": ints(3, 5, kind="uint8", hi=15).astype(uint4)}, "qdq", "MatMul", format="uint4"),
    "dq-transposed": Case("d = DequantizeLinear<axis = 0>(q, s) w = Transpose<perm = [1, 0]>(d) y = MatMul(x, w)",
        {"q": ints(5, 8), "s": scales(5)}, "qdq", "MatMul", gone=("Transpose", "DequantizeLinear")),
    "dq-widened": Case("c = Cast<to = 3>(q) w = DequantizeLinear<axis = 1>(c, s) y = MatMul(x, w)",
        {"q": ints(8, 5, lo=-7, hi=7).astype(int4), "s": scales(5)}, "qdq", "MatMul", format="int4"),
    "q-dq-floats": Case("q = QuantizeLinear<axis = 1>(f, s, z) w = DequantizeLinear<axis = 1>(q, s, z) y = MatMul(x, w)",
        {"f": RNG.normal(0, 1, (8, 5)).astype(np.float32), "s": scales(5), "z": np.zeros(5, np.int8)},
        "qdq", "MatMul", format="float32"),
    "storage": Case("c = Cast<to = 1>(q) d = Cast<to = 1>(z) e = Sub(c, d) w = Mul(e, s) y = MatMul(x, w)",
        {"q": ints(8, 5, kind="uint8"), "s": scales(1, 5), "z": np.array(Z8)}, "storage", "MatMul",
        format="uint8", gone=("Cast", "Sub", "Mul")),
    "storage-groups": Case(
        "c = Cast<to = 1>(q) e = Mul(s, c) r = Reshape(e, shape) w = Slice(r, from, to, axes) y = MatMul(x, w)",
        {"q": ints(3, 3, 5), "s": scales(3, 1, 5), "shape": np.array([9, 5]), "from": np.array([0]),
         "to": np.array([8]), "axes": np.array([0])}, "storage", "MatMul", gone=("Reshape", "Slice", "Cast")),
    "codebook": Case("i = Cast<to = 6>(q) t = Gather(table, i) w = Mul(t, s) y = MatMul(x, w)",
        {"q": ints(8, 5, kind="uint8", hi=16).astype(uint4), "table": scales(16), "s": scales(1, 5)},
        "codebook", "MatMul", format="uint4", gone=("Cast", "Gather", "Mul")),
    "codebook-of-vectors": Case("i = Cast<to = 6>(q) t = Gather(table, i) r = Reshape(t, shape) w = Mul(r, s) y = MatMul(x, w)",
        {"q": ints(4, 5, kind="uint8", hi=9), "table": scales(9, 2), "shape": np.array([8, 5]), "s": np.array(S)},
        "codebook", "MatMul", format="uint8", gone=("Gather", "Reshape")),
    "nbits-4": Case(NBITS.format(bits=4, more=""), {"w": ints(6, 3, 8, kind="uint8", hi=256), "s": scales(6, 3)},
        "nbits", "MatMul", inputs="float[3, 40] x", atol=2e-4, format="uint4", gone=("MatMulNBits",)),
    "nbits-4-zeros-bias": Case(NBITS.format(bits=4, more=", z, , b"),
        {"w": ints(6, 3, 8, kind="uint8", hi=256), "s": scales(6, 3), "z": ints(6, 2, kind="uint8", hi=256), "b": scales(6)},
        "nbits", "MatMul", inputs="float[3, 40] x", atol=2e-4, format="uint4", gone=("MatMulNBits",)),
    "nbits-4-float-zeros": Case(NBITS.format(bits=4, more=", z"),
        {"w": ints(6, 3, 8, kind="uint8", hi=256), "s": scales(6, 3), "z": (100 * scales(6, 3)).astype(np.float32)},
        "nbits", "MatMul", inputs="float[3, 40] x", atol=2e-4, format="uint4", gone=("MatMulNBits",)),
    "nbits-4-order": Case(NBITS.format(bits=4, more=", , order"),
        {"w": ints(6, 3, 8, kind="uint8", hi=256), "s": scales(6, 3), "order": (np.arange(40) % 3).astype(np.int32)},
        "nbits", "MatMul", inputs="float[3, 40] x", atol=2e-4, format="uint4", gone=("MatMulNBits",)),
    "nbits-8": Case(NBITS.format(bits=8, more=", z"),
        {"w": ints(6, 3, 16, kind="uint8", hi=256), "s": scales(6, 3) / 16, "z": ints(6, 3, kind="uint8", hi=256)},
        "nbits", "MatMul", inputs="float[3, 40] x", atol=2e-4, format="uint8", gone=("MatMulNBits",)),
    "nbits-2": Case(NBITS.format(bits=2, more=""), {"w": ints(6, 3, 4, kind="uint8", hi=256), "s": scales(6, 3)},
        "nbits", "MatMul", inputs="float[3, 40] x", atol=2e-4, format="uint2", gone=("MatMulNBits",)),
    "nbits-table": Case("y = com.microsoft.GatherBlockQuantized<block_size = 16, quantize_axis = 1>(w, x, s)",
        {"w": ints(9, 32, lo=-8, hi=8).astype(int4), "s": scales(9, 2)}, "nbits", "Gather", inputs="int64[3] x",
        format="int4", gone=("GatherBlockQuantized",)),
    "nbits-table-bytes": Case("y = com.microsoft.GatherBlockQuantized<block_size = 16, quantize_axis = 1, bits = 4>(w, x, s, z)",
        {"w": ints(9, 16, kind="uint8", hi=256), "s": scales(9, 2), "z": ints(9, 1, kind="uint8", hi=256)}, "nbits",
        "Gather", inputs="int64[3] x", format="uint4", gone=("GatherBlockQuantized",)),
    "qlinear-conv": Case(
        STATIC[0] + "r = QLinearConv<group = 2>(q, xs, xz, w, ws, wz, ys, yz, b)" + STATIC[1],
        {**ACT, **OUT, "w": ints(6, 2, 3, 3), "ws": scales(6) / 10, "wz": np.zeros(6, np.int8), "b": ints(6, kind="int32")},
        "qoperator", "Conv", inputs="float[1, 4, 5, 5] x", outputs="float[a, b, c, d] y", atol=0.101),
    "qlinear-matmul": Case(STATIC[0] + "r = QLinearMatMul(q, xs, xz, w, ws, wz, ys, yz)" + STATIC[1],
        {**ACT, **OUT, "w": ints(8, 5, kind="uint8"), "ws": np.array(S / 10), "wz": np.array(Z8)}, "qoperator", "MatMul",
        atol=0.101, format="uint8"),
    "qgemm": Case(STATIC[0] + "r = com.microsoft.QGemm<transB = 1, alpha = 0.5>(q, xs, xz, w, ws, wz, b, ys, yz)" + STATIC[1],
        {**ACT, **OUT, "w": ints(5, 8), "ws": scales(5), "wz": np.zeros(5, np.int8), "b": ints(5, kind="int32")},
        "qoperator", "Gemm", atol=0.101),
    "qgemm-floats": Case(STATIC[0] + "y = com.microsoft.QGemm(q, xs, xz, w, ws, wz)",
        {**ACT, "w": ints(8, 5), "ws": np.array(S), "wz": np.array(0, np.int8)}, "qoperator", "Gemm"),
    "qlinear-add": Case(STATIC[0] + "r = com.microsoft.QLinearAdd(w, ws, wz, q, xs, xz, ys, yz)" + STATIC[1],
        {**ACT, **OUT, "w": ints(3, 8, kind="uint8"), "ws": np.array(S), "wz": np.array(Z8)}, "qoperator", "Add",
        atol=0.101, format="uint8"),
    "dynamic-matmul": Case(
        "q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, z, wz) f = Cast<to = 1>(i) m = Mul(ws, s) y = Mul(m, f)",
        {"w": ints(8, 5, kind="uint8"), "ws": scales(5), "wz": ints(5, kind="uint8")}, "dynamic", "MatMul", atol=0.1,
        format="uint8", gone=("DynamicQuantizeLinear", "MatMulInteger", "Cast")),
    "dynamic-conv": Case(
        "q, s, z = DynamicQuantizeLinear(x) i = ConvInteger<pads = [1, 1, 1, 1]>(q, w, z) f = Cast<to = 1>(i) "
        "h = Mul(f, s) y = Mul(h, ws)",
        {"w": ints(6, 4, 3, 3), "ws": scales(1, 6, 1, 1)}, "dynamic", "Conv", inputs="float[1, 4, 5, 5] x",
        outputs="float[a, b, c, d] y", atol=0.5, gone=("DynamicQuantizeLinear", "ConvInteger", "Cast")),
    "dynamic-to-float": Case(
        "q, s, z = DynamicQuantizeLinear(x) y = com.microsoft.MatMulIntegerToFloat(q, w, s, ws, z, , b)",
        {"w": ints(8, 5), "ws": scales(5), "b": scales(5)}, "dynamic", "MatMul", atol=0.1,
        gone=("DynamicQuantizeLinear", "MatMulIntegerToFloat")),
    "dynamic-in-one": Case("y = com.microsoft.DynamicQuantizeMatMul(x, w, ws, wz, b)",
        {"w": ints(8, 5), "ws": scales(5), "wz": np.zeros(5, np.int8), "b": scales(5)}, "dynamic", "MatMul", atol=0.1,
        gone=("DynamicQuantizeMatMul",)),
    "dynamic-lstm": Case(
        "y = com.microsoft.DynamicQuantizeLSTM<hidden_size = 4>(x, w, r, , , , , , ws, wz, rs, rz)",
        {"w": ints(1, 8, 16), "r": ints(1, 4, 16), "ws": scales(1, 16) / 10, "wz": np.zeros((1, 16), np.int8),
         "rs": scales(1) / 10, "rz": np.zeros(1, np.int8)}, "dynamic", "LSTM", inputs="float[6, 2, 8] x",
        outputs="float[a, b, c, d] y", atol=0.03, gone=("DynamicQuantizeLSTM",)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_found_and_computed_as_in_onnxruntime(name: str) -> None:
    case = CASES[name]
    proto = case.proto()
    found = [s for _, _, s in stored_weights(Model.from_proto(proto)) if s.form != "float"]
    if case.op != "Add":  # a constant operand is no layer's weight
        assert found[0].form == case.form
        bits = found[0].bits
        assert (str(found[0].numbers.dtype) if bits is None else f"uint{bits}") == case.format
    feeds = None
    if "xs" in case.values:  # x is what integers stand for: only results are rounded
        shape = Model.from_proto(proto).graph.inputs[0].shape
        feeds = [{"x": ints(*shape, lo=-60, hi=60).astype(np.float32) * np.float32(0.05)}]
    result = check_pass(DequantizeModel(), proto, feeds=feeds, atol=case.atol, rtol=1e-3)
    assert result.ops[case.op]
    assert not set(case.gone) & result.ops.keys()
    assert check(result.model).is_clean


PRODUCTS = [
    name
    for name, case in CASES.items()
    if case.form in ("qdq", "storage", "nbits") and case.op == "MatMul" and "bias" not in name
]


@pytest.mark.parametrize("name", PRODUCTS)
def test_weights_are_equal_to_the_bit(name: str) -> None:
    """x is the identity: the product is the weight, as onnxruntime unpacks it."""
    case = CASES[name]
    model = Model.from_proto(case.proto())
    size = model.graph.inputs[0].shape[1]
    proto = case.proto()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    given = runtime.session(proto, optimize="off").run(None, {"x": np.eye(size, dtype=np.float32)})
    DequantizeModel()(model)
    (layer,) = model.nodes("MatMul")
    grid = remembered(layer.inputs[1])
    assert grid is not None
    np.testing.assert_allclose(grid.values(), given[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(grid.values(), layer.inputs[1].values)


@pytest.mark.parametrize(
    ("body", "values"),
    [
        pytest.param("c = Cast<to = 1>(q) w = Mul(c, x) y = Identity(w)", {"q": ints(3, 8)}, id="runtime"),
        pytest.param("c = Cast<to = 1>(q) y = Add(x, c)", {"q": ints(3, 8)}, id="no-scale"),
        pytest.param("y = Mul(x, q)", {"q": scales(3, 8)}, id="floats"),
        pytest.param("d = DequantizeLinear(q, s) w = Mul(d, s) y = Add(x, w)",
                     {"q": ints(3, 8), "s": np.array(S)}, id="scaled-twice"),
    ],
)  # fmt: skip
def test_what_is_no_stored_weight(body: str, values: dict[str, np.ndarray]) -> None:
    proto = Case(body, values, "", "").proto()
    model = Model.from_proto(proto)
    (last,) = [n for n in model.nodes() if any(model.is_output(t) for t in n.outputs)]
    assert all(stands_for(t) is None for t in last.inputs)


GRID = Grid.of(ints(6, 4), scales(4), None, axis=1)


def test_a_grid_fits_what_holds_its_numbers() -> None:
    q, params = GRID.fitted(QuantScheme("int8", PerChannel(1))) or (None, None)
    assert q is not None
    assert params is not None
    np.testing.assert_array_equal(q, GRID.numbers)
    np.testing.assert_array_equal(params.dequantize(q), GRID.values())
    for wide in (
        QuantScheme("int16", PerChannel(1)),
        QuantScheme("uint8", PerChannel(1), symmetric=False),
        QuantScheme("uint8", PerChannel(1)),
        QuantScheme("int8", PerGroup(2, 0)),
    ):
        q, params = GRID.fitted(wide) or (None, None)
        assert q is not None, wide
        assert params is not None
        assert q.dtype == wide.numbers.dtype
        np.testing.assert_array_equal(params.dequantize(q), GRID.values())


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param(QuantScheme("int8", PerTensor()), id="one-scale"),
        pytest.param(QuantScheme("int8", PerChannel(0)), id="other-axis"),
        pytest.param(QuantScheme("int4", PerChannel(1)), id="narrower"),
        pytest.param(QuantScheme("int8", PerChannel(1), levels=15), id="levels"),
        pytest.param(QuantScheme("int8", PerChannel(1), power_of_two=True), id="power-of-two"),
        pytest.param(QuantScheme("float8e4m3fn", PerChannel(1)), id="float8"),
        pytest.param(QuantScheme("int16", PerChannel(1), symmetric=False), id="asymmetric-wider"),
    ],
)
def test_a_grid_that_does_not_fit(scheme: QuantScheme) -> None:
    assert GRID.fitted(scheme) is None


def test_negative_scales_turn_where_levels_are_counted() -> None:
    grid = Grid.of(ints(6, 4, lo=-7, hi=7).astype(int4), -scales(4), None, axis=1)
    q, params = grid.fitted(QuantScheme("int4", PerChannel(1), levels=15)) or (None, None)
    assert q is not None
    assert params is not None
    assert (params.scale > 0).all()
    np.testing.assert_array_equal(params.dequantize(q), grid.values())


def test_zero_points_become_a_shift() -> None:
    grid = Grid.of(ints(6, 4, kind="uint8", hi=15).astype(uint4), scales(3, 4), ints(3, 4, kind="uint8", hi=15).astype(uint4), axis=0, block=2)  # fmt: skip
    for scheme in (
        QuantScheme("uint4", PerGroup(2, 0), symmetric=False),
        QuantScheme("int4", PerGroup(2, 0), symmetric=False),
        QuantScheme("int8", PerGroup(2, 0)),
    ):
        q, params = grid.fitted(scheme) or (None, None)
        assert q is not None
        assert params is not None
        np.testing.assert_array_equal(params.dequantize(q), grid.values())


def test_float_zero_points_and_codebooks_fit_no_grid() -> None:
    numbers = ints(6, 4, kind="uint8", hi=15)
    assert (
        Grid.of(numbers, np.array(S), np.array(7.5, np.float32)).fitted(QuantScheme("int8")) is None
    )
    table = Grid(numbers, np.broadcast_to(S, numbers.shape), table=scales(16))
    assert table.fitted(QuantScheme("int8")) is None
    np.testing.assert_array_equal(table.values(), table.table[numbers] * S)  # type: ignore[index]


def test_a_copy_remembers_and_small_weights_too() -> None:
    proto = CASES["dq-channel"].proto()
    model = Model.from_proto(proto)
    DequantizeModel()(model)
    other = model.copy()
    other.raise_opset(22)
    (layer,) = other.nodes("MatMul")
    grid = remembered(layer.inputs[1])
    assert grid is not None
    np.testing.assert_array_equal(grid.numbers, numpy_helper.to_array(proto.graph.initializer[0]))
    assert helper.np_dtype_to_tensor_dtype(layer.inputs[1].dtype) == TensorProto.FLOAT


@pytest.mark.parametrize(
    ("kind", "bits", "granularity"),
    [
        ("nf4", 4, "group"), ("kmeans", 3, "channel"), ("kmeans", 5, "group"),
        ("vector", 6, "channel"), ("kmeans", 1, "tensor"), ("logarithmic", 4, "channel"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("opset", [17, 21])
def test_codebooks_as_they_are_written_here(
    kind: Any, bits: int, granularity: Any, opset: int
) -> None:
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> g (float[3, 40] x) => (float[a, b] y) '
        "{ h = MatMul(x, w) y = MatMul(h, v) }"
    )
    for name, shape in (("w", (40, 96)), ("v", (96, 64))):
        values = RNG.normal(0, 0.1, shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    model = Model.from_proto(proto)
    QuantizeCodebook(kind, bits, granularity, group_size=16)(model)
    rows = weight_table(model)
    entries = 2**bits
    assert len(rows) == 2
    assert all(row.format.startswith(f"codebook of {entries}") for row in rows)
    assert all(0.5 < (row.entropy or 0) <= bits for row in rows)
    result = check_pass(DequantizeModel(), model.to_proto())
    assert set(result.ops) == {"MatMul"}


def test_parts_that_do_not_fit_are_told_in_one_line() -> None:
    model = Model.from_proto(CASES["dq-channel"].proto())
    DequantizeModel()(model)
    (layer,) = model.nodes("MatMul")
    grid = remembered(layer.inputs[1])
    assert grid is not None
    for wrong in (
        lambda: Grid.of(grid.numbers, scales(3), None, axis=1),
        lambda: grid.map(np.transpose),
    ):
        constant = Weight("wrong", Recovered(wrong, (8, 5), np.float32))
        with pytest.raises(ModelError, match="do not fit its shape"):
            constant.values  # noqa: B018
