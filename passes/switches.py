"""A quantized model as a float one whose Q/DQ pairs can be switched, and set, by what is fed to it.

    t = DQ(Q(x, s, z), s, z)    =>    t = If(on) then DQ(Q(x, s, z), s, z) else x

with s, z and on among the model's inputs: one session measures any ranges. A pair that is switched
off costs a copy of its tensor. Weights are made floats again, so that nothing is fused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxq.schemes import QParams

Proto = onnx.ModelProto
FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True, slots=True)
class Pair:
    """The scale and zero point that pairs share, by the names of their constants."""

    scale: str
    zero: str

    @property
    def on(self) -> str:
        """The input that switches the pairs."""
        return f"{self.scale}_is_on"

    def fed(self, params: QParams, *, is_on: bool) -> dict[str, np.ndarray]:
        """What is fed for parameters."""
        return {
            self.scale: np.asarray(params.scale),
            self.zero: np.asarray(params.zero_point),
            self.on: np.array(is_on),
        }


def switched(proto: Proto, pairs: Collection[Pair]) -> list[Pair]:
    """Make pairs of the main graph switchable, in place; returns those that are.

    Others keep their constants: one is read in a body too, or stored integers have its scale.
    """
    graph = proto.graph
    stored = {t.name: t for t in graph.initializer}
    inside = {name for node in graph.node for body in _bodies(node) for name in _read(body)}
    fixed = {
        node.input[1]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    }
    outputs = {t.name for t in graph.output}
    found = {
        pair.scale: pair
        for pair in pairs
        if pair.scale not in fixed and not {pair.scale, pair.zero} & (inside | outputs)
    }
    sources = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "QuantizeLinear" and node.input[1] in found
    }
    nodes = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in sources:
            nodes.append(_switch(sources[node.input[0]], node, found[node.input[1]]))
        elif node.op_type == "DequantizeLinear" and _floats(node, stored, graph):
            continue
        elif not node.output or node.output[0] not in sources:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    for pair in found.values():
        for name in (pair.scale, pair.zero):
            graph.input.append(helper.make_tensor_value_info(name, stored[name].data_type, ()))
        graph.input.append(helper.make_tensor_value_info(pair.on, onnx.TensorProto.BOOL, ()))
    promoted = {name for pair in found.values() for name in (pair.scale, pair.zero)}
    kept = [t for t in graph.initializer if t.name not in promoted]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return [pair for pair in pairs if pair.scale in found]


def _switch(quantize: onnx.NodeProto, dequantize: onnx.NodeProto, pair: Pair) -> onnx.NodeProto:
    """The If that takes the place of a pair; names in its branches are new."""
    name = dequantize.output[0]
    first, second = onnx.NodeProto(), onnx.NodeProto()
    first.CopyFrom(quantize)
    second.CopyFrom(dequantize)
    first.output[0] = second.input[0] = f"{name}/integers"
    second.output[0] = f"{name}/rounded"
    copied = helper.make_node("Identity", [quantize.input[0]], [f"{name}/copied"])
    branches = {
        key: helper.make_graph(
            nodes, key, [], [helper.make_tensor_value_info(nodes[-1].output[0], FLOAT, None)]
        )
        for key, nodes in (("then_branch", [first, second]), ("else_branch", [copied]))
    }
    return helper.make_node("If", [pair.on], [name], name=f"{name}/If", **branches)


def _floats(
    node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto], graph: onnx.GraphProto
) -> bool:
    """Store what a DequantizeLinear makes of stored integers; whether it did."""
    if len(node.input) < 3 or any(name not in stored for name in node.input):
        return False
    q, scale, zero = (numpy_helper.to_array(stored[name]) for name in node.input)
    attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    axis = attrs.get("axis", 1) % q.ndim if scale.ndim else None
    params = QParams(scale, zero, axis, attrs.get("block_size") or None)
    graph.initializer.append(numpy_helper.from_array(params.dequantize(q), node.output[0]))
    return True


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _read(body: onnx.GraphProto) -> Iterator[str]:
    """Names that nodes of a body read, and of bodies in it."""
    for node in body.node:
        yield from node.input
        for inner in _bodies(node):
            yield from _read(inner)
