"""integer_io: what becomes an integer, in which scale, and that a client gets what floats give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, parser

from onnxq import runtime
from onnxq.data import open_samples
from onnxq.errors import ModelError
from onnxq.model import Model
from onnxq.passes import IntegerIo, QuantizeStatic, simplify_qdq
from onnxq.ports import Affine, ports_of
from onnxq.targets import load_target
from onnxq.testing import Checked, check

MODELS = Path(__file__).parent.parent / "models"
INITS = (
    "float s = {0.1}, uint8 z = {128}, float s2 = {0.2}, uint8 z2 = {7}, int8 zi = {0}, "
    "float w = {0.5}"
)
U8 = Affine("uint8", float(np.float32(0.1)), 128)
FEEDS = [{"x": np.linspace(-9, 9, 24, dtype=np.float32).reshape(1, 4, 2, 3)}]


def text(
    body: str, inputs: str = "float[1, 4, 2, 3] x", outputs: str = "float[1, 4, 2, 3] y",
    inits: str = "", opset: int = 17,
) -> str:  # fmt: skip
    """A model as text; all its scales are in INITS."""
    both = ", ".join(filter(None, (INITS, inits)))
    head = f'<ir_version: 8, opset_import: ["": {opset}, "com.microsoft": 1]>'
    return f"{head} g ({inputs}) => ({outputs}) <{both}> {{ {body} }}"


def pair(source: str, made: str, scale: str = "s", zero: str = "z") -> str:
    return (
        f"{made}_q = QuantizeLinear({source}, {scale}, {zero}) "
        f"{made} = DequantizeLinear({made}_q, {scale}, {zero}) "
    )


def middle(source: str = "a", made: str = "b") -> str:
    """Something computed between two pairs."""
    return f"{made}_c = Mul({source}, w) " + pair(f"{made}_c", made)


def samples(model: str, **arrays: Any) -> Any:
    loaded = Model.from_proto(parser.parse_model(model))
    return open_samples([arrays], loaded)


def affines(done: Checked) -> dict[str, Affine]:
    return {name: port.affine for name, port in ports_of(done.model).items()}


def dtypes(done: Checked) -> dict[str, str]:
    graph = done.model.graph
    return {t.name: str(np.dtype(t.dtype)) for t in (*graph.inputs, *graph.outputs)}


def test_what_is_quantized_inside_gives_the_scales() -> None:
    done = check(IntegerIo(), text(pair("x", "a") + middle(made="y")), feeds=FEEDS)
    assert dtypes(done) == {"x": "uint8", "y": "uint8"}
    assert affines(done) == {"x": U8, "y": U8}
    assert done.ops == {"DequantizeLinear": 1, "Mul": 1, "QuantizeLinear": 1}
    assert [n.text for n in done.notes] == [
        "input: uint8, scale 0.1, zero point 128",
        "output: uint8, scale 0.1, zero point 128",
    ]


MOVES = {
    "Transpose": ("m = Transpose <perm = [0, 2, 3, 1]> (x)", "1, 2, 3, 4"),
    "Reshape": ("m = Reshape(x, to)", "2, 12"),
    "Flatten": ("m = Flatten(x)", "1, 24"),
    "Squeeze": ("m = Squeeze(x, first)", "4, 2, 3"),
    "Unsqueeze": ("m = Unsqueeze(x, first)", "1, 1, 4, 2, 3"),
    "Slice": ("m = Slice(x, one, three, one)", "1, 2, 2, 3"),
    "Tile": ("m = Tile(x, twice)", "2, 4, 2, 3"),
    "Expand": ("m = Expand(x, wide)", "2, 4, 2, 3"),
    "Gather": ("m = Gather<axis = 1>(x, two)", "1, 2, 2, 3"),
    "Pad": ("m = Pad(x, pads)", "1, 4, 4, 3"),
    "Pad-reflect": ('m = Pad<mode = "reflect">(x, pads)', "1, 4, 4, 3"),
    "DepthToSpace": ("m = DepthToSpace<blocksize = 2>(x)", "1, 1, 4, 6"),
    "MaxPool": ("m = MaxPool<kernel_shape = [2, 2]>(x)", "1, 4, 1, 2"),
    "Resize": ('m = Resize<mode = "nearest">(x, , sizes)', "1, 4, 4, 6"),
    "Identity": ("m = Identity(x)", "1, 4, 2, 3"),
}
CONSTANTS = (
    "int64[2] to = {2, 12}, int64[1] first = {0}, int64[1] one = {1}, int64[1] three = {3}, "
    "int64[4] twice = {2, 1, 1, 1}, int64[4] wide = {2, 4, 2, 3}, int64[2] two = {0, 2}, "
    "int64[8] pads = {0, 0, 1, 0, 0, 0, 1, 0}, float[4] sizes = {1.0, 1.0, 2.0, 2.0}"
)


@pytest.mark.parametrize("zero", ["z", "zi"])
@pytest.mark.parametrize("op", MOVES)
def test_data_movement_stands_on_integers(op: str, zero: str) -> None:
    (body, shape), name = MOVES[op], op.partition("-")[0]
    outputs = f"float[{shape}] y"
    front = body + " " + pair("m", "a", zero=zero) + "y = Mul(a, w)"
    done = check(IntegerIo(), text(front, outputs=outputs, inits=CONSTANTS), feeds=FEEDS)
    assert [node.op for node in done.model.graph.inputs[0].outputs] == [name]
    assert done.ops == {name: 1, "DequantizeLinear": 1, "Mul": 1}
    assert done.declined == ["output: stays float, no samples tell its range"]

    behind = pair("x", "a", zero=zero) + "y" + body[1:].replace("(x", "(a")
    done = check(IntegerIo(), text(behind, outputs=outputs, inits=CONSTANTS), feeds=FEEDS)
    assert done.ops == {name: 1}
    assert dtypes(done) == dict.fromkeys("xy", "uint8" if zero == "z" else "int8")


def test_a_split_moves_integers_to_all_its_outputs() -> None:
    body = pair("x", "a") + "y, m = Split<axis = 1>(a) e = Exp(m)"
    outputs = "float[1, 2, 2, 3] y, float[1, 2, 2, 3] e"
    done = check(IntegerIo(), text(body, outputs=outputs), feeds=FEEDS)
    assert done.ops == {"Split": 1, "DequantizeLinear": 1, "Exp": 1}
    assert dtypes(done) == {"x": "uint8", "y": "uint8", "e": "float32"}


def test_inputs_that_are_joined_are_joined_as_integers() -> None:
    inputs = "float[1, 4, 2, 3] x, float[1, 2, 2, 3] t"
    inits = "float[1, 1, 2, 3] one = {1.0, 1.0, 1.0, 1.0, 1.0, 1.0}"
    moved = "r = Transpose <perm = [0, 1, 2, 3]> (t)"
    body = f"{moved} m = Concat <axis = 1> (x, r, one) " + pair("m", "a") + "y = Exp(a)"
    source = text(body, inputs, "float[1, 7, 2, 3] y", inits)
    feed = {**FEEDS[0], "t": np.linspace(-3, 3, 12, dtype=np.float32).reshape(1, 2, 2, 3)}
    done = check(IntegerIo(), source, feeds=[feed])
    assert done.ops == {"Transpose": 1, "Concat": 1, "DequantizeLinear": 1, "Exp": 1}
    assert affines(done) == {"x": U8, "t": U8}
    far = source.replace(moved, pair("t", "r", "s2", "z2"))
    apart = check(IntegerIo(), far, feeds=[feed])
    assert apart.ops["QuantizeLinear"] == 1  # the scales differ: what is joined are floats
    assert {a.scale for a in affines(apart).values()} == {U8.scale, float(np.float32(0.2))}


def test_what_cannot_move_integers_moves_floats() -> None:
    inits = "int64[8] pads = {0, 0, 1, 0, 0, 0, 1, 0}, float five = {5.0}"
    body = "m = Pad(x, pads, five) " + pair("m", "a") + "y = Exp(a)"
    done = check(IntegerIo(), text(body, "float[1, 4, 2, 3] x", "float[1, 4, 4, 3] y", inits),
                 feeds=FEEDS)  # fmt: skip
    assert done.ops["Pad"] == done.ops["QuantizeLinear"] == 1
    assert done.ops["DequantizeLinear"] == 2
    assert affines(done) == {"x": U8}


def test_targets_that_want_pairs_around_data_movement_keep_them() -> None:
    body = MOVES["Transpose"][0] + " " + pair("m", "a") + "y = Exp(a)"
    source = text(body, outputs="float[1, 2, 3, 4] y")
    done = check(IntegerIo(integer_moves=False), source, feeds=FEEDS)
    assert done.ops == {"DequantizeLinear": 2, "Transpose": 1, "QuantizeLinear": 1, "Exp": 1}


def test_the_scale_that_most_readers_have_is_taken() -> None:
    body = (
        pair("x", "other", "s2", "z2") + pair("x", "a") + MOVES["Identity"][0] + " "
        + pair("m", "b") + "e = Exp(x) ab = Add(a, b) abo = Add(ab, other) y = Add(abo, e)"
    )  # fmt: skip
    done = check(IntegerIo(), text(body), feeds=FEEDS)
    assert affines(done) == {"x": U8}
    assert done.ops["QuantizeLinear"] == 1  # to the other scale
    exp = next(n for n in done.model.graph.nodes if n.op == "Exp")
    assert exp.inputs[0].inputs[0].op == "DequantizeLinear"


def test_an_output_that_is_also_read_inside() -> None:
    body = pair("x", "a") + middle(made="y") + "e = Exp(y)"
    done = check(IntegerIo(), text(body, outputs="float[1, 4, 2, 3] y, float[1, 4, 2, 3] e"),
                 feeds=FEEDS)  # fmt: skip
    assert dtypes(done) == {"x": "uint8", "y": "uint8", "e": "float32"}


def test_two_outputs_of_the_same_integers() -> None:
    body = pair("x", "a") + middle() + "y = DequantizeLinear(b_q, s, z) t = Identity(b)"
    done = check(IntegerIo(), text(body, outputs="float[1, 4, 2, 3] y, float[1, 4, 2, 3] t"),
                 feeds=FEEDS)  # fmt: skip
    assert dtypes(done) == {"x": "uint8", "y": "uint8", "t": "uint8"}


def test_an_output_that_is_an_input_quantized() -> None:
    done = check(IntegerIo(), text(pair("x", "y")), feeds=FEEDS)
    assert done.ops == {"Identity": 1}


def test_integers_that_are_an_output_stay_one() -> None:
    body = "y = QuantizeLinear(x, s, z) d = DequantizeLinear(y, s, z) e = Exp(d)"
    done = check(IntegerIo(), text(body, outputs="uint8[1, 4, 2, 3] y, float[1, 4, 2, 3] e"),
                 feeds=FEEDS)  # fmt: skip
    assert done.ops == {"DequantizeLinear": 2, "QuantizeLinear": 1, "Exp": 1}
    assert "output: is of uint8, no floats" in done.declined


def test_samples_give_ranges_to_what_is_computed_in_floats() -> None:
    source = text("y = Exp(x)")
    given = samples(source, x=np.linspace(-1, 2, 24, dtype=np.float32).reshape(1, 4, 2, 3))
    done = check(IntegerIo(samples=given), source, feeds=list(given))
    found = affines(done)
    assert found["x"].type == found["y"].type == "int8"
    assert found["x"].scale == pytest.approx(3 / 255)
    assert found["x"].zero_point == round(-128 + 1 / found["x"].scale)
    assert found["y"].scale == pytest.approx(np.exp(2) / 255)
    assert found["y"].zero_point == -128
    for target, format in (("ort-cpu", "uint8"), ("tflite-int8", "int8")):
        done = check(IntegerIo(load_target(target), given), source, feeds=list(given))
        assert dtypes(done) == {"x": format, "y": format}


def test_scales_of_targets_with_powers_of_two_are_such() -> None:
    source = text("y = Exp(x)")
    given = samples(source, x=np.ones((1, 4, 2, 3), np.float32))
    done = check(IntegerIo(load_target("esp-dl"), given), source, feeds=list(given))
    assert affines(done)["x"] == Affine("int8", 2**-6, 0)


@pytest.mark.parametrize("op", ["Softmax", "Sigmoid", "HardSigmoid", "Tanh"])
def test_known_ranges_need_no_samples(op: str) -> None:
    done = check(IntegerIo(), text(pair("x", "a") + f"y = {op}(a)"), feeds=FEEDS)
    lo = -1 if op == "Tanh" else 0
    found = affines(done)["y"]
    assert found.type == "uint8"
    assert found.dequantize(np.array([0, 255], np.uint8)) == pytest.approx([lo, 1], abs=0.01)


def test_what_a_target_demands_of_a_result_is_kept() -> None:
    source = text(pair("x", "a", zero="zi") + "y = Softmax(a)")
    given = samples(source, x=FEEDS[0]["x"])
    target = load_target("tflite-int8")
    assert affines(check(IntegerIo(target, given), source))["y"] == Affine("int8", 1 / 256, -128)
    done = check(IntegerIo(target, given, "uint8"), source)
    assert affines(done)["y"] == Affine("uint8", 1 / 256, 0)


DECLINES = [
    pytest.param("y = Cast<to = 6>(x)", "int64[1, 4, 2, 3] x", "int32[1, 4, 2, 3] y",
                 ["input: is of int64, no floats", "output: is of int32, no floats"], id="ints"),
    pytest.param("y = Not(x)", "bool[2] x", "bool[2] y",
                 ["input: is of bool, no floats", "output: is of bool, no floats"], id="bools"),
    pytest.param("y = Identity(x)", "string[2] x", "string[2] y",
                 ["input: is of strings, no floats", "output: is of strings, no floats"],
                 id="strings"),
    pytest.param("y = Exp(x)", "float[2] x", "float[2] y",
                 ["input: stays float, no samples tell its range",
                  "output: stays float, no samples tell its range"], id="no-samples"),
    pytest.param("y = Constant<value = float[1] {1.0}>() t = Cast<to = 6>(x)", "int64[2] x",
                 "float[1] y, int32[2] t",
                 ["input: is of int64, no floats",
                  "output: stays float, nothing in the model computes it",
                  "output: is of int32, no floats"], id="constant"),
    pytest.param("y = Resize(x, , scales)", "float[1, 1, 2, 2] x, float[4] scales",
                 "float[a, b, c, d] y",
                 ["input: stays float, it tells the size of what is computed",
                  "input: stays float, no samples tell its range",
                  "output: stays float, no samples tell its range"], id="scales-of-a-resize"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "inputs", "outputs", "declined"), DECLINES)
def test_declines(body: str, inputs: str, outputs: str, declined: list[str]) -> None:
    model = Model.from_proto(parser.parse_model(text(body, inputs, outputs)))
    before = model.to_proto()
    notes = IntegerIo()(model)
    assert [n.text for n in notes] == declined
    assert not any(n.changed for n in notes)
    assert model.to_proto() == before


def test_what_is_to_be_kept_stays() -> None:
    done = check(IntegerIo(keep=("y*",)), text(pair("x", "a") + middle(made="y")), feeds=FEEDS)
    assert dtypes(done) == {"x": "uint8", "y": "float32"}
    assert done.declined == ["output: stays float, it is in keep"]


def test_values_that_are_not_finite_stay_floats() -> None:
    source = text("y = Log(x)")
    given = samples(source, x=np.zeros((1, 4, 2, 3), np.float32))
    model = Model.from_proto(parser.parse_model(source))
    texts = [n.text for n in IntegerIo(samples=given)(model)]
    assert "output: stays float, it has values that are not finite" in texts
    assert list(ports_of(model)) == ["x"]


def test_an_input_that_is_an_output_stays() -> None:
    model = Model.from_proto(parser.parse_model(text("y = Exp(x)")))
    model.graph.outputs.append(model.graph.inputs[0])
    texts = [n.text for n in IntegerIo()(model)]
    assert texts[0] == "input: stays float, it is an output as it is"


def test_old_opsets_have_no_quantize_linear() -> None:
    model = Model.from_proto(parser.parse_model(
        '<ir_version: 8, opset_import: ["": 9]> g (float[2] x) => (float[2] y) { y = Exp(x) }'
    ))  # fmt: skip
    (note,) = IntegerIo()(model)
    assert "opset 9 has no QuantizeLinear" in note.text
    assert not note.changed


@pytest.mark.parametrize("optimize", ["off", "all"])
@pytest.mark.parametrize(("zero", "asked"), [("z", "int8"), ("zi", "uint8")])
def test_the_other_sign_is_the_same_steps(zero: str, asked: Any, optimize: Any) -> None:
    between = middle().replace("s, z)", f"s, {zero})")
    source = text(pair("x", "a", zero=zero) + between + "y = Identity(b)")
    plain = check(IntegerIo(), source, feeds=FEEDS)
    done = check(IntegerIo(type=asked), source, feeds=FEEDS)
    assert set(dtypes(done).values()) == {asked}
    shift = 128 if asked == "uint8" else -128
    for name, affine in affines(done).items():
        before = affines(plain)[name]
        assert (affine.scale, affine.zero_point) == (before.scale, before.zero_point + shift)
    every = np.arange(256).reshape(1, 4, 8, 8)
    (a,), (b,) = (
        runtime.session(_any_size(one.model), optimize=optimize).run(
            None, {"x": (every - (0 if kind == "uint8" else 128)).astype(kind)}
        )
        for one, kind in ((plain, dtypes(plain)["x"]), (done, asked))
    )
    np.testing.assert_array_equal(a.astype(int) + shift, b.astype(int))


def _any_size(model: Model) -> onnx.ModelProto:
    """The model with free axes at its interface."""
    proto = model.to_proto()
    for value in (*proto.graph.input, *proto.graph.output):
        for i, dim in enumerate(value.type.tensor_type.shape.dim):
            dim.dim_param = f"{value.name}{i}"
    del proto.graph.value_info[:]
    return proto


@pytest.mark.parametrize("asked", ["auto", "int8", "uint8"])
@pytest.mark.parametrize("opset", [17, 21])
def test_sixteen_bits_inside_are_sixteen_outside(opset: int, asked: Any) -> None:
    proto = parser.parse_model(
        text(pair("x", "a", zero="z16") + "y = Softmax(a)", inits="int16 z16 = {0}", opset=opset)
    )
    for node in proto.graph.node[:2] if opset < 21 else ():
        node.domain = "com.microsoft"
    done = check(IntegerIo(type=asked), proto, feeds=FEEDS)
    wanted = {"auto": "int16", "int8": "int16", "uint8": "uint16"}[asked]
    assert set(dtypes(done).values()) == {wanted}
    domains = {n.domain for n in done.model.nodes("QuantizeLinear", "DequantizeLinear")}
    assert (domains == {"com.microsoft"}) is (opset < 21)


def test_floats_of_other_sizes_are_cast_on_the_way() -> None:
    body = "f = Cast<to = 1>(x) " + pair("f", "a") + middle() + "y = Cast<to = 10>(b)"
    source = text(body, "float16[1, 4, 2, 3] x", "float16[1, 4, 2, 3] y")
    feed = {"x": FEEDS[0]["x"].astype(np.float16)}
    done = check(IntegerIo(), source, feeds=[feed])
    assert done.ops == {"DequantizeLinear": 1, "Mul": 1, "QuantizeLinear": 1}
    assert affines(done) == {"x": U8, "y": U8}
    both = source.replace("y = Cast<to = 10>(b)", "c = Cast<to = 10>(b) e = Exp(x) y = Add(c, e)")
    done = check(IntegerIo(samples=samples(both, **feed)), both, feeds=[feed], atol=1e-2)
    assert dtypes(done) == {"x": "uint8", "y": "uint8"}


def test_bodies_read_integer_inputs_too() -> None:
    body = (
        pair("x", "a") + "y = If (yes) <then_branch = g1 () => (float[1, 4, 2, 3] t)"
        " { t = Add(x, a) }, else_branch = g2 () => (float[1, 4, 2, 3] e) { e = Exp(x) }>"
    )
    source = text(body, "float[1, 4, 2, 3] x, bool yes")
    given = samples(source, x=FEEDS[0]["x"], yes=np.array(True))
    feeds = [{**FEEDS[0], "yes": np.array(yes)} for yes in (True,)]
    done = check(IntegerIo(samples=given), source, feeds=feeds)
    assert dtypes(done) == {"x": "uint8", "yes": "bool", "y": "uint8"}


def test_float_layers_stay_exact_behind_integer_inputs() -> None:
    """ONNX Runtime would quantize the weight of a float Conv between pairs, with one scale."""
    rng = np.random.default_rng(1)
    source = parser.parse_model(text(
        "c = Conv(x, k) " + pair("c", "y"), "float[1, 4, 6, 6] x", "float[1, 8, 4, 4] y",
    ))  # fmt: skip
    weight = rng.normal(0, 1, (8, 4, 3, 3)) * np.logspace(-3, 0, 8).reshape(8, 1, 1, 1)
    source.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), "k"))
    x = rng.uniform(-1, 1, (1, 4, 6, 6)).astype(np.float32)
    model = Model.from_proto(source)
    given = open_samples([{"x": x}], model)
    IntegerIo(load_target("ort-cpu"), given)(model)
    affine = ports_of(model)["x"].affine
    on_grid = affine.dequantize(affine.quantize(x))
    (want,) = runtime.session(source).run(None, {"x": on_grid})
    (got,) = runtime.Client(runtime.session(model)).run({"x": on_grid})
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_other_pairs_are_no_scales_of_an_interface() -> None:
    """Scales for each channel, float8, a scale that is computed: the range comes from samples."""
    channels = "float[4] sc = {0.1, 0.2, 0.3, 0.4}, uint8[4] zc = {0, 0, 0, 0}"
    source = text(
        "q = QuantizeLinear<axis = 1>(x, sc, zc) y = DequantizeLinear<axis = 1>(q, sc, zc)",
        inits=channels,
    )
    given = samples(source, x=FEEDS[0]["x"])
    done = check(IntegerIo(samples=given), source, feeds=FEEDS)
    assert done.ops == {"QuantizeLinear": 2, "DequantizeLinear": 2}
    computed = text("k = Add(s, s) " + pair("x", "y", "k", "z"))
    given = samples(computed, x=FEEDS[0]["x"])
    done = check(IntegerIo(samples=given), computed, feeds=FEEDS)
    assert done.ops["QuantizeLinear"] == 2


def test_what_is_an_integer_already_is_left_alone() -> None:
    model = Model.from_proto(parser.parse_model(text(pair("x", "a") + middle(made="y"))))
    IntegerIo()(model)
    before = model.to_proto()
    notes = IntegerIo(type="int8")(model)
    assert [n.text for n in notes] == ["input: is uint8 already", "output: is uint8 already"]
    assert model.to_proto() == before
    assert ports_of(model.copy()) == ports_of(model)


@pytest.mark.parametrize(("target", "asked"), [
    ("ort-cpu", "auto"), ("ort-cpu", "int8"), ("tflite-int8", "auto"), ("tflite-int8", "uint8"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["digits_cnn", "digits_mobilenet", "lang_lstm", "char_gpt"])
def test_a_client_of_integers_gets_what_floats_give(name: str, target: str, asked: Any) -> None:
    model = Model.load(MODELS / f"{name}.onnx")
    given = open_samples(MODELS / f"{name}.calib.npz", model).take(24)
    model.raise_opset(13)
    QuantizeStatic(load_target(target), given)(model)
    simplify_qdq(model)
    opened = model.copy()
    IntegerIo(load_target(target), given, asked)(opened)
    onnx.checker.check_model(opened.to_proto(), full_check=True)
    ports = {name: port.affine for name, port in ports_of(opened).items()}
    floats, integers = runtime.session(model), runtime.session(opened)
    assert {v.type for v in integers.get_outputs()} <= {"tensor(int8)", "tensor(uint8)"}
    for feed in open_samples(MODELS / f"{name}.eval.npz", model).take(40):
        sent = {k: ports[k].quantize(v) if k in ports else v for k, v in feed.items()}
        meant = {k: ports[k].dequantize(v) if k in ports else v for k, v in sent.items()}
        for out, x, q in zip(floats.get_outputs(), floats.run(None, meant),
                             integers.run(None, sent), strict=True):  # fmt: skip
            steps = ports[out.name].quantize(x).astype(int) - q.astype(int)
            assert np.abs(steps).max() <= 1, out.name


def test_metadata_that_do_not_fit_are_no_ports() -> None:
    model = Model.from_proto(parser.parse_model(text(pair("x", "a") + middle(made="y"))))
    IntegerIo()(model)
    model.graph.inputs[0].dtype = np.dtype(np.int8)
    assert list(ports_of(model)) == ["y"]


@pytest.mark.parametrize("value", [
    "no json", "[]", "{}",
    '{"role": "input", "type": "int8", "scale": 0, "zero_point": 0, "axis": null}',
    '{"role": "input", "type": "int4", "scale": 1.0, "zero_point": 0, "axis": null}',
    '{"role": "both", "type": "int8", "scale": 1.0, "zero_point": 0, "axis": null}',
    '{"role": "input", "type": "int8", "scale": 1.0, "zero_point": 200, "axis": null}',
    '{"role": "input", "type": "int8", "scale": 1.0, "zero_point": 0, "axis": 1}',
    '{"role": "input", "type": "int8", "scale": NaN, "zero_point": 0, "axis": null}',
])  # fmt: skip
def test_damaged_metadata_are_told(value: str) -> None:
    proto = parser.parse_model(text("y = Exp(x)"))
    helper.set_model_props(proto, {"onnxq.io.x": value, "other": "kept"})
    with pytest.raises(ModelError, match="onnxq.io.x is damaged".replace(".", r"\.")):
        ports_of(Model.from_proto(proto))


@pytest.mark.parametrize(("scale", "said"), [(0.2, "y"), (None, "inputs were")])
def test_check_sees_integers_that_mean_something_else(scale: float | None, said: str) -> None:
    @dataclass(frozen=True)
    class Wrong:
        name: str = "wrong"

        def __call__(self, model: Model, /) -> Any:
            notes = IntegerIo()(model)
            told = model.envelope.metadata_props
            kept = [(e.key, e.value) for e in told if scale]
            kept = [(k, v.replace("0.1", str(scale)) if k.endswith("y") else v) for k, v in kept]
            del told[:]
            for key, value in kept:
                told.add(key=key, value=value)
            return notes

    with pytest.raises(AssertionError, match=said):
        check(Wrong(), text(pair("x", "a") + middle(made="y")), feeds=FEEDS)
