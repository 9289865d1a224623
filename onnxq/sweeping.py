"""Sweeping: removing what no graph output needs.

graphsurgeon's own cleanup compares tensors by name and nodes by content, and takes quadratic time.
"""

from __future__ import annotations

from itertools import chain

import onnx_graphsurgeon as gs

from onnxq.graphs import DEFAULT_DOMAIN, bodies_of, op_type_of, origin_of, sort, walk

PURE_DOMAINS = (*DEFAULT_DOMAIN, "ai.onnx.ml", "com.microsoft")
"""Domains whose operators do nothing but compute their outputs."""


def sweep(main: gs.Graph, functions: set[tuple[str, str]]) -> None:
    """Remove nodes that are not needed, in bodies too, and initializers that nothing reads.

    `functions` are the domains and names of model-local functions: calls of them are pure.
    """
    live = _live(main, functions)
    for graph in walk(main):
        for node in graph.nodes:
            if id(node) not in live:
                _detach(node)
        graph.nodes[:] = [node for node in graph.nodes if id(node) in live]
    for graph in walk(main):
        tensors = (t for node in graph.nodes for t in (*node.inputs, *node.outputs))
        for tensor in chain(tensors, graph.inputs, graph.outputs, origin_of(graph).initializers):
            _keep(tensor.outputs, live)
            _keep(tensor.inputs, live)
    for graph in walk(main):
        _drop_unused_initializers(graph)
        sort(graph)


def _detach(node: gs.Node) -> None:
    """Cut the node from its tensors; these forget it when they are swept."""
    list.clear(node.inputs)
    list.clear(node.outputs)
    for body in bodies_of(node):
        for inner in body.nodes:
            _detach(inner)


def _live(main: gs.Graph, functions: set[tuple[str, str]]) -> set[int]:
    """The ids of nodes that the graph outputs need, those in bodies included."""
    live: set[int] = set()
    todo: list[gs.Node] = [n for t in main.outputs for n in t.inputs]
    todo += [n for n in main.nodes if _has_effects(n, functions)]
    while todo:
        node = todo.pop()
        if id(node) in live:
            continue
        live.add(id(node))
        for tensor in chain(node.inputs, *(body.outputs for body in bodies_of(node))):
            todo += tensor.inputs
        for body in bodies_of(node):
            todo += [n for n in body.nodes if _has_effects(n, functions)]
    return live


def _has_effects(node: gs.Node, functions: set[tuple[str, str]]) -> bool:
    """Whether the node may do more than compute outputs."""
    if not node.outputs:  # made without outputs, or detached by a pass?
        return "origin" in node.__dict__ and not node.origin.output
    return node.domain not in PURE_DOMAINS and (node.domain, op_type_of(node)) not in functions


def _keep(nodes: list[gs.Node], live: set[int]) -> None:
    """Cut a tensor's links to other nodes; by identity, which gs's own lists do not do."""
    if any(id(node) not in live for node in nodes):
        list.__setitem__(nodes, slice(None), [node for node in nodes if id(node) in live])


def _drop_unused_initializers(graph: gs.Graph) -> None:
    origin = origin_of(graph)
    notes = origin.shell.quantization_annotation
    noted = {entry.value for note in notes for entry in note.quant_parameter_tensor_names}
    outputs = {id(t) for t in graph.outputs}
    origin.initializers = [
        t for t in origin.initializers if t.outputs or id(t) in outputs or t.name in noted
    ]
    origin.idle = {id(t) for t in origin.initializers if t.name in noted}
