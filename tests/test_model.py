"""Model: loss-free import and export, names, types, edits, operator sets."""

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto, helper, numpy_helper, parser
from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException

from onnxq.errors import ModelError
from onnxq.graphs import Node
from onnxq.model import Model, producer, readers, values_of

HEAD = '<ir_version: 8, opset_import: ["": 17, "custom": 3]>\n'


def text(graph: str, head: str = HEAD) -> onnx.ModelProto:
    return parser.parse_model(head + graph)


def model_of(graph: str) -> Model:
    return Model.from_proto(text(graph))


def f32(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def node_of(model: Model, op: str) -> gs.Node:
    (node,) = model.nodes(op)
    return node


def ops(graph: onnx.GraphProto) -> list[str]:
    return [node.op_type for node in graph.node]


def run(proto: onnx.ModelProto, **feed: Any) -> list[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    outputs: list[Any] = ort.InferenceSession(proto.SerializeToString(), options).run(None, feed)
    return outputs


def assert_lossless(proto: onnx.ModelProto) -> None:
    """Nothing but the names of unnamed (or twice named) nodes may differ, in the copy too."""
    before = proto.SerializeToString(deterministic=True)
    model = Model.from_proto(proto)
    for after in (model.to_proto(), model.copy().to_proto()):
        want, got = onnx.ModelProto(), onnx.ModelProto()
        want.CopyFrom(proto)
        got.CopyFrom(after)
        seen: set[str] = set()
        for one, other in zip(_nodes(want.graph), _nodes(got.graph), strict=True):
            assert other.name
            if not one.name or one.name in seen:
                one.ClearField("name")
                assert other.name not in seen
                seen.add(other.name)
                other.ClearField("name")
            seen.add(one.name)
        assert got == want
    assert proto.SerializeToString(deterministic=True) == before, "the caller's proto was changed"


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of a graph and then of its bodies: the order in which Model names them."""
    yield from graph.node
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body)


# --- load followed by save loses nothing ----------------------------------------------------------


def _backend_cases() -> Iterator[tuple[str, onnx.ModelProto]]:
    from onnx.backend.test.case.node import collect_testcases

    for case in collect_testcases(None):
        if case.model is not None:
            yield case.name, case.model
    for path in (Path(onnx.__file__).parent / "backend/test/data").rglob("*.onnx"):
        yield str(path), onnx.load(path)


def test_the_onnx_backend_suite_is_carried_without_loss() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy, over the operators' reference values
        cases = list(_backend_cases())
    assert len(cases) > 1500
    failed = []
    for name, proto in cases:
        try:
            assert_lossless(proto)
        except Exception as e:
            failed.append(f"{name}: {e!r:.200}")
    assert not failed


def documented() -> onnx.ModelProto:
    """A model with everything that graphsurgeon has no place for."""
    proto = text("""
        g (float[N,4] x, seq(float[4]) s, optional(float[4]) o, float[4] unused)
          => (float[N,4] y, seq(float[4]) t, float[4] w)
          <float[4] w = {1,2,3,4}, float[N,4] h, float[9] nothing> {
          h = Add (x, w)
          y = custom.Op <text = "abc", number = 0.1, empty: ints = []> (h, "", w, "")
          t = Identity (s)
          u, "", v = custom.Three (o)
        }""")
    proto.producer_name, proto.producer_version = "me", "1.2"
    proto.domain, proto.model_version, proto.doc_string = "org.me", 7, "model\ndoc"
    graph, op = proto.graph, proto.graph.node[1]
    graph.doc_string = "graph doc"
    op.doc_string, op.overload, op.name = "node doc", "version2", "the op"
    graph.initializer[0].doc_string = "tensor doc"
    graph.input[0].doc_string = graph.output[0].doc_string = graph.value_info[0].doc_string = "doc"
    graph.input[0].type.denotation = "IMAGE"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    for place in (proto, graph, op, graph.input[0], graph.initializer[0], graph.value_info[0]):
        place.metadata_props.add(key="key", value="value")
    note = graph.quantization_annotation.add(tensor_name="h")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="h_scale")
    graph.quantization_annotation.add(tensor_name="gone")
    scale = numpy_helper.from_array(f32(0.5), "h_scale")
    graph.initializer.extend([scale, numpy_helper.from_array(f32(1), "idle")])
    kinds = (TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2FNUZ)
    graph.initializer.extend(helper.make_tensor(f"k{k}", k, [3], [1, 2, 3]) for k in kinds)
    kinds4 = [k for k in ("INT4", "UINT4", "INT2", "UINT2", "FLOAT4E2M1") if k in dir(TensorProto)]
    for kind in kinds4:
        tensor = helper.make_tensor(kind, getattr(TensorProto, kind), [3], [1, 0, 1])
        raw = graph.initializer.add()
        raw.CopyFrom(tensor)
        packed = numpy_helper.from_array(numpy_helper.to_array(tensor), kind + "raw")
        graph.initializer.append(packed)
    texts = helper.make_tensor("texts", TensorProto.STRING, [2], [b"text", b"\xff\xfe"])  # type: ignore[list-item]
    graph.initializer.append(texts)
    ints = helper.make_tensor("", TensorProto.INT64, [2], [0, 2])
    values = helper.make_tensor("sparse", TensorProto.FLOAT, [2], [1.0, 2.0])
    sparse = helper.make_sparse_tensor(values, ints, [4])
    graph.sparse_initializer.append(sparse)
    kind = helper.make_tensor_type_proto(1, [2])
    out = onnx.ValueInfoProto(name="n")
    bodies = [
        helper.make_graph([helper.make_node("Neg", ["h"], ["n"], name=name)], name, [], [out])
        for name in ("neg1", "neg2")
    ]
    extra: dict[str, Any] = {"t": kind, "ts": [kind, kind], "sp": sparse, "sps": [sparse, sparse]}
    extra |= {"tensors": [ints, ints], "graphs": bodies, "bytes": b"\xff\x00", "doc": 1}
    extra |= {"mixed": [b"\xff", b"text"], "nan": float("nan"), "big": 2**62, "tiny": 1e-45}
    op.attribute.extend(helper.make_attribute(k, v) for k, v in extra.items())
    op.attribute.add(name="strings", type=AttributeProto.STRINGS)
    op.attribute.add(name="none", type=AttributeProto.GRAPHS)
    op.attribute.add(name="ref", type=AttributeProto.INT, ref_attr_name="outer")
    next(a for a in op.attribute if a.name == "doc").doc_string = "attribute doc"
    proto.functions.append(
        parser.parse_function(
            '<domain: "custom", opset_import: ["": 17]> F (a) => (b) {b = Neg(a)}'
        )
    )
    training = proto.training_info.add()
    training.algorithm.name = "training"
    return proto


def test_everything_that_graphsurgeon_drops_is_carried() -> None:
    assert_lossless(documented())


def test_documentation_survives_an_edit_and_a_sweep() -> None:
    proto = documented()
    model = Model.from_proto(proto)
    model.emit("Relu", node_of(model, "Add").outputs[0], name="relu", at=node_of(model, "Add"))
    model.sweep()
    after = model.to_proto()
    assert ops(after.graph) == ["Add", "Op", "Identity", "Three"]  # Three may have effects
    assert after.graph.node[1] == proto.graph.node[1]
    assert [t.name for t in after.graph.initializer] == ["w", "h_scale"]  # h_scale is annotated
    assert [i.name for i in after.graph.value_info] == ["h", "nothing"]
    assert after.graph.input == proto.graph.input
    assert after.functions == proto.functions
    assert model.functions == ["custom::F"]


def test_ai_onnx_is_the_default_domain() -> None:
    proto = text("g (float[4] x) => (float[4] y) { y = ai.onnx.Relu (x) }")
    proto.opset_import[0].domain = "ai.onnx"
    proto.graph.node[0].domain = "ai.onnx"
    assert_lossless(proto)
    model = Model.from_proto(proto)
    assert model.opset == 17
    assert node_of(model, "Relu").domain is None
    model.raise_opset(18)
    assert [(o.domain, o.version) for o in model.to_proto().opset_import] == [
        ("ai.onnx", 18),
        ("custom", 3),
    ]


def test_graphsurgeon_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    Model.from_proto(documented()).to_proto()
    with pytest.raises(OnnxGraphSurgeonException):
        gs.Constant("no array", 1.0)
    assert capfd.readouterr() == ("", "")


IR3 = """<ir_version: 3, opset_import: ["": 8]>
g (float[2] x, float[2] w, float[2] z) => (float[2] y) <float[2] w = {1,2}> {
  h = Add (x, w)
  y = Add (h, z)
}"""


def test_initializers_listed_as_inputs_stay_listed_and_nobody_has_to_feed_them() -> None:
    proto = parser.parse_model(IR3)
    assert_lossless(proto)
    model = Model.from_proto(proto)
    assert [t.name for t in model.graph.inputs] == ["x", "z"]
    assert [i.name for i in model.to_proto().graph.input] == ["x", "w", "z"]


def test_a_new_initializer_raises_ir_3_and_lists_none() -> None:
    model = Model.from_proto(parser.parse_model(IR3))
    node_of_z = model.nodes("Add")[1]
    node_of_z.inputs[0] = model.emit(
        "Mul", node_of_z.inputs[0], model.constant("two", f32(2, 2)), name="m"
    )
    proto = model.to_proto()
    assert proto.ir_version == 4
    assert [i.name for i in proto.graph.input] == ["x", "z"]
    assert [t.name for t in proto.graph.initializer] == ["w", "two"]
    onnx.checker.check_model(proto, full_check=True)


@pytest.mark.parametrize("listed", [True, False])
def test_raising_the_opset_of_an_ir_3_model_lists_no_initializers(listed: bool) -> None:
    proto = parser.parse_model(IR3)
    if not listed:  # against the rules, and seen
        del proto.graph.input[1]
    model = Model.from_proto(proto)
    model.raise_opset(17)
    proto = model.to_proto()
    assert proto.ir_version >= 8
    assert [i.name for i in proto.graph.input] == ["x", "z"]
    one = f32(1, 1)
    np.testing.assert_array_equal(run(proto, x=one, z=one)[0], [3, 4])


def test_unsorted_nodes_are_sorted_and_the_rest_stays_in_order() -> None:
    proto = text("""g (float[4] x, bool c) => (float[4] y, float[4] z) {
        z = Neg (x)
        y = If (c) <then_branch = t () => (float[4] a) { a = Abs (h) },
                    else_branch = e () => (float[4] b) { b = Identity (x) }>
        i = Exp (x)
        h = Relu (i)
    }""")
    model = Model.from_proto(proto)
    abs_ = node_of(model, "Abs")
    assert producer(abs_.inputs[0]) is node_of(model, "Relu")
    assert ops(model.to_proto().graph) == ["Neg", "Exp", "Relu", "If"]


def test_deep_graphs_are_sorted_without_recursion() -> None:
    proto = text("g (float[4] t0) => (float[4] t3000) { t1 = Relu (t0) }")
    del proto.graph.node[:]
    for i in reversed(range(3000)):
        proto.graph.node.append(helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]))
    out = Model.from_proto(proto).to_proto()
    assert [n.output[0] for n in out.graph.node] == [f"t{i + 1}" for i in range(3000)]


def test_a_cycle_is_an_error() -> None:
    model = model_of("g (float[4] x) => (float[4] y) { h = Relu (x)  y = Neg (h) }")
    node_of(model, "Relu").inputs[0] = model.graph.outputs[0]
    with pytest.raises(ModelError, match="cycle"):
        model.to_proto()


def test_a_loose_end_is_an_error() -> None:
    model = model_of("g (float[4] x) => (float[4] y) { h = Relu (x)  y = Neg (h) }")
    model.graph.nodes[:] = [node_of(model, "Neg")]
    with pytest.raises(ModelError, match=r"reads 'h'.*not in the graph"):
        model.to_proto()


# --- names ----------------------------------------------------------------------------------------


def test_every_node_gets_a_name_of_its_own() -> None:
    proto = text("""g (float[4] x) => (float[4] y) {
        a = Relu (x)  [y] b = Relu (a)  [twin] c = Relu (b)  [twin] d = Relu (c)  y = Relu (d) }""")
    names = [node.name for node in Model.from_proto(proto).nodes()]
    assert len(set(names)) == 5
    assert names[1:3] == ["y", "twin"]  # kept, though y is a tensor's name as well
    assert names[0].startswith("Relu_")
    assert names[3] == "twin_1"


def test_twins_are_told_apart() -> None:
    model = model_of(
        "g (float[4] x) => (float[4] y) { a = Relu (x)  b = Relu (x)  y = Add (a, b) }"
    )
    one, other = model.nodes("Relu")
    one.name = other.name = one.outputs[0].name = other.outputs[0].name = "twin"
    other.inputs.clear()
    assert one != other
    assert [n is one for n in model.graph.inputs[0].outputs] == [True]
    assert {one, other} == {other, one}


def test_new_names_are_new_everywhere() -> None:
    model = model_of("""g (float[4] x, bool c) => (float[4] y) <float[4] w = {1,2,3,4}> {
        [n] y = If (c) <then_branch = t () => (float[4] a) { a = Add (x, w) },
                        else_branch = e () => (float[4] b) { b = Identity (x) }> }""")
    for name in ("x", "y", "w", "a", "b", "n"):
        assert model.unique(name) == f"{name}_1"
    assert [model.unique("new") for _ in range(3)] == ["new", "new_1", "new_2"]


# --- types ----------------------------------------------------------------------------------------

UNTYPED = """g (float[N,4] x, bool c, int64[2] p) => (z) <int64[2] shape = {-1, 2}> {
  h = MatMul (x, w)
  r = Reshape (h, shape)
  z = If (c) <then_branch = t () => (a) { e = Exp (r)  a = Neg (e) },
              else_branch = e () => (b) { b = Identity (r) }>
}"""


def untyped() -> onnx.ModelProto:
    proto = text(UNTYPED)
    proto.graph.initializer.append(
        numpy_helper.from_array(np.ones((4, 256), np.float32), "w")  # large: not given to inference
    )
    return proto


def test_types_are_inferred_in_bodies_too_and_not_written() -> None:
    model = Model.from_proto(untyped())
    h, r = node_of(model, "MatMul").outputs[0], node_of(model, "Reshape").outputs[0]
    assert (h.dtype, h.shape) == (np.float32, ["N", 256])
    assert (r.dtype, r.shape) == (np.float32, [None, 2])
    e = node_of(model, "Exp").outputs[0]
    assert (e.dtype, e.shape) == (np.float32, [None, 2])
    assert not model.to_proto().graph.value_info
    assert_lossless(untyped())


def test_types_follow_an_edit() -> None:
    model = Model.from_proto(untyped())
    model.graph.inputs[0].shape = [3, 4]
    model.infer_shapes()
    assert node_of(model, "MatMul").outputs[0].shape == [3, 256]
    assert node_of(model, "Exp").outputs[0].shape == [384, 2]
    proto = model.to_proto()
    assert [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [3, 4]


def test_types_follow_an_edit_against_what_was_declared() -> None:
    model = model_of("g (float[N] x) => (float[N] y) { y = Neg (x) }")
    x, y = model.graph.inputs[0], model.graph.outputs[0]
    x.dtype, x.shape = np.dtype(np.float16), [3]
    model.infer_shapes()
    assert (y.dtype, y.shape) == (np.float16, [3])
    assert (x.dtype, x.shape) == (np.float16, [3])


def test_the_inputs_of_bodies_are_inferred() -> None:
    model = model_of("""g (float[5,4] x) => (y) {
        y = Scan <num_scan_inputs = 1, body = b (i) => (o) { o = Neg (i) }> (x) }""")
    (i,) = node_of(model, "Neg").inputs
    assert (i.dtype, i.shape) == (np.float32, [4])


def test_documented_types_that_a_pass_changed_are_not_written() -> None:
    proto = text("""g (float[N] x) => (float[N] y) <float[N] a, float[N] b> {
        a = Neg (x)  b = Neg (a)  y = Neg (b) }""")
    model = Model.from_proto(proto)
    model.nodes("Neg")[0].outputs[0].dtype = np.dtype(np.float16)
    assert [i.name for i in model.to_proto().graph.value_info] == ["b"]


def test_an_interface_that_a_pass_changed_is_written() -> None:
    proto = text("g (float[N] x) => (float[N] y) { y = Neg (x) }")
    proto.graph.input[0].doc_string = "doc"
    model = Model.from_proto(proto)
    for tensor in (model.graph.inputs[0], model.graph.outputs[0]):
        tensor.dtype, tensor.shape = np.dtype(np.float16), [1]
    model.graph.outputs.append(model.emit("Abs", model.graph.inputs[0], name="z"))
    graph = model.copy().to_proto().graph
    want = helper.make_tensor_type_proto(TensorProto.FLOAT16, [1])
    assert graph.input[0].type == graph.output[0].type == want
    assert graph.input[0].doc_string == "doc"
    assert graph.output[1].name == "z"


def test_what_inference_cannot_do_is_no_error() -> None:
    proto = text(
        "g (float[2] x, float[3] z) => (y) <float[7] c> { c = custom.Op (x)  d = Neg (c)"
        " e = Add (x, z)  y = MatMul (e, d) }"
    )
    model = Model.from_proto(proto)
    assert node_of(model, "Neg").outputs[0].shape == [7]  # of the documented type of c
    model.infer_shapes()
    assert node_of(model, "Neg").outputs[0].shape == [7]


def test_inference_that_throws_is_no_error() -> None:
    proto = text("g (float[2] x) => (y) { y = Relu (x) }")
    proto.opset_import[0].version = 9999
    assert Model.from_proto(proto).opset == 9999


# --- weights --------------------------------------------------------------------------------------


def test_constants_are_not_kept_twice_and_cannot_be_written() -> None:
    model = Model.from_proto(untyped())
    w = node_of(model, "MatMul").inputs[1]
    first = values_of(w)
    assert first is not None
    assert first is not values_of(w)
    assert not first.flags.writeable
    w.values = first * 2
    np.testing.assert_array_equal(w.values, first * 2)
    other = model.copy()
    with pytest.raises(ValueError, match="read-only"):
        w.values[:] = 0
    np.testing.assert_array_equal(other.nodes("MatMul")[0].inputs[1].values, first * 2)


CONSTANTS: dict[str, NDArray[Any]] = {
    "value = float[2] {1, 2}": f32(1, 2),
    "value_float = 1.5": np.array(1.5, np.float32),
    "value_floats = [1.5]": f32(1.5),
    "value_int = 3": np.array(3),
    "value_ints = [3, 4]": np.array([3, 4]),
    'value_string = "a"': np.array("a", object),
}


@pytest.mark.parametrize("attribute", CONSTANTS)
def test_values_of_constant_nodes(attribute: str) -> None:
    model = model_of(f"g () => (y) {{ c = Constant <{attribute}> ()  y = Identity (c) }}")
    values, want = values_of(node_of(model, "Identity").inputs[0]), CONSTANTS[attribute]
    assert values is not None
    assert values.dtype == want.dtype
    np.testing.assert_array_equal(values, want)


def test_values_of_other_tensors_are_unknown() -> None:
    model = Model.from_proto(documented())
    add, op = node_of(model, "Add"), node_of(model, "Op")
    assert values_of(add.inputs[0]) is None
    assert values_of(add.outputs[0]) is None
    assert values_of(op.inputs[1]) is None


def test_values_of_strings_and_sparse_initializers() -> None:
    proto = documented()
    proto.graph.node.add(op_type="X", domain="custom", input=["texts", "sparse"], output=["q"])
    texts, sparse = node_of(Model.from_proto(proto), "X").inputs
    values = values_of(texts)
    assert values is not None
    assert values.tolist() == [b"text", b"\xff\xfe"]
    np.testing.assert_array_equal(sparse.values, f32(1, 0, 2, 0))


def test_new_constants_are_packed_and_texts_are_texts() -> None:
    model = model_of("g () => (y) { y = Constant <value_int = 1> () }")
    four = numpy_helper.to_array(helper.make_tensor("", TensorProto.INT4, [3], [1, -2, 3]))
    model.emit(
        "X", model.constant("four", four), model.constant("t", np.array(["a", "bc"])), name="x"
    )
    first, second = model.to_proto().graph.initializer
    assert first.raw_data == b"\xe1\x03"
    assert list(second.string_data) == [b"a", b"bc"]


def test_a_constant_lands_where_its_readers_see_it() -> None:
    model = model_of("""g (float[2] x, bool c) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] a) { a = Neg (x) },
                    else_branch = e () => (float[2] b) { b = Abs (x) }> }""")
    shared, own = (model.constant(n, f32(1, 2)) for n in ("shared", "own"))
    for op in ("Neg", "Abs"):
        node = node_of(model, op)
        node.inputs[0] = model.emit("Add", node.inputs[0], shared, name="s", like=shared, at=node)
    node.inputs[0] = model.emit("Mul", node.inputs[0], own, name="m", like=own, at=node)
    proto = model.to_proto()
    bodies = {a.name: a.g for a in proto.graph.node[0].attribute}
    assert [t.name for t in proto.graph.initializer] == ["shared"]
    assert [t.name for t in bodies["else_branch"].initializer] == ["own"]
    assert ops(bodies["else_branch"]) == ["Add", "Mul", "Abs"]
    assert not bodies["then_branch"].initializer
    x = f32(1, 1)
    np.testing.assert_array_equal(run(proto, x=x, c=np.array(False))[0], [2, 6])


def test_a_copy_is_independent() -> None:
    model = Model.from_proto(untyped())
    other = model.copy()
    node_of(other, "MatMul").op = "Other"
    assert node_of(model, "MatMul").op == "MatMul"
    assert node_of(other, "Other").outputs[0].shape == ["N", 256]
    assert model.unique("new") == other.unique("new")


def test_copies_keep_the_order_of_initializers() -> None:
    """Weights made since loading are written in the order of their use, in a copy as well."""
    proto = text(
        "g (float[1] x) => (float[1] y) <float[1] c = {1}, float[1] b = {2}, float[1] a = {3}>"
        " { h = Add (x, a)  k = Add (h, c)  y = Add (k, b) }"
    )
    model = Model.from_proto(proto)
    assert [t.name for t in proto.graph.initializer] == ["c", "b", "a"]
    for node, name in zip(model.nodes("Add")[:2], ("new", "newer"), strict=True):
        node.inputs[1] = model.constant(name, f32(4))
    models = model, model.copy(), model.copy().copy()
    for other in models:
        first, second, _ = other.nodes("Add")
        first.inputs[1], second.inputs[1] = second.inputs[1], first.inputs[1]
    for other in models:
        graph = other.to_proto().graph
        assert [t.name for t in graph.initializer] == ["b", "newer", "new"]


# --- edits ----------------------------------------------------------------------------------------

BODIES = """g (float[2] x, bool c) => (float[2] y) <float[2] w = {1,2}, float[2] v = {5,6}> {
  h = Add (x, w)
  dead = Neg (x)
  deader = Mul (dead, v)
  y = If (c) <then_branch = t () => (float[2] a) { k = Relu (x)  a = Abs (h) },
              else_branch = e () => (float[2] b) { b = Identity (x) }>
}"""


def test_sweep_keeps_what_bodies_capture_and_drops_the_rest() -> None:
    model = model_of(BODIES)
    x = model.graph.inputs[0]
    model.sweep()
    assert sorted(n.op for n in model.nodes()) == ["Abs", "Add", "Identity", "If"]
    assert sorted(n.op for n in x.outputs) == ["Add", "Identity"]
    proto = model.to_proto()
    assert [t.name for t in proto.graph.initializer] == ["w"]
    assert [i.name for i in proto.graph.input] == ["x", "c"]
    onnx.checker.check_model(proto, full_check=True)


def test_sweep_drops_bodies_with_their_node() -> None:
    model = model_of(BODIES)
    model.replace(model.graph.outputs[0], model.emit("Exp", model.graph.inputs[0], name="e"))
    model.sweep()
    proto = model.to_proto()
    assert ops(proto.graph) == ["Exp"]
    assert [n.op for n in model.graph.inputs[0].outputs] == ["Exp"]
    assert not proto.graph.initializer
    assert [i.name for i in proto.graph.input] == ["x", "c"]


def test_sweep_keeps_operators_that_may_have_effects() -> None:
    proto = text("""g (float[2] x) => (float[2] y) {
        a = custom.Print (x)  b = custom.Local (x)  c = com.microsoft.Gelu (x)  y = Neg (x) }""")
    proto.graph.node.add(op_type="Sink", domain="custom", input=["x"])
    proto.functions.append(
        parser.parse_function(
            '<domain: "custom", opset_import: ["": 17]> Local (a) => (b) { b = Neg (a) }'
        )
    )
    model = Model.from_proto(proto)
    model.sweep()
    assert sorted(n.op for n in model.nodes()) == ["Neg", "Print", "Sink"]


def test_sweep_sees_readers_that_a_pass_left_attached() -> None:
    model = model_of("g (float[2] x) => (float[2] y) { h = Abs (x)  z = Neg (h)  y = Exp (h) }")
    neg = node_of(model, "Neg")
    model.graph.nodes[:] = [n for n in model.graph.nodes if n is not neg]
    model.sweep()
    assert [n.op for n, _ in readers(node_of(model, "Abs").outputs[0])] == ["Exp"]


def test_replace_reaches_captures_and_every_place() -> None:
    model = model_of(BODIES)
    h = node_of(model, "Add").outputs[0]
    node_of(model, "Mul").inputs[1] = h
    node_of(model, "Mul").inputs[0] = h
    new = model.emit("Exp", model.graph.inputs[0], name="e", like=h)
    model.replace(h, new)
    assert node_of(model, "Abs").inputs[0] is new
    assert [t is new for t in node_of(model, "Mul").inputs] == [True, True]
    assert not node_of(model, "Add").outputs
    assert sorted((n.op, i) for n, i in readers(new)) == [("Abs", 0), ("Mul", 0), ("Mul", 1)]


def test_replace_keeps_the_names_of_outputs() -> None:
    model = model_of("""g (float[2] x) => (float[2] y) { h = Abs (x)  y = Neg (h)  z = Exp (y) }""")
    y, h = model.graph.outputs[0], node_of(model, "Abs").outputs[0]
    model.replace(y, h)
    assert producer(y) is node_of(model, "Abs")
    assert node_of(model, "Neg").outputs == []
    model.sweep()
    assert ops(model.to_proto().graph) == ["Abs"]
    assert model.to_proto().graph.output[0].name == "y"


def test_replace_keeps_the_places_of_other_outputs() -> None:
    model = model_of(
        """g (float[6] x) => (float[2] a, float[2] c) {
        a, b, c = Split <axis = 0, num_outputs = 3> (x)  d = Neg (b) }""".replace(
            ", num_outputs = 3", ""
        )
    )
    split = node_of(model, "Split")
    model.replace(split.outputs[0], model.emit("Exp", split.outputs[1], name="e"))
    assert [t.name for t in split.outputs] == ["a_unread", "b", "c"]
    x = np.arange(6, dtype=np.float32)
    a, c = run(model.to_proto(), x=x)
    np.testing.assert_allclose(a, np.exp(x[2:4]), rtol=1e-6)
    np.testing.assert_array_equal(c, x[4:])


@pytest.mark.parametrize("new", ["x", "w", "z"])
def test_replace_refuses_what_cannot_be_done(new: str) -> None:
    model = model_of("""g (float[2] x) => (float[2] y, float[2] z) <float[2] w = {1,2}> {
        y = Add (x, w)  z = Neg (x) }""")
    before = model.to_proto()
    tensors = {t.name: t for n in model.nodes() for t in [*n.inputs, *n.outputs]}
    with pytest.raises(ValueError, match="y is a graph output"):
        model.replace(tensors["y"], tensors[new])
    assert model.to_proto() == before


def test_inputs_and_constants_may_be_outputs_and_stay_so() -> None:
    proto = text(
        "g (float[2] x) => (float[2] x, float[2] w, float[2] y) <float[2] w = {1,2}>"
        " { y = Neg (x)  h = Abs (x) }"
    )
    assert_lossless(proto)
    model = Model.from_proto(proto)
    for tensor in model.graph.outputs[:2]:
        with pytest.raises(ValueError, match="is a graph output"):
            model.replace(tensor, node_of(model, "Abs").outputs[0])
    model.sweep()
    assert [t.name for t in model.to_proto().graph.initializer] == ["w"]


def test_replace_does_not_reach_out_of_a_body() -> None:
    model = model_of(BODIES)
    a, h = node_of(model, "Abs").outputs[0], node_of(model, "Add").outputs[0]
    with pytest.raises(ValueError, match="another graph"):
        model.replace(a, h)
    model.replace(a, node_of(model, "Relu").outputs[0])
    model.sweep()
    onnx.checker.check_model(model.to_proto(), full_check=True)


def test_emitted_nodes_go_where_they_are_asked_to() -> None:
    model = model_of(BODIES)
    abs_ = node_of(model, "Abs")
    out = model.emit("Neg", abs_.inputs[0], name="n", at=abs_, like=abs_.inputs[0])
    body = model.graph_of(abs_)
    assert body.name == "t"
    assert model.graph_of(producer(out)) is body
    assert model.graph_of(node_of(model, "If")) is model.graph_of(None) is model.graph
    assert isinstance(producer(out), Node)
    assert model.is_output(abs_.outputs[0])
    assert model.is_output(model.graph.outputs[0])
    assert not model.is_output(out)
    assert model.is_input(model.graph.inputs[0])
    assert not model.is_input(out)
    by_hand = gs.Node("Neg", "by hand", inputs=[out], outputs=[gs.Variable("o")])
    body.nodes.append(by_hand)
    assert model.graph_of(by_hand) is body


def test_domains_that_are_used_are_imported() -> None:
    model = model_of("g (float[2] x) => (float[2] y) { y = Neg (x) }")
    model.emit("Gelu", model.graph.inputs[0], name="g", domain="com.microsoft")
    model.emit("Foo", model.graph.inputs[0], name="f", domain="custom")
    imports = {o.domain: o.version for o in model.to_proto().opset_import}
    assert imports == {"": 17, "custom": 3, "com.microsoft": 1}


def test_edits_of_large_graphs_are_fast() -> None:
    proto = text("g (float[4] t0) => (float[4] t5000) { t1 = Relu (t0) }")
    del proto.graph.node[:]
    for i in range(5000):
        proto.graph.node.append(helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]))
    model = Model.from_proto(proto)
    start = time.perf_counter()
    for node in model.nodes("Relu"):
        old = node.outputs[0]
        model.replace(old, model.emit("Abs", node.inputs[0], name="same", like=old, at=node))
    shared = model.constant("shared", f32(1))
    for node in model.nodes("Abs"):
        node.inputs.append(shared)
    for node in model.nodes("Abs"):
        del node.inputs[1]
    model.sweep()
    assert time.perf_counter() - start < 4
    assert len(model.to_proto().graph.node) == 5000


# --- operator sets --------------------------------------------------------------------------------

OLD = """<ir_version: 5, opset_import: ["": 9, "custom": 1]>
g (float[2,3,4] x, bool c) => (float[2,3,4] y, float[2,12] z) {
  [soft] s = Softmax <axis = 1> (x)
  [slice] p = Slice <axes = [2], starts = [0], ends = [4]> (s)
  [branch] y = If (c) <then_branch = t () => (float[2,3,4] a) { a = Softmax <axis = 1> (p) },
              else_branch = e () => (float[2,3,4] b) { b = Clip <min = 0.2> (p) }>
  f = Flatten (x)
  z = MatMul (f, w)
}"""


def old() -> onnx.ModelProto:
    proto = parser.parse_model(OLD)
    w = np.random.default_rng(0).standard_normal((12, 300)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(w, "w"))
    proto.graph.output[1].type.tensor_type.shape.dim[1].dim_value = 300
    return proto


def test_raising_the_opset_keeps_values_and_documentation() -> None:
    proto = old()
    proto.doc_string = proto.graph.doc_string = proto.graph.node[1].doc_string = "doc"
    proto.graph.input[0].doc_string = "doc"
    proto.graph.output[0].metadata_props.add(key="k", value="v")
    model = Model.from_proto(proto)
    graph = model.graph
    model.raise_opset(21)
    after = model.to_proto()
    assert model.graph is graph
    assert model.opset == after.opset_import[0].version == 21
    assert after.ir_version >= 10
    onnx.checker.check_model(after, full_check=True)
    assert after.graph.input == proto.graph.input
    assert after.graph.output == proto.graph.output
    assert after.doc_string == after.graph.doc_string == "doc"
    assert next(n for n in after.graph.node if n.name == "slice").doc_string == "doc"
    assert [g.opset for g in model.graphs()] == [21] * 3
    names = [n.name for n in model.nodes()]
    assert len(set(names)) == len(names)
    assert node_of(model, "MatMul").inputs[1].values.shape == (12, 300)
    assert node_of(model, "Slice").outputs[0].shape == [2, 3, 4]
    x = np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)
    for c in (np.array(True), np.array(False)):
        for a, b in zip(run(proto, x=x, c=c), run(after, x=x, c=c), strict=True):
            np.testing.assert_array_equal(a, b)


def test_raising_the_opset_carries_what_the_converter_does_not_know() -> None:
    proto = documented()
    proto.graph.ClearField("sparse_initializer")
    model = Model.from_proto(proto)
    model.raise_opset(18)
    after = model.to_proto()
    want, got = ({a.name: a for a in p.graph.node[1].attribute} for p in (proto, after))
    assert want == got
    assert after.graph.node[1].doc_string == "node doc"
    assert after.graph.node[1].overload == "version2"
    assert after.functions == proto.functions
    assert after.training_info == proto.training_info
    assert after.metadata_props == proto.metadata_props
    assert after.graph.quantization_annotation == proto.graph.quantization_annotation
    assert after.graph.value_info == proto.graph.value_info


def test_raising_to_a_lower_opset_does_nothing() -> None:
    model = Model.from_proto(old())
    model.raise_opset(9)
    model.raise_opset(7)
    assert model.to_proto() == Model.from_proto(old()).to_proto()


@pytest.mark.parametrize(
    ("proto", "version", "message"),
    [
        pytest.param(
            """<ir_version: 4, opset_import: ["": 9]>
            g (float[2] x) => (float[2] y) { y = NoSuch (x) }""",
            17,
            "opset 17 .operator NoSuch",
            id="unknown",
        ),
        pytest.param(
            """<ir_version: 8, opset_import: ["": 18]>
            g (float[1,4,2] x, float[2] s, float[2] b) => (float[1,4,2] y)
            { y = GroupNormalization <num_groups = 2> (x, s, b) }""",
            21,
            "opset 21 .operator GroupNormalization",
            id="changed-meaning",
        ),
        pytest.param(OLD, 9999, "install a newer onnx", id="future"),
    ],
)
def test_what_cannot_be_converted_stays(proto: str, version: int, message: str) -> None:
    model = Model.from_proto(parser.parse_model(proto))
    before = model.to_proto()
    with pytest.raises(ModelError, match=message) as error:
        model.raise_opset(version)
    assert "\n" not in str(error.value)
    assert model.to_proto() == before
