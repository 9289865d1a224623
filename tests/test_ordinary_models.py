"""What people bring: the default recipe on graphs of every form, from load to the written file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, numpy_helper, parser

from onnxq import optimize
from onnxq.errors import BudgetError, ModelError
from onnxq.model import Model
from onnxq.passes import cleanup

WEIGHTS = {
    "w": (16, 16, 3, 3),
    "w1": (16, 16, 3),
    "w3": (16, 16, 3, 3, 3),
    "wg": (16, 4, 3, 3),
    "wd": (16, 1, 3, 3),
    "wt": (16, 16, 3, 3),
    "wtg": (16, 4, 3, 3),
    "b": (16,),
    "m": (16, 32),
    "m2": (32, 16),
    "gt": (32, 16),
    "table": (40, 16),
    "lw": (1, 64, 16),
    "lr": (1, 64, 16),
    "s": (16,),
    "v": (16,),
}
IMAGE = "float[1, 16, 10, 10] x"
ROW = "float[4, 16] x"


def proto(
    body: str, inputs: str = IMAGE, outputs: str = "y", opset: int = 17, ir: int = 8, head: str = ""
) -> ModelProto:
    """A model with inferred types of outputs; WEIGHTS that it names are drawn with a seed."""
    domains = f'"": {opset}' + head
    text = f"<ir_version: {ir}, opset_import: [{domains}]> g ({inputs}) => ({outputs}) {{ {body} }}"
    made = parser.parse_model(text)
    rng = np.random.default_rng(1)
    for name, shape in WEIGHTS.items():
        if f"{name})" in body or f"{name}," in body:
            values = np.abs(rng.normal(0, 0.2, shape)).astype(np.float32)
            if len(shape) > 1:
                values *= rng.choice([-1, 1], shape).astype(np.float32)
            made.graph.initializer.append(numpy_helper.from_array(values, name))
    for value in made.graph.output:
        if not value.type.HasField("sequence_type"):
            value.ClearField("type")
    if ir < 4:
        made.graph.input.extend(
            onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
            for t in made.graph.initializer
        )
    typed = onnx.shape_inference.infer_shapes(made)
    made.graph.ClearField("output")
    made.graph.output.extend(typed.graph.output)
    return made


QUANTIZED = {
    "conv": proto("c = Conv(x, w, b) r = Relu(c) y = Conv(r, w)"),
    "conv-1d": proto("c = Conv(x, w1, b) r = Relu(c) y = Conv(r, w1)", "float[1, 16, 50] x"),
    "conv-3d": proto("c = Conv(x, w3, b) r = Relu(c) y = Conv(r, w3)", "float[1, 16, 6, 6, 6] x"),
    "conv-grouped": proto("c = Conv<group = 4>(x, wg, b) r = Relu(c) y = Conv(r, w)"),
    "conv-depthwise": proto("c = Conv<group = 16>(x, wd) r = Clip(c) y = Conv(r, w)"),
    "conv-transpose": proto("c = ConvTranspose(x, wt, b) r = Relu(c) y = Conv(r, w)"),
    "conv-transpose-grouped": proto("c = ConvTranspose<group = 4>(x, wtg) y = Conv(c, w)"),
    "batch-normalization": proto(
        "c = Conv(x, w) n = BatchNormalization(c, s, b, b, v) y = Relu(n)"
    ),
    "matmul-3d": proto("c = MatMul(x, m) r = Relu(c) y = MatMul(r, m2)", "float[2, 5, 16] x"),
    "gemm-transposed": proto("c = Gemm<transB = 1>(x, gt) y = Gemm(c, m2, b)", ROW),
    "embedding": proto("e = Gather(table, i) y = MatMul(e, m)", "int64[1, 5] i"),
    "lstm": proto("y, h = LSTM<hidden_size = 16>(x, lw, lr)", "float[5, 1, 16] x"),
    "lstm-optional-inputs": proto(
        "a, y = LSTM<hidden_size = 16>(x, lw, lr, , , h0)",
        "float[5, 1, 16] x, float[1, 1, 16] h0", "y",
    ),
    "opset-7": proto("c = Conv(x, w, b) r = Relu(c) y = Conv(r, w)", opset=7, ir=3),
    "opset-8-upsample": proto(
        'c = Conv(x, w) u = Upsample<mode = "nearest", scales = [1.0, 1.0, 2.0, 2.0]>(c)'
        " y = Conv(u, w)", opset=8, ir=3,
    ),
    "initializers-as-inputs": proto("c = Conv(x, w, b) r = Relu(c) y = Conv(r, w)", ir=3, opset=8),
    "dynamic-shape": proto("c = Conv(x, w, b) r = Relu(c) y = Conv(r, w)", "float[n, 16, h, k] x"),
    "several-outputs": proto("c = Conv(x, w) y = Relu(c) z = Conv(y, w)", outputs="y, z, c"),
    "unused-output-of-a-node": proto(
        "c = Conv(x, w) d, mask = Dropout(c) a, q = Split<axis = 1>(d) y = Conv(d, w)"
    ),
    "unused-input": proto("c = Conv(x, w) y = Conv(c, w)", f"{IMAGE}, float[3] unused"),
    "output-twice-consumed": proto("y = Conv(x, w) a = Relu(y) z = Conv(a, w)", outputs="y, z"),
    "sequence-passed-through": proto(
        "c = Conv(x, w) y = Conv(c, w) q = SequenceConstruct(x, x)",
        outputs="y, seq(float[1, 16, 10, 10]) q",
    ),
    "optional-passed-through": proto(
        "c = Conv(x, w) y = Conv(c, w) o = Optional(x) h = OptionalHasElement(o)", outputs="y, h"
    ),
    "scalar": proto(
        "k = Constant<value = float {2.0}>() c = Conv(x, w) p = Mul(c, k) r = Relu(p)"
        " y = Conv(r, w)"
    ),
    "zero-size": proto(
        "i = Constant<value = int64[0] {}>() e = Gather<axis = 1>(x, i) j = Concat<axis = 1>(x, e)"
        " y = Conv(j, w)"
    ),
    "weight-in-a-constant-node": proto(
        "one = Constant<value = float[1, 16, 1, 1] {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6,"
        " 7}>() c = Conv(x, w) d = Conv(c, w) y = Conv(d, one)"
    ),
    "weight-computed-from-constants": proto("t = Transpose(gt) c = MatMul(x, t) y = Relu(c)", ROW),
    "shared-weight": proto("a = MatMul(x, m) c = MatMul(a, m2) y = MatMul(c, m)", ROW),
    "captured-by-a-body": proto(
        "c = Conv(x, w) y = If(k) <then_branch = t () => (t1) { t1 = Conv(c, w) },"
        " else_branch = f () => (t2) { d = Conv(c, w) t2 = Neg(d) }>", f"{IMAGE}, bool k"
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", ["ort-cpu", "generic"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_is_quantized(name: str, target: str, tmp_path: Path) -> None:
    before = QUANTIZED[name]
    report = optimize(before, tmp_path / "out.onnx", recipe="int8", target=target)
    after = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(after, full_check=True)
    session = ort.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    weights = {t.name for t in before.graph.initializer}
    assert [i.name for i in session.get_inputs()] == [
        i.name for i in before.graph.input if i.name not in weights
    ]
    assert [o.name for o in session.get_outputs()] == [o.name for o in before.graph.output]
    assert report.fidelity is not None
    assert report.fidelity.sqnr_db > 20
    assert report.coverage.weight_share > 0.9
    assert report.size_bytes[1] < before.ByteSize()


def test_custom_operators_are_left_alone_by_a_clean_up(tmp_path: Path) -> None:
    """onnxruntime has no kernel for them: there is nothing to compare with."""
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "my": 1]> g (float[1, 16] x) => (float[1, 16] y)'
        " { i = Identity(x) c = my.Conv(i) y = Relu(c) }"
    )
    report = optimize(model, tmp_path / "out.onnx", recipe="cleanup")
    nodes = onnx.load(tmp_path / "out.onnx").graph.node
    assert [(n.op_type, n.domain) for n in nodes] == [("Conv", "my"), ("Relu", "")]
    assert "not compared" in report.warnings[0]
    with pytest.raises(ModelError, match=r"my:Conv.* recipe auto has to run the model"):
        optimize(model, tmp_path / "other.onnx")


def test_nothing_to_quantize_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="the model has no layer with a weight"):
        optimize(proto("y = Relu(x)"), tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_a_function_named_like_an_operator_is_not_taken_for_it(tmp_path: Path) -> None:
    """A BatchNormalization behind a function called Conv is not folded into its second input."""
    model = proto(
        "c = my.Conv(x, w) n = BatchNormalization(c, s, b, b, v) y = Relu(n)", head=', "my": 1'
    )
    model.functions.append(
        parser.parse_function(
            '<domain: "my", opset_import: ["": 17]> Conv (x, w) => (y)'
            " { a = Abs(w) y = Conv(x, a) }"
        )
    )
    before, after = Model.from_proto(model), Model.from_proto(model).copy()
    assert not [note for note in cleanup(after) if note.changed]
    assert after.to_proto() == before.to_proto()
    report = optimize(model, tmp_path / "out.onnx")
    assert report.fidelity is not None
    assert report.fidelity.sqnr_db > 30
