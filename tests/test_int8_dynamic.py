"""The recipe int8-dynamic, and dynamic layers beside static ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnxq import check, load, optimize, runtime
from onnxq.core import Pass
from onnxq.data import open_samples
from onnxq.errors import BudgetError, RecipeError
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.passes import QuantizeDynamic, QuantizeStatic, QuantizeWeights, simplify_qdq
from onnxq.recipes import Recipe, load_recipe, plan
from onnxq.settings import configured
from onnxq.targets import load_target, names

MODELS = Path(__file__).parent.parent / "models"


def top1(subject: Model | Path, data: Path, n: int) -> tuple[np.ndarray, float]:
    samples = open_samples(data, load(subject)).take(n)
    session = runtime.session(subject)
    made = np.concatenate([runtime.run(session, feed)["logits"] for feed in samples])
    guesses = made.argmax(-1).reshape(-1)
    assert samples.labels is not None
    return made, float((guesses == np.asarray(samples.labels).reshape(-1)).mean())


@pytest.mark.parametrize(
    ("name", "op", "floor_db"),
    [("lang_lstm", "DynamicQuantizeLSTM", 36), ("char_gpt", "MatMulInteger", 34)],
)
def test_real_models(name: str, op: str, floor_db: float, tmp_path: Path) -> None:
    source, result = MODELS / f"{name}.onnx", tmp_path / "result.onnx"
    report = optimize(source, result, recipe="int8-dynamic")
    assert report.size_bytes[1] < 0.31 * report.size_bytes[0]
    assert report.coverage.macs_share > 0.8
    assert report.coverage.weight_share > 0.9
    assert load(result).nodes(op)
    assert check(result).is_clean
    before, after = (top1(p, MODELS / f"{name}.eval.npz", 120) for p in (source, result))
    assert sqnr_db(before[0], after[0]) > floor_db
    assert after[1] > before[1] - 0.005 - 1 / 120
    with pytest.raises(BudgetError, match=f"already quantized .*{op}"):
        optimize(result, recipe="int8-dynamic")


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    files = [tmp_path / "one.onnx", tmp_path / "two.onnx"]
    for file in files:
        optimize(MODELS / "lang_lstm.onnx", file, recipe="int8-dynamic", validate=False)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_data_tell_sizes(tmp_path: Path) -> None:
    target = load_target("ort-cpu")
    recipe = load_recipe("int8-dynamic")
    feeds = [{"x": np.ones((3, 5), np.float32)}]
    body = (
        '<ir_version: 8, opset_import: ["": 13]> g (float[a, b] x) => (float[a, b] y) {y = Neg(x)}'
    )
    samples = open_samples(feeds, Model.from_proto(parser.parse_model(body)))
    synthetic = replace(samples, synthetic=True)
    for given, shapes in ((samples, {"x": (3, 5)}), (synthetic, None), (None, None)):
        passes = plan(recipe, target, given).passes
        (pass_,) = [p for p in passes if isinstance(p, QuantizeDynamic)]
        assert pass_.shapes == shapes


DYNAMIC = {"ort-cpu", "ort-cpu-avx2", "ort-arm64", "ort-mobile", "generic"}


@pytest.mark.parametrize("name", names())
def test_targets_that_have_none_are_refused_at_once(name: str) -> None:
    target = load_target(name)
    assert bool(target.dynamic) == (name in DYNAMIC)
    if target.dynamic:
        assert plan(load_recipe("int8-dynamic"), target, None).passes
        return
    with pytest.raises(RecipeError, match=f"^{name} does not quantize activations at run time"):
        plan(load_recipe("int8-dynamic"), target, None)
    both = Recipe("both", "", ("quantize_static", "quantize_dynamic", "quantize_weights"), {})
    kept = [p.name for p in plan(both, target, None).passes]
    assert kept[0] == "quantize_static"
    assert "quantize_dynamic" not in kept


def test_weights_that_no_pass_is_for_are_named() -> None:
    body = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[5, 2, 32] x) => (float[a, b, c, d] y) '
        "{ y = LSTM<hidden_size = 32>(x, w, w) }"
    )
    proto = parser.parse_model(body)
    values = np.ones((1, 128, 32), np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(values, "w"))
    with pytest.raises(
        BudgetError, match=r"quantized: its weights \(LSTM\) are too small .* target"
    ):
        optimize(proto, recipe="int8", target="tensorrt")


def test_layers_that_are_left_to_dynamic_kernels_need_them() -> None:
    """int8-mixed keeps products from quantize_static; without kernels they would stay floats."""
    target = load_target("openvino")
    with pytest.raises(RecipeError, match="at run time: use the recipe int8 with --data, or int8-"):
        plan(load_recipe("int8-mixed"), target, None)
    with pytest.raises(RecipeError, match=r"use the recipe int8 with --data$"):  # not int8-weights
        plan(load_recipe("int8-mixed"), load_target("tensorrt"), None)
    spared = configured(load_recipe("int8-hybrid"), None, ("op:MatMul=float", "first=float"))
    assert plan(spared, target, None).passes


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('kernel = "Gemm"', "dynamic MatMul: kernel is one of 'MatMulInteger'"),
        ('kernel = "MatMulInteger"\nspeed = 1', "dynamic MatMul: unknown key speed"),
        ('kernel = "MatMulInteger"\nfloats = { mac = 1.0 }', "measured against each other"),
    ],
)
def test_target_files_are_checked(table: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    weights = 'weights = { format = "int8", symmetric = true, per_channel = true }'
    file.write_text(f'extends = "tensorrt"\n[dynamic.MatMul]\n{weights}\n{table}\n')
    with pytest.raises(RecipeError, match=message):
        load_target(str(file))


# Static for convolutions, dynamic for recurrent layers and large products, storage for the rest.

MIXED = """<ir_version: 8, opset_import: ["": 17]>
g (float[1, 16, 24, 24] x) => (float[12, 1, 1, 96] y, float[12, 1, 8] z) {
    a = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, f1)  b = Relu(a)
    c = Conv<pads = [1, 1, 1, 1]>(b, f2)  d = Relu(c)
    m = ReduceMean<axes = [3], keepdims = 0>(d)
    s = Transpose<perm = [2, 0, 1]>(m)
    y = LSTM<hidden_size = 96>(s, lw, lr)
    k = Constant<value_ints = [12, 1, 96]>()  r = Reshape(y, k)  z = MatMul(r, w)
}"""
MIXED_SHAPES = {
    "f1": (64, 16, 3, 3), "f2": (64, 64, 3, 3), "lw": (1, 384, 64), "lr": (1, 384, 96), "w": (96, 8)
}  # fmt: skip


def test_static_dynamic_and_storage_in_sequence() -> None:
    proto = parser.parse_model(MIXED)
    rng = np.random.default_rng(5)
    for name, shape in MIXED_SHAPES.items():
        values = rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    before = Model.from_proto(proto)
    feeds = [{"x": rng.normal(0, 1, (1, 16, 24, 24)).astype(np.float32)} for _ in range(6)]
    target = load_target("ort-cpu")
    samples = open_samples(feeds, before)
    passes: list[Pass] = [
        QuantizeStatic(target, samples), simplify_qdq, QuantizeDynamic(target),
        QuantizeWeights(target=target, encoding="storage"),
    ]  # fmt: skip
    after = before.copy()
    notes = [note for pass_ in passes for note in pass_(after)]
    done = {n.rule for n in notes if n.changed}
    assert {"quantize_static", "quantize_dynamic", "quantize_weights"} <= done
    dynamic = [n.text for n in notes if n.rule == "quantize_dynamic"]
    assert len(dynamic) == 2  # the LSTM and the small MatMul; nothing of static layers
    assert "LSTM: activations quantized at run time" in dynamic[0]
    assert "floats are faster" in dynamic[1]
    one, two = runtime.session(before), runtime.session(after)
    for name in ("y", "z"):
        a, b = (np.stack([s.run([name], f)[0] for f in feeds]) for s in (one, two))
        assert sqnr_db(a, b) > 25
    assert check(after).is_clean
