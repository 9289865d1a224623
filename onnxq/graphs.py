"""What a graph is made of: nodes, bodies, tensors and where it came from; order and place.

graphsurgeon's graphs with what they have no place for: `Origin` on graphs, `origin` on nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.errors import ModelError
from onnxq.weights import dtype_of

DEFAULT_DOMAIN = (None, "", "ai.onnx")


SAME_MEANING = ("QuantizeLinear", "DequantizeLinear")
"""Operators of com.microsoft that do what the standard's do (they took 16 bits before it did)."""


def plain_domain(domain: str | None) -> str:
    """The domain as protos have it: empty for the standard's operators."""
    return "" if domain in DEFAULT_DOMAIN else str(domain)


def opset_of(proto: onnx.ModelProto) -> int:
    """The default operator set's version; the newest for the IR version when none is imported."""
    for entry in proto.opset_import:
        if entry.domain in DEFAULT_DOMAIN:
            return int(entry.version)
    rows = onnx.helper.VERSION_TABLE
    return max((row[2] for row in rows if row[1] <= proto.ir_version), default=1)


def op_of(domain: str, op_type: str | bytes) -> str:
    """The operator's name as nodes have it: never that of a standard one that it is not.

    A foreign operator that is called Conv is "domain::Conv": no rule is to take it for the other.
    Raises ModelError for a name that is not UTF-8.
    """
    if not isinstance(op_type, str):  # protobuf gives bytes for what is not UTF-8
        raise ModelError("damaged (an operator's name is not UTF-8); download or export it again")
    if domain in DEFAULT_DOMAIN or not onnx.defs.has(op_type):
        return op_type
    is_same = domain == "com.microsoft" and op_type in SAME_MEANING
    return op_type if is_same else f"{domain}::{op_type}"


def op_type_of(node: gs.Node) -> str:
    """The operator's name in its domain."""
    return str(node.op).removeprefix(f"{node.domain}::")


class Node(gs.Node):  # type: ignore[misc]
    """A gs.Node that equals only itself and can be in sets.

    gs.Node compares names, attributes and tensors; gs's lists remove the first node that is equal.
    """

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


@dataclass(slots=True)
class Origin:
    """What a graph was imported from, as far as a gs.Graph has no place for it."""

    shell: onnx.GraphProto = field(default_factory=onnx.GraphProto)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    value_infos: list[onnx.ValueInfoProto] = field(default_factory=list)
    initializers: list[gs.Constant] = field(default_factory=list)
    idle: set[int] = field(default_factory=set)
    """ids of initializers that nothing read: kept until a sweep"""
    loose: set[str] = field(default_factory=set)
    """names that were documented but named nothing: kept"""


def origin_of(graph: gs.Graph) -> Origin:
    """The graph's origin; an empty one for a graph that a pass made."""
    origin = graph.__dict__.setdefault("origin", Origin())
    assert isinstance(origin, Origin)
    return origin


def bodies_of(node: gs.Node) -> Iterator[gs.Graph]:
    """The bodies in the node's attributes (gs overlooks lists of graphs)."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            yield value
        elif isinstance(value, list) and value and isinstance(value[0], gs.Graph):
            yield from value


def walk(graph: gs.Graph) -> Iterator[gs.Graph]:
    """The graph and all bodies in it, outermost first."""
    yield graph
    for node in graph.nodes:
        for body in bodies_of(node):
            yield from walk(body)


def captured(node: gs.Node) -> Iterator[gs.Tensor]:
    """The tensors that the bodies of a node read or hand out, from wherever they come."""
    for body in bodies_of(node):
        for graph in walk(body):
            for inner in graph.nodes:
                yield from inner.inputs
            yield from graph.outputs


def local_tensors(graph: gs.Graph) -> dict[str, gs.Tensor]:
    """Tensors of this very graph by name: inputs, outputs, initializers, results of its nodes."""
    results = (t for node in graph.nodes for t in node.outputs if t.name)
    every = chain(results, origin_of(graph).initializers, graph.outputs, graph.inputs)
    return {t.name: t for t in every}


def type_of(info: onnx.TypeProto) -> tuple[np.dtype[Any] | None, list[int | str | None] | None]:
    """The dtype and shape of a tensor type; None for what is unknown or no tensor."""
    tensor = info.tensor_type
    if not info.HasField("tensor_type") or not tensor.HasField("shape"):
        return dtype_of(tensor.elem_type), None
    shape = [
        d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim
    ]
    return dtype_of(tensor.elem_type), shape


def state_of(tensor: gs.Tensor) -> tuple[Any, tuple[Any, ...] | None]:
    """The dtype and shape as a value, to see later whether a pass has changed them."""
    return tensor.dtype, None if tensor.shape is None else tuple(tensor.shape)


def remember(graph: gs.Graph) -> None:
    """Note dtype and shape of all tensors; documented types are kept where these do not change."""
    for inner in walk(graph):
        for tensor in local_tensors(inner).values():
            tensor.seen = state_of(tensor)


def is_unchanged(tensor: gs.Tensor) -> bool:
    """Whether dtype and shape are those that were remembered."""
    return bool(tensor.__dict__.get("seen") == state_of(tensor))


def place(main: gs.Graph) -> dict[int, list[gs.Constant]]:
    """Which graph (by id) holds which constants, in order.

    Imported ones stay where they were while all their readers can see them there; new ones are
    held by the one graph that reads them, or by the main graph.
    """
    paths: dict[int, tuple[int, ...]] = {}
    readers: dict[int, list[int]] = {}
    constants: dict[int, gs.Constant] = {}

    def visit(graph: gs.Graph, path: tuple[int, ...]) -> None:
        paths[id(graph)] = (*path, id(graph))
        for tensor in chain((t for node in graph.nodes for t in node.inputs), graph.outputs):
            if isinstance(tensor, gs.Constant):
                constants[id(tensor)] = tensor
                readers.setdefault(id(tensor), []).append(id(graph))
        for node in graph.nodes:
            for body in bodies_of(node):
                visit(body, paths[id(graph)])

    visit(main, ())
    placed: dict[int, list[gs.Constant]] = {key: [] for key in paths}
    for graph in walk(main):
        origin = origin_of(graph)
        for constant in origin.initializers:
            places = readers.get(id(constant), [])
            if all(id(graph) in paths[p] for p in places) and (
                places or id(constant) in origin.idle
            ):
                placed[id(graph)].append(constant)
                constants.pop(id(constant), None)
    for key, constant in constants.items():
        places = readers[key]
        home = places[0] if len(set(places)) == 1 else id(main)
        placed[home].append(constant)
    return placed


def sort(graph: gs.Graph) -> None:
    """Put the nodes in topological order, if they are not; those that may stay, stay.

    Raises ModelError for a cycle.
    """
    home = {id(node): i for i, node in enumerate(graph.nodes)}

    def needs(node: gs.Node) -> Iterable[int]:
        for tensor in chain(node.inputs, captured(node)):
            for source in tensor.inputs:
                if id(source) in home:
                    yield home[id(source)]

    needed = [set(needs(node)) for node in graph.nodes]
    if all(j < i for i, before in enumerate(needed) for j in before):
        return
    order: dict[int, None] = {}
    open_nodes: set[int] = set()
    stack = list(reversed(range(len(needed))))
    while stack:
        i = stack[-1]
        missing = sorted((j for j in needed[i] if j not in order), reverse=True)
        if i in order or not missing:
            order.setdefault(stack.pop())
            open_nodes.discard(i)
        else:
            if open_nodes.intersection(missing) or i in missing:
                raise ModelError(
                    f"the graph has a cycle through node {graph.nodes[i].name!r}; export it again"
                )
            open_nodes.add(i)
            stack += missing
    graph.nodes[:] = [graph.nodes[i] for i in order]


def check_connected(nodes: Sequence[gs.Node]) -> None:
    """Raise ModelError where a node reads what none of the nodes makes."""
    present = {id(node) for node in nodes}
    for node in nodes:
        for tensor in node.inputs:
            if any(id(source) not in present for source in tensor.inputs):
                raise ModelError(
                    f"node {node.name!r} reads {tensor.name!r}, which is produced by a node "
                    "that is not in the graph: a pass removed or misplaced it"
                )
