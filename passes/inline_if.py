"""Put the body of an If in its place when its condition is constant.

    y = If(True, then: { u = f(x) }, else: { v = g(x) })    =>    y = f(x)

The condition is often the size of an input axis that is known by now. The other branch goes, and
with it weights that only it reads.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxq.core import Skip, rewrites
from onnxq.graphs import local_tensors, origin_of, walk
from onnxq.model import Model, producer, values_of


@rewrites("If")
def inline_if(model: Model, node: gs.Node) -> str | None:
    """Move the nodes of the branch that is taken; tensors get new names where they must."""
    condition = values_of(node.inputs[0]) if node.inputs else None
    if condition is None or condition.size != 1 or node.domain:
        return None
    name = "then_branch" if condition.reshape(-1)[0] else "else_branch"
    body = node.attrs[name]
    home = model.graph_of(node)
    inside = {id(n) for n in body.nodes}
    results = list(zip(node.outputs, body.outputs, strict=True))
    for outer, inner in results:
        if model.is_output(outer):
            maker = producer(inner)
            if maker is None or id(maker) not in inside:
                raise Skip(f"{outer.name} is an output, {inner.name} is not made in the body")
    if len({id(inner) for _, inner in results}) < len(results):
        raise Skip("two of its results are the same tensor")
    _rename(model, body)
    nodes = list(body.nodes)
    body.nodes.clear()
    body.outputs.clear()
    origin_of(home).initializers += origin_of(body).initializers
    origin_of(body).initializers = []
    node.attrs.clear()
    node.op, node.inputs = "Identity", []  # nothing is left of it that a walk could find
    home.nodes.extend(nodes)
    model.graphs()
    for inner_node in nodes:
        inner_node.home = home
    for outer, inner in results:
        model.replace(outer, inner)
    node.outputs.clear()
    return f"its condition is constant: {name}"


def _rename(model: Model, body: gs.Graph) -> None:
    """Names are unique within a graph and what is outside of it, not between two bodies."""
    taken = {
        name for graph in walk(model.graph) if graph is not body for name in local_tensors(graph)
    }
    for tensor in local_tensors(body).values():
        if tensor.name in taken:
            tensor.name = model.unique(f"{tensor.name}_inlined")
