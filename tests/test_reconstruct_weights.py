"""reconstruct_weights: closer results with the same bits, and integers that survive."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from layer_cases import (
    CASES,
    OUT,
    ROWS,
    SUMMED,
    closeness,
    correlated,
    model,
)
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.data import Samples, open_samples
from onnxq.errors import DataError
from onnxq.model import Model
from onnxq.packed import remembered
from onnxq.passes import QuantizeWeights, ReconstructCodebook, ReconstructWeights
from onnxq.passes.grams import Layer, depths, in_rounds, observed_products
from onnxq.passes.layouts import held_by
from onnxq.recipes import load_recipe
from onnxq.synthetic import synthetic_samples

ROUNDED = [name for name in CASES if name != "MatMul-stack"]
SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {"format": "int8", "granularity": "channel", "symmetric": True},
    "int4": {"format": "int4", "granularity": "channel", "symmetric": True},
    "uint4": {"format": "uint4", "granularity": "group", "group_size": 16, "symmetric": False},
    "short": {"format": "uint4", "granularity": "group", "group_size": 20, "symmetric": False},
    "tensor": {"format": "int8", "granularity": "tensor", "symmetric": True},
    "int2": {"format": "int2", "granularity": "group", "group_size": 8, "symmetric": True},
}


def both(name: str, scheme: str, **options: Any) -> tuple[Model, Model, Model, Samples, Any]:
    """A model; quantized after reconstruction and without; samples; what the pass said."""
    before = model(*CASES[name])
    samples, chosen = correlated(before, axis=SUMMED.get(name)), SCHEMES[scheme]
    after, plain = before.copy(), before.copy()
    notes = ReconstructWeights(samples=samples, **chosen, **options)(after)
    QuantizeWeights(**chosen)(after)
    QuantizeWeights(**chosen, range="importance", samples=samples)(plain)
    return before, after, plain, samples, notes


@pytest.mark.parametrize("name", ROUNDED)
def test_results_are_closer(name: str) -> None:
    before, after, plain, samples, notes = both(name, "int4", smallest=300)
    assert all(note.changed for note in notes)
    held = samples.skip(24)
    gain = closeness(before, after, held) - closeness(before, plain, held)
    assert gain > (1 if "depthwise" in name else 4)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["MatMul", "Conv", "ConvTranspose-groups", "LSTM"])
def test_integers_are_kept_as_they_are(name: str, scheme: str) -> None:
    """What quantize_weights writes unpacks to the values that the pass left, to the bit."""
    before = model(*CASES[name])
    samples = correlated(before, 12)
    left = before.copy()
    notes = ReconstructWeights(samples=samples, **SCHEMES[scheme])(left)
    assert all(note.changed for note in notes)
    packed = left.copy()
    assert all(n.changed for n in QuantizeWeights(**SCHEMES[scheme])(packed))
    assert packed.to_proto().ByteSize() < left.to_proto().ByteSize()
    one, two = runtime.session(left), runtime.session(packed)
    for feed in samples:
        np.testing.assert_allclose(
            one.run(None, feed)[0], two.run(None, feed)[0], rtol=1e-5, atol=1e-6
        )


def test_the_recipe_keeps_integers() -> None:
    recipe = load_recipe("int4-accurate")
    fine, coarse = (dict(recipe.options[p]) for p in ("reconstruct_weights", "quantize_weights"))
    coarse.pop("range")
    assert {k: coarse[k] for k in coarse} == {k: v for k, v in fine.items() if k in coarse}
    for field in ("smallest", "recurrent_group", "wide_share", "encoding", "levels", "group_size"):
        assert ReconstructWeights.__dataclass_fields__[field].default == (
            QuantizeWeights.__dataclass_fields__[field].default
        )


def test_a_layer_that_does_not_gain_is_left_as_it_was() -> None:
    """The samples that judge have other correlations than those that were fitted to."""
    before = model(*CASES["MatMul"])
    rng = np.random.default_rng(0)
    one = rng.normal(size=(12, 20, 2)) @ rng.normal(size=(2, 32))
    other = rng.normal(size=(4, 20, 32))
    feeds = [{"x": v.astype(np.float32)} for v in (*one, *other)]
    samples, options = open_samples(feeds, before), SCHEMES["int4"]
    after, plain = before.copy(), before.copy()
    notes = ReconstructWeights(samples=samples, damping=0.0, range="mse", **options)(after)
    assert [note.text.endswith(": undone") for note in notes] == [True]
    QuantizeWeights(**options)(after)
    QuantizeWeights(**options)(plain)
    assert closeness(plain, after, samples) == np.inf


def test_later_layers_see_the_errors_of_earlier_ones() -> None:
    before = model(*CASES["chain"])
    samples = correlated(before)
    seen = {}
    for rounds in (1, 12):
        after = before.copy()
        options = replace(ReconstructWeights(samples=samples, **SCHEMES["int2"]), rounds=rounds)
        options(after)
        grids = [remembered(node.inputs[1]) for node in after.nodes("MatMul")]
        assert all(grid is not None for grid in grids)
        seen[rounds] = [grid.numbers.astype(int) for grid in grids if grid is not None]
    np.testing.assert_array_equal(seen[1][0], seen[12][0])
    assert (seen[1][1] != seen[12][1]).any()


def test_depths_and_rounds() -> None:
    found = model(
        "h = MatMul(x, m) r = Relu(h) a = MatMul(r, m2) b = MatMul(r, m2) y = Add(a, b)", ROWS, OUT
    )
    depth = depths(found, found.nodes("MatMul"))
    assert [depth[id(node)] for node in found.nodes("MatMul")] == [0, 1, 1]
    items = [(0, 5, "a"), (2, 5, "d"), (1, 5, "b"), (1, 5, "c"), (3, 50, "e")]
    assert list(in_rounds(items, 1, 100)) == [["a", "b", "c", "d", "e"]]
    assert list(in_rounds(items, 2, 100)) == [["a", "b", "c"], ["d", "e"]]
    assert list(in_rounds(items, 9, 100)) == [["a"], ["b", "c"], ["d"], ["e"]]
    assert list(in_rounds(items, 1, 12)) == [["a", "b"], ["c", "d"], ["e"]]
    assert list(in_rounds([], 3, 12)) == []


def test_few_samples_judge_themselves() -> None:
    before = model(*CASES["MatMul"])
    node = before.nodes("MatMul")[0]
    layer = Layer.of(before, node, list(held_by(node))[1])
    seen = observed_products(before, [layer], correlated(before, 3))[id(node), 1]
    np.testing.assert_array_equal(seen.fitted, seen.judging)
    seen = observed_products(before, [layer], correlated(before, 8))[id(node), 1]
    assert not np.array_equal(seen.fitted, seen.judging)


def test_what_a_mask_leaves_out_does_not_count() -> None:
    """Padding of large values: integers are those that samples without it give."""
    body = "f = Cast<to = 1>(attention_mask) s = ReduceSum(f) h = MatMul(x, m) y = Mul(h, s)"
    inputs = "float[1, t, 32] x, int64[1, t] attention_mask"
    before = model(body, inputs, "float[p, q, r] y")
    rng = np.random.default_rng(0)
    real = rng.normal(size=(16, 1, 20, 4)) @ rng.normal(size=(4, 32))
    junk = 50 * rng.normal(size=(16, 1, 12, 32))
    both = [(r, np.concatenate([r, j], 1)) for r, j in zip(real, junk, strict=True)]
    found = []
    for cut in (slice(20), slice(None)):
        after = before.copy()
        feeds = [
            {
                "x": (padded if cut.stop is None else short).astype(np.float32),
                "attention_mask": (np.arange(32) < 20).astype(np.int64)[None, cut],
            }
            for short, padded in both
        ]
        options = SCHEMES["int4"]
        ReconstructWeights(samples=open_samples(feeds, after), **options)(after)
        grid = remembered(after.nodes("MatMul")[0].inputs[1])
        assert grid is not None
        found.append(grid.values())
    np.testing.assert_array_equal(found[0], found[1])


def test_one_weight_of_two_layers() -> None:
    body = "h = MatMul(x, m) k = Neg(x) g = MatMul(k, m) y = Concat<axis = 0>(h, g)"
    before = model(body, ROWS, OUT)
    samples = correlated(before)
    after = before.copy()
    assert [n.changed for n in ReconstructWeights(samples=samples, **SCHEMES["int4"])(after)] == [
        True
    ]
    first, second = after.nodes("MatMul")
    assert first.inputs[1] is second.inputs[1]
    assert first.inputs[1].name == "m"
    assert closeness(before, after, samples) > 15


IF = (
    "t = Constant<value_int = 1>() c = Cast<to = 9>(t) y = If(c) <then_branch = p () => "
    "(float[20, 48] u) { e = Neg(x) u = MatMul(e, m) }, else_branch = q () => (float[20, 48] v) "
    "{ h = MatMul(x, m2) v = Neg(h) }>"
)
DECLINES = [
    pytest.param("y = Gather(table, x)", "int64[1, 7] x", "a table", id="table"),
    pytest.param(IF.replace("m2", "m"), ROWS, "other readers|body", id="body"),
    pytest.param("y = MatMul(x, stack)", "float[1, 20, 32] x", "a stack of 2", id="stack"),
    pytest.param(
        "h = MatMul(x, m) g = MatMul(m, mt) k = MatMul(x, g) y = Concat<axis = 1>(h, k)", ROWS,
        "other readers|not a float activation", id="constants",
    ),
    pytest.param("z = Sub(x, x) y = MatMul(z, m)", ROWS, "inputs are zeros", id="zeros"),
    pytest.param("z = Log(x) y = MatMul(z, m)", ROWS, "NaN or infinite", id="nonfinite"),
    pytest.param(
        "h = MatMul(x, m) g = Transpose(m) k = Transpose(h) y = MatMul(h, g)", ROWS,
        "other readers", id="transposed",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "inputs", "why"), DECLINES)
def test_declines(body: str, inputs: str, why: str) -> None:
    before = model(
        body, inputs, OUT if "stack" not in body and "table" not in body else "float[a, b, c] y"
    )
    samples = (
        open_samples([{"x": np.arange(7)[None]}], before) if "table" in body else correlated(before)
    )
    proto = before.to_proto()
    notes = ReconstructWeights(samples=samples, **SCHEMES["int4"])(before)
    assert notes
    for note in notes:
        assert not note.changed
        assert any(part in note.text for part in why.split("|")), note.text
    assert before.to_proto() == proto


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_with_nan_or_infinity_stays(bad: float) -> None:
    one = model("h = MatMul(x, m) g = Relu(h) y = MatMul(g, m2)", ROWS, OUT)
    samples = correlated(one)
    weight = one.nodes("MatMul")[1].inputs[1]
    weight.values = np.where(weight.values > 0.3, np.float32(bad), weight.values)
    options = SCHEMES["int4"]
    for pass_ in (ReconstructWeights(samples=samples, **options), ReconstructCodebook(samples)):
        made = one.copy()
        notes = {note.node: note for note in pass_(made)}
        first, second = made.nodes("MatMul")
        assert notes[first.name].changed
        assert notes[second.name].text == "its weight has NaN or infinite values"
        np.testing.assert_array_equal(second.inputs[1].values, weight.values)


def test_memory_has_a_bound() -> None:
    value = np.random.default_rng(0).normal(size=(4, 300)).astype(np.float32)
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 21]> g (float[5, 300] x) => (float[5, 4] y) '
        "{ y = Gemm<transB = 1>(x, w) }"
    )
    proto.graph.initializer.append(numpy_helper.from_array(value, "w"))
    wide = Model.from_proto(proto)
    notes = ReconstructWeights(samples=correlated(wide), memory_mb=1)(wide)
    assert [n.text for n in notes] == ["its products take 2 MB: memory_mb allows 1"]


def test_it_needs_real_samples() -> None:
    before = model(*CASES["MatMul"])
    with pytest.raises(DataError, match="give --data"):
        ReconstructWeights(samples=correlated(before).take(0))(before)
    notes = ReconstructWeights(samples=synthetic_samples(before, 8))(before)
    assert [(n.changed, "synthetic" in n.text) for n in notes] == [(False, True)]


OPTIONS = [({"damping": -1.0}, "damping"), ({"damping": np.inf}, "not inf"),
           ({"sweeps": -1}, "sweeps"), ({"rounds": 0}, "rounds"),
           ({"memory_mb": 0}, "memory_mb"), ({"format": "int32"}, "int32"),
           ({"layers": ("x=int3",)}, "int3")]  # fmt: skip


@pytest.mark.parametrize(("options", "match"), OPTIONS)
def test_options(options: Any, match: str) -> None:
    samples = correlated(model(*CASES["MatMul"]), 2)
    with pytest.raises((ValueError, Exception), match=match):
        ReconstructWeights(samples=samples, **options)
