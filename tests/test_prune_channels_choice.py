"""Which channels go and how many, and what makes up for them: on networks that are run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.core import Note
from onnxq.data import Samples, open_samples
from onnxq.errors import DataError, RecipeError
from onnxq.model import Model
from onnxq.passes.prune_channels import PruneChannels
from onnxq.passes.removal import structure
from onnxq.passes.unit_budget import Work, allotted, even
from onnxq.passes.unit_curves import stops_of
from onnxq.passes.unit_plans import NOTHING
from onnxq.passes.unit_readers import readings
from onnxq.passes.work import macs
from onnxq.targets import load_target
from onnxq.validation import compare

Values = NDArray[np.float32]
CHAIN = """<ir_version: 8, opset_import: ["": 17]>
g (float[1, 4, 12, 12] x) => (float[1, 3, 12, 12] y) {
    a = Conv<pads=[1, 1, 1, 1]>(x, w, b)
    h = Relu(a)
    y = Conv(h, v)
}"""
BLOCK = """<ir_version: 8, opset_import: ["": 17]>
g (float[1, 6, 10, 10] x) => (float[1, 6] y) {
    a = Conv<pads=[1, 1, 1, 1]>(x, w, b)
    h = Relu(a)
    c = Conv<pads=[1, 1, 1, 1]>(h, v, d)
    s = Add(c, x)
    r = Relu(s)
    e = Conv<pads=[1, 1, 1, 1]>(r, t, f)
    i = Relu(e)
    k = Conv(i, u, q)
    m = Add(r, k)
    p = GlobalAveragePool(m)
    n = Flatten(p)
    y = Gemm<transB=1>(n, z, o)
}"""


def filled(text: str, weights: Mapping[str, NDArray[Any]]) -> Model:
    proto = parser.parse_model(text)
    for name, values in weights.items():
        proto.graph.initializer.append(
            numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name)
        )
    onnx.checker.check_model(proto, full_check=True)
    return Model.from_proto(proto)


def chain(seed: int = 0) -> Model:
    """8 channels, of which the last 4 are mixtures of the first 4, on the side where Relu is open.

    The mixtures have large weights: their norm says nothing.
    """
    rng = np.random.default_rng(seed)
    w, v = rng.normal(size=(8, 4, 3, 3)) * 0.1, rng.normal(size=(3, 8, 1, 1))
    mix = np.abs(rng.normal(size=(4, 4)))
    w[4:] = 5 * np.einsum("ij,jklm->iklm", mix, w[:4])
    bias = np.full(8, 6.0)
    bias[4:] = 5 * mix @ bias[:4]
    return filled(CHAIN, {"w": w, "b": bias, "v": v})


def block(seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> NDArray[np.float64]:
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 100
        return np.asarray(rng.normal(size=shape) / fan**0.5)

    return filled(BLOCK, {
        "w": drawn(32, 6, 3, 3), "b": drawn(32), "v": drawn(6, 32, 3, 3), "d": drawn(6),
        "t": drawn(32, 6, 3, 3), "f": drawn(32), "u": drawn(6, 32, 1, 1), "q": drawn(6),
        "z": drawn(6, 6), "o": drawn(6),
    })  # fmt: skip


def real(model: Model, count: int = 32, seed: int = 1) -> Samples:
    rng = np.random.default_rng(seed)
    shape = [1, *model.graph.inputs[0].shape[1:]]
    smooth = [
        rng.normal(size=(*shape[:2], 1, 1)) + 0.5 * rng.normal(size=shape) for _ in range(count)
    ]
    return open_samples([{"x": x.astype(np.float32)} for x in smooth], model)


def pruned(model: Model, **options: Any) -> tuple[Model, list[Note]]:
    """A pruned copy, checked, and what was said."""
    made = model.copy()
    notes = list(PruneChannels(**options)(made))
    onnx.checker.check_model(made.to_proto(), full_check=True)
    before = model.copy()
    before.infer_shapes()
    assert [str(v) for v in made.to_proto().graph.output] == [
        str(v) for v in before.to_proto().graph.output
    ]
    return made, notes


def db(model: Model, made: Model, seed: int = 9) -> float:
    return compare(model, made, real(model, 8, seed)).sqnr_db


def work(model: Model) -> float:
    found = model.copy()
    found.infer_shapes()
    return sum(macs(found).values())


def test_what_others_can_make_up_for_goes() -> None:
    model = chain()
    samples = real(model)
    made, notes = pruned(model, amount=0.5, samples=samples)
    assert made.nodes("Conv")[0].inputs[1].shape == (4, 4, 3, 3)
    assert db(model, made) > 40
    assert "by what others can make up for" in notes[0].text
    small, _ = pruned(model, amount=0.5, criterion="norm", samples=samples, compensation=False)
    assert db(model, small) < 20


def test_a_bias_is_added_where_a_mean_goes() -> None:
    """The second layer has no bias; the channels that go are about constant."""
    model = chain()
    first = model.nodes("Conv")[0]
    bias = np.array(first.inputs[2].values)
    weight = np.array(first.inputs[1].values)
    weight[2:6] *= 1e-3
    first.inputs[1], first.inputs[2] = model.constant("w2", weight), model.constant("b2", bias)
    made, _ = pruned(model, amount=0.5, criterion="activation", samples=real(model))
    assert made.nodes("Conv")[0].inputs[1].shape[0] == 4
    assert len(made.nodes("Conv")[1].inputs) == 3
    assert db(model, made) > 40


@pytest.mark.parametrize(
    ("criterion", "gain"), [("norm", 2.0), ("activation", 0.3), ("reconstruction", 3.0)]
)
def test_making_up_for_it_helps(criterion: str, gain: float) -> None:
    model = block()
    samples = real(model)
    options = {"macs": 0.3, "criterion": criterion, "samples": samples}
    made, notes = pruned(model, **options)
    plain, others = pruned(model, compensation=False, **options)
    assert db(model, made) > db(model, plain) + gain
    assert "were fitted anew" in notes[0].text
    assert "nothing makes up for it" in others[0].text


def test_reconstruction_beats_the_others() -> None:
    found = {}
    for criterion in ("norm", "activation", "reconstruction"):
        errors = []
        for seed in range(3):
            model = block(seed)
            made, _ = pruned(model, amount=0.4, criterion=criterion, samples=real(model))
            errors.append(db(model, made))
        found[criterion] = float(np.mean(errors))
    assert found["reconstruction"] > found["activation"]
    assert found["reconstruction"] > found["norm"]


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_share_of_work(share: float) -> None:
    model = block()
    made, notes = pruned(model, macs=share, samples=real(model))
    left = work(made) / work(model)
    assert 1 - share - 0.1 < left <= 1 - share
    assert notes[0].text.startswith(f"{1 - left:.1%} of multiply-accumulates removed")


def test_size_and_multiples() -> None:
    model = block()
    made, notes = pruned(model, size=0.4, samples=real(model), multiple=8)
    assert "of the weights' bytes; outputs within" in notes[0].text
    assert sum(made.weight_sizes()) <= 0.6 * sum(model.weight_sizes())
    assert all(made.nodes("Conv")[i].inputs[1].shape[0] % 8 == 0 for i in (0, 2))


def test_latency_is_measured() -> None:
    model = block()
    samples = real(model)
    made, notes = pruned(model, latency=0.25, samples=samples, target=load_target("ort-cpu"))
    assert "of the time, measured; outputs within" in notes[0].text
    feed = next(iter(samples))
    assert runtime.latency(model, made, feed, seconds=0.5).ratio < 0.9


def test_what_cannot_be_reached_is_said() -> None:
    model = block()
    _, notes = pruned(model, macs=0.99, samples=real(model))
    assert "fewer than the 99% asked for" in notes[0].text
    _, notes = pruned(model, size=0.99, samples=real(model))
    assert "not what was asked" in notes[0].text


def test_curves_fall() -> None:
    model = block()
    _, notes = pruned(model, macs=0.2, samples=real(model))
    curves = [note.curve for note in notes if note.curve]
    assert len(curves) == 2
    for curve in curves:
        amounts, levels = zip(*curve, strict=True)
        assert list(amounts) == sorted(amounts)
        assert list(levels) == sorted(levels, reverse=True)
    _, notes = pruned(model, macs=0.01, samples=real(model))
    stays = [note for note in notes if "others cost the outputs less" in note.text]
    assert [bool(note.curve) for note in stays] == [True]


def test_without_samples() -> None:
    model = block()
    made, notes = pruned(model, macs=0.3)
    assert work(made) <= 0.7 * work(model)
    assert not any(note.curve for note in notes)
    assert "by the norm of weights" in notes[0].text
    assert [note.text for note in notes if not note.changed and note.text == NOTHING]
    fake = replace(real(model), synthetic=True)
    same, _ = pruned(model, macs=0.3, samples=fake)
    assert same.to_proto() == made.to_proto()


def test_again_is_the_same() -> None:
    model = block()
    one, two = (pruned(model, macs=0.3, samples=real(model))[0].to_proto() for _ in range(2))
    assert one.SerializeToString() == two.SerializeToString()


def test_dense_layers_are_fitted_but_not_pruned() -> None:
    model = block()
    node = model.nodes("Conv")[0]
    node.name = "first"
    made, notes = pruned(model, macs=0.2, samples=real(model), layers=("first=dense",))
    assert made.nodes("Conv")[0].inputs[1].shape[0] == 32
    assert any("keeps first dense" in note.text for note in notes)


def test_what_contradicts_itself() -> None:
    with pytest.raises(RecipeError, match="one of amount, macs, size and latency"):
        PruneChannels(amount=0.1, macs=0.2)
    with pytest.raises(RecipeError, match="share from 0 to below 1"):
        PruneChannels(latency=1.0)
    wishes: tuple[dict[str, Any], ...] = (
        {"criterion": "reconstruction"}, {"criterion": "activation"}, {"latency": 0.2},
    )  # fmt: skip
    for options in wishes:
        assert PruneChannels.wants("samples", options)
        with pytest.raises(DataError, match="give --data"):
            PruneChannels(**options)(chain())
    assert not PruneChannels.wants("samples", {"macs": 0.3})


def test_nothing_to_remove() -> None:
    model = chain()
    _, notes = pruned(model, macs=0.0, samples=real(model))
    assert [note.changed for note in notes if "nothing can go" in note.text] == [False]


def test_allotment_against_all_others() -> None:
    """Errors per work of two layers in a row, where what one saves depends on the other."""
    model = block()
    found = structure(model, "test")
    counted = Work.of(model, found)
    rng = np.random.default_rng(0)
    for _ in range(5):
        curves = [
            dict(zip((8, 16, 24), np.cumsum(rng.random(3) ** 2).tolist(), strict=True))
            for _ in found.groups
        ]
        removed = allotted(counted, curves, 0.3)
        whole = counted.left(np.zeros(2, np.int64))
        assert counted.left(removed) <= 0.7 * whole

        def noise(counts: Any, curves: Any = curves) -> float:
            each = (c.get(int(n), 0.0) for c, n in zip(curves, counts, strict=True))
            return float(sum(each))

        best = min(
            noise(counts)
            for counts in product((0, 8, 16, 24), repeat=2)
            if counted.left(np.array(counts)) <= 0.7 * whole
        )
        assert noise(removed) <= 2 * best + 1e-9


def test_work_is_what_is_left_of_it() -> None:
    model = block()
    found = structure(model, "test")
    counted = Work.of(model, found)
    none = np.zeros(len(found.groups), np.int64)
    assert counted.left(none) == work(model)
    removed = none.copy()
    removed[0] = 16
    assert counted.left(none) - counted.left(removed) == counted.saved(none, 0, 16)
    assert counted.saved(none, 0, 14, block=16) < counted.saved(none, 0, 14)


def test_counts_that_may_go() -> None:
    assert stops_of(64, 1) == (8, 16, 24, 32, 40, 48, 56)
    assert stops_of(3, 1) == (1, 2)
    assert stops_of(40, 16) == (8, 24)
    assert stops_of(8, 8) == ()
    assert [even(10, a) for a in (0.0, 0.3, 0.99)] == [0, 3, 9]
    assert even(10, 0.5, 4) == 2
    assert even(3, 0.9, 8) == 0


def test_what_a_layer_has_to_give() -> None:
    """The layer beside a shortcut makes up for what the shortcut has lost; a clamp is seen."""
    model = block()
    found = {r.node.outputs[0].name: r for r in readings(model, structure(model, "test"))}
    assert set(found) == {"a", "c", "e", "k", "y"}
    beside = {name: r.beside and r.beside.name for name, r in found.items()}
    assert beside == {"a": None, "c": "x", "e": None, "k": "r", "y": None}
    assert {name: r.aim.name for name, r in found.items()} == {
        "a": "a", "c": "s", "e": "e", "k": "m", "y": "y",
    }  # fmt: skip
    assert {name for name, r in found.items() if r.clamp == (0.0, np.inf)} == {"a", "c", "e"}
