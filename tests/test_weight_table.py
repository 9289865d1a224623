"""What inspect and the report say of each weight: format, bits, entropy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from test_packed_weights import CASES

from onnxq import inspect, optimize
from onnxq.cli import main
from onnxq.model import Model
from onnxq.numerics.entropy import (
    WHOLE,
    entropy_bits,
    entropy_of,
    excerpt,
    float_zeros,
    histogram,
)
from onnxq.passes.packed_weights import stored_weights
from onnxq.report import rendered
from onnxq.weight_table import totals, weight_table

MODELS = Path(__file__).parent.parent / "models"
EXPECTED = {  # format, weights, weights that share a scale, bits with scales and zero points
    "dq-tensor": ("uint8", 40, 40, (40 + 5) / 40 * 8),
    "dq-channel": ("int8", 40, 8, (40 + 20) / 40 * 8),
    "dq-blocks": ("uint4", 40, 3, (20 + 60 + 8) / 40 * 8),
    "q-dq-floats": ("float32", 40, 8, (160 + 20 + 5) / 40 * 8),
    "storage": ("uint8", 40, 8, (40 + 20 + 1) / 40 * 8),
    "storage-groups": ("int8", 40, 3, (45 + 60) / 40 * 8),
    "codebook": ("codebook of 16", 40, 8, (20 + 64 + 20) / 40 * 8),
    "codebook-of-vectors": ("codebook of 9 x 2", 40, 40, (20 + 72 + 4) / 40 * 8),
    "nbits-4": ("uint4", 240, 14, (144 + 72) / 240 * 8),
    "nbits-2": ("uint2", 240, 14, (72 + 72) / 240 * 8),
    "nbits-table-bytes": ("uint4", 288, 16, (144 + 72 + 9) / 288 * 8),
    "qlinear-conv": ("int8", 108, 18, (108 + 24 + 6) / 108 * 8),
    "dynamic-lstm": ("int8", 128, 8, (128 + 64 + 16) / 128 * 8),
    "dynamic-matmul": ("uint8", 40, None, (40 + 5) / 40 * 8),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_form(name: str) -> None:
    first, *_ = weight_table(Model.from_proto(CASES[name].proto()))
    assert (first.format, first.weights, first.scale_for) == EXPECTED[name][:3]
    assert first.bits == pytest.approx(EXPECTED[name][3])
    assert first.form == CASES[name].form
    assert first.entropy is not None
    assert 0 < first.entropy < 9


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_entropy_of_numbers_of_each_width(bits: int) -> None:
    rng = np.random.default_rng(1)
    few = rng.integers(0, 3, 5001)
    share = np.bincount(few) / few.size
    expected = -(share * np.log2(share)).sum()
    if bits < 8:
        packed = np.zeros(-(-few.size * bits // 8), np.uint8)
        for i, value in enumerate(few.tolist()):
            packed[i * bits // 8] |= value << (i * bits % 8)
        raw = packed
    else:
        kind = {8: np.uint8, 16: np.uint16, 32: np.float32}[bits]
        raw = few.astype(kind).view(np.uint8)
    assert entropy_of(raw, bits, few.size) == pytest.approx(expected)
    assert histogram(raw, bits).sum() >= few.size


@pytest.mark.parametrize("name", EXPECTED)
def test_zeros_are_those_of_the_values(name: str) -> None:
    model = Model.from_proto(CASES[name].proto())
    (_, _, stands), *_ = stored_weights(model)
    first, *_ = weight_table(model)
    if stands.read is None:
        assert first.zeros is None
        return
    assert first.zeros == pytest.approx(np.mean(stands.read().values() == 0))


@pytest.mark.parametrize("bits", [16, 32])
def test_zeros_of_many_floats_are_estimated(bits: int) -> None:
    rng = np.random.default_rng(1)
    wide = rng.normal(0, 1, 1 << 21).astype(f"f{bits // 8}") * (rng.random(1 << 21) < 0.3)
    wide[0] = -0.0
    raw = wide.astype(f"f{bits // 8}").view(np.uint8)
    assert float_zeros(raw, bits) == np.mean(wide == 0)
    assert float_zeros(excerpt(raw), bits) == pytest.approx(0.7, abs=0.01)


def test_entropy_of_nothing_and_of_one_value() -> None:
    assert entropy_bits(np.zeros(4, np.int64)) == 0
    assert entropy_of(np.full(100, 7, np.uint8), 8) == 0
    assert entropy_of(np.empty(0, np.uint8), 8) == 0


def test_a_large_tensor_is_judged_by_a_part() -> None:
    rng = np.random.default_rng(1)
    raw = np.clip(rng.normal(128, 20, 5 * WHOLE), 0, 255).astype(np.uint8)
    assert entropy_of(raw, 8) == pytest.approx(entropy_bits(np.bincount(raw)), abs=0.01)


def test_fake_quantized_floats_show() -> None:
    """A float weight of 16 values is worth 4 bits: that is what entropy is there for."""
    rng = np.random.default_rng(1)
    wide = rng.normal(0, 1, 4096).astype(np.float32)
    few = (np.round(wide * 2).clip(-8, 7) * np.float32(0.031)).astype(np.float32)
    assert entropy_of(few.view(np.uint8), 32) < 4 < 9 < entropy_of(wide.view(np.uint8), 32)


def test_totals_and_text(tmp_path: Path) -> None:
    small = tmp_path / "small.onnx"
    report = optimize(MODELS / "char_gpt.onnx", small, recipe="int4-weights", validate=False)
    found = inspect(small)
    assert found.stored == report.stored
    by_format = {t.format: t for t in totals(found.stored)}
    assert set(by_format) == {"uint4", "int8"}
    assert sum(t.tensors for t in by_format.values()) == len(found.stored) == 14
    assert 4 < by_format["uint4"].bits < 5.2
    assert by_format["uint4"].entropy < 4
    for text in (report.text(), rendered(found.print_to)):
        assert "weights stored in" in text
        assert "uint4" in text
    assert "largest" in rendered(found.print_to)


def test_the_command_tells_all_to_machines() -> None:
    done = CliRunner().invoke(main, ["inspect", str(MODELS / "lang_lstm.onnx"), "--json", "-"])
    rows = json.loads(done.stdout)["stored"]
    assert {"name", "format", "bits", "entropy", "scale_for", "shape"} <= rows[0].keys()
    assert {row["format"] for row in rows} == {"float32"}
    assert all(row["bits"] == 32 for row in rows)


def test_a_model_without_weights() -> None:
    model = Model.from_proto(CASES["dq-tensor"].proto())
    model.graph.nodes.clear()
    assert weight_table(model) == ()


@pytest.mark.parametrize(
    ("recipe", "share", "format"),
    [
        ("float16", 0.0, "float16"),
        ("codebook-weights", 0.98, "codebook of 16"),
        ("int4-weights", 0.98, "uint4"),
    ],
)
def test_however_they_are_stored_all_weights_are_seen(
    recipe: str, share: float, format: str, tmp_path: Path
) -> None:
    plain = inspect(MODELS / "digits_cnn.onnx")
    optimize(MODELS / "digits_cnn.onnx", tmp_path / "small.onnx", recipe=recipe, validate=False)
    small = inspect(tmp_path / "small.onnx")
    assert sum(row.weights for row in small.stored) == sum(row.weights for row in plain.stored)
    assert {row.format for row in small.stored} >= {format}
    assert sum(row.size_bytes for row in small.stored) < 0.55 * plain.coverage.weight_bytes
    # scales and codebooks are no weights; BatchNormalizations were folded
    assert 0.98 < small.coverage.weight_bytes / plain.coverage.weight_bytes <= 1
    assert share <= small.coverage.weight_share <= share + 0.02


def test_weights_behind_a_call_of_a_function() -> None:
    found = inspect(_function())
    assert [(row.op, row.weights) for row in found.stored] == [("MatMul", 12)]


def _function() -> onnx.ModelProto:
    proto = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 17, "own" : 1]>
        g (float[2,4] x) => (float[2,3] y) <float[4,3] w> { y = own.layer(x, w) }
        <domain: "own", opset_import: ["" : 17]>
        layer (a, b) => (c) { c = MatMul(a, b) }
    """)
    weight = onnx.numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    proto.graph.initializer.append(weight)
    return proto
