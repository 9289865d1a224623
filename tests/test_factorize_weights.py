"""Large matrices as two small ones: against the optimum, and only where time is saved."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.core import Note
from onnxq.data import Samples, open_samples
from onnxq.model import Model
from onnxq.numerics.lowrank import directions
from onnxq.passes import FactorizeWeights
from onnxq.targets import load_target
from onnxq.testing import check

RNG = np.random.default_rng(0)


def low(m: int, n: int, rank: int, noise: float = 0.0) -> np.ndarray:
    """A matrix of that rank, and noise."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n)) / np.sqrt(rank)
    return np.asarray(w + noise * rng.standard_normal((m, n)), np.float32)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_without_products_it_is_the_svd(shape: tuple[int, int]) -> None:
    w = RNG.standard_normal(shape)
    u, s, v = np.linalg.svd(w)
    found = directions(w)
    for rank in (1, 10, 39, 40):
        left, right = found.factors(w, rank)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        np.testing.assert_allclose(left @ right, best, atol=1e-5)
        assert found.errors[rank] == pytest.approx((s[rank:] ** 2).sum() / (s**2).sum(), abs=1e-12)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_with_products_results_are_as_near_as_they_can_be(shape: tuple[int, int]) -> None:
    """The optimum by whitening, W L = U S V^T: (U_r S_r V_r^T) L^-1."""
    w = RNG.standard_normal(shape)
    x = RNG.standard_normal((500, shape[1])) * np.logspace(0, 1, shape[1])
    products = x.T @ x
    root = np.linalg.cholesky(products)
    u, s, v = np.linalg.svd(w @ root, full_matrices=False)
    found = directions(w, products)
    for rank in (1, 10, 30):
        left, right = found.factors(w, rank)
        best = (u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(root)
        error, least = (np.square(x @ (w - a).T).sum() for a in (left @ right, best))
        assert error == pytest.approx(least, rel=1e-6)
        assert found.errors[rank] == pytest.approx(least / np.square(x @ w.T).sum(), rel=1e-6)
        plain = np.square(x @ (w - np.matmul(*directions(w).factors(w, rank))).T).sum()
        assert error < plain


def test_ranks_by_a_bound_and_singular_products() -> None:
    w = low(50, 70, 6)
    found = directions(w)
    assert found.rank(60) == 6
    assert found.rank(10) < 6
    x = RNG.standard_normal((5, 70))  # fewer vectors than values
    seen = directions(w, x.T @ x)
    assert seen.rank(60) == 5
    assert directions(low(70, 50, 6), np.zeros((50, 50))).rank(30) == 0
    noisy = directions(low(50, 70, 6, 1.0))
    assert noisy.rank(200) == 50
    assert (np.diff(noisy.errors) <= 0).all()


def layer(op: str, weight: np.ndarray, batch: int = 64) -> onnx.ModelProto:
    """One layer with a bias, of a weight [out, in]."""
    out, inner = weight.shape
    call, x, y, laid = {
        "MatMul": ("Add(MatMul(x, w), c)", [batch, inner], [batch, out], weight.T),
        "Gemm": ("Gemm<transB = 1, alpha = 0.5>(x, w, c)", [batch, inner], [batch, out], weight),
        "Conv": (
            "Conv<strides = [2, 2]>(x, w, c)", [1, inner, 16, 16], [1, out, 8, 8],
            weight[:, :, None, None],
        ),
    }[op]  # fmt: skip
    nodes = f"y = {call}" if op != "MatMul" else "h = MatMul(x, w) y = Add(h, c)"
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float{x} x) => (float{y} y) {{ {nodes} }}'
    )
    values = {"w": np.ascontiguousarray(laid), "c": np.arange(out, dtype=np.float32)}
    proto.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in values.items())
    return proto


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Conv"])
def test_a_matrix_of_low_rank_is_recovered_and_faster(op: str) -> None:
    proto = layer(op, low(512, 768, 16))
    done = check(FactorizeWeights(), proto, rtol=1e-3, atol=1e-3)
    (note,) = done.notes
    assert note.changed
    assert "rank 16 of 512" in note.text
    assert "x the time, 0.05x the multiply-accumulates" in note.text
    assert len(done.model.nodes("MatMul", "Gemm", "Conv")) == 2
    feed = {"x": RNG.standard_normal(shape(proto)).astype(np.float32)}
    assert runtime.latency(proto, done.model, feed, seconds=0.5).ratio < 0.8


def shape(proto: onnx.ModelProto) -> tuple[int, ...]:
    return tuple(d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim)


def samples_of(proto: onnx.ModelProto, x: np.ndarray) -> Samples:
    return open_samples({"x": x}, Model.from_proto(proto))


def test_samples_say_what_matters() -> None:
    """A full-rank weight whose inputs have few directions: two small ones do."""
    proto = layer("MatMul", RNG.standard_normal((512, 768)).astype(np.float32), 32)
    few = RNG.standard_normal((24, 768))
    x = (RNG.standard_normal((640, 24)) @ few).astype(np.float32)
    samples = samples_of(proto, x)
    model = Model.from_proto(proto)
    (note,) = FactorizeWeights(samples=samples)(model)
    assert note.changed, note.text
    assert "rank 24 of 512" in note.text
    assert "samples kept back" in note.text
    feed = {"x": x[:32]}
    want, got = (runtime.run(runtime.session(m), feed)["y"] for m in (proto, model))
    assert 10 * np.log10(np.square(want).sum() / np.square(want - got).sum()) > 30
    (plain,) = FactorizeWeights()(Model.from_proto(proto))
    assert not plain.changed


def only(pass_: FactorizeWeights, proto: Any) -> Note:
    model = Model.from_proto(proto)
    before = model.to_proto()
    (note,) = pass_(model)
    assert not note.changed
    assert model.to_proto() == before
    return note


def nan(weight: np.ndarray) -> np.ndarray:
    weight[0, 0] = np.nan
    return weight


def changed(proto: onnx.ModelProto, text: str, new: str) -> onnx.ModelProto:
    """The model with other text in its nodes."""
    again = parser.parse_model(onnx.printer.to_text(proto).replace(text, new))
    again.graph.initializer.extend(proto.graph.initializer[len(again.graph.initializer) :])
    return again


GOOD = low(256, 256, 8)
DECLINES = [
    pytest.param(
        FactorizeWeights(), layer("MatMul", low(256, 256, 8, 1)), "30 dB take rank", id="rank"
    ),
    pytest.param(
        FactorizeWeights(layers=("op:Gemm=dense",)), layer("Gemm", GOOD), "stays whole", id="dense"
    ),
    pytest.param(FactorizeWeights(), layer("Gemm", nan(GOOD.copy())), "NaN", id="nan"),
    pytest.param(
        FactorizeWeights(gain=0.04, sqnr_db=1), layer("MatMul", low(256, 256, 1)), "x the time",
        id="slower",
    ),
    pytest.param(
        FactorizeWeights(target=load_target("tflite-int8")), layer("Gemm", GOOD),
        "cannot be measured", id="target",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("pass_", "proto", "why"), DECLINES)
def test_declines(pass_: FactorizeWeights, proto: Any, why: str) -> None:
    assert why in only(pass_, proto).text


NOT_MINE = [
    ("y = Conv<pads = [1,1,1,1]>(x, w)", (256, 128, 1, 1), "[1,128,8,8]", "not a 1x1 convolution"),
    ("y = Conv(x, w)", (64, 64, 3, 3), "[1,64,8,8]", "not a 1x1 convolution"),
    ("y = MatMul(x, w)", (4, 128, 128), "[4,8,128]", "a stack of matrices"),
    ("y = Gemm<transA = 1>(x, w)", (128, 256), "[128,16]", "transA"),
    ("h = MatMul(x, w) y = MatMul(h, w)", (160, 160), "[16,160]", "its weight is shared"),
    ("y = MatMul(x, w)", (160, 160), "[N,160]", "shape of its input is not known"),
]


@pytest.mark.parametrize(("nodes", "size", "x", "why"), NOT_MINE)
def test_layers_that_stay(nodes: str, size: tuple[int, ...], x: str, why: str) -> None:
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float{x} x) => (float y) {{ {nodes} }}'
    )
    w = np.zeros(size, np.float32)
    w.reshape(size[0], -1)[:, :2] = 1
    proto.graph.initializer.append(numpy_helper.from_array(w, "w"))
    notes = FactorizeWeights()(Model.from_proto(proto))
    assert {n.text for n in notes if why in n.text}
    assert not any(n.changed for n in notes)


def test_small_weights_are_not_looked_at_and_options_are_checked() -> None:
    assert not FactorizeWeights(smallest=10**6)(Model.from_proto(layer("Gemm", GOOD)))
    with pytest.raises(ValueError, match="gain is from 0 to 1"):
        FactorizeWeights(gain=2)


def test_shapes_that_depend_on_values_are_seen_on_a_sample() -> None:
    proto = parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]> g (float[N,256] x, int64[2] s) => (float[a,b] y)
        { r = Reshape(x, s) y = MatMul(r, w) }""")
    proto.graph.initializer.append(numpy_helper.from_array(low(256, 256, 8), "w"))
    x = RNG.standard_normal((32, 16, 256)).astype(np.float32)
    s = np.tile(np.array([16, 256]), (32, 1))
    feeds = [{"x": a, "s": b} for a, b in zip(x, s, strict=True)]
    samples = open_samples(lambda: iter(feeds), Model.from_proto(proto))
    (note,) = FactorizeWeights(samples=samples)(Model.from_proto(proto))
    assert "not known" not in note.text
    (blind,) = FactorizeWeights()(Model.from_proto(proto))
    assert "not known" in blind.text
