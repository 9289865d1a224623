"""Static quantization inside of If, Loop and Scan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.data import open_samples
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.passes import QuantizeStatic, simplify_qdq
from onnxq.targets import load_target

SHAPES = {"w": (8, 8, 3, 3), "w2": (8, 8, 3, 3), "m": (8, 8), "r": (8, 8)}
IMAGE = "float[1, 8, 8, 8]"


def model(graph: str) -> Model:
    proto = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}')
    rng = np.random.default_rng(3)
    for name, shape in SHAPES.items():
        values = rng.normal(0, 0.2, shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.checker.check_model(proto, full_check=True)
    return Model.from_proto(proto)


def feeds(model: Model) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(11)
    return [
        {
            t.name: np.array(i % 2 == 0)
            if t.dtype == np.bool_
            else rng.normal(0, 1, t.shape).astype(np.float32)
            for t in model.graph.inputs
        }
        for i in range(6)
    ]


CONVS = "pads = [1, 1, 1, 1]"
BRANCHES = f"""g (bool c, {IMAGE} x) => ({IMAGE} y) {{
    s = Conv<{CONVS}>(x, w)
    y = If(c) <
        then_branch = t () => ({IMAGE} u) {{ a = Conv<{CONVS}>(s, w2)  b = Relu(a)
                                             u = Conv<{CONVS}>(b, w) }},
        else_branch = f () => ({IMAGE} v) {{ a = Conv<{CONVS}>(s, w)  v = Relu(a) }}>
}}"""
# What does not depend on the state is quantized; the recurrence itself stays float.
LOOP = """g (float[5, 8] x) => (float[8] y)
    <int64 n = {5}, bool go = {1}, float[8] h0 = {0, 0, 0, 0, 0, 0, 0, 0}> {
    y = Loop(n, go, h0) <body = b (int64 i, bool c, float[8] h) => (bool d, float[8] k) {
        d = Identity(c)  v = Gather(x, i)
        p = MatMul(v, m)  q = MatMul(h, r)  z = Add(p, q)  k = Tanh(z) }>
}"""
SCAN = """g (float[5, 8] x, float[8] h0) => (float[8] y, float[5, 8] z) {
    y, z = Scan<num_scan_inputs = 1, body = b (float[8] h, float[8] v)
        => (float[8] k, float[8] o) { p = MatMul(v, m)  o = Tanh(p)  k = Add(h, o) }>(h0, x)
}"""
NESTED = f"""g (bool c, {IMAGE} x) => ({IMAGE} y) <int64 n = {{2}}, bool go = {{1}}> {{
    y, l = Loop(n, go, x) <
      body = b (int64 i, bool e, {IMAGE} h) => (bool d, {IMAGE} k, {IMAGE} o) {{
        d = Identity(e)  o = Conv<{CONVS}>(x, w)
        k = If(c) <then_branch = t () => ({IMAGE} u) {{ q = Conv<{CONVS}>(o, w2)  u = Add(h, q) }},
                   else_branch = f () => ({IMAGE} v) {{ v = Add(h, x) }}> }}>
}}"""
CASES = [
    pytest.param(BRANCHES, 4, {"QLinearConv": 4}, id="If"),
    pytest.param(LOOP, 1, {"MatMulIntegerToFloat": 1}, id="Loop"),
    pytest.param(SCAN, 1, {"MatMulIntegerToFloat": 1}, id="Scan"),
    pytest.param(NESTED, 1, {"QLinearConv": 1}, id="If-in-Loop"),
]


@pytest.mark.parametrize(("graph", "layers", "kernels"), CASES)
def test_bodies_run_in_integers(
    graph: str, layers: int, kernels: dict[str, int], tmp_path: Path
) -> None:
    before = model(graph)
    after = before.copy()
    target = replace(load_target("ort-cpu"), costs=None)
    samples = open_samples(feeds(before), before)
    notes = QuantizeStatic(target, samples)(after)
    simplify_qdq(after)
    onnx.checker.check_model(after.to_proto(), full_check=True)
    done = [n.text for n in notes if n.changed]
    assert sum("weights" in text for text in done) == layers
    one, two = (runtime.session(m.to_proto(), optimize="off") for m in (before, after))
    a, b = ([s.run(["y"], feed)[0] for feed in feeds(before)] for s in (one, two))
    assert sqnr_db(np.stack(a), np.stack(b)) > 25
    found = executed(after, tmp_path)
    assert {op: found.count(op) for op in kernels} == kernels


def executed(model: Model, path: Path) -> list[str]:
    """Operators as onnxruntime executes them, in bodies too."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path / "optimized.onnx")
    options.log_severity_level = 3
    proto = model.to_proto().SerializeToString()
    ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return [node.op for node in Model.load(path / "optimized.onnx").nodes()]


def test_a_loop_in_a_loop_is_left_float_with_a_reason() -> None:
    graph = """g (float[8] x) => (float[8] y) <int64 n = {2}, bool go = {1}> {
        y = Loop(n, go, x) <body = b (int64 i, bool c, float[8] h) => (bool d, float[8] k) {
            d = Identity(c)  k = Loop(n, go, h) <
                body = b2 (int64 i2, bool c2, float[8] h2) => (bool d2, float[8] k2) {
                    d2 = Identity(c2)  p = MatMul(x, m)  k2 = Add(h2, p) }> }>
    }"""
    before = model(graph)
    before.sweep()
    after = before.copy()
    notes = QuantizeStatic(load_target("ort-cpu"), open_samples(feeds(before), before))(after)
    assert [n.text for n in notes] == ["in a loop inside of a loop: activations there stay float"]
    assert after.to_proto() == before.to_proto()
