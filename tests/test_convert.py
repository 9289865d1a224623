"""Passes that bring a model into the form that others work on: functions, 16-bit floats."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxq.model import Model
from onnxq.passes import convert_float32, inline_functions
from onnxq.testing import check

NESTED = """<ir_version: 9, opset_import: ["": 17, "a": 1, "b": 1]>
g (float[2,4] x) => (float[2,4] y) <float[4,4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}> {
    p = a.layer<k = 2.0>(x, w)  y = a.layer<k = 0.5>(p, w) }
<domain: "a", opset_import: ["": 17, "b": 1]>
layer <k> (x, w) => (y) { m = MatMul(x, w)  y = b.act<alpha: float = @k>(m) }
<domain: "b", opset_import: ["": 17]>
act <alpha> (x) => (y) { z = Neg(x)  y = Elu<alpha: float = @alpha>(z) }"""


def test_nested_functions_are_inlined() -> None:
    checked = check(inline_functions, NESTED)
    assert checked.ops == {"MatMul": 2, "Neg": 2, "Elu": 2}
    assert checked.model.functions == []
    told = {note.node: note.text for note in checked.notes}
    assert told == {"a::layer": "inlined, 2 calls", "b::act": "inlined inside of another function"}


def test_a_function_of_another_opset_is_inlined_where_its_operators_are_the_same() -> None:
    checked = check(inline_functions, NESTED.replace('["": 17]>\nact', '["": 13]>\nact'))
    assert checked.model.functions == []


def test_a_function_of_other_operators_stays() -> None:
    text = NESTED.replace("Elu<alpha: float = @alpha>(z)", "Softmax(z)")
    proto = parser.parse_model(text.replace('["": 17]>\nact', '["": 11]>\nact'))
    model = Model.from_proto(proto)
    notes = inline_functions(model)
    assert model.functions == ["b::act"]
    assert [(n.node, n.changed) for n in notes] == [("a::layer", True), ("b::act", False)]
    assert "other versions of operators" in notes[1].text


def test_a_function_in_a_body_is_inlined() -> None:
    text = """<ir_version: 9, opset_import: ["": 17, "a": 1]>
    g (float[4] x, bool c) => (float[4] y) {
        y = If(c) <then_branch = t () => (float[4] u) { u = a.twice(x) },
                   else_branch = e () => (float[4] v) { v = Neg(x) }> }
    <domain: "a", opset_import: ["": 17]> twice (x) => (y) { y = Add(x, x) }"""
    assert check(inline_functions, text).ops == {"If": 1, "Add": 1, "Neg": 1}


def half(body: str, inputs: str = "float16[2,4] x", outputs: str = "float16[2,4] y") -> str:
    return f"""<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => ({outputs})
        <float16[4,4] w = {{1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}}> {{ {body} }}"""


HALVES = [
    pytest.param(half("m = MatMul(x, w)  y = Relu(m)"), id="weights"),
    pytest.param(half("m = MatMul(x, w)  y = Relu(m)  z = Neg(y)",
                      outputs="float16[2,4] y, float16[2,4] z"), id="output-read-inside"),
    pytest.param(half("f = Cast<to = 1>(x)  e = Exp(f)  h = Cast<to = 10>(e)  y = Add(h, x)"),
                 id="casts-inside"),
    pytest.param(half("s = Shape(x)  o = ConstantOfShape<value = float16[1] {2}>(s)"
                      "  k = Constant<value = float16 {3}>()  p = Mul(o, k)  y = Add(x, p)"),
                 id="typed-attributes"),
    pytest.param(half("y = If(c) <then_branch = t () => (float16[2,4] u) { u = MatMul(x, w) },"
                      " else_branch = e () => (float16[2,4] v) { v = Neg(x) }>",
                      inputs="float16[2,4] x, bool c"), id="bodies"),
    pytest.param(half("h = Cast<to = 10>(x)  m = MatMul(h, w)  y = Cast<to = 1>(m)",
                      inputs="float[2,4] x", outputs="float[2,4] y"), id="float32-interface"),
    pytest.param(half("i = Cast<to = 1>(x)  j = Mul(i, i)  y = Cast<to = 10>(j)"), id="interface"),
]  # fmt: skip


@pytest.mark.parametrize("text", HALVES)
def test_floats_of_16_bits_become_float32_inside(text: str) -> None:
    checked = check(convert_float32, text, rtol=2e-3, atol=1e-2)
    kinds = {
        t.dtype
        for graph in checked.model.graphs()
        for node in graph.nodes
        for t in (*node.inputs, *node.outputs)
        if node.op != "Cast"
    }
    assert np.float16 not in kinds


def test_bfloat16_too() -> None:
    checked = parser.parse_model(
        half("m = MatMul(x, w)  y = Relu(m)").replace("float16", "bfloat16")
    )
    model = Model.from_proto(checked)
    assert [n.text for n in convert_float32(model)] == ["4 tensors to float32"]
    onnx.checker.check_model(model.to_proto(), full_check=True)
    assert [n.op for n in model.nodes()] == ["Cast", "MatMul", "Relu", "Cast"]


DECLINED = [
    pytest.param('y = my.Op(x)', "Op may need 16-bit floats", id="foreign-operator"),
    pytest.param("q = SequenceConstruct(x)  y = ConcatFromSequence<axis = 0>(q)",
                 "SequenceConstruct may need 16-bit floats", id="sequence"),
    pytest.param("y = Relu(x)  z = Identity(w)", "w is an output", id="constant-output"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), DECLINED)
def test_declines_as_a_whole(body: str, reason: str) -> None:
    text = half(body).replace('"": 17', '"": 17, "my": 1')
    if "w is" in reason:
        text = half("y = Relu(x)", outputs="float16[2,4] y, float16[4,4] w")
    model = Model.from_proto(parser.parse_model(text))
    before = model.to_proto()
    (note,) = convert_float32(model)
    assert reason in note.text
    assert not note.changed
    assert model.to_proto() == before


def test_a_float32_model_is_left_alone() -> None:
    assert check(convert_float32, NESTED.split("<domain")[0].replace(', "a": 1, "b": 1', "")
                 .replace("p = a.layer<k = 2.0>(x, w)  y = a.layer<k = 0.5>(p, w)",
                          "y = MatMul(x, w)")).notes == ()  # fmt: skip
