"""The compute encoding: fused by ONNX Runtime, chosen where it pays; what targets refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.errors import RecipeError
from onnxq.lint import conformance
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.passes import QuantizeWeights
from onnxq.recipes import Recipe, load_recipe, plan, wants
from onnxq.synthetic import synthetic_samples
from onnxq.targets import Target, load_target
from onnxq.workflow import optimize

ORT = load_target("ort-cpu")
FLAT = "float[4, 100] x"
SHAPES = {"w": (100, 96), "wt": (96, 100), "left": (96, 4), "b": (96,), "b2": (1, 96)}


def model(body: str, inputs: str = FLAT, opset: int = 25, **shapes: tuple[int, ...]) -> Model:
    proto = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}]> '
        f"g ({inputs}) => (float[a, b] y) {{ {body} }}"
    )
    proto.ir_version = 13 if opset > 23 else 10
    rng = np.random.default_rng(3)
    for name, shape in (SHAPES | shapes).items():
        if f"{name}," in body or f"{name})" in body:
            value = rng.normal(0, 0.2, shape).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(value, name))
    return Model.from_proto(proto)


def loaded(model: Model, folder: Path) -> Model:
    """The model as ONNX Runtime has it."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Model.load(folder / "optimized.onnx")


def outputs(model: Model, **options: Any) -> np.ndarray:
    session = runtime.session(model, **options)
    return np.stack([session.run(None, f)[0] for f in synthetic_samples(model, 3)])


FORMATS = ["int2", "uint2", "int4", "uint4", "int8", "uint8"]
SHARED = [
    pytest.param({"granularity": "tensor"}, id="tensor"),
    pytest.param({"granularity": "channel"}, id="channel"),
    pytest.param({"granularity": "group", "group_size": 16}, id="16"),
    pytest.param({"granularity": "group", "group_size": 32}, id="32-short"),
    pytest.param({"granularity": "group", "group_size": 64}, id="64-short"),
]


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_matmul_is_fused(
    format: str, shared: dict[str, Any], tmp_path: Path, *, symmetric: bool
) -> None:
    before = model("y = MatMul(x, w)")
    options: Any = {"format": format, "encoding": "compute", "symmetric": symmetric, **shared}
    after = before.copy()
    (note,) = QuantizeWeights(target=ORT, **options)(after)
    assert note.text.endswith("compute")
    result = loaded(after, tmp_path)
    assert [n.op for n in result.nodes()] == ["MatMulNBits"]
    assert result.nodes()[0].attrs["bits"] == int(format[-1])
    # The kernel brings the activations to 8 bits, in groups.
    assert sqnr_db(outputs(after, optimize="off"), outputs(after)) > 35


FUSED = [
    pytest.param("y = Gemm(x, w)", FLAT, 1, id="gemm"),
    pytest.param("y = Gemm(x, w, b)", FLAT, 1, id="gemm-bias"),
    pytest.param("y = Gemm<transB = 1>(x, wt, b)", FLAT, 1, id="gemm-transposed"),
    pytest.param("h = MatMul(x, w) y = Add(h, b)", FLAT, 1, id="matmul-bias"),
    pytest.param(
        "y = If(c) <then_branch = p () => (float[4, 96] u) { u = MatMul(x, w) }, "
        "else_branch = q () => (float[4, 96] v) { h = Gemm<transB = 1>(x, wt) v = Neg(h) }>",
        f"{FLAT}, bool c",
        2,
        id="bodies",
    ),
]


@pytest.mark.parametrize(("body", "inputs", "count"), FUSED)
@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_other_layouts_are_fused(
    body: str, inputs: str, count: int, granularity: Any, tmp_path: Path
) -> None:
    before = model(body, inputs)
    after = before.copy()
    notes = QuantizeWeights("int4", granularity, encoding="compute", target=ORT)(after)
    assert [n.changed for n in notes] == [True] * count
    result = loaded(after, tmp_path)
    assert len(result.nodes("MatMulNBits")) == count
    assert not result.nodes("DequantizeLinear")
    assert sqnr_db(outputs(before), outputs(after)) > 12
    assert not conformance(after, ORT).violations


NOT_FUSED = [
    pytest.param("y = MatMul(left, x)", "on the right", id="left"),
    pytest.param("y = Gemm<alpha = 0.5>(x, w)", "alpha", id="alpha"),
    pytest.param("y = Gemm(x, w, b2)", "one value a column", id="bias"),
    pytest.param("h = MatMul(x, w) k = MatMul(x, w) y = Add(h, k)", "more than once", id="twice"),
]


@pytest.mark.parametrize(("body", "reason"), NOT_FUSED)
def test_what_is_not_fused_is_stored(body: str, reason: str, tmp_path: Path) -> None:
    """A DequantizeLinear would be computed at every run."""
    after = model(body, "float[40, 100] x", left=(96, 40))
    notes = QuantizeWeights("int4", "group", 16, encoding="compute", target=ORT)(after)
    assert notes[0].changed
    assert reason in notes[0].text
    assert not loaded(after, tmp_path).nodes("DequantizeLinear", "Cast", "Reshape")


def test_sizes_without_a_kernel() -> None:
    after = model("y = MatMul(x, w)")
    (note,) = QuantizeWeights("int4", "group", 48, encoding="compute", target=ORT)(after)
    assert "groups of 16, 32" in note.text
    after = model("y = MatMul(x, w)")
    (note,) = QuantizeWeights("int16", encoding="compute", target=ORT)(after)
    assert "no kernel for int16" in note.text
    old = model("y = MatMul(x, w)", opset=17)
    (note,) = QuantizeWeights("int8", "group", 16, encoding="compute", target=ORT)(old)
    assert "storage (opset 17" in note.text


LARGE: dict[str, Any] = {"w": (512, 512)}
CHOICES = [
    pytest.param("float[1, 512] x", LARGE, "compute", id="one-row"),
    pytest.param("float[N, 512] x", LARGE, "compute", id="batch"),
    pytest.param("float[256, 512] x", LARGE, "storage", id="many-rows"),
    pytest.param("float[1, 64] x", {"w": (64, 64)}, "storage", id="tiny"),
    pytest.param("float[1, T, 512] x", LARGE, "storage", id="unknown"),
]


@pytest.mark.parametrize(("inputs", "shapes", "encoding"), CHOICES)
def test_auto_chooses_by_measured_times(inputs: str, shapes: Any, encoding: str) -> None:
    body = "y = MatMul(x, w)"
    if "T" in inputs:
        body = "h = MatMul(x, w) k = Constant<value_ints = [-1, 512]>() y = Reshape(h, k)"
    after = model(body, inputs, **shapes)
    (note,) = QuantizeWeights(target=ORT)(after)
    assert note.text.endswith(encoding)


def test_auto_without_a_target_stores() -> None:
    after = model("y = MatMul(x, w)", "float[1, 512] x", **LARGE)
    (note,) = QuantizeWeights()(after)
    assert note.text.endswith("storage")


def weights_recipe(**options: Any) -> Recipe:
    return Recipe("mine", "", ("raise_opset", "quantize_weights"), {"quantize_weights": options})


def test_the_opset_is_raised_as_far_as_formats_need() -> None:
    for name, opset in (("int8-weights", 13), ("int4-weights", 21), ("int2-weights", 25)):
        passes = plan(load_recipe(name), ORT, None).passes
        assert next(p.version for p in passes if p.name == "raise_opset") == opset  # type: ignore[attr-defined]
        assert not wants(load_recipe(name), "samples")
    assert wants(weights_recipe(range="importance"), "samples")
    with_most = replace(ORT, max_opset=23)
    first = plan(weights_recipe(format="int2"), with_most, None).passes[0]
    assert first.version == 23  # type: ignore[attr-defined]


REFUSED = [
    pytest.param("ort-cpu", "float4e2m1", "format 'float4e2m1': ort-cpu cannot run", id="unknown"),
    pytest.param("tflite-int8", "int8", "neither unpacks int8 weights", id="no-floats"),
    pytest.param("tensorrt", "int2", "kernels: int4", id="no-kernel"),
    pytest.param("openvino", "int2", "openvino cannot run weights in it", id="format"),
]


@pytest.mark.parametrize(("target", "format", "reason"), REFUSED)
def test_refused_before_the_model_is_read(
    target: str, format: str, reason: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        f'description = ""\npasses = ["quantize_weights"]\n[quantize_weights]\nformat = "{format}"'
    )
    with pytest.raises(RecipeError, match=reason):
        optimize(tmp_path / "missing.onnx", recipe=str(recipe), target=target)


def test_beside_other_passes_it_is_left_out() -> None:
    passes = plan(load_recipe("int8"), load_target("tflite-int8"), None).passes
    assert [p.name for p in passes if p.name.startswith("quantize")] == ["quantize_static"]


def test_a_target_that_folds_nothing_gets_kernels_or_nothing() -> None:
    target: Target = load_target("tensorrt")
    after = model("h = MatMul(x, w) l = Neg(left) y = MatMul(left, h)", left=(96, 4))
    notes = QuantizeWeights("int4", "group", 128, target=target)(after)
    texts = {n.node: (n.changed, n.text) for n in notes}
    assert any("not unpacked at load" in text for changed, text in texts.values() if not changed)
    wide = model("y = MatMul(x, w)", "float[1, 512] x", **LARGE)
    (note,) = QuantizeWeights("int4", "group", 128, target=target)(wide)
    assert note.text.endswith("compute")
    assert not conformance(wide, target).violations
    assert "weights" in {f.rule for f in conformance(wide, load_target("esp-dl")).violations}


def test_check_knows_what_kernels_take() -> None:
    cases: list[tuple[dict[str, Any], str, str]] = [
        (dict(format="int8"), "tensorrt", "weights of MatMul in int8"),
        (dict(format="int4", granularity="group", group_size=32), "tensorrt", "groups of 32"),
        (dict(format="int4"), "tensorrt", "scales of groups"),
    ]
    for options, target, text in cases:
        after = model("y = MatMul(x, w)", "float[1, 512] x", **LARGE)
        QuantizeWeights(encoding="compute", target=ORT, **options)(after)
        found = conformance(after, load_target(target)).violations
        assert any(text in f.text and f.rule == "weight_kernels" for f in found), found
