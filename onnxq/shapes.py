"""Types and shapes of a graph's variables, from onnx's shape inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from onnxq.graphs import bodies_of, local_tensors, type_of, walk

Shape = list[int | str | None] | None
Merge = Callable[[Shape, Shape], Shape]


def fill(old: Shape, new: Shape) -> Shape:
    """What the file says, completed by what was inferred."""
    if old is None:
        return new
    if new is None or len(old) != len(new):
        return old
    return [a if a is not None else b for a, b in zip(old, new, strict=True)]


def update(old: Shape, new: Shape) -> Shape:
    """What was inferred, completed by what was known."""
    if new is None:
        return old
    return fill(new, old)


def symbols(graph: gs.Graph) -> set[str]:
    """All names of dimensions."""
    tensors = (t for inner in walk(graph) for t in local_tensors(inner).values())
    shapes = (t.shape for t in tensors if isinstance(t, gs.Variable) and t.shape is not None)
    return {dim for shape in shapes for dim in shape if isinstance(dim, str)}


def take_types(graph: gs.Graph, proto: onnx.GraphProto, merge: Merge, known: set[str]) -> None:
    """Merge the types of an inferred proto into the graph it was exported from.

    Names that inference makes up for dimensions (not in `known`) differ from run to run and are
    not taken.
    """
    infos = {i.name: i.type for i in (*proto.input, *proto.output, *proto.value_info)}
    for name, tensor in local_tensors(graph).items():
        info = infos.get(name)
        if info is None or not isinstance(tensor, gs.Variable):
            continue
        dtype, shape = type_of(info)
        if shape is not None:
            shape = [None if isinstance(d, str) and d not in known else d for d in shape]
        if tensor.dtype is None or merge is update:
            tensor.dtype = dtype if dtype is not None else tensor.dtype
        tensor.shape = merge(tensor.shape, shape)
    for node, inferred in zip(graph.nodes, proto.node, strict=False):
        protos: list[Any] = [a.g for a in inferred.attribute if a.HasField("g")]
        protos += [g for a in inferred.attribute for g in a.graphs]
        for body, inner in zip(bodies_of(node), protos, strict=False):
            take_types(body, inner, merge, known)


def same_types(source: gs.Graph, target: gs.Graph) -> None:
    """Copy types between two graphs of the same form."""
    for one, other in zip(walk(source), walk(target), strict=False):
        into = local_tensors(other)
        for name, tensor in local_tensors(one).items():
            if isinstance(tensor, gs.Variable) and isinstance(into.get(name), gs.Variable):
                copy_type(tensor, into[name])


def copy_type(source: gs.Variable, target: gs.Variable) -> None:
    """Give a variable another's type."""
    target.dtype, target.type = source.dtype, source.type
    target.shape = None if source.shape is None else list(source.shape)


def known_shapes(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """The shapes that are wholly known, by name of the tensor; bodies included."""
    known: dict[str, list[int]] = {}
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                known |= known_shapes(body)
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            known[value.name] = [d.dim_value for d in kind.shape.dim]
    return known


def inferred(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """The model with the types that onnx infers; None where it cannot. Raises the IR version."""
    proto.ir_version = max(proto.ir_version, 8)
    try:
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # whatever C++ throws: what is not known stays unknown
        return None


def shapes_with(
    proto: onnx.ModelProto, inputs: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """Shapes of tensors, by name, when the inputs have the given ones; edits the proto.

    Empty where the inputs do not fit: that is told when they are run.
    """
    proto.graph.ClearField("value_info")
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in proto.graph.input:
        if value.name in inputs:
            shape = value.type.tensor_type.shape
            shape.ClearField("dim")
            shape.dim.extend(
                onnx.TensorShapeProto.Dimension(dim_value=d) for d in inputs[value.name]
            )
    found = inferred(proto)
    return {} if found is None else known_shapes(found.graph)
