"""prune_weights: exact counts, close results, and a reason where nothing is pruned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layer_cases import (
    CASES,
    FOUR,
    OUT,
    ROWS,
    SUMMED,
    closeness,
    correlated,
    model,
)
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.core import Note
from onnxq.data import open_samples
from onnxq.errors import DataError
from onnxq.model import Model, values_of
from onnxq.numerics.sparsity import Pattern, without_least
from onnxq.passes import PASSES, PruneWeights, QuantizeWeights
from onnxq.passes.layouts import held_by
from onnxq.passes.prune_curves import amounts_tried
from onnxq.recipes import Recipe, wants
from onnxq.synthetic import synthetic_samples

PRUNABLE = [name for name in CASES if name != "Conv-depthwise"]


def weights(model: Model) -> dict[str, np.ndarray]:
    """Weights of layers, by name."""
    found = {}
    for node in model.nodes():
        for held in held_by(node):
            values = values_of(node.inputs[held.index])
            if values is not None and values.ndim > 1:
                found[node.inputs[held.index].name] = np.asarray(values)
    return found


def zeros(model: Model) -> dict[str, int]:
    return {name: int((values == 0).sum()) for name, values in weights(model).items()}


def pruned(before: Model, **options: Any) -> tuple[Model, list[Note]]:
    after = before.copy()
    return after, list(PruneWeights(**options)(after))


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obs"])
@pytest.mark.parametrize("name", PRUNABLE)
def test_counts_are_exact(name: str, criterion: str) -> None:
    before = model(*CASES[name])
    samples = correlated(before, 12, axis=SUMMED.get(name))
    after, notes = pruned(before, samples=samples, criterion=criterion, amount=0.3, scope="layer")
    assert all(note.changed for note in notes)
    for key, values in weights(before).items():
        assert zeros(after)[key] == round(0.3 * values.size)
    assert after.to_proto().ByteSize() == before.to_proto().ByteSize()
    again = after.to_proto()
    assert not any(note.changed for note in PruneWeights(samples, amount=0.3, scope="layer")(after))
    assert after.to_proto() == again


@pytest.mark.parametrize("name", PRUNABLE)
def test_second_order_is_closest(name: str) -> None:
    before = model(*CASES[name])
    samples = correlated(before, axis=SUMMED.get(name))
    held, found = samples.skip(24), {}
    for criterion in ("magnitude", "obs"):
        after, notes = pruned(before, samples=samples, criterion=criterion)
        found[criterion] = closeness(before, after, held)
    assert found["obs"] > found["magnitude"] + 5
    assert all("others set anew: results within" in note.text for note in notes)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obs"])
@pytest.mark.parametrize("name", PRUNABLE)
@pytest.mark.parametrize("nm", ["2:4", "4:8"])
def test_patterns_are_along_the_inputs(name: str, nm: str, criterion: str) -> None:
    before = model(*CASES[name])
    samples = correlated(before, 12, axis=SUMMED.get(name))
    after, notes = pruned(before, samples=samples, criterion=criterion, nm=nm)
    kept, of = map(int, nm.split(":"))
    assert all(n.changed for n in notes) or (name == "Conv-groups" and kept == 4)
    for node in after.nodes():
        for held in held_by(node):
            if (values := values_of(node.inputs[held.index])) is None:
                continue
            inputs = np.moveaxis(values, held.summed[0], -1)
            groups = [inputs[..., i : i + of] for i in range(0, inputs.shape[-1], of)]
            assert all(np.count_nonzero(g, axis=-1).max() <= kept for g in groups)
            if inputs.shape[-1] % of == 0:
                assert np.count_nonzero(values) == values.size * kept // of
    assert not any(n.changed for n in PruneWeights(samples, nm=nm)(after))


def test_magnitude_takes_the_least() -> None:
    before = model(*CASES["chain"])
    after, notes = pruned(before, criterion="magnitude", amount=0.25)
    assert "384 of 1536 weights (25.0%) zero, by magnitude" in notes[0].text
    for key, values in weights(before).items():
        kept = without_least(np.abs(values), values.size // 4)
        np.testing.assert_array_equal(weights(after)[key], values * kept)
    after, _ = pruned(before, threshold=0.1)
    for key, values in weights(before).items():
        np.testing.assert_array_equal(weights(after)[key], values * (np.abs(values) >= 0.1))


def test_a_threshold_with_samples_sets_the_others_anew() -> None:
    before = model(*CASES["MatMul"])
    samples = correlated(before)
    plain, _ = pruned(before, threshold=0.15)
    after, _ = pruned(before, threshold=0.15, samples=samples)
    np.testing.assert_array_equal(weights(after)["m"] == 0, weights(plain)["m"] == 0)
    held = samples.skip(24)
    assert closeness(before, after, held) > closeness(before, plain, held) + 4
    assert not pruned(before, threshold=1e-9)[1][0].changed


def test_wanda_looks_at_what_weights_meet() -> None:
    before = model(*CASES["MatMul"])
    scale = np.exp(np.random.default_rng(0).normal(size=32))
    rng = np.random.default_rng(1)
    feeds = [{"x": (rng.normal(size=(20, 32)) * scale).astype(np.float32)} for _ in range(8)]
    after, _ = pruned(before, samples=open_samples(feeds, before), criterion="wanda")
    norms = np.sqrt(np.square([f["x"] for f in feeds]).sum((0, 1)))
    m = weights(before)["m"]
    kept = [without_least(np.abs(column) * norms, 16) for column in m.T]
    np.testing.assert_array_equal(weights(after)["m"], m * np.transpose(kept))


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obs"])
def test_one_count_for_all_layers(criterion: str) -> None:
    before = model(*CASES["chain"])
    after, notes = pruned(
        before, samples=correlated(before), criterion=criterion, scope="global", amount=0.4
    )
    counts, sizes = zeros(after), {k: v.size for k, v in weights(before).items()}
    assert sum(counts.values()) == round(0.4 * sum(sizes.values()))
    assert counts["m"] != round(0.4 * sizes["m"])
    assert [n.changed for n in notes] == [True, True]
    if criterion == "magnitude":
        whole = np.concatenate([np.abs(v).ravel() for v in weights(before).values()])
        gone = np.concatenate([(v == 0).ravel() for v in weights(after).values()])
        np.testing.assert_array_equal(~gone, without_least(whole, int(gone.sum())))


@pytest.mark.parametrize("criterion", ["magnitude", "obs"])
def test_layers_that_matter_more_lose_less(criterion: str) -> None:
    """The second layer's results are added to ones that are a hundred times as large."""
    body = "h = MatMul(x, m) k = MatMul(x, m3) c = Constant<value_float = 0.01>() l = Mul(k, c) y = Add(h, l)"  # noqa: E501
    proto = parser.parse_model(
        f'<ir_version: 11, opset_import: ["": 25]> g ({ROWS}) => ({OUT}) {{ {body} }}'
    )
    rng = np.random.default_rng(0)
    for name in ("m", "m3"):
        value = rng.normal(0, 0.2, (32, 48)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    before = Model.from_proto(proto)
    samples = correlated(before)
    after, notes = pruned(before, samples=samples, criterion=criterion, scope="sensitivity")
    counts = zeros(after)
    assert sum(counts.values()) == 1536
    assert counts["m3"] > 1.5 * counts["m"]
    for note in notes:
        assert [a for a, _ in note.curve] == list(amounts_tried(0.5))
        levels = [level for _, level in note.curve]
        assert levels == sorted(levels, reverse=True)
    assert min(notes[1].curve)[1] > max(notes[0].curve)[1] + 20
    even, _ = pruned(before, samples=samples, criterion=criterion, scope="layer")
    assert closeness(before, after, samples) > closeness(before, even, samples) + 1


def test_one_weight_of_two_layers() -> None:
    body = "h = MatMul(x, m) k = Neg(x) g = MatMul(k, m) y = Concat<axis = 0>(h, g)"
    before = model(body, ROWS, OUT)
    for criterion in ("magnitude", "wanda", "obs"):
        after, notes = pruned(before, samples=correlated(before), criterion=criterion)
        first, second = after.nodes("MatMul")
        assert first.inputs[1] is second.inputs[1]
        assert first.inputs[1].name == "m"
        assert zeros(after) == {"m": 768}
        assert len(notes) == 1


IF = (
    "t = Constant<value_int = 1>() c = Cast<to = 9>(t) y = If(c) <then_branch = p () => "
    "(float[20, 48] u) { e = Neg(x) u = MatMul(e, m) }, else_branch = q () => (float[20, 48] v) "
    "{ h = Neg(x) v = MatMul(h, m) }>"
)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obs"])
def test_weights_in_bodies_go_by_magnitude(criterion: str) -> None:
    before = model(IF, ROWS, OUT)
    after, notes = pruned(before, samples=correlated(before), criterion=criterion)
    assert ["by magnitude" in n.text and n.changed for n in notes] == [True]
    assert ("is in a body" in notes[0].text) == (criterion == "obs")
    assert zeros(after) == {"m": 768}
    runtime.session(after).run(None, next(iter(correlated(before))))


@pytest.mark.parametrize("body", ["z = Sub(x, x) y = MatMul(z, m)", "z = Log(x) y = MatMul(z, m)"])
def test_inputs_that_tell_nothing(body: str) -> None:
    before = model(body, ROWS, OUT)
    for criterion in ("wanda", "obs"):
        after, notes = pruned(before, samples=correlated(before), criterion=criterion)
        assert "by magnitude" in notes[0].text
        assert zeros(after) == {"m": 768}


def test_16_bit_weights() -> None:
    before = model("h = Cast<to = 10>(x) k = MatMul(h, m) y = Cast<to = 1>(k)", ROWS, OUT)
    tensor = before.nodes("MatMul")[0].inputs[1]
    tensor.values = tensor.values.astype(np.float16)
    before = Model.from_proto(before.to_proto())
    samples = correlated(before)
    after, notes = pruned(before, samples=samples)
    assert "set anew" in notes[0].text
    assert weights(after)["m"].dtype == np.float16
    assert zeros(after)["m"] == 768
    plain, _ = pruned(before)
    assert closeness(before, after, samples) > closeness(before, plain, samples) + 4


def test_memory_has_a_bound() -> None:
    value = np.random.default_rng(0).normal(size=(4, 300)).astype(np.float32)
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 21]> g (float[5, 300] x) => (float[5, 4] y) '
        "{ y = Gemm<transB = 1>(x, w) }"
    )
    proto.graph.initializer.append(numpy_helper.from_array(value, "w"))
    wide = Model.from_proto(proto)
    notes = PruneWeights(samples=correlated(wide), memory_mb=1)(wide)
    assert notes[0].text.endswith("by magnitude (its products take 2 MB: memory_mb allows 1)")
    assert zeros(wide) == {"w": 600}


def test_magnitude_stays_where_it_is_better() -> None:
    """The samples that judge have other correlations than those that were fitted to."""
    before = model(*CASES["MatMul"])
    rng = np.random.default_rng(0)
    one = rng.normal(size=(12, 20, 2)) @ rng.normal(size=(2, 32))
    other = rng.normal(size=(4, 20, 32))
    samples = open_samples([{"x": v.astype(np.float32)} for v in (*one, *other)], before)
    after, notes = pruned(before, samples=samples)
    plain, _ = pruned(before)
    assert "by magnitude: results within" in notes[0].text
    np.testing.assert_array_equal(weights(after)["m"], weights(plain)["m"])


DECLINES = [
    pytest.param("y = Gather(table, x)", "int64[1, 7] x", "a table", id="table"),
    pytest.param("y = Conv<group = 24>(x, wd)", "float[1, 24, 9, 9] x", "one input", id="deep"),
    pytest.param(
        "y = ConvTranspose<group = 24>(x, wd)", "float[1, 24, 9, 9] x", "one input", id="wide"
    ),
    pytest.param("y = Conv(x, rgb)", "float[1, 3, 9, 9] x", "3 input channels make", id="rgb"),
    pytest.param("y = MatMul(x, tiny)", ROWS, "256 weights: those of fewer than 512", id="tiny"),
    pytest.param(
        "h = MatMul(x, m) g = Transpose(m) y = MatMul(h, g)", ROWS, "read by Transpose", id="moved"
    ),
    pytest.param(
        "h = MatMul(x, m) y = Gemm<transB = 1>(h, m)", ROWS, "in another way", id="two-ways"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "inputs", "why"), DECLINES)
def test_declines(body: str, inputs: str, why: str) -> None:
    ranks = {"table": "float[a, b, c] y", "wd": FOUR, "rgb": FOUR}
    out = next((out for name, out in ranks.items() if name in body), OUT)
    before = model(body, inputs, out)
    after, notes = pruned(before)
    assert any(why in note.text and not note.changed for note in notes)
    assert not any(note.changed for note in notes)
    assert after.to_proto() == before.to_proto()


def test_a_layer_that_is_to_stay_dense() -> None:
    before = model(*CASES["chain"])
    after, notes = pruned(before, layers=("first=dense", "op:MatMul=int8"))
    assert [(n.changed, "override" in n.text) for n in sorted(notes, key=lambda n: n.changed)] == [
        (False, True), (True, False),
    ]  # fmt: skip
    assert zeros(after) == {"m": 0, "m2": 960}


def test_a_quantized_weight_stays() -> None:
    before = model(*CASES["chain"])
    QuantizeWeights(layers=("first=float",))(before)
    after, notes = pruned(before)
    assert {n.changed: n.text.split(":")[0] for n in notes}[
        False
    ] == "its weight is quantized already"
    assert zeros(after)["m"] == 768


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("scope", ["layer", "global", "sensitivity"])
def test_a_weight_with_nan_or_infinity_stays(bad: float, scope: str) -> None:
    one = model("h = MatMul(x, m) g = Relu(h) k = Erf(g) y = MatMul(k, m2)", ROWS, OUT)
    samples = correlated(one)
    weight = one.nodes("MatMul")[1].inputs[1]
    weight.values = np.where(weight.values > 0.5, np.float32(bad), weight.values)
    after, notes = pruned(one, samples=samples, scope=scope)
    said = {note.node: note for note in notes}
    first, second = after.nodes("MatMul")
    assert said[first.name].changed
    assert said[second.name].text == "its weight has NaN or infinite values"
    np.testing.assert_array_equal(second.inputs[1].values, weight.values)


def test_samples_are_needed_or_not() -> None:
    before = model(*CASES["MatMul"])
    made = synthetic_samples(before, 8)
    assert "by magnitude" in pruned(before, samples=made)[1][0].text
    assert "by magnitude" in pruned(before)[1][0].text
    for options in ({"criterion": "obs"}, {"criterion": "wanda"}, {"scope": "sensitivity"}):
        with pytest.raises(DataError, match="give --data"):
            pruned(before, **options)
        notes = pruned(before, samples=made, **options)[1]
        assert [(n.changed, "synthetic" in n.text) for n in notes] == [(False, True)]
        assert wants(Recipe("own", "", ("prune_weights",), {"prune_weights": options}), "samples")
    assert not wants(Recipe("own", "", ("prune_weights",)), "samples")
    assert not wants(Recipe("own", "", ("prune_weights",)), "calibration")


OPTIONS = [
    ({"amount": 1.0}, "from 0 to below 1"), ({"amount": -0.1}, "from 0 to below 1"),
    ({"amount": np.nan}, "from 0 to below 1"), ({"threshold": -1.0}, "threshold is at least 0"),
    ({"amount": 0.5, "threshold": 0.1}, "amount and threshold both say"),
    ({"amount": 0.5, "nm": "2:4"}, "amount and nm both say"),
    ({"threshold": 0.1, "nm": "2:4"}, "threshold and nm both say"),
    ({"nm": "2:4", "scope": "global"}, "leave nm out"),
    ({"threshold": 0.1, "scope": "sensitivity"}, "leave threshold out"),
    ({"threshold": 0.1, "criterion": "wanda"}, "magnitude or obs"), ({"nm": "4"}, "is N:M"),
    ({"damping": -1.0}, "damping"), ({"memory_mb": 0}, "memory_mb"), ({"smallest": 0}, "smallest"),
    ({"layers": ("x=int3",)}, "int3"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "why"), OPTIONS)
def test_options_that_cannot_be(options: dict[str, Any], why: str) -> None:
    with pytest.raises(Exception, match=why) as caught:
        PruneWeights(**options)
    assert "\n" not in str(caught.value)


def test_it_is_a_pass() -> None:
    assert PASSES["prune_weights"] is PruneWeights
    assert PruneWeights(nm="2:4").pattern == Pattern(2, 4)


def test_amounts_go_by_sensitivity_where_that_takes_no_minutes() -> None:
    before = model(*CASES["chain"])
    samples = correlated(before)
    after, notes = pruned(before, samples=samples)
    asked, told = pruned(before, samples=samples, scope="sensitivity")
    assert [note.curve for note in notes] == [note.curve for note in told]
    assert all(note.curve for note in notes)
    assert zeros(after) == zeros(asked)
    assert not any(note.changed for note in PruneWeights(samples)(after))
    for options in ({"criterion": "magnitude"}, {"nm": "2:4"}, {"threshold": 0.01}):
        _, plain = pruned(before, samples=samples, **options)
        assert not any(note.curve for note in plain)
