"""convert_float16: which nodes and constants become 16-bit floats, where Casts stand, and why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import onnxq
from onnxq import runtime
from onnxq.core import Note
from onnxq.data import open_samples
from onnxq.errors import BudgetError, ModelError, RecipeError
from onnxq.model import Model
from onnxq.passes import ConvertFloat16, cleanup, convert_float32
from onnxq.recipes import load_recipe, plan
from onnxq.synthetic import synthetic_samples
from onnxq.targets import Target, load_target
from onnxq.testing import Checked, check

TENSORRT = load_target("tensorrt")
COMPUTE = ConvertFloat16(encoding="compute")
RNG = np.random.default_rng(0)


def model(
    body: str,
    inputs: str = "float[2,8] x",
    outputs: str = "float[2,8] y",
    *,
    opset: int = 17,
    **weights: Any,
) -> onnx.ModelProto:
    """ONNX text with weights given as arrays."""
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for name, values in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    return proto


def normal(*shape: int, scale: float = 0.3) -> np.ndarray:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def samples(proto: onnx.ModelProto, tmp_path: Path, **feeds: Any) -> Any:
    np.savez(tmp_path / "data.npz", **feeds)
    return open_samples(str(tmp_path / "data.npz"), Model.from_proto(proto))


def computed(checked: Checked) -> dict[str, str]:
    """The type that each operator (but Cast) returns."""
    return {
        node.op: str(node.outputs[0].dtype)
        for node in checked.model.nodes()
        if node.op not in ("Cast", "Constant")
    }


def run(pass_: ConvertFloat16, proto: onnx.ModelProto) -> tuple[Model, list[Note]]:
    edited = Model.from_proto(proto)
    notes = list(pass_(edited))
    onnx.checker.check_model(edited.to_proto(), full_check=True)
    runtime.session(edited)
    return edited, notes


def loose(pass_: ConvertFloat16, proto: onnx.ModelProto) -> Checked:
    """Check a pass whose results are rounded."""
    return check(pass_, proto, rtol=2e-2, atol=2e-2)


# Storage


@pytest.mark.parametrize("format", ["float16", "bfloat16"])
def test_weights_are_stored_and_cast_once(format: Any) -> None:
    w = normal(8, 32, 8)
    proto = model(
        "a = MatMul(x, w)  b = Identity(x)  c = MatMul(b, w)  y = Add(a, c)",
        "float[8,2,32] x", "float[8,2,8] y", w=w,
    )  # fmt: skip
    checked = loose(ConvertFloat16(format=format), proto)
    assert checked.ops["Cast"] == 1
    assert [n.text for n in checked.notes] == [f"2048 values of w stored as {format}"]
    assert computed(checked)["MatMul"] == "float32"


def test_what_stays_float32_in_storage() -> None:
    huge, tiny, good = normal(32, 32) * 1e6, normal(32, 32) * 1e-8, normal(32, 32)
    proto = model(
        "a = MatMul(x, huge)  b = MatMul(x, tiny)  c = MatMul(x, shown)  d = Mul(x, bias)"
        "  e = MatMul(x, good)  y = Sum(a, b, c, d, e)",
        "float[2,32] x", "float[2,32] y, float[32,32] shown",
        huge=huge, tiny=tiny, shown=good + 1, good=good, bias=normal(512)[:32],
    )  # fmt: skip
    _, notes = run(ConvertFloat16(), proto)
    told = [n.text for n in notes]
    assert any("huge stays float32: it has values of" in t for t in told)
    assert any("most of it is too small" in t for t in told)
    assert any("shown stays float32: it is an output" in t for t in told)
    assert [n.text for n in notes if n.changed] == ["1024 values of good stored as float16"]
    # bfloat16 has float32's range
    _, notes = run(ConvertFloat16(format="bfloat16"), proto)
    assert sum(n.changed for n in notes) == 3


def test_the_first_weights_stay_float32_while_they_are_few() -> None:
    proto = model(
        "a = Conv(x, first)  b = Relu(a)  c = Conv(b, second)  y = Identity(c)",
        "float[2,16,3,3] x", "float[2,256,3,3] y", first=normal(16, 16, 1, 1),
        second=normal(256, 16, 1, 1),
    )  # fmt: skip
    _, notes = run(ConvertFloat16(first_share=0.1), proto)
    assert [n.changed for n in notes] == [False, True]
    assert "among the first" in notes[0].text
    exact = proto.graph.initializer[0]
    rounded = numpy_helper.to_array(exact).astype(np.float16).astype(np.float32)
    exact.CopyFrom(numpy_helper.from_array(rounded, "first"))
    _, notes = run(ConvertFloat16(first_share=0.1), proto)
    assert [n.changed for n in notes] == [True, True]  # nothing is lost
    _, notes = run(ConvertFloat16(first_share=0.01), proto)
    assert [n.changed for n in notes] == [True, True]


def test_an_override_keeps_a_layers_weight() -> None:
    proto = model("a = MatMul(x, w)  y = Relu(a)", "float[2,32] x", "float[2,32] y",
                  w=normal(32, 32))  # fmt: skip
    _, notes = run(ConvertFloat16(layers=("op:MatMul=float",)), proto)
    assert [n.changed for n in notes] == [False]
    assert "asked for by the override" in notes[0].text


def test_a_weight_of_two_bodies_is_cast_in_the_main_graph() -> None:
    proto = model(
        "y = If(c) <then_branch = t () => (float[2,32] u) { u = MatMul(x, w) },"
        " else_branch = e () => (float[2,32] v) { p = MatMul(x, w)  v = Neg(p) }>",
        "float[2,32] x, bool c", "float[2,32] y", w=normal(32, 32),
    )  # fmt: skip
    checked = loose(ConvertFloat16(), proto)
    assert [n.op for n in checked.model.graph.nodes if n.op == "Cast"] == ["Cast"]
    assert checked.ops["Cast"] == 1


def test_scales_of_pairs_are_left() -> None:
    proto = model(
        "d = DequantizeLinear<axis = 0, block_size = 2>(q, s)  y = MatMul(x, d)",
        "float[2,64] x", "float[2,32] y", opset=21,
        q=RNG.integers(-8, 8, (64, 32)).astype(np.int8), s=np.abs(normal(32, 32)) + 0.1,
    )  # fmt: skip
    _, notes = run(ConvertFloat16(), proto)
    assert [n.text for n in notes] == ["s stays float32: DequantizeLinear reads it"]


def test_clean_up_leaves_stored_weights_stored() -> None:
    proto = model("a = MatMul(x, w)  y = Relu(a)", "float[2,32] x", "float[2,32] y",
                  w=normal(32, 32))  # fmt: skip
    edited, _ = run(ConvertFloat16(), proto)
    cleanup(edited)
    assert [n.op for n in edited.nodes()] == ["Cast", "MatMul", "Relu"]


# Compute: regions and Casts


def test_the_interface_is_kept_and_casts_are_two() -> None:
    proto = model("a = MatMul(x, w)  b = Relu(a)  y = Add(b, bias)", w=normal(8, 8), bias=normal(8))
    checked = loose(COMPUTE, proto)
    assert computed(checked) == {"MatMul": "float16", "Relu": "float16", "Add": "float16"}
    assert checked.ops["Cast"] == 2
    assert checked.notes[0].text == "3 nodes compute in float16, 0 in float32, 2 Casts between"


def test_an_interface_in_half() -> None:
    proto = model("a = MatMul(x, w)  y = Relu(a)", w=normal(8, 8))
    edited, _ = run(ConvertFloat16(encoding="compute", interface="half"), proto)
    assert [n.op for n in edited.nodes()] == ["MatMul", "Relu"]
    made = runtime.session(edited)
    assert [v.type for v in (*made.get_inputs(), *made.get_outputs())] == ["tensor(float16)"] * 2
    stored, _ = run(ConvertFloat16(encoding="storage", interface="half", smallest=32), proto)
    assert sorted(n.op for n in stored.nodes()) == ["Cast", "Cast", "Cast", "MatMul", "Relu"]
    with pytest.raises(ValueError, match="cannot be fed"):
        ConvertFloat16(format="bfloat16", interface="half")


def test_one_cast_for_all_readers_and_outputs() -> None:
    proto = model(
        "a = MatMul(x, w)  e = Neg(a)  f = Abs(a)  y = Add(e, f)  z = MatMul(y, w)",
        outputs="float[2,8] y, float[2,8] z, float[2,8] a", w=normal(8, 8),
    )  # fmt: skip
    checked = loose(COMPUTE, proto)
    assert checked.ops["Cast"] == 4  # one in, three out


def test_moves_go_with_their_neighbours() -> None:
    body = (
        "a = MatMul(x, huge)  r = Reshape(a, s)  t = Transpose<perm = [1, 0]>(r)  y = MatMul(t, {})"
    )
    shape = np.array([8, 2], np.int64)
    proto = model(body.format("w"), outputs="float[2,8] y", huge=normal(8, 8) * 1e7, s=shape,
                  w=normal(8, 8) * 1e-6)  # fmt: skip
    edited, notes = run(ConvertFloat16(encoding="compute", target=TENSORRT), proto)
    assert not any(n.op == "Cast" for n in edited.nodes())  # both ends float32
    assert sum("stays float32" in n.text for n in notes) == 2
    proto = model(body.format("w"), outputs="float[2,8] y", huge=normal(8, 8) * 1e7, s=shape,
                  w=normal(8, 8))  # fmt: skip
    edited, _ = run(ConvertFloat16(encoding="compute", target=TENSORRT), proto)
    assert sum(n.op == "Cast" for n in edited.nodes()) == 2


def test_casts_of_the_model_cancel() -> None:
    proto = model(
        "h = Cast<to = 10>(x)  i = Neg(h)  f = Cast<to = 1>(i)  m = MatMul(f, w)  y = Relu(m)",
        w=normal(8, 8),
    )  # fmt: skip
    checked = loose(COMPUTE, proto)
    assert checked.ops["Cast"] == 2
    assert computed(checked)["MatMul"] == "float16"


TYPED = [
    pytest.param("s = Shape(x)  o = ConstantOfShape(s)  m = MatMul(x, w)  y = Add(m, o)", id="of-shape"),
    pytest.param("s = Shape(x)  o = ConstantOfShape<value = float[1] {2}>(s)  m = MatMul(x, w)"
                 "  y = Add(m, o)", id="of-shape-value"),
    pytest.param("i = Cast<to = 7>(k)  f = Cast<to = 1>(k)  m = MatMul(x, w)  y = Mul(m, f)", id="cast"),
    pytest.param("k1 = Constant<value = float {2}>()  m = MatMul(x, w)  y = Mul(m, k1)", id="constant"),
    pytest.param("l = Constant<value_float = -1.0>()  h = Constant<value_float = 3.4e38>()"
                 "  m = MatMul(x, w)  y = Clip(m, l, h)", id="clip"),
    pytest.param("m = MatMul(x, w)  d, e = Dropout(m)  y = Identity(d)", id="dropout"),
    pytest.param("q = SequenceConstruct(x)  c = ConcatFromSequence<axis = 0>(q)  y = MatMul(c, w)", id="sequence"),
    pytest.param("m = MatMul(x, w)  t, i = TopK(m, k1)  f = Cast<to = 1>(i)  a = Mul(t, f)"
                 "  y = Concat<axis = 1>(a, a)", id="indices"),
    pytest.param("e = EyeLike<dtype = 1>(w8)  a = MatMul(x, e)  y = Relu(a)", id="eye"),
]  # fmt: skip


@pytest.mark.parametrize("body", TYPED)
def test_typed_operators(body: str) -> None:
    extra = {"k": np.array([2], np.int32), "k1": np.array([4], np.int64)}
    if "k1 = " in body:
        del extra["k1"]
    used: dict[str, Any] = {k: v for k, v in extra.items() if f"({k})" in body or f", {k}" in body}
    if "w8" in body:
        used["w8"] = np.ones((8, 8), np.float32)
    if "(x, w)" in body or "(c, w)" in body:
        used["w"] = normal(8, 8)
    checked = loose(COMPUTE, model(body, **used))
    assert "float16" in computed(checked).values()


LOOP = """n = Constant<value_ints = [3]>()  n0 = Squeeze(n)  p = MatMul(x, w)
  s, z = Loop(n0, , p) <body = b (int64 i, bool ci, float[2,8] a) => (bool co, float[2,8] b1, float[2,8] o)
    {{ co = Identity(ci)  m = MatMul(a, w)  b1 = Tanh(m)  o = {} }}>
  y = Relu(s)"""


def test_what_a_loop_carries_is_half_inside_and_outside() -> None:
    proto = model(
        LOOP.format("Identity(m)"), outputs="float[2,8] y, float[3,2,8] z", w=normal(8, 8)
    )
    checked = loose(COMPUTE, proto)
    assert checked.ops["Cast"] == 3  # the input and both outputs: none in the body
    assert [g.inputs[2].dtype for g in checked.model.graphs()[1:]] == [np.float16]


def test_a_scan_and_a_captured_tensor() -> None:
    proto = model(
        """p = MatMul(x, w)  r = Neg(p)
        s, z = Scan<num_scan_inputs = 1, body = b (float[8] a, float[8] i) => (float[8] c, float[8] o)
          { c = Add(a, i)  q = MatMul(c, w)  o = ReduceMax<keepdims = 0, axes = [0]>(r) }>(zero, p)
        y = Relu(z)""",
        outputs="float[2,8] y, float[8] s", w=normal(8, 8), zero=np.zeros(8, np.float32),
    )  # fmt: skip
    checked = loose(COMPUTE, proto)
    assert checked.ops["Cast"] == 3


def test_branches_agree_on_their_type() -> None:
    proto = model(
        """m = MatMul(x, w)
        i = If(c) <then_branch = t () => (float[2,8] u) { u = Exp(m) },
                   else_branch = e () => (float[2,8] v) { v = Identity(k) }>
        y = Relu(i)""",
        "float[2,8] x, bool c", w=normal(8, 8), k=normal(2, 8),
    )  # fmt: skip
    checked = loose(COMPUTE, proto)
    assert computed(checked)["If"] == computed(checked)["Relu"]
    assert computed(checked)["Exp"] == "float32"  # no samples show that it fits


# Compute: what stays float32


def reasons(notes: list[Note]) -> str:
    return " | ".join(n.text for n in notes if not n.changed)


def test_an_activation_that_overflows_in_samples(tmp_path: Path) -> None:
    proto = model("a = MatMul(x, w)  b = Mul(a, a)  c = Mul(b, small)  y = MatMul(c, w)",
                  w=normal(8, 8), small=np.float32(1e-3))  # fmt: skip
    data = samples(proto, tmp_path, x=normal(4, 2, 8, scale=1000.0))
    edited, notes = run(ConvertFloat16(encoding="compute", samples=data), proto)
    types = {n.name: str(n.outputs[0].dtype) for n in edited.nodes("Mul")}
    assert set(types.values()) == {"float32"}
    assert "reaches" in reasons(notes)
    calm = samples(proto, tmp_path, x=normal(4, 2, 8))
    assert reasons(run(ConvertFloat16(encoding="compute", samples=calm), proto)[1]) == ""


def test_sums_inside_of_reductions(tmp_path: Path) -> None:
    proto = model("a = MatMul(x, w)  r = ReduceL2<axes = [1], keepdims = 1>(a)  y = Add(a, r)",
                  "float[2,8] x", w=normal(8, 8) + np.eye(8, dtype=np.float32))  # fmt: skip
    for size, kept in ((100.0, True), (1.0, False)):
        data = samples(proto, tmp_path, x=np.full((4, 2, 8), size, np.float32))
        _, notes = run(ConvertFloat16(encoding="compute", samples=data), proto)
        assert ("sums of up to" in reasons(notes)) == kept


NORM = ("s = Sub(x, x0)  q = Mul(s, s)  v = ReduceMean<axes = [1]>(q)  e = Add(v, eps)"
        "  d = Sqrt(e)  n = Div(s, d)  y = MatMul(n, w)")  # fmt: skip


@pytest.mark.parametrize("real", [True, False])
def test_a_normalisation_with_a_small_epsilon(tmp_path: Path, *, real: bool) -> None:
    proto = model(NORM, x0=np.zeros(8, np.float32), eps=np.float32(1e-12), w=normal(8, 8))
    data = samples(proto, tmp_path, x=normal(4, 2, 8, scale=1e-3)) if real else None
    edited, notes = run(ConvertFloat16(encoding="compute", samples=data), proto)
    types = {n.op: str(n.outputs[0].dtype) for n in edited.nodes() if n.op != "Cast"}
    assert {types[op] for op in ("ReduceMean", "Add", "Sqrt", "Div")} == {"float32"}
    assert types["MatMul"] == "float16"
    assert "eps: most of it is too small for float16" in reasons(notes)


def test_a_logarithm_of_small_powers(tmp_path: Path) -> None:
    proto = model("a = MatMul(x, w)  p = Mul(a, a)  l = Log(p)  y = MatMul(l, w)", w=normal(8, 8))
    data = samples(proto, tmp_path, x=normal(4, 2, 8, scale=1e-3))
    edited, notes = run(ConvertFloat16(encoding="compute", samples=data), proto)
    types = {n.op: str(n.outputs[0].dtype) for n in edited.nodes("Mul", "Log")}
    assert types == {"Mul": "float32", "Log": "float32"}
    assert "go into Log" in reasons(notes)
    # bfloat16 holds them
    edited = Model.from_proto(proto)
    wide = ConvertFloat16("bfloat16", "compute", samples=data, target=TENSORRT)
    assert reasons(list(wide(edited))) == ""
    onnx.checker.check_model(edited.to_proto(), full_check=True)


def test_indices_and_positions(tmp_path: Path) -> None:
    proto = model("a = MatMul(x, w)  b = Mul(a, k)  f = Floor(b)  i = Cast<to = 7>(f)"
                  "  j = Cast<to = 1>(p)  y = Add(a, j)", "float[2,8] x, int64[8] p",
                  "float[2,8] y, int64[2,8] i", w=normal(8, 8), k=np.float32(100))  # fmt: skip
    data = samples(proto, tmp_path, x=normal(4, 2, 8), p=np.full((4, 8), 4001, np.int64))
    edited, notes = run(ConvertFloat16(encoding="compute", samples=data), proto)
    assert "goes into Floor" in reasons(notes)
    assert "integers up to 4001" in reasons(notes)
    assert {str(n.outputs[0].dtype) for n in edited.nodes("Floor", "Mul")} == {"float32"}


def test_what_is_quantized_stays_as_it_is() -> None:
    proto = model(
        "q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  w = DequantizeLinear(wq, s)"
        "  m = MatMul(d, w)  r = QuantizeLinear(m, s, z)  t = DequantizeLinear(r, s, z)"
        "  y = MatMul(t, v)", "float[2,8] x", "float[2,8] y", opset=21,
        s=np.float32(0.1), z=np.uint8(128), wq=RNG.integers(-9, 9, (8, 8)).astype(np.int8),
        v=normal(8, 8),
    )  # fmt: skip
    _, notes = run(COMPUTE, proto)
    assert "MatMul stays float32: quantized" in reasons(notes)


MASKS = [
    pytest.param("n = Sub(one, f)  k = Mul(n, big)  t = Add(a, k)", True, id="factor"),
    pytest.param("b = Cast<to = 9>(m)  t = Where(b, a, big)", True, id="where"),
    pytest.param("n = Sub(one, f)  k = Mul(n, big)  u = Add(a, k)  t = Identity(u)  z2 = Neg(u)", False, id="also-read"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "fits"), MASKS)
def test_attention_masks(body: str, fits: bool, tmp_path: Path) -> None:
    used: dict[str, Any] = {"one": np.float32(1)} if "one" in body else {}
    last = "  z = Relu(z2)" if "z2" in body else "  z = Relu(a)"
    proto = model(
        f"f = Cast<to = 1>(m)  a = MatMul(x, w)  {body}  p = Softmax(t)  y = MatMul(p, w){last}",
        "float[2,8] x, int64[2,8] m", "float[2,8] y, float[2,8] z",
        w=normal(8, 8), big=np.float32(-1e9), **used,
    )  # fmt: skip
    mask = np.ones((4, 2, 8), np.int64)
    mask[:, :, 5:] = 0
    mask[0, 0] = 0  # a row of nothing
    x = normal(4, 2, 8)
    data = samples(proto, tmp_path, x=x, m=mask)
    edited, notes = run(ConvertFloat16(encoding="compute", samples=data), proto)
    (softmax,) = edited.nodes("Softmax")
    assert (str(softmax.outputs[0].dtype) == "float16") == fits
    assert ("-1e+09" in reasons(notes) or "1e+09" in reasons(notes)) == (not fits)
    one, two = runtime.session(proto), runtime.session(edited)
    for feed in ({"x": x[i], "m": mask[i]} for i in range(1, 4)):
        np.testing.assert_allclose(
            runtime.run(two, feed)["y"], runtime.run(one, feed)["y"], atol=2e-3
        )
    assert np.isfinite(runtime.run(two, {"x": x[0], "m": mask[0]})["y"]).all()


def test_operators_without_a_form_or_kernel() -> None:
    proto = model("a = MatMul(x, w)  r = RandomNormalLike<seed = 1.0>(a)  b = my.Op(a)  y = Add(a, r)",
                  outputs="float[2,8] y, b", w=normal(8, 8))  # fmt: skip
    proto.opset_import.add(domain="my", version=1)
    proto.graph.output[1].type.tensor_type.elem_type = 1
    edited = Model.from_proto(proto)
    told = reasons(list(COMPUTE(edited)))
    assert "other random numbers would be drawn" in told
    assert "my may not have it in float16" in told
    cpu = load_target("ort-cpu")
    proto = model("a = MatMul(x, w)  t = Transpose<perm = [1, 0]>(a)  y = MatMul(w, t)",
                  outputs="float[8,2] y", w=normal(8, 8))  # fmt: skip
    _, notes = run(ConvertFloat16(encoding="compute", target=cpu), proto)
    assert "Transpose stays float32: no kernel for float16" in reasons(notes)


def test_bfloat16_needs_opset_13_and_constrains_by_it() -> None:
    proto = model("a = MatMul(x, w)  y = Relu(a)", opset=11, w=normal(8, 8))
    _, (note,) = run(ConvertFloat16("bfloat16"), proto)
    assert "opset 11 has no Cast to bfloat16" in note.text
    proto = model("a = MatMul(x, w)  b = Elu(a)  y = Relu(b)", opset=13, w=normal(8, 8))
    edited = Model.from_proto(proto)
    notes = list(ConvertFloat16("bfloat16", "compute", target=TENSORRT)(edited))
    onnx.checker.check_model(edited.to_proto(), full_check=True)
    assert "Elu stays float32: it has no bfloat16 in opset 13" in reasons(notes)


# Recipes


@pytest.mark.parametrize("recipe", ["float16", "bfloat16"])
def test_recipes_halve_a_model(recipe: str, tmp_path: Path) -> None:
    report = onnxq.optimize("models/digits_cnn.onnx", tmp_path / "out.onnx", recipe=recipe,
                            data="models/digits_cnn.eval.npz")  # fmt: skip
    assert report.size_bytes[1] < 0.53 * report.size_bytes[0]
    assert report.fidelity is not None
    assert report.fidelity.sqnr_db > (60 if recipe == "float16" else 45)
    assert report.latency is not None


def test_old_models() -> None:
    """Opset 7, IR 3 with initializers among the inputs."""
    proto = model("a = Conv<kernel_shape = [3, 3]>(x, w)  b = Relu(a)  y = MaxPool<kernel_shape = [2, 2]>(b)",
                  "float[1,8,8,8] x, float[8,8,3,3] w", "float[1,8,5,5] y", opset=7,
                  w=normal(8, 8, 3, 3))  # fmt: skip
    proto.ir_version = 3
    for options in (ConvertFloat16(), COMPUTE):
        edited, notes = run(options, proto)
        assert any(n.changed for n in notes)
        assert edited.envelope.ir_version >= 4


@pytest.mark.parametrize("encoding", ["storage", "compute"])
def test_free_dimensions(encoding: Any) -> None:
    proto = model("a = MatMul(x, w)  s = Shape(a)  r = Reshape(a, s)  y = Softmax(r)",
                  'float[N,32] x', 'float[N,32] y', w=normal(32, 32))  # fmt: skip
    checked = loose(ConvertFloat16(encoding=encoding), proto)
    assert checked.ops["Cast"] == (1 if encoding == "storage" else 2)


def test_a_float16_model_goes_through_float32_and_back() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float16[2,32] x) => (float16[2,32] y)
        { a = MatMul(x, w)  y = Relu(a) }"""
    proto = parser.parse_model(text)
    w = normal(32, 32).astype(np.float16)
    proto.graph.initializer.append(numpy_helper.from_array(w, "w"))
    edited = Model.from_proto(proto)
    assert next(iter(COMPUTE(edited))).changed is False  # nothing is float32
    convert_float32(edited)
    COMPUTE(edited)
    assert [n.op for n in edited.nodes()] == ["MatMul", "Relu"]
    assert edited.nodes("MatMul")[0].inputs[1].values.tobytes() == w.tobytes()


def test_targets_without_floats_refuse() -> None:
    for name in ("esp-dl", "tflite-int8"):
        with pytest.raises(RecipeError, match="has no float16"):
            plan(load_recipe("float16"), load_target(name), None)


def test_nothing_to_convert_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    onnx.save(model("y = Relu(x)"), path)
    with pytest.raises(BudgetError, match="nothing was"):
        onnxq.optimize(path, tmp_path / "out.onnx", recipe="float16")


@pytest.mark.parametrize("data", [None, "models/digits_cnn.calib.npz"])
def test_the_interface_can_be_asked_for(data: str | None, tmp_path: Path) -> None:
    from onnxq.settings import Settings

    report = onnxq.optimize("models/digits_cnn.onnx", tmp_path / "out.onnx", recipe="float16", data=data,
                            settings=Settings(encoding="compute", interface="half"))  # fmt: skip
    assert report.fidelity is not None
    assert report.fidelity.sqnr_db > 50
    made = runtime.session(tmp_path / "out.onnx")
    assert [i.type for i in made.get_inputs()] == ["tensor(float16)"]


def test_bfloat16_for_another_machine_is_computed_in_and_not_compared(tmp_path: Path) -> None:
    model, out = "models/digits_cnn.onnx", tmp_path / "out.onnx"
    with pytest.raises(ModelError, match=r"for tensorrt alone is written with --no-validate"):
        onnxq.optimize(model, out, recipe="bfloat16", target="tensorrt")
    assert not out.exists()
    report = onnxq.optimize(model, out, recipe="bfloat16", target="tensorrt", validate=False)
    assert report.opset[1] == 22
    assert {row.format for row in report.stored} == {"bfloat16"}
    assert onnxq.check(out, target="tensorrt").is_clean
    stored = onnxq.optimize(model, out, recipe="bfloat16", validate=False)
    assert stored.opset == (13, 13)


def test_target_facts_are_checked(tmp_path: Path) -> None:
    for line, said in (
        ('[halves.float32]\nencoding = "storage"', "halves are float16 and bfloat16"),
        ('[halves.float16]\nencoding = "fast"', "compute or storage"),
        ("[halves.float16]\nops = []", "unknown key ops"),
    ):
        path = tmp_path / "t.toml"
        path.write_text(f'extends = "ort-cpu"\ndescription = "x"\n{line}\n')
        with pytest.raises(RecipeError, match=said):
            load_target(str(path))
    assert isinstance(load_target("ort-cpu"), Target)


def test_samples_that_are_made_up_show_overflows_too() -> None:
    proto = model("a = MatMul(x, w)  b = Mul(a, k)  c = Mul(b, q)  y = MatMul(c, w)", w=normal(8, 8),
                  k=np.float32(60000), q=np.float32(1e-3))  # fmt: skip
    data = synthetic_samples(Model.from_proto(proto), 3)
    edited, notes = run(ConvertFloat16(encoding="compute", samples=data), proto)
    assert "reaches" in reasons(notes)
    assert str(edited.nodes("Mul")[0].outputs[0].dtype) == "float32"
