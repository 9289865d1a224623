"""quantize_codebook: indices in few bits, unpacked at load to exactly what the codes say."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import numpy_helper, parser
from test_quantize_weights import (
    CASES,
    IMAGE,
    ROWS,
    constants,
    model,
    optimized,
    outputs,
)

from onnxq import runtime
from onnxq.codebooks import fit_codebook
from onnxq.core import Pass
from onnxq.coverage import coverage
from onnxq.data import open_samples
from onnxq.demands import why_not
from onnxq.errors import DataError, RecipeError
from onnxq.layers import has_weight, is_lookup
from onnxq.lint import conformance
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.passes import QuantizeCodebook, QuantizeWeights, inline_functions
from onnxq.passes.codebook_encoding import PACKED, IndexStorage, pack
from onnxq.passes.layouts import WEIGHTS, held_by
from onnxq.passes.weight_storage import Found
from onnxq.schemes import quantize_weight
from onnxq.targets import load_target

UNPACKING = ("Cast", "Sub", "Mul", "Div", "Mod", "ReduceSum", "Slice", "DequantizeLinear")
FORMS = [
    pytest.param({"codebook": "nf4"}, 17, id="nf4-packed"),
    pytest.param({"codebook": "nf4", "group_size": 19}, 21, id="nf4-uint4-short-group"),
    pytest.param({"granularity": "tensor"}, 21, id="kmeans-tensor"),
    pytest.param({"bits": 1}, 17, id="kmeans-1"),
    pytest.param({"bits": 2, "granularity": "channel"}, 25, id="kmeans-uint2-channel"),
    pytest.param({"bits": 2, "group_size": 16}, 21, id="kmeans-2-group"),
    pytest.param({"bits": 3}, 17, id="kmeans-3"),
    pytest.param({"bits": 3, "group_size": 7}, 17, id="kmeans-3-short-group"),
    pytest.param({"bits": 5, "granularity": "tensor"}, 17, id="kmeans-5"),
    pytest.param({"bits": 6, "granularity": "tensor"}, 13, id="kmeans-6"),
    pytest.param({"codebook": "power-of-two", "bits": 3}, 17, id="power-of-two"),
    pytest.param({"codebook": "logarithmic", "bits": 4}, 17, id="logarithmic"),
    pytest.param({"codebook": "exponential", "bits": 4}, 17, id="exponential"),
    pytest.param({"codebook": "vector", "bits": 4, "dim": 2}, 21, id="vector-2-uint4"),
    pytest.param(
        {"codebook": "vector", "bits": 5, "dim": 5, "group_size": 20}, 17, id="vector-5-short"
    ),
    pytest.param(
        {"codebook": "vector", "bits": 3, "dim": 8, "granularity": "channel"}, 17, id="vector-8"
    ),
    pytest.param(
        {"codebook": "vector", "bits": 4, "dim": 3, "granularity": "tensor"}, 17, id="vector-3"
    ),
]  # fmt: skip


FEW = ("RNN", "MatMul-left")  # so few values that int8 may take less than a codebook


def test_the_cases_are_all_operators() -> None:
    assert set(WEIGHTS) <= set(CASES)


@pytest.mark.parametrize(("options", "opset"), FORMS)
@pytest.mark.parametrize("name", CASES)
def test_unpacked_at_load_and_exact(
    name: str, options: dict[str, Any], opset: int, tmp_path: Path
) -> None:
    """ONNX Runtime folds all of it, and computes what indices, codebook and scales say."""
    pass_, before = QuantizeCodebook(**options, state="codebook"), model(*CASES[name])
    before.raise_opset(opset)
    after = before.copy()
    notes = pass_(after)
    assert notes
    assert all(note.changed for note in notes)
    assert any("codebook of" in note.text for note in notes) or name in FEW
    proto = after.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ByteSize() < before.to_proto().ByteSize()
    assert optimized(proto, tmp_path, *UNPACKING) == []
    assert len(optimized(proto, tmp_path, "Gather")) == (name == "Gather")
    expected, number = before.copy(), 0
    for node in expected.nodes(*WEIGHTS):
        for held in held_by(node):
            weight = node.inputs[held.index]
            if not isinstance(weight, gs.Constant) or prod(held.shape) < 512:
                continue
            if "int8" in notes[number].text:
                back = linear(pass_, Found(node, held))
            else:
                back = values(pass_, held, weight, number)
            node.inputs[held.index] = expected.constant("back", back)
            number += 1
    assert number == len(notes)
    np.testing.assert_array_equal(outputs(after), outputs(expected))
    assert not [n for n in pass_(after) if n.changed]


def values(pass_: QuantizeCodebook, held: Any, weight: gs.Constant, number: int) -> np.ndarray:
    """What a weight should be unpacked to."""
    rows = held.rows(weight.values)
    codes = fit_codebook(rows, pass_.plan.scheme(held), seed=pass_.seed + number)
    shape = [held.shape[a] for a in held.order]
    back = codes.values(held.length).reshape(shape).transpose(np.argsort(held.order))
    return np.ascontiguousarray(back)


def linear(pass_: QuantizeCodebook, weight: Found) -> np.ndarray:
    """As `values`, where a codebook of so few would take more than int8."""
    held = weight.held
    numbers, params = quantize_weight(
        held.rows(np.asarray(weight.tensor.values)), pass_.plan.linear(weight, "int8"), None, "mse"
    )
    back = params.dequantize(numbers).reshape([held.shape[a] for a in held.order])
    return np.ascontiguousarray(back.transpose(np.argsort(held.order)))


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("count", [1, 7, 24, 25])
def test_indices_share_bytes(bits: int, count: int) -> None:
    """Digit i of a number, from below, is index i; no number has more than 24 bits."""
    digits = PACKED[bits]
    assert digits.count * bits <= 8 * digits.size <= 24
    indices = np.random.default_rng(bits).integers(0, 1 << bits, count).astype(np.uint8)
    packed = pack(indices, bits)
    assert packed.shape == (-(-count // digits.count), digits.size)
    numbers = [int.from_bytes(row.tobytes(), "little") for row in packed]
    found = [n >> bits * i & (1 << bits) - 1 for n in numbers for i in range(digits.count)]
    assert found[:count] == indices.tolist()
    assert not any(found[count:])


STORAGES = [
    (1, 25, (), None, 1), (2, 25, (), "uint2", 2), (2, 24, (), None, 2), (3, 25, (), None, 3),
    (4, 21, (), "uint4", 4), (4, 20, (), None, 4), (5, 21, (), None, 16 / 3), (6, 21, (), None, 6),
    (7, 10, (), "uint8", 8), (8, 10, (), "uint8", 8), (2, 25, ("uint8", "uint4"), None, 2),
    (4, 25, ("uint8",), None, 4), (8, 10, ("int8",), "uint8", 8),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "opset", "allowed", "type_", "each"), STORAGES)
def test_the_shortest_storage_of_indices(
    bits: int, opset: int, allowed: tuple[str, ...], type_: str | None, each: float
) -> None:
    storage = IndexStorage.of(bits, opset, allowed)
    assert (storage.type, storage.each) == (type_, each)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_opset_10(bits: int, tmp_path: Path) -> None:
    """The oldest that has Mod; ReduceSum has its axes as an attribute there."""
    proto = parser.parse_model(
        f'<ir_version: 5, opset_import: ["": 10]> g ({ROWS}) => (float[a, b] y) '
        "{ y = MatMul(x, m) }"
    )
    weight = np.random.default_rng(0).normal(size=(32, 49)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "m"))
    before = Model.from_proto(proto)
    after, pass_ = before.copy(), QuantizeCodebook(bits=bits, granularity="tensor")
    (note,) = pass_(after)
    assert note.changed
    assert after.opset == 10
    onnx.checker.check_model(after.to_proto(), full_check=True)
    assert optimized(after.to_proto(), tmp_path, *UNPACKING, "Gather") == []
    (matmul,) = before.nodes("MatMul")
    (held,) = (h for h in held_by(matmul) if h.index == 1)
    matmul.inputs[1] = before.constant("back", values(pass_, held, matmul.inputs[1], 0))
    np.testing.assert_array_equal(outputs(before), outputs(after))


@pytest.mark.parametrize(("options", "opset"), FORMS)
def test_the_bits_in_the_note_are_those_in_the_file(options: dict[str, Any], opset: int) -> None:
    after = model("y = MatMul(x, m)", ROWS, "float[a, b] y")
    after.raise_opset(opset)
    (note,) = QuantizeCodebook(**options)(after)
    said = float(note.text.split(" bits each")[0].split()[-1])
    kinds = ("codebook", "scale", "packed", "uint")
    held = [c for c in constants(after) if any(f"m_{kind}" in c.name for kind in kinds)]
    proto = {t.name: t for t in after.to_proto().graph.initializer}
    stored = sum(8 * len(proto[c.name].raw_data) for c in held)
    granularity = options.get("granularity", "group")
    absorbed = 32 if granularity == "tensor" else 0  # into the codebook
    assert said == pytest.approx((stored + absorbed) / (32 * 48), abs=0.11)


def test_one_scale_is_part_of_the_codebook() -> None:
    after = model("y = MatMul(x, m)", ROWS, "float[a, b] y")
    QuantizeCodebook("nf4", granularity="tensor")(after)
    assert not after.nodes("Mul")
    by_channel = model("y = MatMul(x, m)", ROWS, "float[a, b] y")
    QuantizeCodebook("nf4", granularity="channel")(by_channel)
    assert len(by_channel.nodes("Mul")) == 1


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    body = (
        "a = MatMul(x, m) h = MatMul(x, m) t = Transpose(m) s = Transpose(t) u = MatMul(x, s) "
        "y = Sum(a, h, u)"
    )
    after = model(body, ROWS, "float[a, b] y")
    after.raise_opset(21)
    QuantizeCodebook()(after)
    kinds = [t.data_type for t in after.to_proto().graph.initializer]
    assert kinds.count(onnx.TensorProto.UINT4) == 1
    assert not [c for c in constants(after) if str(c.dtype) == "float32" and prod(c.shape) > 100]
    assert optimized(after.to_proto(), tmp_path, *UNPACKING, "Transpose", "Gather") == []


def test_bodies_capture_what_is_unpacked_in_the_main_graph() -> None:
    after = model(*CASES["body"])
    QuantizeCodebook("nf4")(after)
    gathers = after.nodes("Gather")
    assert [after.graph_of(node) is after.graph for node in gathers] == [True]


def test_functions_are_seen_into_when_inlined(tmp_path: Path) -> None:
    proto = parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17, "own": 1]>
        g ({ROWS}) => (float[a, b] y) {{ y = own.layer(x, m) }}
        <opset_import: ["": 17], domain: "own"> layer (u, v) => (z) {{ z = MatMul(u, v) }}
    """)
    weight = np.random.default_rng(0).normal(size=(32, 48)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "m"))
    after = Model.from_proto(proto)
    assert not QuantizeCodebook()(after)
    inline_functions(after)
    assert [note.changed for note in QuantizeCodebook()(after)] == [True]
    assert optimized(after.to_proto(), tmp_path, *UNPACKING, "Gather") == []


def test_float16_stays_float16(tmp_path: Path) -> None:
    after = model("y = MatMul(x, m)", "float16[32, 32] x", "float16[a, b] y", np.float16)
    before = after.copy()
    assert [n.changed for n in QuantizeCodebook()(after)] == [True]
    onnx.checker.check_model(after.to_proto(), full_check=True)
    assert sqnr_db(outputs(before), outputs(after)) > 18
    left = optimized(after.to_proto(), tmp_path, "Mul", "Gather", "Mod")
    assert left == []


def test_batch_normalisation_still_folds(tmp_path: Path) -> None:
    after = model(
        "c = Conv(x, w) y = BatchNormalization(c, bn, bn, bn, bn)", IMAGE, "float[a, b, c, d] y"
    )
    for node in after.nodes("BatchNormalization"):
        node.inputs[1].values = np.full(16, 0.5, np.float32)  # the variance must not be negative
    assert [n.changed for n in QuantizeCodebook(bits=3)(after)] == [True]
    assert optimized(after.to_proto(), tmp_path, "BatchNormalization", *UNPACKING, "Gather") == []


@pytest.mark.parametrize("name", CASES)
def test_a_result_is_known_again(name: str) -> None:
    """Nobody takes the codebook of vectors for an embedding, nor the model for a float one."""
    for options in ({"bits": 3}, {"codebook": "vector", "dim": 4, "bits": 3}):
        after = model(*CASES[name])
        before = after.copy()
        share = coverage(before).weight_bytes
        QuantizeCodebook(**options, smallest=128)(after)
        assert "of stored weights)" in why_not([], after)
        lookups = [node for node in after.nodes("Gather") if is_lookup(node)]
        assert lookups
        assert not any(has_weight(node) for node in lookups)
        found = coverage(after)
        assert found.quantized_weight_bytes > 0.85 * share
        assert conformance(after, load_target("ort-cpu")).violations == ()


def test_recurrent_state_keeps_eight_bits() -> None:
    for name in ("LSTM", "GRU"):
        notes = QuantizeCodebook()(model(*CASES[name]))
        assert ["codebook" in note.text for note in notes] == [True, False]
        assert "int8" in notes[1].text
        assert "it multiplies the state" in notes[1].text
        notes = QuantizeCodebook(state="codebook")(model(*CASES[name]))
        assert all("codebook of" in note.text for note in notes)


def test_layers_of_linear_formats(tmp_path: Path) -> None:
    after = model("h = MatMul(x, m) y = Gemm(h, mt2, row)", ROWS, "float[a, b] y")
    after.raise_opset(21)
    notes = QuantizeCodebook(group_size=16, layers=("last=int8", "first=int4"))(after)
    assert "int4 in groups of 16" in notes[0].text
    assert "int8 per channel" in notes[1].text
    assert optimized(after.to_proto(), tmp_path, *UNPACKING) == []


def test_a_codebook_that_takes_more_than_int8_is_int8() -> None:
    after = model("y = MatMul(x, m)", ROWS, "float[a, b] y")
    (note,) = QuantizeCodebook(bits=8)(after)  # 256 entries for 1536 values
    assert "int8 per channel" in note.text
    assert "a codebook takes 14.3 bits" in note.text
    large = model("y = MatMul(x, m)", ROWS, "float[a, b] y")
    (matmul,) = large.nodes("MatMul")
    wide = np.random.default_rng(0).normal(size=(32, 4096)).astype(np.float32)
    matmul.inputs[1] = large.constant("wide", wide)
    (note,) = QuantizeCodebook(bits=8, granularity="tensor")(large)
    assert "codebook of 256 entries per tensor, 8.1 bits" in note.text


DECLINES = [
    pytest.param({"layers": ("op:MatMul=float",)}, 17, "asked for by the override", id="layer"),
    pytest.param({"layers": ("op:MatMul=int4",)}, 17, "opset 17 has no int4", id="opset-int4"),
    pytest.param({}, 9, "opset 9 cannot unpack codebooks: opset 10 can", id="opset"),
    pytest.param({"target": "tensorrt"}, 17, "does not unpack codebooks at load", id="target"),
]


@pytest.mark.parametrize(("options", "opset", "reason"), DECLINES)
def test_declines(options: dict[str, Any], opset: int, reason: str) -> None:
    if "target" in options:
        options = {"target": load_target(options["target"])}
    before = model("y = MatMul(x, m)", ROWS, "float[a, b] y", opset=opset)
    (note,) = QuantizeCodebook(**options)(before)
    assert not note.changed
    assert reason in note.text
    assert [str(t.dtype) for t in constants(before)] == ["float32"]


def test_nothing_is_saved_of_few_float16_values() -> None:
    after = model("y = MatMul(x, m)", "float16[32, 32] x", "float16[a, b] y", np.float16)
    (matmul,) = after.nodes("MatMul")
    matmul.inputs[1] = after.constant("few", np.ones((32, 6), np.float16))
    (note,) = QuantizeCodebook(smallest=1)(after)
    assert "save nothing" in note.text


def test_values_that_are_not_finite() -> None:
    broken = model("y = MatMul(x, m)", ROWS, "float[a, b] y")
    (weight,) = [n.inputs[1] for n in broken.nodes("MatMul")]
    weight.values = np.full((32, 48), np.nan, np.float32)
    (note,) = QuantizeCodebook()(broken)
    assert not note.changed
    assert "NaN" in note.text


def test_a_small_output_convolution_stays_float() -> None:
    after = model("c = Conv(x, w) y = Conv(c, last)", IMAGE, "float[a, b, c, d] y")
    convs = after.nodes("Conv")
    convs[0].inputs[1].values = np.ones((64, 8, 3, 3), np.float32)
    convs[1].inputs[1] = after.constant("last", np.ones((2, 64, 1, 1), np.float32))
    notes = QuantizeCodebook(smallest=1)(after)
    assert [note.changed for note in notes] == [False, True]
    assert "a small output layer" in notes[0].text
    notes = QuantizeCodebook(smallest=1, layers=("last=int8",))(after)
    assert [note.changed for note in notes] == [True]


def test_small_weights_are_left() -> None:
    assert not QuantizeCodebook(smallest=10_000)(model("y = MatMul(x, m)", ROWS, "float[a, b] y"))


WRONG = [
    pytest.param({"layers": ("a=int32",)}, "unknown format", id="int32"),
    pytest.param({"codebook": "nf4", "bits": 3}, "nf4 has 4 bits", id="nf4"),
    pytest.param({"codebook": "kmeans", "dim": 4}, "use vector", id="dim"),
    pytest.param({"codebook": "vector", "dim": 9}, "2 to 8 values", id="long"),
    pytest.param({"codebook": "vector", "dim": 3}, "do not fill groups of 64", id="group"),
    pytest.param({"codebook": "huffman"}, "unknown codebook", id="kind"),
    pytest.param({"bits": 9}, "1 to 8 bits", id="bits"),
    pytest.param({"seed": -1}, "seed is at least 0", id="seed"),
    pytest.param({"smallest": 0}, "smallest is at least 1", id="smallest"),
    pytest.param({"group_size": 0}, "at least one value", id="group-size"),
]


@pytest.mark.parametrize(("options", "reason"), WRONG)
def test_wrong_options(options: dict[str, Any], reason: str) -> None:
    with pytest.raises((ValueError, RecipeError), match=reason):
        QuantizeCodebook(**options)


def test_formats_that_the_target_does_not_unpack() -> None:
    openvino = load_target("openvino")
    with pytest.raises(ValueError, match="openvino cannot run weights in it: use one of int8"):
        QuantizeCodebook(layers=("a=int2",), target=openvino)
    after = model("y = MatMul(x, m)", ROWS, "float[a, b] y")
    after.raise_opset(25)
    QuantizeCodebook(bits=2, target=openvino)(after)
    assert "uint8" in {str(c.dtype) for c in constants(after)}


def test_opsets_that_are_asked_for() -> None:
    assert QuantizeCodebook().opset == 21
    assert QuantizeCodebook(bits=2).opset == QuantizeCodebook(bits=3).opset == 10
    assert QuantizeCodebook(bits=3, layers=("last=int4",)).opset == 21
    mobile = replace(load_target("openvino"), stored_formats=("int8", "uint8"))
    assert QuantizeCodebook(target=mobile).opset == 10


def test_samples_are_wanted_for_importance_alone() -> None:
    assert not QuantizeCodebook.wants("samples", {})
    assert QuantizeCodebook.wants("samples", {"range": "importance"})
    with pytest.raises(DataError, match="give --data"):
        QuantizeCodebook(range="importance")(model("y = MatMul(x, m)", ROWS, "float[a, b] y"))


def test_importance_lowers_the_error_of_the_output(tmp_path: Path) -> None:
    """Half of the inputs are 30 times as large, and meet the smaller weights: these matter more."""
    before = model("y = MatMul(x, m)", ROWS, "float[a, b] y")
    x = np.random.default_rng(3).normal(size=(8, 32, 32)).astype(np.float32)
    x[..., ::2] *= 30
    np.savez(tmp_path / "x.npz", x=x)
    samples = open_samples(tmp_path / "x.npz", before)
    (matmul,) = before.nodes("MatMul")
    exact, db = np.array(matmul.inputs[1].values), {}
    exact[::2] /= 10
    matmul.inputs[1].values = exact
    plain = QuantizeCodebook(bits=3, granularity="tensor")
    for pass_ in (plain, replace(plain, range="importance", samples=samples)):
        after = before.copy()
        pass_(after)
        found = np.stack([runtime.session(after).run(None, {"x": one})[0] for one in x])
        db[pass_.range] = sqnr_db(x @ exact, found)
    assert db["importance"] > db["mse"] + 3, db


def test_what_is_not_observed_is_said(tmp_path: Path) -> None:
    after = model("y = Gather(table, x)", "int64[1, 7] x", "float[a, b, c] y")
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 1, 7), np.int64))
    samples = open_samples(tmp_path / "x.npz", after)
    (note,) = QuantizeCodebook(range="importance", samples=samples)(after)
    assert note.changed
    assert "mse: its input was not observed" in note.text


def test_the_same_bytes_each_time() -> None:
    for options in ({"bits": 3}, {"codebook": "vector", "bits": 4, "dim": 2}):
        one, other, seeded = (model("y = MatMul(x, m)", ROWS, "float[a, b] y") for _ in range(3))
        QuantizeCodebook(**options)(one)
        QuantizeCodebook(**options)(other)
        QuantizeCodebook(**options, seed=5)(seeded)
        assert one.to_proto() == other.to_proto()
        assert (one.to_proto() == seeded.to_proto()) == ("codebook" not in options)


@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_what_formats_lose_at_four_bits(granularity: Any) -> None:
    """On normal weights k-means is best, NF4 next, then int4, and powers of two last."""
    before, db = model("y = MatMul(x, m)", ROWS, "float[a, b] y", opset=21), {}
    wide = np.random.default_rng(0).normal(size=(32, 1024)).astype(np.float32)
    before.nodes("MatMul")[0].inputs[1] = before.constant("wide", wide)
    shared: dict[str, Any] = {"granularity": granularity, "group_size": 16}
    passes: dict[str, Pass] = {
        "kmeans": QuantizeCodebook(**shared),
        "nf4": QuantizeCodebook("nf4", **shared),
        "power-of-two": QuantizeCodebook("power-of-two", **shared),
        "int4": QuantizeWeights("int4", range="mse", **shared),
    }
    for name, pass_ in passes.items():
        after = before.copy()
        pass_(after)
        db[name] = sqnr_db(outputs(before), outputs(after))
    assert db["kmeans"] > db["nf4"] > db["power-of-two"] + 2, db
    assert db["kmeans"] > db["int4"] + 0.5, db
