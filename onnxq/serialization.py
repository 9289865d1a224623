"""Between onnx protos and graphsurgeon graphs, without loss.

graphsurgeon's own importer and exporter drop much (documentation, metadata, types that are not
tensors, some attributes) and cannot carry some models at all. Here what graphsurgeon has no place
for stays in the protos it came from, see `onnxq.graphs`.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto

from onnxq.errors import ModelError
from onnxq.graphs import (
    DEFAULT_DOMAIN,
    Node,
    Origin,
    is_unchanged,
    local_tensors,
    op_of,
    op_type_of,
    origin_of,
    sort,
    type_of,
)
from onnxq.sparse import StoredSparse
from onnxq.weights import (
    Fetch,
    Placeholders,
    Put,
    Weight,
    data_type_of,
    inline,
    without,
)


@dataclass(frozen=True, slots=True)
class Importer:
    """Makes gs graphs of protos; `fetch` says what holds the values of a TensorProto."""

    fetch: Fetch
    opset: int

    def graph(self, proto: onnx.GraphProto, outer: ChainMap[str, gs.Tensor]) -> gs.Graph:
        """The graph; names not defined in it are those of the scope outside."""
        scope = outer.new_child()
        local = scope.maps[0]
        initializers = [Weight(t.name, self.fetch(t)) for t in proto.initializer]
        initializers += [
            Weight(t.values.name, StoredSparse(t, self.fetch)) for t in proto.sparse_initializer
        ]
        local.update({t.name: t for t in initializers})
        # results are declared before any body is read: it may capture one that comes later
        results = (name for node in proto.node for name in node.output if name)
        for name in chain((i.name for i in (*proto.input, *proto.output)), results):
            if name not in local:
                local[name] = gs.Variable(name)
        for info in (*proto.value_info, *proto.output, *proto.input):
            _describe(local.get(info.name), info.type)
        constants = {t.name for t in initializers}
        nodes = [self._node(node, scope) for node in proto.node]
        graph = gs.Graph(
            nodes=nodes,
            inputs=[local[i.name] for i in proto.input if i.name not in constants],
            outputs=[local[o.name] for o in proto.output],
            name=proto.name,
            doc_string=proto.doc_string,
            opset=self.opset,
        )
        documented = (i.name for i in proto.value_info)
        annotated = (a.tensor_name for a in proto.quantization_annotation)
        graph.origin = Origin(
            shell=without(proto, *_CARRIED),
            inputs=list(proto.input),
            outputs=list(proto.output),
            value_infos=list(proto.value_info),
            initializers=initializers,
            idle={id(t) for t in initializers if not t.outputs},
            loose={name for name in chain(documented, annotated) if name not in local},
        )
        return graph

    def _node(self, proto: onnx.NodeProto, scope: ChainMap[str, gs.Tensor]) -> Node:
        def tensor(name: str) -> gs.Tensor:
            if not name:
                return gs.Variable.empty()
            if name not in scope:
                scope[name] = gs.Variable(name)
            return scope[name]

        node = Node(
            op_of(proto.domain, proto.op_type),
            proto.name,
            {a.name: self._attribute(a, scope) for a in proto.attribute},
            [tensor(name) for name in proto.input],
            [scope.maps[0][name] if name else gs.Variable.empty() for name in proto.output],
            None if proto.domain in DEFAULT_DOMAIN else proto.domain,
        )
        node.origin = proto
        return node

    def _attribute(self, attribute: AttributeProto, scope: ChainMap[str, gs.Tensor]) -> Any:
        """The value as gs has it; what gs cannot hold stays an AttributeProto."""
        if attribute.ref_attr_name:
            return attribute
        match attribute.type:
            case AttributeProto.FLOAT:
                return attribute.f
            case AttributeProto.INT:
                return attribute.i
            case AttributeProto.STRING:
                return _text(attribute.s)
            case AttributeProto.FLOATS:
                return list(attribute.floats)
            case AttributeProto.INTS:
                return list(attribute.ints)
            case AttributeProto.STRINGS:
                return [_text(s) for s in attribute.strings]
            case AttributeProto.TENSOR:
                return Weight(attribute.t.name, self.fetch(attribute.t))
            case AttributeProto.GRAPH:
                return self.graph(attribute.g, scope)
            case AttributeProto.GRAPHS:
                return [self.graph(g, scope) for g in attribute.graphs]
            case AttributeProto.SPARSE_TENSOR if attribute.name == SPARSE_VALUE:
                held = StoredSparse(attribute.sparse_tensor, self.fetch, is_node=True)
                return Weight(attribute.sparse_tensor.values.name, held)
        inner = (*attribute.tensors, attribute.sparse_tensor.values)
        if any(t.data_location == onnx.TensorProto.EXTERNAL for t in inner):
            raise ModelError(f"attribute {attribute.name!r}: its data file is not supported")
        return attribute


SPARSE_VALUE = "sparse_value"  # of Constant

_CARRIED = ("node", "initializer", "sparse_initializer", "input", "output", "value_info")


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _describe(tensor: gs.Tensor | None, info: onnx.TypeProto) -> None:
    if not isinstance(tensor, gs.Variable) or info.WhichOneof("value") is None:
        return
    tensor.type = info.WhichOneof("value")
    dtype, shape = type_of(info)
    tensor.dtype = dtype if dtype is not None else tensor.dtype
    tensor.shape = shape if shape is not None else tensor.shape


@dataclass(frozen=True, slots=True)
class Exporter:
    """Makes protos of gs graphs; `put` says how a constant is written.

    `placed` tells which constants each graph holds. With `infer`, types are written only where
    shape inference cannot find them: results of operators outside of the standard.
    """

    put: Put
    placed: dict[int, list[gs.Constant]]
    infer: bool = False

    def graph(self, graph: gs.Graph, out: onnx.GraphProto) -> None:
        """Write the graph, its nodes sorted if they were not; raises ModelError for a cycle."""
        sort(graph)
        origin, constants = origin_of(graph), self.placed[id(graph)]
        out.MergeFrom(without(origin.shell, "quantization_annotation"))
        if out.name != graph.name:
            out.name = graph.name
        for constant in constants:
            self._constant(constant, out)
        for node in graph.nodes:
            self._node(node, out.node.add())
        out.input.extend(_inputs(graph, constants))
        known = {info.name: info for info in origin.outputs}
        out.output.extend(interface(t, known.get(t.name)) for t in graph.outputs)
        for info in out.output if self.infer else ():
            info.ClearField("type")  # after an edit it may be what was true before
        local = local_tensors(graph)
        out.value_info.extend(_custom(graph) if self.infer else _documented(origin, local))
        out.quantization_annotation.extend(
            note
            for note in origin.shell.quantization_annotation
            if note.tensor_name in local or note.tensor_name in origin.loose
        )

    def _constant(self, constant: gs.Constant, out: onnx.GraphProto) -> None:
        held = constant._values
        if not isinstance(held, StoredSparse) or isinstance(self.put, Placeholders):
            out.initializer.add().CopyFrom(self.put(constant))
        elif held.is_node:
            node = out.node.add(op_type="Constant", name=constant.name, output=[constant.name])
            attribute = node.attribute.add(name=SPARSE_VALUE, type=AttributeProto.SPARSE_TENSOR)
            attribute.sparse_tensor.CopyFrom(held.to_proto(held.name))
        else:
            out.sparse_initializer.add().CopyFrom(held.to_proto(constant.name))

    def _node(self, node: gs.Node, out: onnx.NodeProto) -> None:
        origin = node.__dict__.get("origin", onnx.NodeProto())
        out.input.extend(t.name for t in node.inputs)
        out.output.extend(t.name for t in node.outputs)
        out.op_type = op_type_of(node)
        if node.name:
            out.name = node.name
        if node.domain not in DEFAULT_DOMAIN:
            out.domain = node.domain
        elif origin.HasField("domain") and origin.domain in DEFAULT_DOMAIN:
            out.domain = origin.domain
        extras = "input", "output", "op_type", "name", "domain", "attribute"
        out.MergeFrom(without(origin, *extras))
        likes = {a.name: a for a in origin.attribute}
        for name, value in node.attrs.items():
            self._attribute(name, value, likes.get(name), out.attribute.add())

    def _attribute(
        self, name: str, value: Any, like: AttributeProto | None, out: AttributeProto
    ) -> None:
        out.name = name
        if isinstance(value, AttributeProto):
            out.CopyFrom(value)
            out.name = name
            return
        if isinstance(value, gs.Constant) and isinstance(value._values, StoredSparse):
            out.type = AttributeProto.SPARSE_TENSOR
            out.sparse_tensor.CopyFrom(value._values.to_proto(value.name))
        elif isinstance(value, gs.Constant):
            out.type = AttributeProto.TENSOR
            out.t.CopyFrom(self.put(value))
        elif isinstance(value, np.ndarray):
            out.type = AttributeProto.TENSOR
            out.t.CopyFrom(inline(gs.Constant("", value)))
        elif isinstance(value, gs.Graph):
            out.type = AttributeProto.GRAPH
            self.graph(value, out.g)
        elif isinstance(value, list) and value and isinstance(value[0], gs.Graph):
            out.type = AttributeProto.GRAPHS
            for body in value:
                self.graph(body, out.graphs.add())
        else:
            _plain(name, value, like, out)
        if like is not None and like.HasField("doc_string"):
            out.doc_string = like.doc_string


def _plain(name: str, value: Any, like: AttributeProto | None, out: AttributeProto) -> None:
    """Numbers, texts and lists of them; `like` tells the type of an empty list."""
    if isinstance(value, (np.dtype, type)):
        value = data_type_of(value)
    kind = like.type if like is not None else AttributeProto.UNDEFINED
    value = [*value] if isinstance(value, (list, tuple)) else value
    if kind == AttributeProto.FLOAT and not isinstance(value, (str, bytes, list)):
        value = float(value)
    if kind == AttributeProto.FLOATS and isinstance(value, list):
        value = [float(v) for v in value]
    if not isinstance(value, list) or value:
        out.CopyFrom(onnx.helper.make_attribute(name, value))
    else:
        out.type = kind or AttributeProto.INTS


def interface(tensor: gs.Tensor, info: onnx.ValueInfoProto | None) -> onnx.ValueInfoProto:
    """The input or output as it was documented; with a new type if a pass has changed that."""
    out = onnx.ValueInfoProto()
    if info is not None:
        out.CopyFrom(info)
        if is_unchanged(tensor):
            return out
        out.ClearField("type")
    out.name = tensor.name
    if tensor.dtype is not None:
        kind = data_type_of(tensor.dtype)
        out.type.CopyFrom(onnx.helper.make_tensor_type_proto(kind, tensor.shape))
    return out


def _inputs(graph: gs.Graph, constants: list[gs.Constant]) -> list[onnx.ValueInfoProto]:
    """Inputs in their order, initializers among them where they were listed."""
    listed = {info.name: info for info in origin_of(graph).inputs}
    infos = {t.name: interface(t, listed.get(t.name)) for t in graph.inputs}
    weights = {t.name: listed[t.name] for t in constants if t.name in listed}
    if [name for name in listed if name in infos] == list(infos):
        every = infos | weights
        return [every[name] for name in listed if name in every]
    return [*infos.values(), *weights.values()]


def _documented(origin: Origin, local: dict[str, gs.Tensor]) -> Iterator[onnx.ValueInfoProto]:
    """The value infos that are still true."""
    for info in origin.value_infos:
        tensor = local.get(info.name)
        if info.name in origin.loose or (tensor is not None and is_unchanged(tensor)):
            yield info


def _custom(graph: gs.Graph) -> Iterator[onnx.ValueInfoProto]:
    for node in graph.nodes:
        if node.domain not in DEFAULT_DOMAIN:
            yield from (interface(t, None) for t in node.outputs if t.name and t.dtype is not None)
