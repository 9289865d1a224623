"""quantize_static: what runs in integers in onnxruntime, how close, and what stays float."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.calibration import load_calibration
from onnxq.data import Samples, open_samples
from onnxq.errors import DataError
from onnxq.model import Model, producer
from onnxq.numerics.metrics import sqnr_db
from onnxq.passes import QuantizeStatic, simplify_qdq
from onnxq.passes.sensitive import graph_rules
from onnxq.schemes import PerChannel, PerTensor, QuantScheme
from onnxq.targets import Target, load_target

RNG = np.random.default_rng(7)
SHAPES = {
    "w": (8, 8, 3, 3),  # Conv, ConvTranspose
    "w2": (8, 8, 1, 1),
    "wd": (8, 1, 3, 3),
    "wt": (8, 4, 3, 3),  # ConvTranspose in two groups
    "b": (8,),
    "b2": (8,),
    "m": (8, 16),
    "m2": (16, 8),
    "bm": (16,),
    "g": (16, 8),
    "left": (8, 8),
    "stack": (2, 12, 8),
    "table": (50, 8),
    "const": (1, 8, 1, 1),
}


def model(body: str, inputs: str = "float[1, 8, 12, 12] x", outputs: str = "float[a, b, c, d] y",
          opset: int = 17, inits: str = "", **values: Any) -> Model:  # fmt: skip
    """A model around `body`; weights of SHAPES that it names are drawn at random."""
    inits = f"<{inits}>" if inits else ""
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> '
        f"g ({inputs}) => ({outputs}) {inits} {{ {body} }}"
    )
    rng = np.random.default_rng(3)
    used = set(re.findall(r"\w+", body))
    for name, shape in SHAPES.items():
        if name in used:
            value = values.get(name, rng.normal(0, 0.3, shape))
            array = np.asarray(value, np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto, full_check=True)
    return Model.from_proto(proto)


def feeds(model: Model, n: int = 6, high: int = 50) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(11)
    return [
        {
            t.name: rng.integers(0, high, t.shape).astype(t.dtype)
            if t.dtype in (np.int64, np.bool_)
            else rng.normal(0, 1, t.shape).astype(np.float32)
            for t in model.graph.inputs
        }
        for _ in range(n)
    ]


def samples(model: Model) -> Samples:
    return open_samples(feeds(model), model)


def everything(name: str = "ort-cpu") -> Target:
    """The target without its costs: on graphs as small as these, floats are always faster."""
    return replace(load_target(name), costs=None)


def quantized(before: Model, target: str = "ort-cpu", **options: Any) -> tuple[Model, list[Any]]:
    after = before.copy()
    notes = list(QuantizeStatic(everything(target), samples(before), **options)(after))
    notes += simplify_qdq(after)
    onnx.checker.check_model(after.to_proto(), full_check=True)
    return after, notes


def run(model: Model, optimize: runtime.Level = "all") -> dict[str, np.ndarray]:
    session = runtime.session(model.to_proto(), optimize=optimize)
    names = [o.name for o in session.get_outputs()]
    runs = [session.run(None, feed) for feed in feeds(model)]
    return {name: np.stack([r[i] for r in runs]) for i, name in enumerate(names)}


def fidelity(before: Model, after: Model, output: str = "y") -> float:
    return float(sqnr_db(run(before)[output], run(after)[output]))


def executed(model: Model, path: Path) -> list[str]:
    """Operators of the model as onnxruntime executes it (layout transformations left out)."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(
        model.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [node.op_type for node in onnx.load(path / "optimized.onnx").graph.node]


# One row an operator: between two integer layers it runs in integers. y is made by a Gemm,
# so that no output layer is left float.
TAIL = "p = GlobalAveragePool(e) f = Flatten(p) y = Gemm<transB = 1>(f, g)"
BETWEEN = [
    pytest.param("c = Conv(x, w, b) e = Conv(c, w2, b2)", "QLinearConv", id="Conv"),
    pytest.param("c = Conv(x, w, b) e = Conv<group = 8>(c, wd)", "QLinearConv", id="depthwise"),
    pytest.param("c = Conv(x, w, b) r = Relu(c) e = Conv(r, w2)", "QLinearConv", id="Relu"),
    pytest.param(
        "c = Conv(x, w, b) lo = Constant<value_float = 0.0>() hi = Constant<value_float = 6.0>()"
        " r = Clip(c, lo, hi) e = Conv(r, w2)",
        "QLinearConv",
        id="Clip",
    ),
    pytest.param(
        "c = Conv(x, w) d = Conv(x, w) s = Add(c, d) e = Conv(s, w2)", "QLinearAdd", id="Add"
    ),
    pytest.param(
        "c = Conv(x, w) s = Add(c, const) e = Conv(s, w2)", "QLinearAdd", id="Add-constant"
    ),
    pytest.param(
        "c = Conv(x, w) d = Conv(x, w) s = Mul(c, d) e = Conv(s, w2)", "QLinearMul", id="Mul"
    ),
    pytest.param(
        "c = Conv(x, w2) d = Conv(x, w2) s = Concat<axis = 2>(c, d) e = Conv(s, w2)",
        "QLinearConcat",
        id="Concat",
    ),
    pytest.param(
        "c = Conv(x, w) s = AveragePool<kernel_shape = [2, 2]>(c) e = Conv(s, w2)",
        "QLinearAveragePool",
        id="AveragePool",
    ),
    pytest.param(
        "c = Conv(x, w) s = MaxPool<kernel_shape = [2, 2]>(c) e = Conv(s, w2)",
        "MaxPool",
        id="MaxPool",
    ),
    pytest.param(
        "c = Conv(x, w) s = LeakyRelu(c) e = Conv(s, w2)", "QLinearLeakyRelu", id="LeakyRelu"
    ),
    pytest.param("c = Conv(x, w) s = Sigmoid(c) e = Conv(s, w2)", "QLinearSigmoid", id="Sigmoid"),
    pytest.param(
        "sc = Constant<value_floats = [1.0, 1.0, 2.0, 2.0]>() c = Conv(x, w)"
        " s = Resize<mode = 'nearest'>(c, , sc) e = Conv(s, w2)".replace("'", '"'),
        "Resize",
        id="Resize",
    ),
    pytest.param(
        "c = Conv(x, w2) s = Transpose<perm = [0, 1, 3, 2]>(c) e = Conv(s, w2)",
        "Transpose",
        id="Transpose",
    ),
    pytest.param(
        "c = Conv(x, w2) s, t = Split<axis = 2>(c) u = Add(s, t) e = Conv(u, w2)",
        "Split",
        id="Split",
    ),
    pytest.param(
        "pads = Constant<value_ints = [0, 0, 1, 1, 0, 0, 1, 1]>() c = Conv(x, w2) s = Pad(c, pads)"
        " e = Conv(s, w2)",
        "Pad",
        id="Pad",
    ),
]
FLOAT_OPS = set(
    "Conv FusedConv NhwcFusedConv Gemm FusedGemm MatMul Relu Clip Add Mul Concat AveragePool"
    " LeakyRelu Sigmoid GlobalAveragePool".split()
)


@pytest.mark.parametrize(("body", "kernel"), BETWEEN)
def test_runs_in_integers_between_layers(body: str, kernel: str, tmp_path: Path) -> None:
    before = model(f"{body} {TAIL}", outputs="float[a, b] y")
    after, _ = quantized(before)
    ops = executed(after, tmp_path)
    assert kernel in ops
    assert not FLOAT_OPS & set(ops)
    assert ops.count("QuantizeLinear") == 1  # of the input; everything behind it is in integers
    assert (
        fidelity(before, after) > 20
    )  # the least seen is 23 dB (Mul); a wrong scale gives under 5


def test_matmul_returns_floats_and_gemm_keeps_its_bias(tmp_path: Path) -> None:
    before = model(
        "h = MatMul(x, m) n = Softmax(h) k = MatMul(n, m2) y = Gemm<transB = 1>(k, g, bm)",
        "float[4, 8] x",
        "float[a, b] y",
    )
    after, _ = quantized(before)
    ops = executed(after, tmp_path)
    assert ops.count("MatMulIntegerToFloat") + ops.count("QLinearMatMul") == 2
    assert "QGemm" in ops
    assert not {"MatMul", "Gemm"} & set(ops)
    assert fidelity(before, after) > 30


def test_unsigned_range_of_a_relu_uses_all_of_it() -> None:
    after, _ = quantized(
        model(f"c = Conv(x, w, b) r = Relu(c) e = Conv(r, w2) {TAIL}", outputs="float[a, b] y")
    )
    assert after.nodes("Relu") == []
    (q,) = [n for n in after.nodes("QuantizeLinear") if n.outputs[0].name.startswith("r_")]
    assert q.inputs[2].values == 0


def test_clip_wider_than_the_range_stays_when_it_matters() -> None:
    """A Clip that cannot be told from saturation: its bounds do not include zero."""
    before = model(
        "lo = Constant<value_float = 0.5>() hi = Constant<value_float = 6.0>() c = Conv(x, w)"
        f" r = Clip(c, lo, hi) e = Conv(r, w2) {TAIL}",
        outputs="float[a, b] y",
    )
    after, _ = quantized(before)
    assert len(after.nodes("Clip")) == 1
    assert fidelity(before, after) > 30


def test_layers_keep_their_names() -> None:
    before = model(f"c = Conv(x, w) r = Relu(c) e = Conv(r, w2) {TAIL}", outputs="float[a, b] y")
    after, _ = quantized(before)
    names = {t.name for node in after.nodes("DequantizeLinear") for t in node.outputs}
    assert {"r", "e", "f"} <= names


def test_tied_weights_are_stored_once() -> None:
    before = model(f"c = Conv(x, w) d = Conv(c, w) e = Conv(d, w) {TAIL}", outputs="float[a, b] y")
    after, _ = quantized(before)
    stored = [t for t in after.graph.tensors().values() if getattr(t, "dtype", None) == np.int8]
    assert sum(t.shape == [8, 8, 3, 3] or tuple(t.shape) == (8, 8, 3, 3) for t in stored) == 1


def test_bias_that_would_saturate_coarsens_the_weight() -> None:
    """A dead channel's tiny scale times a bias of 100 is beyond int32."""
    w = RNG.normal(0, 0.3, SHAPES["w"])
    w[3] = 1e-12
    b = np.full(8, 0.1)
    b[3] = 100.0
    before = model(f"c = Conv(x, w, b) e = Conv(c, w2) {TAIL}", outputs="float[a, b] y", w=w, b=b)
    after, _ = quantized(before)
    assert fidelity(before, after) > 30


@pytest.mark.parametrize("group", [1, 2])
def test_generic_quantizes_transposed_convolutions(group: int) -> None:
    weight = "w" if group == 1 else "wt"
    before = model(
        f"c = Conv(x, w2) t = ConvTranspose<group = {group}>(c, {weight}, b)"
        f" e = Conv(t, w2) {TAIL}",
        outputs="float[a, b] y",
    )
    after, _ = quantized(before, "generic")
    assert all(
        t.inputs and t.inputs[0].op == "DequantizeLinear"
        for node in after.nodes("ConvTranspose")
        for t in node.inputs
    )
    assert (
        fidelity(before, after) > 18
    )  # random weights: 21.6 and 23.6 dB are what 8 bits give here


def test_one_scale_for_a_transposed_convolution_in_groups_with_a_bias() -> None:
    before = model(
        f"c = Conv(x, w2) t = ConvTranspose<group = 2>(c, wt, b) e = Conv(t, w2) {TAIL}",
        outputs="float[a, b] y",
    )
    target = replace(everything("generic").without_channels(), name="one-scale")
    after = before.copy()
    QuantizeStatic(target, samples(before))(after)
    onnx.checker.check_model(after.to_proto(), full_check=True)
    (node,) = after.nodes("ConvTranspose")
    assert {t.inputs[0].op for t in node.inputs} == {"DequantizeLinear"}
    assert fidelity(before, after) > 15


def test_what_matmul_takes_no_scale_a_column_of_has_one_scale() -> None:
    """A left operand and a stack of matrices."""
    before = model(
        "u = MatMul(left, x) y = MatMul(u, stack)", "float[2, 8, 12] x", "float[p, q, r] y",
    )  # fmt: skip
    after, _ = quantized(before, "generic")
    weights = [n for n in after.nodes("DequantizeLinear") if isinstance(n.inputs[0], gs.Constant)]
    assert [(np.shape(n.inputs[1].values), "axis" in n.attrs) for n in weights] == [((), False)] * 2
    assert fidelity(before, after) > 20


INFINITE = np.zeros((1, 8, 1, 1))
INFINITE[0, 0] = -np.inf


@pytest.mark.parametrize(
    ("op", "values"),
    [("Mul(c, const)", INFINITE), ("Concat<axis = 2>(c, const)", np.zeros((1, 8, 0, 12)))],
)
def test_constant_operands_without_a_range_stay_float(op: str, values: np.ndarray) -> None:
    before = model(
        f"c = Conv(x, w2) s = {op} r = Clip(s, lo, hi) e = Conv(r, w2) {TAIL}",
        outputs="float[a, b] y", inits="float lo = {-1.0}, float hi = {1.0}", const=values,
    )  # fmt: skip
    after, _ = quantized(before, "generic")
    (node,) = after.nodes(op.split("(")[0].split("<")[0])
    assert isinstance(node.inputs[1], gs.Constant)
    assert len(after.nodes("QuantizeLinear")) > 1
    assert np.isfinite(run(after)["y"]).all()


@pytest.mark.parametrize("opset", [10, 11, 12, 13, 21])
def test_every_opset_that_has_quantize_linear(opset: int) -> None:
    before = model(
        f"c = Conv(x, w, b) e = Conv(c, w2) {TAIL.replace('f, g)', 'f, g, bm)')}",
        outputs="float[a, b] y",
        opset=opset,
    )
    after, _ = quantized(before)
    assert after.opset == opset
    assert after.nodes("QuantizeLinear")
    assert fidelity(before, after) > 25


DECLINES = [
    pytest.param(
        dict(body="y = Conv(x, v)", inputs="float[1, 8, 12, 12] x, float[8, 8, 1, 1] v"),
        "its weight is not constant",
        id="runtime-weight",
    ),
    pytest.param(
        dict(body="y = Conv(x, w)", w=np.full(SHAPES["w"], np.nan)),
        "NaN or infinite",
        id="nan-weight",
    ),
    pytest.param(
        dict(body="y = ConvTranspose(x, w)"), "ort-cpu has no integer ConvTranspose", id="no-kernel"
    ),
    pytest.param(
        dict(body="y = Gemm<alpha = 2.0>(x, m)", inputs="float[4, 8] x", outputs="float[a, b] y"),
        "alpha or beta",
        id="gemm-alpha",
    ),
    pytest.param(
        dict(
            body="y = Gemm(x, m, v)",
            inputs="float[4, 8] x, float[16] v",
            outputs="float[a, b] y",
        ),
        "its bias is not constant",
        id="runtime-bias",
    ),
    pytest.param(
        dict(
            body="y = If(c) <then_branch = t () => (float[1, 8, 10, 10] u) { u = Conv(x, w) },"
            " else_branch = f () => (float[1, 8, 10, 10] v) { v = Conv(x, w) }>",
            inputs="bool c, float[1, 8, 12, 12] x",
        ),
        "no sample takes the branch",
        id="branch-not-taken",
    ),
    pytest.param(
        dict(
            body="y = If(c) <then_branch = t () => (float[1, 8, 10, 10] u) { u = Conv(x, w) },"
            " else_branch = f () => (float[1, 8, 10, 10] v) { k = Conv(x, w) v = Relu(k) }>",
            inputs="bool c, float[1, 8, 12, 12] x",
        ),
        "no sample takes the branch",
        id="branch-not-taken-behind-a-clamp",
    ),
    pytest.param(
        dict(body="c = Conv(x, w) r = Log(c) e = Relu(r) y = Conv(e, w)"),
        "goes into Log",
        id="front-end",
    ),
    pytest.param(
        dict(body="y = MatMul(x, m)", inputs="float[0, 8] x", outputs="float[a, b] y"),
        "x has no elements in any sample",
        id="empty",
    ),
]


def test_results_without_elements_cost_nothing() -> None:
    before = model("y = MatMul(x, v)", "float[4, 8] x, float[8, 0] v", "float[4, 0] y")
    assert QuantizeStatic(load_target("ort-cpu"), samples(before))(before.copy()) is not None


@pytest.mark.parametrize(("graph", "reason"), DECLINES)
def test_declines_with_a_reason(graph: dict[str, Any], reason: str) -> None:
    before = model(**graph)
    after = before.copy()
    notes = QuantizeStatic(everything(), samples(before))(after)
    assert any(reason in note.text and not note.changed for note in notes)
    told = [(note.node, note.text) for note in notes]
    assert len(set(told)) == len(told)


def test_the_cheap_output_convolution_stays_float() -> None:
    before = model("c = Conv(x, w) d = Conv(c, w) e = Conv(d, w) y = Conv<group = 8>(e, wd)")
    after, notes = quantized(before)
    (text,) = [n.text for n in notes if not n.changed]
    assert "output layer" in text
    assert fidelity(before, after) > 25


@pytest.mark.parametrize("pool", ["GlobalAveragePool(e)", "ReduceMean<axes = [2, 3]>(e)"])
def test_an_output_convolution_that_is_averaged_need_not(pool: str) -> None:
    before = model(f"c = Conv(x, w) d = Conv(c, w) e = Conv<group = 8>(d, wd) y = {pool}")
    after, notes = quantized(before)
    assert all(n.changed for n in notes)
    assert fidelity(before, after) > 25


def test_negative_values_count_little_before_leaky_relu() -> None:
    """The range in front of it goes to the positive side."""
    before = model("c = Conv(x, w) d = LeakyRelu<alpha = 0.05>(c) y = Conv(d, w)")
    scales = {}
    for method in ("minmax", "careful"):
        after, _ = quantized(before, range=method)
        (leaky,) = after.nodes("LeakyRelu")
        _, scale, zero = leaky.inputs[0].inputs[0].inputs
        scales[method] = float(scale.values), int(zero.values)
    assert scales["careful"][0] < 0.95 * scales["minmax"][0]
    assert scales["careful"][1] < scales["minmax"][1]


def test_parts_of_a_concat_with_other_ranges_stay_float() -> None:
    before = model(
        "c = Conv(x, w2) s = Sigmoid(c) d = Conv(x, w2) t = Mul(d, const)"
        f" k = Concat<axis = 2>(s, t) e = Conv(k, w2) {TAIL}",
        outputs="float[a, b] y",
        const=np.full(SHAPES["const"], 1000.0),
    )
    after, notes = quantized(before)
    assert any("one scale would wipe it out" in n.text for n in notes)
    (concat,) = after.nodes("Concat")
    assert all(t.inputs[0].op != "QuantizeLinear" for t in concat.inputs)
    assert concat.outputs[0].outputs[0].op == "QuantizeLinear"


def test_scores_in_front_of_a_softmax_stay_float() -> None:
    before = model(
        "k = MatMul(x, left) s = Add(k, mask) p = Softmax(s) y = MatMul(p, left)",
        "float[4, 8] x, float[4, 8] mask",
        "float[a, b] y",
    )
    for target in ("ort-cpu", "generic"):
        after, _ = quantized(before, target)
        (add,) = after.nodes("Add")
        assert add.inputs[1].name == "mask"
        assert add.outputs[0].outputs[0].op == "Softmax"


def test_recurrent_state_stays_float() -> None:
    before = model(
        "h = Gemm(state, left) i = Gemm(x, left) n = Add(h, i) y = Gemm(i, m) state2 = Tanh(n)",
        "float[4, 8] x, float[4, 8] state",
        "float[a, b] y, float[4, 8] state2",
    )
    _, notes = quantized(before)
    assert [n.text for n in notes if "recurrent state" in n.text]


def test_a_branch_of_its_own_is_no_recurrent_state() -> None:
    """An input and an output of one shape, and nothing else goes into it."""
    before = model(
        "y = Gemm(x, left) k = Gemm(branch, left) z = Gemm(k, left)",
        "float[4, 8] x, float[4, 8] branch",
        "float[a, b] y, float[4, 8] z",
    )
    after, notes = quantized(before)
    assert not [n.text for n in notes if "recurrent state" in n.text]
    assert all(producer(node.inputs[1]) for node in after.nodes("Gemm"))


def test_a_state_that_goes_through_bodies_stays_float() -> None:
    before = model(
        "c = Cast<to = 9>(flag) y, state2 = If(c)<"
        "then_branch = t () => (float[a, b] y1, float[4, 8] s1) "
        "{ h = Gemm(state, left) s1 = Add(h, x) y1 = Gemm(s1, left) }, "
        "else_branch = e () => (float[a, b] y2, float[4, 8] s2) "
        "{ k = Gemm(state, left) s2 = Sub(k, x) y2 = Gemm(s2, left) }>",
        "int64 flag, float[4, 8] x, float[4, 8] state",
        "float[a, b] y, float[4, 8] state2",
    )
    floats = graph_rules(before, {})
    texts = {n.op: floats[id(n)] for n in before.nodes("Gemm", "Add", "Sub") if id(n) in floats}
    assert set(texts) == {"Gemm", "Add", "Sub"}
    assert all("recurrent state" in text for text in texts.values())


def test_a_saved_calibration_is_used_again(tmp_path: Path) -> None:
    before = model(f"c = Conv(x, w, b) e = Conv(c, w2) {TAIL}", outputs="float[a, b] y")
    path = tmp_path / "ranges.npz"
    first, _ = quantized(before, calibration=path)
    again = before.copy()
    zeros = open_samples([{"x": np.zeros((1, 8, 12, 12), np.float32)}], before)
    QuantizeStatic(everything(), zeros,
                   calibration=path)(again)  # fmt: skip
    simplify_qdq(again)
    assert again.to_proto() == first.to_proto()


def test_a_calibration_is_completed_with_the_same_samples_alone(tmp_path: Path) -> None:
    """What other options left out is added; of other samples it would be a mixture."""
    before = model(f"c = Conv(x, w, b) e = Conv(c, w2) {TAIL}", outputs="float[a, b] y")
    path, whole = tmp_path / "ranges.npz", tmp_path / "whole.npz"
    quantized(before, calibration=path, layers=("op:Gemm=float", "op:MatMul=float"))
    quantized(before, calibration=path, layers=("last=float",))
    _, meta = load_calibration(path)
    first = path.read_bytes()
    quantized(before, calibration=path, layers=("first=float",))
    quantized(before, calibration=path)
    quantized(before, calibration=whole)
    found, expected = load_calibration(path), load_calibration(whole)
    assert found[1] == expected[1] == meta
    assert {n: str(s) for n, s in found[0].items()} == {n: str(s) for n, s in expected[0].items()}
    path.write_bytes(first)
    zeros = open_samples([{"x": np.zeros((1, 8, 12, 12), np.float32)}], before)
    with pytest.raises(DataError, match="has no statistics of"):
        QuantizeStatic(everything(), zeros, calibration=path)(before.copy())
    assert path.read_bytes() == first


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ranges.npz"
    quantized(
        model(f"c = Conv(x, w, b) e = Conv(c, w2) {TAIL}", outputs="float[a, b] y"),
        calibration=path,
    )
    other = model(f"other = Conv(x, w, b) e = Conv(other, w2) {TAIL}", outputs="float[a, b] y")
    with pytest.raises(DataError, match="has no statistics of 'other'"):
        quantized(other, calibration=path)


def test_a_calibration_of_other_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ranges.npz"
    body = f"c = Conv(x, w, b) e = Conv(c, w2) {TAIL}"
    quantized(model(body, outputs="float[a, b] y"), calibration=path)
    retrained = model(body, outputs="float[a, b] y", w=np.full(SHAPES["w"], 0.1))
    with pytest.raises(DataError, match="is of other weights"):
        quantized(retrained, calibration=path)


SCHEMES = [
    pytest.param("uint8", False, QuantScheme("int8", PerChannel()), id="u8s8"),
    pytest.param("uint8", False, QuantScheme("int8", PerTensor()), id="per-tensor"),
    pytest.param("uint8", False, QuantScheme("uint8", PerTensor(), symmetric=False), id="u8u8"),
    pytest.param("uint8", True, QuantScheme("int8", PerChannel()), id="symmetric-unsigned"),
    pytest.param("int8", False, QuantScheme("int8", PerChannel()), id="s8s8"),
    pytest.param("int8", True, QuantScheme("int8", PerChannel()), id="symmetric"),
    pytest.param("int8", True, QuantScheme("int8", symmetric=False), id="asymmetric-weights"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "symmetric", "weights"), SCHEMES)
def test_schemes(form: str, symmetric: bool, weights: QuantScheme) -> None:
    before = model(
        f"c = Conv(x, w, b) r = Relu(c) e = Conv(r, w2, b2) {TAIL}", outputs="float[a, b] y"
    )
    activations = QuantScheme(form, symmetric=symmetric)
    target = replace(everything(), activations=activations, weights=weights)
    after = before.copy()
    QuantizeStatic(target, samples(before))(after)
    onnx.checker.check_model(after.to_proto(), full_check=True)
    stored = {str(n.inputs[0].dtype) for n in after.nodes("DequantizeLinear")}
    assert stored == {form, weights.format, "int32"}
    zero_points = [n.inputs[2].values for n in after.nodes("QuantizeLinear")]
    assert not symmetric or all(z == (0 if form == "int8" else 128) for z in zero_points)
    assert fidelity(before, after) > 20


@pytest.mark.parametrize("target", ["ort-cpu", "esp-dl"])
def test_a_second_run_changes_nothing(target: str) -> None:
    before = model(f"c = Conv(x, w, b) r = Relu(c) e = Conv(r, w2) {TAIL}", outputs="float[a, b] y")
    once, _ = quantized(before, target)
    twice, notes = quantized(once, target)
    assert not any(note.changed for note in notes)
    assert twice.to_proto() == once.to_proto()


def test_weights_of_few_bits_have_closer_ranges() -> None:
    body = f"c = Conv(x, w, b) e = Conv(c, w2) {TAIL}"
    before = model(body, outputs="float[a, b] y", opset=21)
    errors = {}
    for method in ("minmax", "standardized", "mse", "hqq"):
        after, _ = quantized(before, "generic", weights="int4", weight_range=method)
        weights = [
            (conv.inputs[1].inputs[0].inputs, kept.inputs[1].values)
            for conv, kept in zip(after.nodes("Conv"), before.nodes("Conv"), strict=True)
        ]
        errors[method] = sum(
            np.square(q.values.astype(np.float32) * s.values.reshape(-1, 1, 1, 1) - w).sum()
            for (q, s, _), w in weights
        )
    assert errors["mse"] < 0.9 * errors["minmax"]
    assert errors["hqq"] <= errors["mse"]
    assert errors["standardized"] not in (errors["minmax"], errors["mse"])


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse", "careful"])
def test_range_methods(method: str) -> None:
    before = model(f"c = Conv(x, w, b) r = Relu(c) e = Conv(r, w2) {TAIL}", outputs="float[a, b] y")
    after, _ = quantized(before, range=method)
    assert fidelity(before, after) > 20


def test_a_clamp_stays_where_its_floats_are_an_output() -> None:
    """What reads y itself must not see values below zero that saturation would cut off."""
    rng = np.random.default_rng(0)
    made = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[64, 256] x) => (float[64, 256] y, float[64, 256] z) {
            a = MatMul(x, w) y = Relu(a) z = MatMul(y, w)
        }""")
    weight = rng.normal(0, 0.1, (256, 256)).astype(np.float32)
    made.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    found = Model.from_proto(made)
    feeds = [{"x": rng.normal(0, 1, (64, 256)).astype(np.float32)} for _ in range(4)]
    QuantizeStatic(load_target("ort-cpu"), open_samples(feeds, found))(found)
    assert found.nodes("QuantizeLinear")
    y = runtime.run(runtime.session(found), feeds[0])["y"]
    assert y.min() >= 0


def int32_bias(after: Model) -> np.ndarray:
    """What the only bias in integers stands for."""
    (node,) = (n for n in after.nodes("DequantizeLinear") if n.inputs[0].dtype == np.int32)
    q, scale = (np.asarray(t.values, np.float64) for t in node.inputs[:2])
    return q * scale


BIASED = "z = Conv <pads = [1, 1, 1, 1]> (x, w, b)\n y = Relu(z)"


@pytest.mark.parametrize(("target", "share"), [("generic", 1e-4), ("qnn-htp-u16", 1e-6)])
@pytest.mark.parametrize("size", [1.0, 1e-10])
def test_the_error_of_a_bias_is_negligible(target: str, share: float, size: float) -> None:
    """It is at most half a step of s_x s_W: of 8 bits times 8 bits, or 16 times 8."""
    rng = np.random.default_rng(2)
    w, b = size * rng.normal(0, 0.3, (8, 8, 3, 3)), size * rng.normal(0, 0.3, 8)
    before = model(BIASED, opset=21, w=w, b=b)
    after, _ = quantized(before, target, bias="int32")
    error = np.abs(int32_bias(after) - b.astype(np.float32)).max()
    assert 0 < error < share * np.abs(run(before)["y"]).max()


@pytest.mark.parametrize("b", [0.0, 1e-40, 1e-30, 1.0])
@pytest.mark.parametrize("target", ["generic", "qnn-htp-u16", "esp-dl"])
def test_a_bias_whose_scale_would_be_zero(target: str, b: float) -> None:
    """1e-22 times 1e-20 is no float32: the weight is stored in a coarser scale then."""
    rng = np.random.default_rng(2)
    before = model(BIASED, opset=21, w=rng.normal(0, 1e-20, (8, 8, 3, 3)), b=np.full(8, b))
    after = before.copy()
    tiny = [{"x": (1e-22 * feed["x"]).astype(np.float32)} for feed in feeds(before)]
    QuantizeStatic(everything(target), open_samples(tiny, before), bias="int32")(after)
    onnx.checker.check_model(after.to_proto(), full_check=True)
    (node,) = (n for n in after.nodes("DequantizeLinear") if n.inputs[0].dtype == np.int32)
    assert (np.asarray(node.inputs[1].values) >= np.finfo(np.float32).tiny).all()
    assert int32_bias(after) == pytest.approx(np.full(8, np.float32(b)), rel=1e-5, abs=2e-38)
