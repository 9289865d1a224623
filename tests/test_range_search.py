"""range = output: ranges by what they cost at the model's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.core import Note
from onnxq.data import Samples, open_samples
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.passes import QuantizeStatic
from onnxq.passes.formats import formats_of
from onnxq.passes.placement import place
from onnxq.passes.range_search import LADDER, START, _Search, is_clearly_better, search
from onnxq.passes.range_simulation import Ranges, Simulation, errors, run
from onnxq.passes.ranges import activation_params
from onnxq.schemes import QParams
from onnxq.statistics import Histogram
from onnxq.targets import Target, load_target

BODY = """
    h = Conv (x, w1)
    s = Conv (h, w2)
    t = Tanh (s)
    {end}
"""
PLAIN = "y = Conv (t, w3)"


def model(end: str = PLAIN, outputs: str = "float[1, 8, h, w] y", slope: float = 2.0) -> Model:
    """Tanh does not tell large values of h from larger ones: h may be clipped."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": np.linalg.qr(rng.normal(size=(8, 8)))[0].reshape(8, 8, 1, 1),
        "w2": slope * np.eye(8).reshape(8, 8, 1, 1),
        "w3": rng.normal(0, 0.3, (8, 8, 1, 1)),
    }
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> '
        f"g (float[1, 8, n, 16] x) => ({outputs}) {{ {BODY.format(end=end)} }}"
    )
    proto.graph.initializer.extend(
        numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()
    )
    onnx.checker.check_model(proto, full_check=True)
    return Model.from_proto(proto)


def samples(before: Model, seed: int = 1, count: int = 16, rows: Sequence[int] = (16,)) -> Samples:
    """Long tails; rows: heights of samples, in turn."""
    rng = np.random.default_rng(seed)
    feeds = [
        {"x": rng.standard_t(4, (1, 8, rows[i % len(rows)], 16)).astype(np.float32)}
        for i in range(count)
    ]
    return open_samples(feeds, before)


def everything(name: str = "ort-cpu") -> Target:
    return replace(load_target(name), costs=None)


def quantized(before: Model, given: Samples | None = None, **options: Any) -> tuple[Model, Note]:
    after = before.copy()
    chosen = {"range": "output"} | options
    notes = QuantizeStatic(everything(), samples(before) if given is None else given, **chosen)(
        after
    )
    onnx.checker.check_model(after.to_proto(), full_check=True)
    return after, next((n for n in notes if n.text.startswith("ranges: ")), notes[0])


def fidelity(before: Model, after: Model) -> float:
    sessions = [runtime.session(m) for m in (before, after)]
    made = [[run(s, feed)[0] for feed in samples(before, seed=2)] for s in sessions]
    return float(sqnr_db(*(np.stack(part) for part in made)))


def simulated(before: Model) -> tuple[Simulation, list[Ranges]]:
    """The simulation of a model, and the ladder."""
    before.separate_names()
    target, given = everything(), samples(before)
    formats = formats_of(before, target, {}, activations="auto", weights="auto",
                         granularity="auto", group_size=32)  # fmt: skip
    placement = place(before, target, {}, before.shapes_for({"x": (1, 8, 16, 16)}))
    wanted = {name for names in placement.sources.values() for name in names}
    proto = before.to_proto()
    known = {i.name for i in proto.graph.input}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in sorted(wanted - known))
    session = runtime.session(proto)
    seen: dict[str, Histogram] = {}
    for feed in given:
        made = {**feed, **runtime.run(session, feed)}
        for name in wanted:
            one = Histogram.of(made[name])
            seen[name] = seen[name].merge(one) if name in seen else one
    ladder: list[Ranges] = [
        activation_params(before, target, placement, seen, method) for method in LADDER
    ]
    simulation = Simulation.of(before, target, placement, ladder[START], formats.weights, "minmax")
    return simulation, ladder


def test_large_values_that_do_not_matter_are_clipped() -> None:
    before = model()
    after, note = quantized(before)
    careful, _ = quantized(before, range="careful")
    assert "tensors changed by the error of the outputs" in note.text
    assert note.changed
    assert fidelity(before, after) > fidelity(before, careful) + 1
    assert fidelity(before, after) > fidelity(before, quantized(before, range="mse")[0]) + 1


def test_tensors_of_one_scale_move_together() -> None:
    """A MaxPool's input and result are one group: kernels want one scale for both."""
    before = model(end="p = MaxPool <kernel_shape = [1, 1]> (h)\n" + PLAIN)
    pooled = next(n for n in before.graph.nodes if n.op == "MaxPool")
    reader = next(n for n in before.graph.nodes if n.inputs[0].name == "h" and n.op == "Conv")
    reader.inputs[0] = pooled.outputs[0]
    before.graph.toposort()
    after, note = quantized(before)
    assert note.changed
    made = next(n for n in after.graph.nodes if n.op == "MaxPool")
    (dequantize,), (quantize,) = made.inputs[0].inputs, made.outputs[0].outputs
    careful = next(
        n for n in quantized(before, range="careful")[0].graph.nodes if n.op == "MaxPool"
    )
    scales = [n.inputs[1].values for n in (dequantize, quantize, careful.inputs[0].inputs[0])]
    assert scales[0] == scales[1] != scales[2]


def test_without_passes_to_spare_ranges_are_careful() -> None:
    before = model()
    after, note = quantized(before, range_passes=1)
    careful, _ = quantized(before, range="careful")
    assert "none of 5 is clearly better than careful" in note.text
    assert not note.changed
    assert after.to_proto().SerializeToString() == careful.to_proto().SerializeToString()


def test_the_result_is_the_same_every_time() -> None:
    one, two = (quantized(model())[0].to_proto().SerializeToString() for _ in range(2))
    assert one == two


@pytest.mark.parametrize("passes", [30, 60, 120])
def test_passes_are_bounded(passes: int) -> None:
    before = model()
    simulation, ladder = simulated(before)
    found = search(before, simulation, ladder, samples(before), passes)
    assert 0 < found.passes <= passes
    assert f"{found.passes} simulated passes" in found.text


def test_simulated_outputs_are_those_of_the_quantized_model() -> None:
    before = model()
    simulation, ladder = simulated(before)
    after, _ = quantized(before, range="careful")
    session = runtime.session(after, optimize="off")
    for feed in samples(before, count=3):
        (y,), (exact,) = simulation.run(feed, ladder[START]), run(session, feed)
        assert sqnr_db(exact, y) > 60


def test_pairs_that_are_off_leave_floats_as_they_are() -> None:
    before = model()
    simulation, ladder = simulated(before)
    (feed,) = samples(before, count=1)
    fed = dict(feed)
    for key, pair in simulation.pairs.items():
        fed |= pair.fed(ladder[0][key], is_on=False)
    (y,), (x,) = run(simulation.session, fed), run(runtime.session(before), feed)
    assert sqnr_db(x, y) > 40  # weights are rounded
    assert sqnr_db(x, simulation.run(feed, ladder[0])[0]) < 30


BRANCH = """
    many = ReduceSum <keepdims = 0> (x)
    zero = Constant <value = float {0}> ()
    is = Greater (many, zero)
    c = If (is) <
        then_branch = g1 () => (float[a, b, c, d] c1) { c1 = Conv (t, w3) },
        else_branch = g2 () => (float[a, b, c, d] c2) { c2 = Add (t, t) }
    >
    y = Conv (c, w3)
"""
ENDS = {
    "body": (BRANCH, "float[1, 8, h, w] y"),
    "outputs": (PLAIN + "\n z = Sigmoid (t)", "float[1, 8, h, w] y, float[1, 8, h, w] z"),
    "integers": ("v = Conv (t, w3)\n y = ArgMax <axis = 1> (v)", "int64[1, 1, h, w] y"),
    "infinite": ("v = Conv (t, w3)\n y = Log (v)", "float[1, 8, h, w] y"),
}


@pytest.mark.parametrize("case", ENDS)
def test_other_graphs(case: str) -> None:
    before = model(*ENDS[case])
    after, note = quantized(before, range_passes=60)
    assert note.text.startswith("ranges: "), note
    (feed,) = samples(before, count=1)
    run(runtime.session(after), feed)


def test_samples_of_different_shapes() -> None:
    before = model()
    _, note = quantized(before, samples(before, rows=(8, 12, 16)), range_passes=60)
    assert note.text.startswith("ranges: ")


def test_without_samples_ranges_are_careful() -> None:
    """As when a quantized model is quantized again: with the ranges that it had."""
    before = model()
    statistics = {n: Histogram.of(np.linspace(-4, 9, 99, dtype=np.float32)) for n in "xhsty"}
    kept = {n: activations(s) for n, s in statistics.items()}
    before.ranges.update(kept)
    _, note = quantized(before, samples(before).take(0))
    assert note.text == "ranges: careful, since there are no real samples to measure the outputs on"
    assert not note.changed


def activations(seen: Histogram) -> tuple[QParams, ...]:
    return (everything().activations.params(seen.lo, seen.hi),)


def test_a_verdict_takes_back_what_does_not_help() -> None:
    before = model()
    simulation, ladder = simulated(before)
    groups = list(simulation.pairs)
    work = _Search(simulation, ladder, groups, 1000)
    session = runtime.session(before)
    judging = [(feed, run(session, feed)) for feed in samples(before, seed=5, count=4)]
    narrow, wide = (np.full(len(groups), step) for step in (1, len(LADDER) - 1))
    error = work.errors(judging, work.start)
    steps, after = work.judged(judging, wide, error)
    assert (steps == START).all()
    assert after is error
    steps, after = work.judged(judging, narrow, error)
    assert (steps == narrow).all()
    assert after.sum() < error.sum()


def test_errors_of_outputs() -> None:
    x = [np.array([3.0, 4.0]), np.array([1, 2])]
    y = [np.array([3.0, 3.0]), np.array([9, 9])]
    assert errors([x, x], [x, y]) == pytest.approx(np.array([[0.0], [1 / 25]]))
    nan = [np.array([np.nan, 4.0]), y[1]]
    assert errors([x], [nan]).item() == np.inf
    assert errors([nan], [nan]).item() == 0
    assert errors([x], [[np.ones(3), y[1]]]).item() == 1  # of another shape
    assert errors([x[1:]], [y[1:]]).item() == 1  # integers alone: how many differ
    assert errors([x[1:]], [[np.array([1, 3])]]).item() == 0.5
    assert errors([[["not", "an array"]]], [[["?"]]]).shape == (1, 0)


def test_what_is_clearly_better() -> None:
    before = np.array([[1.0], [2.0], [3.0], [4.0]])
    assert is_clearly_better(0.9 * before, before)
    assert not is_clearly_better(0.99 * before, before)  # too little
    assert not is_clearly_better(before * [[0.5], [0.6], [1.5], [1.1]], before)  # chance
    assert not is_clearly_better(before * [[0.1], [0.1], [0.1], [4]], before)  # the sum is not
    assert not is_clearly_better(before * [[0.9], [0.9], [0.9], [np.inf]], before)
    assert not is_clearly_better(before, np.vstack([before[:3], [np.inf]]))
    assert is_clearly_better(0.5 * before, np.full((4, 1), np.inf))
