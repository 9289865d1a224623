"""A pruned weight stays exactly zero through every recipe, and every way to choose integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.core import Pass, Pipeline
from onnxq.data import Samples, open_samples
from onnxq.model import Model
from onnxq.passes import (
    PASSES,
    ConvertFloat16,
    EqualizeLayers,
    PruneWeights,
    QuantizeCodebook,
    QuantizeDynamic,
    QuantizeStatic,
    QuantizeWeights,
    ReconstructCodebook,
    ReconstructStatic,
    ReconstructWeights,
    RoundAdaptively,
    ScaleSalient,
    SmoothActivations,
    WidenChannels,
)
from onnxq.passes.masks import survived
from onnxq.passes.packed_weights import shape_of, stored_weights
from onnxq.recipes import Recipe, load_recipe, names, plan
from onnxq.targets import load_target

MODELS = Path(__file__).parents[1] / "models"
CPU = load_target("ort-cpu")


def values_of(model: Model) -> dict[str, np.ndarray]:
    """What each stored weight stands for, by the node that reads it."""
    found = {}
    for node, tensor, stands in stored_weights(model):
        if len(shape_of(node, tensor, stands)) > 1:
            grid = None if stands.read is None else stands.read()
            values = stands.numbers.values if grid is None else grid.values()
            found[f"{node.name} {tensor.name}"] = np.asarray(values, np.float32)
    for name, tensor in model.graph.tensors().items():
        if "float8" in str(tensor.dtype):  # not among those that stand for weights
            found[name] = np.asarray(tensor.values).astype(np.float32)
    return found


def zeros(model: Model) -> int:
    return sum(int((values == 0).sum()) for values in values_of(model).values())


def keeps(model: Model, samples: Samples, *passes: Pass) -> Model:
    """Prune, run passes, and look: zeros where they were, that also compute."""
    before = model.copy()
    PruneWeights(samples)(before)
    count = zeros(before)
    assert count > 0.4 * sum(v.size for v in values_of(before).values())
    after = before.copy()
    Pipeline("test", passes)(after)
    assert zeros(after) >= count
    assert before.pruned
    assert not [row for row in survived(after) if row.kept is not None and row.kept != row.zeros]
    feed = next(iter(samples))
    one, two = (runtime.session(m).run(None, feed)[0] for m in (before, after))
    assert np.isfinite(two).all()
    assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.7
    return after


# Recipes that do not prune by themselves.
QUANTIZING = [
    name for name in names() if not ((r := load_recipe(name)).choose or r.is_pruning)
]  # fmt: skip


@pytest.mark.parametrize("model", ["digits_cnn", "digits_mobilenet", "char_gpt", "lang_lstm"])
@pytest.mark.parametrize("name", QUANTIZING)
def test_recipes_keep_zeros(name: str, model: str) -> None:
    """prune_weights behind the float passes of a recipe: what the recipe makes has its zeros."""
    recipe = load_recipe(name)
    first = [p for p in ("inline_functions", "raise_opset", "convert_float32") if p in PASSES]
    passes = [p for p in recipe.passes if p not in (*first, "cleanup")]
    loaded = Model.load(MODELS / f"{model}.onnx")
    samples = open_samples(MODELS / f"{model}.calib.npz", loaded).take(16)
    options = {key: value for key, value in recipe.options.items() if key in passes}
    ready = Recipe("first", "", (*first, "cleanup"))
    plan(ready, CPU, samples)(loaded)
    keeps(loaded, samples, plan(Recipe(name, "", tuple(passes), options), CPU, samples))


def small() -> tuple[Model, Samples]:
    """Convolutions, a normalisation, and products that are fed back."""
    body = (
        "a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1) n = BatchNormalization(a, g, b1, b1, g) "
        "r = Relu(n) c = Conv<pads = [1, 1, 1, 1]>(r, w2, b2) s = Relu(c) "
        "p = GlobalAveragePool(s) f = Flatten(p) h = MatMul(f, m1) q = Relu(h) y = MatMul(q, m2)"
    )
    proto = parser.parse_model(
        '<ir_version: 11, opset_import: ["": 25]> t (float[1, 8, 9, 9] x) => (float[a, b] y) '
        f"{{ {body} }}"
    )
    rng = np.random.default_rng(0)
    shapes = {"w1": (16, 8, 3, 3), "w2": (32, 16, 3, 3), "m1": (32, 64), "m2": (64, 40)}
    for name, shape in shapes.items():
        value = rng.normal(0, 0.2, shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    for name, size in (("b1", 16), ("b2", 32), ("g", 16)):
        value = (1 + 0.1 * rng.random(size)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    model = Model.from_proto(proto)
    mix = rng.normal(size=(3, 8, 1, 1))
    causes = rng.normal(size=(24, 3, 9, 9)) + rng.normal(size=(24, 3, 1, 1))
    x = np.einsum("ncij,ck->nkij", causes, mix[..., 0, 0]) + 0.2 * rng.normal(size=(24, 8, 9, 9))
    return model, open_samples([{"x": v[None].astype(np.float32)} for v in x], model)


WEIGHTS: dict[str, dict[str, Any]] = {
    "minmax": {"format": "int8", "granularity": "channel"},
    "uint4": {"format": "uint4", "granularity": "group", "group_size": 16, "symmetric": False},
    "mse": {"format": "uint4", "granularity": "group", "symmetric": False, "range": "mse"},
    "hqq": {"format": "uint4", "granularity": "group", "symmetric": False, "range": "hqq"},
    "standardized": {"format": "int4", "granularity": "channel", "range": "standardized"},
    "balanced": {"format": "int4", "granularity": "channel", "rounding": "balanced"},
    "balanced-groups": {"format": "uint4", "granularity": "group", "group_size": 32,
                        "symmetric": False, "rounding": "balanced"},
    "stochastic": {"format": "uint4", "granularity": "group", "symmetric": False,
                   "rounding": "stochastic"},
    "int2": {"format": "int2", "granularity": "group", "group_size": 16, "symmetric": True},
    "float8": {"format": "float8e4m3fn", "granularity": "channel"},
    "tensor": {"format": "int8", "granularity": "tensor"},
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_rounding_keeps_zeros(name: str) -> None:
    model, samples = small()
    after = keeps(model, samples, QuantizeWeights(**WEIGHTS[name]))
    assert all(stands.form != "float" for _, _, stands in stored_weights(after))


@pytest.mark.parametrize("kind", ["kmeans", "nf4", "power-of-two", "logarithmic", "exponential"])
@pytest.mark.parametrize("bits", [4, 3])
def test_codebooks_keep_zeros(kind: Any, bits: int) -> None:
    model, samples = small()
    if kind == "nf4" and bits == 3:
        return
    own = QuantizeCodebook(codebook=kind, bits=bits)
    keeps(model, samples, own)
    keeps(model, samples, ReconstructCodebook(samples, codebook=kind, bits=bits), own)


def test_vectors_leave_a_pruned_weight_to_linear_numbers() -> None:
    model, samples = small()
    own = QuantizeCodebook(codebook="vector", bits=4)
    after = keeps(model, samples, own)
    assert all(stands.form == "storage" for _, _, stands in stored_weights(after))
    PruneWeights(samples)(model)
    assert all("does not keep the zeros" in note.text for note in own(model))


PASS_LISTS: dict[str, Any] = {
    "equalize": lambda s: (EqualizeLayers(), PASSES["fold_batchnorm"]),
    "smooth": lambda s: (SmoothActivations(CPU, s, insert=True), QuantizeStatic(CPU, s)),
    "salient": lambda s: (
        ScaleSalient(s, format="uint4", granularity="group", symmetric=False),
        QuantizeWeights(format="uint4", granularity="group", symmetric=False),
    ),
    "cleanup": lambda s: (PASSES["cleanup"],),
    "float16": lambda s: (ConvertFloat16(),),
    "dynamic": lambda s: (QuantizeDynamic(CPU),),
    "static": lambda s: (QuantizeStatic(CPU, s, range="minmax"),),
    "a8w4": lambda s: (QuantizeStatic(CPU, s, weights="int4"),),
    "rounded": lambda s: (QuantizeStatic(CPU, s), RoundAdaptively(s)),
    "rounded-w4": lambda s: (QuantizeStatic(CPU, s, weights="int4"), RoundAdaptively(s)),
    "again": lambda s: (QuantizeStatic(CPU, s), ReconstructStatic(s)),
    "again-w4": lambda s: (QuantizeStatic(CPU, s, weights="int4"), ReconstructStatic(s)),
    "wider": lambda s: (QuantizeStatic(CPU, s), WidenChannels(CPU)),
    "reconstructed": lambda s: (ReconstructWeights(s), QuantizeWeights(
        format="uint4", granularity="group", symmetric=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", PASS_LISTS)
def test_passes_keep_zeros(name: str) -> None:
    model, samples = small()
    if name != "equalize":
        PASSES["cleanup"](model)
    keeps(model, samples, *PASS_LISTS[name](samples))


def test_zeros_that_were_lost_are_seen() -> None:
    """Also where as many others are zero in their place."""
    for change in (
        lambda w: np.where(w == 0, np.float32(1e-9), w),
        lambda w: np.ascontiguousarray(w[::-1]),
    ):
        model, samples = small()
        with pytest.raises(AssertionError):
            keeps(model, samples, Changed(change))


class Changed:
    name = "changed"

    def __init__(self, change: Callable[[np.ndarray], np.ndarray]) -> None:
        self.change = change

    def __call__(self, model: Model) -> list[Any]:
        weight = model.nodes("MatMul")[0].inputs[1]
        weight.values = self.change(weight.values)
        return []
