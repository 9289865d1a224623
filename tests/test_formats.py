"""Static Q/DQ in other formats: 16-bit activations, 4-bit weights, and both mixed by layer."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from onnxq import lint, runtime
from onnxq.data import Samples, open_samples
from onnxq.errors import RecipeError
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.passes import QuantizeStatic, RaiseOpset, SimplifyQdq
from onnxq.targets import Target, load_target

SHAPES = {"w": (16, 8, 3, 3), "v": (16, 16, 1, 1), "b": (16,), "g": (16, 24), "m": (24, 10),
          "c": (24,), "one": (16, 1, 3, 3)}  # fmt: skip
TAIL = "p = GlobalAveragePool(e) f = Flatten(p)"
CONV = f"a = Conv(x, w, b) r = Relu(a) e = Conv(r, v, b) {TAIL} y = Gemm(f, g, c)"
MATMUL = f"a = Conv(x, w) e = Conv(a, v) {TAIL} h = MatMul(f, g) y = MatMul(h, m)"


def model(body: str, opset: int = 21, image: str = "1, 8, 12, 12") -> Model:
    proto = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}]> '
        f"g (float[{image}] x) => (float[1, d] y) {{ {body} }}"
    )
    rng = np.random.default_rng(3)
    used = set(re.findall(r"\w+", body))
    for name, shape in SHAPES.items():
        if name in used:
            # channels of very different size: one scale for all of them is a poor one
            spread = np.exp(rng.uniform(-3, 1, (shape[0], *[1] * (len(shape) - 1))))
            values = (rng.normal(0, 0.3, shape) * spread).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.checker.check_model(proto, full_check=True)
    return Model.from_proto(proto)


def feeds(before: Model) -> list[dict[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(11)
    shape = before.graph.inputs[0].shape
    return [{"x": rng.normal(0, 1, shape).astype(np.float32)} for _ in range(8)]


def everything(name: str = "ort-cpu") -> Target:
    """The target without its costs: on graphs as small as these, floats are always faster."""
    return replace(load_target(name), costs=None)


def quantized(before: Model, target: Target | None = None, **options: Any) -> Model:
    aim = target or everything()
    after = before.copy()
    pass_ = QuantizeStatic(aim, open_samples(feeds(before), before), **options)
    RaiseOpset(max(aim.opset, pass_.opset))(after)
    pass_(after)
    SimplifyQdq(aim.integer_moves)(after)
    onnx.checker.check_model(after.to_proto(), full_check=True)
    return after


def run(after: Model, optimize: runtime.Level = "all") -> NDArray[Any]:
    session = runtime.session(after.to_proto(), optimize=optimize)
    return np.stack([session.run(None, feed)[0] for feed in feeds(after)])


def fidelity(before: Model, after: Model) -> float:
    return float(sqnr_db(run(before), run(after)))


def executed(after: Model, path: Path) -> Counter[str]:
    """Operators of the model as onnxruntime executes it (layout transformations left out)."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(
        after.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return Counter(node.op_type for node in onnx.load(path / "optimized.onnx").graph.node)


# Floors in dB, of 8 and 4-bit weights. Rounding errors of convolutions are balanced, which gains
# several dB on real images and costs one on the noise around 0 that these graphs are fed with.
EIGHT_BITS, FOUR_BITS = 28.0, 9.0


@pytest.mark.parametrize(("body", "fused"), [(CONV, "QGemm"), (MATMUL, "MatMulIntegerToFloat")])
def test_four_bit_weights_run_on_the_kernels_of_eight_bits(
    body: str, fused: str, tmp_path: Path
) -> None:
    before = model(body)
    after = quantized(before, weights="int4")
    ops = executed(after, tmp_path)
    assert ops["QLinearConv"] == 2
    assert ops[fused]
    assert not {"Cast", "Conv", "MatMul", "Gemm"} & ops.keys()
    assert FOUR_BITS < fidelity(before, after) < fidelity(before, quantized(before))
    assert not lint.conformance(after, load_target("ort-cpu")).violations


def test_bit_patterns_of_four_bits() -> None:
    """Two values a byte, the first in the low half; in [-7, 7], so that scales are positive."""
    proto = quantized(model(CONV), weights="int4").to_proto()
    (stored,) = [t for t in proto.graph.initializer if t.name.startswith("w_")
                 and t.data_type == onnx.TensorProto.INT4]  # fmt: skip
    (scale,) = [numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == "w_scale"]
    (w,) = [numpy_helper.to_array(t) for t in model(CONV).to_proto().graph.initializer
            if t.name == "w"]  # fmt: skip
    assert (scale > 0).all()
    packed = np.frombuffer(stored.raw_data, np.uint8)
    nibbles = np.stack([packed & 0xF, packed >> 4], axis=1).reshape(w.shape).astype(np.int8)
    q = np.where(nibbles > 7, nibbles - 16, nibbles)
    assert np.abs(q).max() == 7
    # Half a step to the nearest; where rounding errors are balanced, up to a whole one.
    assert np.abs(q - w / scale.reshape(-1, 1, 1, 1)).max() <= 1


def test_widths_are_worth_their_bits() -> None:
    before = model(CONV)
    found = {
        (a, w): fidelity(before, quantized(before, activations=a, weights=w))
        for a in ("a8", "a16")
        for w in ("int4", "int8")
    }
    assert found["a16", "int8"] > found["a8", "int8"]
    assert found["a8", "int8"] > found["a8", "int4"] + 6
    assert found["a16", "int4"] > found["a8", "int4"] - 0.5


def test_sixteen_bits_compute_in_folded_floats(tmp_path: Path) -> None:
    """No weight is dequantized at run time: only activations are."""
    before = model(CONV)
    after = quantized(before, activations="a16")
    ops = executed(after, tmp_path)
    assert ops["QuantizeLinear"] == 4
    assert not [op for op in ops if op.startswith("QLinear") or op in ("Cast", "Mul")]
    written = onnx.load(tmp_path / "optimized.onnx").graph
    constants = {t.name for t in written.initializer}
    at_each_run = [n.input[0] for n in written.node if n.op_type == "DequantizeLinear"]
    assert not constants & {*at_each_run}
    types = {node.outputs[0].dtype for node in after.nodes("QuantizeLinear")}
    assert types == {np.dtype(np.uint16)}
    notes = QuantizeStatic(everything(), samples(before), activations="a16")(before)
    assert all("computed in floats" in n.text for n in notes if n.changed)
    found = lint.conformance(after, load_target("ort-cpu"))
    assert not found.violations
    assert found.integer_nodes == 1  # Flatten moves the integers that are there
    assert any("computes uint16 in floats" in f.text for f in found.fallbacks)


def samples(before: Model) -> Samples:
    return open_samples(feeds(before), before)


@pytest.mark.parametrize("image", ["1, 8, 12, 12", "1, 1, 12, 12"])
def test_onnxruntime_leaves_float_layers_alone(image: str) -> None:
    """Between pairs it would quantize their weights, with one scale for all channels."""
    one = image.startswith("1, 1")
    body = CONV.replace("x, w, b", "x, one, b") if one else CONV
    before = model(body, image=image)
    names = [n.name for n in before.nodes("Conv")]
    asked: list[dict[str, Any]] = [{"activations": "a16"}, {"layers": (f"{names[1]}=float",)}]
    for options in asked:
        after = quantized(before, **options)
        assert sqnr_db(run(after, "off"), run(after)) > 60, options
    if not one:
        plain = quantized(before, replace(everything(), requantizes=False), activations="a16")
        assert sqnr_db(run(plain, "off"), run(plain)) < 45  # what the guard is for


def test_layers_of_two_formats() -> None:
    """A tensor that is read in two formats has two pairs; each layer has its own."""
    body = "a = Conv(x, w) r = Relu(a) k = Conv(r, v) l = Conv(r, v) e = Add(k, l)"
    before = model(f"{body} {TAIL} y = Gemm(f, g)")
    first, second, third = (n.name for n in before.nodes("Conv"))
    target = everything("generic")
    after = quantized(before, target, layers=(f"{second}=a16", f"{third}=a8w4"))
    reads = {n.name: n.inputs[0].inputs[0].inputs[0].dtype for n in after.nodes("Conv")}
    assert reads == {first: np.int8, second: np.int16, third: np.int8}
    weights = {n.name: str(n.inputs[1].inputs[0].inputs[0].dtype) for n in after.nodes("Conv")}
    assert weights == {first: "int8", second: "int8", third: "int4"}
    (add,) = after.nodes("Add")  # reads the wider of what feeds it
    assert {t.inputs[0].inputs[0].dtype for t in add.inputs} == {np.dtype(np.int16)}
    assert not lint.conformance(after, target).violations
    assert fidelity(before, after) > fidelity(before, quantized(before, target, weights="int4"))


def test_a_better_format_for_the_worst_layer() -> None:
    before = model(CONV)
    worst = before.nodes("Conv")[0].name
    low = fidelity(before, quantized(before, layers=(f"{worst}=w4",)))
    for asked in ("float", "int8", "a16w8"):
        layers = (f"{worst}=w4", f"{worst}={asked}")
        assert fidelity(before, quantized(before, layers=layers)) > low + 3


def test_what_is_asked_for_wins_over_rules_and_costs() -> None:
    before = model("a = Conv(x, w) e = Conv(a, v) p = GlobalAveragePool(e) y = Flatten(p)")
    dear, all_samples = load_target("ort-cpu"), samples(before)
    notes = QuantizeStatic(dear, all_samples)(before.copy())
    assert not [n for n in notes if n.changed]
    notes = QuantizeStatic(dear, all_samples, layers=("op:Conv=int8",))(before.copy())
    found = [n.text for n in notes if n.changed and "Conv" in n.text]
    assert found == ["Conv: uint8 activations, int8 weights"] * 2
    notes = QuantizeStatic(everything(), all_samples, layers=("first=float",))(before.copy())
    assert "asked for by the override 'first=float'" in [n.text for n in notes]


REFUSED = [
    ("tensorrt", {"activations": "a16"}, "tensorrt executes no activations of 16 bits"),
    ("tensorrt", {"weights": "int4"}, "tensorrt executes no int4 weights in Conv"),
    ("qnn-htp", {"weights": "int2"}, "qnn-htp executes no int2 weights"),
    ("qnn-htp", {"bias": "float"}, "qnn-htp wants biases as int32, not as float"),
    ("ort-cpu", {"granularity": "group"}, "ort-cpu executes no weights with scales of groups"),
    ("tensorrt", {"bias": "int32"}, "tensorrt wants biases as float, not as int32"),
    ("ort-cpu", {"layers": ("first=int5",)}, "unknown format 'int5'"),
]


@pytest.mark.parametrize(("target", "options", "reason"), REFUSED)
def test_what_the_target_does_not_execute_is_refused(
    target: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RecipeError, match=reason):
        QuantizeStatic(load_target(target), samples(model(CONV)), **options)


ASKED = [
    ("openvino", "op:Conv=int4", "openvino executes no int4 weights in Conv"),
    ("ort-cpu", "op:Gemm=float8e4m3fn", "ort-cpu executes no float8e4m3fn weights in Gemm"),
    ("openvino", "first=a16", "openvino executes no activations of 16 bits"),
]


@pytest.mark.parametrize(("target", "layer", "reason"), ASKED)
def test_overrides_are_refused_before_samples_are_run(
    target: str, layer: str, reason: str, tmp_path: Path
) -> None:
    before, file = model(CONV), tmp_path / "stats.npz"
    pass_ = QuantizeStatic(load_target(target), samples(before), calibration=file, layers=(layer,))
    with pytest.raises(RecipeError, match=f"asked for by the override '{layer}': {reason}"):
        pass_(before)
    assert not file.exists()


def test_operators_without_kernels_for_narrow_weights_keep_theirs() -> None:
    after = quantized(model(CONV), everything("qnn-htp"), weights="int4")
    formats = {
        n.op: str(n.inputs[1].inputs[0].inputs[0].dtype) for n in after.nodes("Conv", "Gemm")
    }
    assert formats == {"Conv": "int4", "Gemm": "uint8"}


WIDE = ("qnn-htp", "qnn-htp-u16", "generic", "ort-cpu", "esp-dl")
NARROW = WIDE[:-1]  # ESP-DL has no 4-bit weights


@pytest.mark.parametrize(
    ("formats", "name"),
    [
        *(({"activations": "a16"}, name) for name in WIDE),
        *(({"weights": "int4"}, name) for name in NARROW),
    ],
)
def test_results_keep_the_targets_rules(name: str, formats: dict[str, Any]) -> None:
    target = everything(name)
    before = model(CONV)
    after = quantized(before, target, **formats)
    assert not lint.conformance(after, target).violations
    assert fidelity(before, after) > (EIGHT_BITS if "activations" in formats else FOUR_BITS)


def test_an_old_opset_has_no_narrow_or_wide_formats() -> None:
    before = model(CONV, opset=17)
    asked: list[tuple[dict[str, Any], str]] = [
        ({"weights": "int4"}, "opset 17 has no int4: opset 21 is needed"),
        ({"activations": "a16"}, "opset 17 has no uint16: opset 21 is needed"),
    ]
    for options, text in asked:
        notes = QuantizeStatic(everything(), samples(before), **options)(before.copy())
        assert {n.text for n in notes} == {text}
    first, *_ = (n.name for n in before.nodes("Conv"))
    notes = QuantizeStatic(everything(), samples(before), layers=(f"{first}=w4",))(before.copy())
    assert [n.node for n in notes if not n.changed] == [first]


OPSETS: list[tuple[dict[str, Any], int]] = [
    ({}, 10),
    ({"weights": "int4"}, 21),
    ({"weights": "int2"}, 25),
    ({"activations": "a16"}, 21),
    ({"layers": ("first=a16",)}, 21),
    ({"layers": ("first=float",)}, 10),
]


@pytest.mark.parametrize(("options", "opset"), OPSETS)
def test_the_opset_that_the_formats_need(options: dict[str, Any], opset: int) -> None:
    assert QuantizeStatic(load_target("ort-cpu"), samples(model(CONV)), **options).opset == opset


def test_float_biases_beside_integer_weights(tmp_path: Path) -> None:
    before = model(CONV)
    after = quantized(before, bias="float")
    assert all(isinstance(n.inputs[2], gs.Constant) for n in after.nodes("Conv", "Gemm"))
    assert executed(after, tmp_path)["QLinearConv"] == 2
    assert fidelity(before, after) == pytest.approx(fidelity(before, quantized(before)), abs=1)


def test_a_bias_that_overflows_beside_wide_activations_stays_float() -> None:
    before = model(CONV)
    (bias,) = [t for t in before.graph.tensors().values() if t.name == "b"]
    bias.values = np.full(16, 3e4, np.float32)
    after = quantized(before, everything("generic"), activations="a16")
    assert isinstance(after.nodes("Conv")[0].inputs[2], gs.Constant)
    exact = quantized(before, everything("qnn-htp"), activations="a16")
    assert exact.nodes("Conv")[0].inputs[2].inputs[0].op == "DequantizeLinear"


def test_groups_where_the_target_has_them() -> None:
    before, target = model(MATMUL), everything("generic")
    found = {
        granularity: fidelity(
            before,
            quantized(before, target, weights="int4", granularity=granularity, group_size=8),
        )
        for granularity in ("tensor", "channel", "group")
    }
    assert found["group"] > found["channel"] > found["tensor"]
    after = quantized(before, target, weights="int4", granularity="group", group_size=8)
    made = {n.name: n.inputs[1].inputs[0] for n in after.nodes("Conv", "MatMul")}
    assert {(n.attrs["block_size"], n.attrs["axis"]) for n in made.values()} == {(8, 0), (8, 1)}
    assert not lint.conformance(after, target).violations
    assert lint.conformance(after, load_target("openvino")).violations


def test_what_is_computed_in_floats_has_no_groups() -> None:
    """Its weights are unpacked at load, with a scale a channel."""
    aim, before = replace(everything(), grouped=True), model(CONV)
    formats = {"activations": "a16", "weights": "int4"}
    grouped = quantized(before, aim, **formats, granularity="group", group_size=4)
    assert grouped.to_proto() == quantized(before, aim, **formats).to_proto()


def test_groups_are_for_few_bits() -> None:
    after = quantized(model(CONV), everything("generic"), granularity="group")
    assert not any("block_size" in n.attrs for n in after.nodes("DequantizeLinear"))


def test_grouped_weights_leave_the_bias_float() -> None:
    after = quantized(model(CONV), everything("generic"), weights="int4", granularity="group")
    assert all(isinstance(n.inputs[2], gs.Constant) for n in after.nodes("Conv", "Gemm"))


MOVED = ["Pad(r, pads)", "DepthToSpace<blocksize = 1>(r)", "SpaceToDepth<blocksize = 1>(r)",
         "MaxPool<kernel_shape = [2, 2]>(r)", "Transpose<perm = [0, 1, 3, 2]>(r)",
         "Tile(r, ones)", "Slice(r, zero, two, three)"]  # fmt: skip


@pytest.mark.parametrize("move", MOVED, ids=lambda m: m.split("(")[0].split("<")[0])
def test_wide_integers_are_moved_where_kernels_take_them(move: str) -> None:
    inits = {
        "pads": [0, 0, 1, 1, 0, 0, 1, 1],
        "ones": [1, 1, 1, 1],
        "zero": [0],
        "two": [9],
        "three": [3],
    }
    named = "".join(
        f" {name} = Constant<value_ints = {values}>()"
        for name, values in inits.items()
        if name in move
    )
    before = model(f"{named} a = Conv(x, w, b) r = Relu(a) k = {move} e = Conv(k, v, b) "
                   f"{TAIL} y = Gemm(f, g, c)")  # fmt: skip
    assert fidelity(before, quantized(before, activations="a16")) > 30
