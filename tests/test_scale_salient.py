"""scale_salient: what scales and narrower ranges bring to weights in few bits, and what declines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.data import Samples, open_samples
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.numerics.migration import salience
from onnxq.numerics.shrinking import errors, grams
from onnxq.packed import remembered
from onnxq.passes import QuantizeWeights, ScaleSalient
from onnxq.testing import check

NORM = "n = LayerNormalization(x, g, b)"
TWO = f"{NORM} q = MatMul(n, m) r = Tanh(q) s = MatMul(n, k) y = Mul(r, s)"
OPTIONS: dict[str, Any] = {"format": "uint4", "granularity": "group", "symmetric": False}


def graph(body: str = TWO, outputs: str = "float[p, q, r] y") -> onnx.ModelProto:
    """Weights of layers behind a normalisation, a few of whose channels are large."""
    proto = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> t (float[N, 6, 64] x) => ({outputs}) {{ {body} }}'
    )
    rng = np.random.default_rng(4)
    shapes = {"g": (64,), "b": (64,), "m": (64, 48), "k": (64, 48), "t": (48, 64), "o": (64, 64)}
    for name in dict.fromkeys(i for node in proto.graph.node for i in node.input):
        if name in shapes:
            value = rng.normal(0, 0.3, shapes[name])
            if name in ("g", "b"):
                value[[3, 40]] *= 30
            proto.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    return proto


def drawn(proto: onnx.ModelProto, count: int = 16) -> Samples:
    rng = np.random.default_rng(8)
    feeds = [{"x": rng.normal(0, 1, (4, 6, 64)).astype(np.float32)} for _ in range(count)]
    return open_samples(feeds, Model.from_proto(proto))


def stored(
    proto: onnx.ModelProto, samples: Samples, pass_: ScaleSalient | None, **rest: Any
) -> float:
    model = Model.from_proto(proto)
    if pass_ is not None:
        pass_(model)
    QuantizeWeights(**{**OPTIONS, **rest})(model)
    one, two = runtime.session(proto), runtime.session(model)
    pairs = [(one.run(None, f)[0], two.run(None, f)[0]) for f in samples]
    return sqnr_db(*(np.concatenate(part) for part in zip(*pairs, strict=True)))


def test_salient_weights_are_saved_and_ranges_narrowed() -> None:
    proto = graph()
    samples = drawn(proto)
    plain = stored(proto, samples, None)
    scaled = stored(proto, samples, ScaleSalient(samples, clip=False, **OPTIONS))
    both = stored(proto, samples, ScaleSalient(samples, **OPTIONS))
    assert plain + 4 < scaled < both


def test_scaling_keeps_the_function_and_adds_no_node() -> None:
    proto = graph()
    samples = drawn(proto)
    pass_ = ScaleSalient(samples, clip=False, **OPTIONS)
    checked = check(pass_, proto, feeds=list(samples.take(2)), rtol=1e-3, atol=1e-3)
    assert sum(checked.ops.values()) == len(proto.graph.node)
    (note,) = checked.notes  # one factor for both layers
    assert "power" in note.text
    assert "dB on held-out samples" in note.text


@pytest.mark.parametrize("granularity", ["group", "channel"])
@pytest.mark.parametrize("format", ["uint4", "int4"])
def test_integers_that_were_found_are_stored_as_they_are(granularity: Any, format: str) -> None:
    proto = graph()
    samples, model = drawn(proto), Model.from_proto(proto)
    options = {"format": format, "granularity": granularity, "symmetric": format == "int4"}
    notes = ScaleSalient(samples, **options)(model)
    narrowed = [n for n in notes if n.changed and "ranges" in n.text]
    assert len(narrowed) == 2
    assert not any(n.changed for n in ScaleSalient(samples, **options)(model))  # they stay
    layers = {node.name: node for node in model.nodes("MatMul")}
    kept = [layers[note.node].inputs[1] for note in narrowed]
    grids = [remembered(t) for t in kept]
    assert all(g is not None and len(np.unique(g.numbers.astype(int))) <= 16 for g in grids)
    feed = next(iter(samples))
    before = runtime.session(model).run(None, feed)[0]
    QuantizeWeights(**options)(model)
    after = runtime.session(model).run(None, feed)[0]
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


def test_layers_that_scale_each_other_are_scaled_before_they_are_narrowed() -> None:
    body = f"{NORM} h = MatMul(n, o) r = Relu(h) y = MatMul(r, m)"
    proto = graph(body)
    samples = drawn(proto)
    pass_ = ScaleSalient(samples, **OPTIONS)
    notes = pass_(Model.from_proto(proto))
    assert not any("keeps its integers" in n.text for n in notes)
    assert sum("ranges" in n.text for n in notes) == 2
    assert stored(proto, samples, pass_) > stored(proto, samples, None) + 2


def test_what_takes_no_factor_is_narrowed_all_the_same() -> None:
    proto = graph("y = MatMul(x, m)")
    samples = drawn(proto)
    first, second = ScaleSalient(samples, **OPTIONS)(Model.from_proto(proto))
    assert "input of the graph" in first.text
    assert not first.changed
    assert second.changed
    (alone,) = ScaleSalient(samples, clip=False, **OPTIONS)(Model.from_proto(proto))
    assert not alone.changed


def test_channels_that_are_alike_stay() -> None:
    proto = graph("h = Relu(x) u = MatMul(h, o) r = Relu(u) y = MatMul(r, m)")
    for tensor in proto.graph.initializer:
        if tensor.name == "o":
            tensor.CopyFrom(numpy_helper.from_array(np.eye(64, dtype=np.float32), "o"))
    notes = ScaleSalient(drawn(proto), clip=False, **OPTIONS)(Model.from_proto(proto))
    assert not any(n.changed for n in notes)
    assert any("left as it was" in n.text for n in notes)


KEPT = [
    pytest.param({"granularity": "tensor"}, "one range for all channels", id="tensor"),
    pytest.param({"group_size": 48}, "the last group is smaller", id="rest"),
]


@pytest.mark.parametrize(("options", "reason"), KEPT)
def test_ranges_that_are_not_narrowed_are_told(options: dict[str, Any], reason: str) -> None:
    proto = graph("y = MatMul(x, m)")
    notes = ScaleSalient(drawn(proto), **{**OPTIONS, **options})(Model.from_proto(proto))
    assert any(reason in n.text for n in notes)
    assert not any(n.changed for n in notes)


def test_overrides_and_small_weights_are_left() -> None:
    proto = graph("y = MatMul(x, m)")
    samples = drawn(proto)
    assert not ScaleSalient(samples, layers=("op:MatMul=float",), **OPTIONS)(
        Model.from_proto(proto)
    )
    assert not ScaleSalient(samples, smallest=5000, **OPTIONS)(Model.from_proto(proto))
    with pytest.raises(ValueError, match="int32"):
        ScaleSalient(samples, format="int32")


def test_values_that_are_not_finite_are_told() -> None:
    proto = graph("h = Exp(x) y = MatMul(h, m)")
    feeds = [{"x": np.full((1, 6, 64), 200.0, np.float32)}]
    samples = open_samples(feeds, Model.from_proto(proto))
    (note,) = ScaleSalient(samples, **OPTIONS)(Model.from_proto(proto))
    assert "not finite" in note.text


def test_synthetic_samples_tell_nothing() -> None:
    proto = graph()
    samples = replace(drawn(proto), synthetic=True)
    (note,) = ScaleSalient(samples, **OPTIONS)(Model.from_proto(proto))
    assert "give --data" in note.text
    assert not note.changed


def test_errors_by_grams_are_those_of_results() -> None:
    rng = np.random.default_rng(0)
    x, d = (rng.normal(size=s).astype(np.float32) for s in ((20, 12), (5, 12)))
    found = errors(d, grams(x, 4))
    parts = [np.square(x[:, i : i + 4] @ d[:, i : i + 4].T).sum(0) for i in (0, 4, 8)]
    np.testing.assert_allclose(found, np.stack(parts, 1), rtol=1e-4)


def test_the_power_is_that_of_mean_magnitudes() -> None:
    s = salience(np.array([1.0, 4.0, 0.0]), 0.5)
    assert s[2] == 1
    assert s[1] / s[0] == pytest.approx(2.0)
