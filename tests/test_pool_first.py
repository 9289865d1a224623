"""pool_first: MaxPool before what keeps order, on integers and in front of a QuantizeLinear."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.passes import pool_first
from onnxq.testing import check

HEAD = '<ir_version: 8, opset_import: ["": 17]> g (float[1, 3, 8, 8] x) => (float[a, b, c, d] y)'
INITS = (
    "<float s = {0.05}, uint8 z = {128}, float s2 = {0.02}, uint8 z2 = {40}, "
    "float[3] many = {0.1, 0.2, 0.3}, uint8[3] zeros = {1, 2, 3}>"
)
POOL = "MaxPool<kernel_shape = [2, 2], strides = [2, 2]>"
OUTER = "q = QuantizeLinear(x, s, z)"
FEEDS = [{"x": np.random.default_rng(4).normal(0, 3, (1, 3, 8, 8)).astype(np.float32)}]


def graph(body: str) -> str:
    return f"{HEAD} {INITS} {{ {body} }}"


MOVED = [
    pytest.param(
        f"l = LeakyRelu<alpha = 0.1>(x) p = {POOL}(l) q = QuantizeLinear(p, s, z) "
        "y = DequantizeLinear(q, s, z)",
        ["MaxPool", "LeakyRelu", "QuantizeLinear", "DequantizeLinear"],
        id="floats-before-a-quantize",
    ),
    pytest.param(
        f"{OUTER} d = DequantizeLinear(q, s, z) l = LeakyRelu<alpha = 0.1>(d) "
        f"ql = QuantizeLinear(l, s2, z2) p = {POOL}(ql) y = DequantizeLinear(p, s2, z2)",
        ["QuantizeLinear", "MaxPool", "DequantizeLinear", "LeakyRelu", "QuantizeLinear",
         "DequantizeLinear"],
        id="integers",
    ),
    pytest.param(
        f"{OUTER} d = DequantizeLinear(q, s, z) l = Sigmoid(d) "
        f"ql = QuantizeLinear(l, s2, z2) p = {POOL}(ql) y = DequantizeLinear(p, s2, z2)",
        ["QuantizeLinear", "MaxPool", "DequantizeLinear", "Sigmoid", "QuantizeLinear",
         "DequantizeLinear"],
        id="sigmoid",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "order"), MOVED)
def test_the_pool_comes_first(body: str, order: list[str]) -> None:
    checked = check(pool_first, graph(body), feeds=FEEDS, rtol=0, atol=0)
    found = [n.op_type for n in checked.model.to_proto().graph.node]
    assert found == order


STAYS = [
    pytest.param(
        f"l = LeakyRelu<alpha = 0.1>(x) y = {POOL}(l)", id="floats: fused with the convolution"
    ),
    pytest.param(
        f"l = LeakyRelu<alpha = -0.1>(x) p = {POOL}(l) q = QuantizeLinear(p, s, z) "
        "y = DequantizeLinear(q, s, z)",
        id="falling",
    ),
    pytest.param(
        f"l = LeakyRelu(x) p = {POOL}(l) q = QuantizeLinear(p, s, z) "
        f"d = DequantizeLinear(q, s, z) u = {POOL}(l) y = Add(d, u)",
        id="used-twice",
    ),
    pytest.param(
        f"{OUTER} d = DequantizeLinear(q, s, z) l = LeakyRelu(d) ql = QuantizeLinear(l, s2, z2) "
        f"p = {POOL}(ql) e = DequantizeLinear(p, s2, z2) m = DequantizeLinear(ql, s2, z2) "
        f"n = {POOL}(m) y = Add(e, n)",
        id="integers-used-twice",
    ),
    pytest.param(
        f"n = Neg(x) p = {POOL}(n) q = QuantizeLinear(p, s, z) y = DequantizeLinear(q, s, z)",
        id="another-operator",
    ),
    pytest.param(
        f"{OUTER} d = DequantizeLinear(q, s, z) l = LeakyRelu(d) "
        f"ql = QuantizeLinear<axis = 1>(l, many, zeros) p = {POOL}(ql) "
        "y = DequantizeLinear<axis = 1>(p, many, zeros)",
        id="scales-by-channel",
    ),
]


@pytest.mark.parametrize("body", STAYS)
def test_left_alone(body: str) -> None:
    assert not check(pool_first, graph(body), feeds=FEEDS).notes


def test_what_is_outside_of_a_body_stays_there() -> None:
    branches = (
        f"then_branch = t () => (float[a, b, c, d] o) {{ p = {POOL}(l) q = QuantizeLinear(p, s, z) "
        "o = DequantizeLinear(q, s, z) }, "
        "else_branch = e () => (float[a, b, c, d] u) { u = Identity(x) }"
    )
    body = (
        f"t = Constant<value_int = 1>() k = Cast<to = 9>(t) l = LeakyRelu(x) y = If(k)<{branches}>"
    )
    assert not check(pool_first, graph(body), feeds=FEEDS).notes
