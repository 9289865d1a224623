"""quantize_weights: a quarter of the bytes, float kernels after load, small errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.passes import QuantizeWeights
from onnxq.passes.layouts import WEIGHTS
from onnxq.synthetic import synthetic_samples

SHAPES = {
    "w": (16, 8, 3, 3), "wt": (8, 16, 3, 3), "m": (32, 48), "mt": (48, 32), "left": (24, 32),
    "table": (40, 32), "lw": (1, 64, 32), "lr": (1, 64, 16), "gw": (1, 48, 32), "gr": (1, 48, 16),
    "rw": (1, 16, 32), "rr": (1, 16, 16), "b": (48,),
}  # fmt: skip
IMAGE, ROWS = "float[1, 8, 6, 6] x", "float[32, 32] x"
SEQUENCE, STATES = "float[5, 1, 32] x", "float[a, b, c, d] y"
CASES = {
    "Conv": ("c = Conv(x, w) f = Flatten(c) k = Constant<value_ints = [-1, 32]>() r = Reshape(f, k) y = MatMul(r, m)", IMAGE, "float[a, b] y"),
    "ConvTranspose": ("c = ConvTranspose(x, wt) f = Flatten(c) k = Constant<value_ints = [-1, 32]>() r = Reshape(f, k) y = MatMul(r, m)", IMAGE, "float[a, b] y"),
    "Gemm": ("y = Gemm(x, m, b)", ROWS, "float[a, b] y"),
    "Gemm-transposed": ("y = Gemm<transB = 1>(x, mt, b)", ROWS, "float[a, b] y"),
    "MatMul": ("y = MatMul(x, m)", ROWS, "float[a, b] y"),
    "MatMul-left": ("y = MatMul(left, x)", ROWS, "float[a, b] y"),
    "Gather": ("y = Gather(table, x)", "int64[1, 7] x", "float[a, b, c] y"),
    "LSTM": ("y = LSTM<hidden_size = 16>(x, lw, lr)", SEQUENCE, STATES),
    "GRU": ("y = GRU<hidden_size = 16>(x, gw, gr)", SEQUENCE, STATES),
    "RNN": ("y = RNN<hidden_size = 16>(x, rw, rr)", SEQUENCE, STATES),
    "body": (
        "t = Constant<value_int = 1>() c = Cast<to = 9>(t) y = If(c) <then_branch = p () => (float[32, 48] u) "
        "{ u = MatMul(x, m) }, else_branch = q () => (float[32, 48] v) { h = MatMul(x, m) v = Neg(h) }>", ROWS, "float[a, b] y",
    ),
}  # fmt: skip


def model(body: str, inputs: str, outputs: str, dtype: type = np.float32) -> Model:
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    rng = np.random.default_rng(2)
    for name, shape in SHAPES.items():
        if f"{name}," in body or f"{name})" in body:
            value: np.ndarray = rng.normal(0, 0.2, shape)
            proto.graph.initializer.append(numpy_helper.from_array(value.astype(dtype), name))
    return Model.from_proto(proto)


def outputs(model: Model) -> np.ndarray:
    session = runtime.session(model)
    return np.stack([session.run(None, f)[0] for f in synthetic_samples(model, 3)])


@pytest.mark.parametrize("name", CASES)
def test_every_operator(name: str, tmp_path: Path) -> None:
    before = model(*CASES[name])
    after = before.copy()
    notes = QuantizeWeights()(after)
    assert all(note.changed for note in notes)
    proto = after.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ByteSize() < 0.55 * before.to_proto().ByteSize()
    assert (
        sqnr_db(outputs(before), outputs(after)) > 38
    )  # 8 bits give 40 to 45 dB on normal weights
    assert not [n for n in QuantizeWeights()(after) if n.changed]
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = Model.load(tmp_path / "o.onnx").nodes("Mul", "DequantizeLinear")
    assert left == []  # unpacked when the model was loaded


def test_the_table_has_a_test_for_each_row() -> None:
    assert set(WEIGHTS) <= set(CASES)


def test_tied_weights_are_stored_once() -> None:
    after = model("a = MatMul(x, m) h = MatMul(x, m) y = Add(a, h)", ROWS, "float[a, b] y")
    QuantizeWeights()(after)
    kinds = [t.data_type for t in after.to_proto().graph.initializer]
    assert kinds.count(onnx.TensorProto.INT8) == 1


def test_float16_stays_float16() -> None:
    after = model("y = MatMul(x, m)", "float16[32, 32] x", "float16[a, b] y", np.float16)
    assert [n.changed for n in QuantizeWeights()(after)] == [True]
    onnx.checker.check_model(after.to_proto(), full_check=True)


def test_scales_that_float16_cannot_hold() -> None:
    after = model("y = MatMul(x, m)", "float16[32, 32] x", "float16[a, b] y", np.float16)
    (weight,) = [n.inputs[1] for n in after.nodes("MatMul")]
    weight.values = np.full((32, 48), 1e-6, np.float16)
    (note,) = QuantizeWeights()(after)
    assert (note.changed, "float16 cannot hold" in note.text) == (False, True)


def test_what_is_left_alone() -> None:
    small = model("y = MatMul(x, m)", ROWS, "float[a, b] y")
    assert not QuantizeWeights(smallest=10_000)(small)
    broken = model("y = MatMul(x, m)", ROWS, "float[a, b] y")
    (weight,) = [n.inputs[1] for n in broken.nodes("MatMul")]
    weight.values = np.full((32, 48), np.nan, np.float32)
    assert "NaN" in QuantizeWeights()(broken)[0].text
