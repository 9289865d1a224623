"""Operands of very different ranges in one scale: told, and requantized where that helps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.core import Note
from onnxq.data import Samples, open_samples
from onnxq.model import Model, producer
from onnxq.numerics.metrics import sqnr_db
from onnxq.passes import EqualizeLayers, QuantizeStatic
from onnxq.targets import Target, load_target

MEETING = """
    a0 = Conv <pads = [1, 1, 1, 1]> (x, wa, ba)
    a = Relu(a0)
    b0 = Conv <pads = [1, 1, 1, 1]> (x, wb)
    b = Relu(b0)
    {join}
    z = Conv <pads = [1, 1, 1, 1]> (a, wz)
"""
CONCAT = "c = Concat <axis = 1> (a, b)\n y = Conv (c, wy)"
ADD = "c = Add(a, b)\n y = Conv (c, wz)"


def model(share: float, join: str = CONCAT) -> Model:
    """Branch a spans about `share` of what b spans; z reads it by itself, y reads both."""
    rng = np.random.default_rng(5)
    weights = {
        "wa": rng.normal(0, 0.3 * share, (8, 4, 3, 3)),
        "ba": rng.normal(0, 0.1 * share, 8),
        "wb": rng.normal(0, 0.3, (8, 4, 3, 3)),
        "wz": rng.normal(0, 0.3, (8, 8, 3, 3)),
        # Trained readers see both branches: the small one has the larger weights.
        "wy": rng.normal(0, 0.3, (8, 16, 1, 1)) / np.repeat([share, 1], 8)[:, None, None],
    }
    body = MEETING.format(join=join)
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> '
        "g (float[1, 4, 16, 16] x) => (float[1, 8, h, w] y, float[1, 8, 16, 16] z) {" + body + "}"
    )
    proto.graph.initializer.extend(
        numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items() if k in body
    )
    onnx.checker.check_model(proto, full_check=True)
    return Model.from_proto(proto)


def samples(before: Model, seed: int = 1) -> Samples:
    rng = np.random.default_rng(seed)
    feeds = [{"x": rng.normal(0, 1, (1, 4, 16, 16)).astype(np.float32)} for _ in range(8)]
    return open_samples(feeds, before)


def everything(name: str) -> Target:
    return replace(load_target(name), costs=None)


def quantized(before: Model, target: str = "generic") -> tuple[Model, list[Note]]:
    after = before.copy()
    notes = list(QuantizeStatic(everything(target), samples(before), range="careful")(after))
    onnx.checker.check_model(after.to_proto(), full_check=True)
    return after, notes


def fidelity(before: Model, after: Model, output: str) -> float:
    sessions = [runtime.session(m, optimize="off") for m in (before, after)]
    made = [[runtime.run(s, f)[output] for f in samples(before, seed=2)] for s in sessions]
    return float(sqnr_db(*(np.stack(part) for part in made)))


def scale_of(after: Model, op: str, weight: str) -> float:
    """Of the activation that the layer with this weight reads."""
    for node in after.nodes(op):
        source = producer(node.inputs[1])
        if source is not None and source.inputs[0].name.startswith(weight):
            dequantize = producer(node.inputs[0])
            assert dequantize is not None
            return float(dequantize.inputs[1].values)
    raise AssertionError(weight)


def mixing(notes: list[Note]) -> list[Note]:
    return [n for n in notes if "in one scale the former" in n.text]


def test_a_small_operand_keeps_a_scale_for_its_other_readers() -> None:
    before = model(0.1)
    after, notes = quantized(before)
    (note,) = mixing(notes)
    assert note.changed
    assert "a requantized for it" in note.text
    assert "a spans" in note.text
    assert "b " in note.text
    assert "equalize_layers" in note.text
    assert scale_of(after, "Conv", "wz") < 0.2 * scale_of(after, "Conv", "wy")
    # The Concat still has one scale for all, as the target wants.
    (concat,) = after.nodes("Concat")
    read = {float(producer(t).inputs[1].values) for t in concat.inputs}  # type: ignore[union-attr]
    assert read == {scale_of(after, "Conv", "wy")}


def test_what_the_requantization_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    before = model(0.1)
    after, _ = quantized(before)
    monkeypatch.setattr("onnxq.passes.quantize_static.set_apart", lambda *_: frozenset())
    shared, _ = quantized(before)
    assert fidelity(before, after, "z") > fidelity(before, shared, "z") + 10
    assert fidelity(before, after, "y") > fidelity(before, shared, "y") - 1


def test_operands_of_like_ranges_share_their_scale() -> None:
    after, notes = quantized(model(0.6))
    assert not mixing(notes)
    assert scale_of(after, "Conv", "wz") == scale_of(after, "Conv", "wy")


def test_one_that_nobody_else_reads_is_told_only() -> None:
    before = model(0.1)
    alone = next(n for n in before.nodes("Conv") if n.outputs[0].name == "z")
    alone.inputs[0] = before.graph.inputs[0]
    alone.inputs[1] = before.constant("wx", np.ones((8, 4, 3, 3), np.float32))
    _, notes = quantized(before)
    (note,) = mixing(notes)
    assert not note.changed
    assert "requantized" not in note.text


def test_a_target_with_a_scale_for_each_input_is_told_only() -> None:
    """ort-cpu: QLinearConcat reads each operand in its own scale."""
    before = model(0.1)
    after, notes = quantized(before, "ort-cpu")
    (note,) = mixing(notes)
    assert not note.changed
    assert scale_of(after, "Conv", "wz") < 0.2 * scale_of(after, "Conv", "wy")


@pytest.mark.parametrize(("share", "told"), [(0.1, 1), (0.6, 0)])
def test_sums_are_told_of(share: float, told: int) -> None:
    _, notes = quantized(model(share, ADD), "ort-cpu")
    assert len(found := mixing(notes)) == told
    assert all(n.text.startswith("Add: a spans") and not n.changed for n in found)


def test_equalization_helps_what_the_concat_makes_of_the_small_branch() -> None:
    before = model(0.1)
    plain, notes = quantized(before)
    assert mixing(notes)
    EqualizeLayers(always=True)(equal := before.copy())
    after, notes = quantized(equal)
    assert not mixing(notes)
    assert fidelity(before, after, "y") > fidelity(before, plain, "y") + 3
