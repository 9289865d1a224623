"""Overrides for single layers: what a pattern matches, what a format asks, and what is nonsense."""

from __future__ import annotations

import re

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnxq.errors import RecipeError
from onnxq.layers import Choice, Layers, no_match
from onnxq.model import Model

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'
# Two inputs, two outputs, a skip over the first layer, a layer in a body.
NET = """g (float[n, 4] x, int64[n] ids) => (float[n, 4] y, float[n, 4] z) {
    [block_0_fc] a = MatMul(x, w1)
    [table] e = Gather(emb, ids)
    [skip] s = Add(a, x)
    [block_1_fc] b = MatMul(s, w2)
    [sum] t = Add(b, e)
    [head] y = Gemm(t, w3)
    flag = Constant<value = float {1.0}>()
    zero = Constant<value = float {0.0}>()
    on = Greater(flag, zero)
    [choose] z = If(on) <then_branch = p () => (float[n, 4] u) { [inner] u = MatMul(t, w4) },
                         else_branch = q () => (float[n, 4] v) { v = Neg(t) }>
}"""


def net() -> Model:
    proto = parser.parse_model(HEAD + NET)
    for name in ("w1", "w2", "w3", "w4", "emb"):
        proto.graph.initializer.append(numpy_helper.from_array(np.eye(4, dtype=np.float32), name))
    return Model.from_proto(proto)


def chosen(model: Model, *texts: str) -> dict[str, str]:
    found = Layers.parse(texts).choices(model)
    return {n.name: found[id(n)].format for n in model.nodes() if id(n) in found}


PATTERNS = [
    ("head", {"head"}),
    ("block_*_fc", {"block_0_fc", "block_1_fc"}),
    ("block_[1-9]_*", {"block_1_fc"}),
    ("op:MatMul", {"block_0_fc", "block_1_fc", "inner"}),
    ("op:Ge*", {"head"}),
    ("first", {"block_0_fc", "table"}),
    ("last", {"head", "inner"}),
    ("fc", set()),
    ("op:matmul", set()),
]


@pytest.mark.parametrize(("pattern", "names"), PATTERNS)
def test_patterns(pattern: str, names: set[str]) -> None:
    assert set(chosen(net(), f"{pattern}=float")) == names


def test_a_name_is_itself_before_it_is_a_glob() -> None:
    model = net()
    node = next(n for n in model.nodes() if n.name == "head")
    node.name = "layers[0]=head*"
    assert chosen(model, "layers[0]=head*=int4") == {"layers[0]=head*": "int4"}


def test_the_last_override_wins() -> None:
    found = chosen(net(), "op:MatMul=int4", "block_1_fc=float", "first=a16", "block_0_fc=int8")
    assert found == {"block_0_fc": "int8", "block_1_fc": "float", "inner": "int4", "table": "a16"}


def test_first_and_last_are_the_same_with_stored_weights() -> None:
    """A second pass sees what the first one made of the weights."""
    text = """g (float[n, 4] x) => (float[n, 4] y) {
        c = Cast<to = 1>(q)  w = Mul(c, s)
        [one] a = MatMul(x, w)
        d = DequantizeLinear(q, s, z)
        [two] b = MatMul(a, d)
        [three] y = MatMul(b, b)
    }"""
    proto = parser.parse_model(HEAD + text)
    for name, value in {
        "q": np.eye(4, dtype=np.int8), "s": np.float32(0.5), "z": np.int8(0)
    }.items():  # fmt: skip
        proto.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    assert chosen(Model.from_proto(proto), "first=int8", "last=int4") == {
        "one": "int8",
        "two": "int4",
    }


def test_no_overrides() -> None:
    assert Layers.parse(()).choices(net()) == {}


FORMATS = [
    ("float", None, None, None),
    ("int8", 8, "int8", "int8"),
    ("uint8", 8, "uint8", "uint8"),
    ("int16", 16, "int16", "int8"),
    ("int4", None, "int4", "int4"),
    ("uint4", None, "uint4", "uint4"),
    ("a16", 16, None, None),
    ("a8w4", 8, "int4", "int4"),
    ("a16w8", 16, "int8", "int8"),
    ("w4", None, "int4", "int4"),
]


@pytest.mark.parametrize(("format_", "activations", "weights", "static"), FORMATS)
def test_formats(
    format_: str, activations: int | None, weights: str | None, static: str | None
) -> None:
    (choice,) = Layers.parse([f" op:Conv = {format_} "]).all
    assert choice == Choice("op:Conv", format_, activations, weights, static)
    assert choice.is_float == (format_ == "float")
    assert choice.is_asked == (format_ not in ("float", "w4"))
    assert choice.reason == f"asked for by the override 'op:Conv={format_}'"


ERRORS = [
    ("conv1", "--layer 'conv1': write PATTERN=FORMAT, such as"),
    ("=int8", "--layer '=int8': write PATTERN=FORMAT"),
    ("", "--layer '': write PATTERN=FORMAT"),
    ("x=", "unknown format ''"),
    ("x=int32", "unknown format 'int32'"),
    ("x=flaot", "unknown format 'flaot': one of float, .*; did you mean 'float'?"),
    ("x=a16w", "unknown format 'a16w'"),
]


@pytest.mark.parametrize(("text", "message"), ERRORS)
def test_nonsense(text: str, message: str) -> None:
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(RecipeError, match=pattern.replace("?", r"\?")) as caught:
        Layers.parse(["first=int8", text])
    assert "\n" not in str(caught.value)


def test_what_matches_nothing() -> None:
    model, layers = net(), Layers.parse(["op:matmul=int4", "heads=float", "last=int8"])
    assert {c.pattern for c in layers.matched(model)} == {"last"}
    assert no_match(layers.all[0], model).endswith(
        "matches no layer of the model; did you mean 'op:MatMul'?"
    )
    assert no_match(layers.all[1], model).endswith("did you mean 'head'?")


def test_dense_is_for_pruning_alone() -> None:
    model = net()
    layers = Layers.parse(("head=int8", "block_*=dense", "block_1_fc=float"))
    dense = layers.dense(model)
    assert {n.name for n in model.nodes() if id(n) in dense} == {"block_0_fc", "block_1_fc"}
    assert chosen(net(), "head=int8", "block_*=dense", "block_1_fc=float") == {
        "head": "int8",
        "block_1_fc": "float",
    }
    assert not any(choice.is_asked for choice in dense.values())
