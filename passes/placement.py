"""Where Q/DQ go: decided once, on the whole graph, from the target and the OPS table.

Everything between linear layers (elementwise operators, pooling, data movement) joins only where
that keeps a chain in integers: some input already comes in integers, and something behind it wants
integers. Where the target says what things cost, the rest is a minimum cut: each node costs one
thing in floats and another in integers, and a tensor between the two costs a QuantizeLinear or
DequantizeLinear. What is left is a list of *tensors* to quantize.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Note, Skip
from onnxq.graphs import bodies_of
from onnxq.mincut import INFINITE, Network
from onnxq.model import Model, producer, readers, values_of
from onnxq.passes.costs import node_ns, size
from onnxq.passes.ops import (
    OPS,
    activation_inputs,
    clamp_bounds,
    is_constant,
    pads_zero,
    weight_input,
)
from onnxq.passes.work import Shapes
from onnxq.targets import Costs, OpRule, Rate, Target

RULE = "quantize_static"

Apart = tuple[int, str]
"""A node, by id, that keeps one scale, and the operand that comes in another."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Which nodes run in integers, and which tensors are quantized for that.

    nodes: by id. produced: tensors that exist only in integers (their producer writes integers), by
    id; read: further tensors that integer nodes read, by id. sources: tensor name -> the tensor
    whose values it carries (data movement shares its input's scale). clamps: producer id -> the
    Relu or Clip behind it that the range can absorb. fixed: tensor name -> the scale and zero point
    that the target demands of it. formats: of activations, by node id.
    """

    nodes: Mapping[int, gs.Node]
    produced: Mapping[int, gs.Tensor]
    read: Mapping[int, gs.Tensor]
    sources: Mapping[str, frozenset[str]]
    clamps: Mapping[int, gs.Node]
    fixed: Mapping[str, tuple[float, int]]
    formats: Mapping[int, str]
    declined: tuple[Note, ...]

    def tensors(self) -> list[gs.Tensor]:
        """All tensors to quantize."""
        return [*self.produced.values(), *self.read.values()]

    def result(self, node: gs.Node) -> gs.Tensor:
        """The tensor that is quantized as the node's result: that behind its clamp, if any."""
        made = self.clamps.get(id(node), node).outputs
        return next((t for t in made if t.name), made[0])

    def own_formats(self) -> dict[str, str]:
        """The format in which each tensor that exists only in integers is made, by its name."""
        return {
            t.name: self.formats[key]
            for key, node in self.nodes.items()
            for t in self.clamps.get(key, node).outputs
            if id(t) in self.produced
        }


def place(
    model: Model,
    target: Target,
    floats: Mapping[int, str],
    shapes: Shapes,
    *,
    formats: Mapping[int, str] | None = None,
    asked: Collection[int] = (),
    apart: Collection[Apart] = (),
) -> Placement:
    """Decide which nodes run in integers; tensors of different bodies must have different names.

    floats: node id -> why that node has to stay float, found by the caller's rules. shapes: of
    tensors by name, as one sample has them. formats: of activations by node id, where they are not
    the target's own. asked: ids of nodes that run in integers whatever they cost. apart: operands
    without the scale of a node that keeps one. For a target without floats all that can does.
    """
    chosen: dict[int, gs.Node] = {}
    declined: list[Note] = []
    hidden = unobservable(model)
    wanted = [op for op in OPS if op in target.operators or OPS[op].role == "linear"]
    for node in model.nodes(*wanted):
        try:
            if node.op not in target.operators:
                raise Skip(f"{target.name} has no integer {node.op}")
            if id(model.graph_of(node)) in hidden:
                raise Skip("in a loop inside of a loop: activations there stay float")
            check(node, target.operators[node.op])
            if id(node) in floats:
                raise Skip(floats[id(node)])
        except Skip as reason:
            if OPS[node.op].role == "linear":
                declined.append(Note(RULE, node.name, str(reason), changed=False))
        else:
            chosen[id(node)] = node
    own = target.activations.format
    known = {key: (formats or {}).get(key, own) for key in chosen}
    return _Chooser(model, target, chosen, shapes, known, asked, apart).placement(declined)


def unobservable(model: Model) -> set[int]:
    """The ids of bodies whose tensors cannot be calibrated, see `onnxq.bodies`."""
    found = set[int]()

    def visit(graph: gs.Graph, loops: int) -> None:
        if loops > 1:
            found.add(id(graph))
        for node in graph.nodes:
            for body in bodies_of(node):
                visit(body, loops + (node.op != "If"))

    visit(model.graph, 0)
    return found


def keeps_scale(node: gs.Node, target: Target) -> bool:
    """Whether the node's inputs and output have one scale."""
    return OPS[node.op].role == "move" or target.operators[node.op].shared


def check(node: gs.Node, rule: OpRule) -> None:
    """Raise Skip if the node cannot run in integers at all, whatever is around it."""
    spec = OPS[node.op]
    data = [node.inputs[i] for i in activation_inputs(node)]
    weight = weight_input(node)
    for tensor in node.inputs[:2]:
        if tensor.inputs and tensor.inputs[0].op == "DequantizeLinear":
            raise Skip("it is already quantized")
    if spec.role == "absorb" and _is_integer(node.inputs[0]):
        raise Skip("it is a part of a layer that is already quantized")
    if weight is None and spec.weight is not None and node.op != "MatMul":
        raise Skip("its weight is not constant")
    for tensor in (*data, *((node.inputs[weight],) if weight is not None else ())):
        if tensor.dtype != np.float32:
            raise Skip(f"{tensor.name} is {tensor.dtype}, not float32")
    for tensor in filter(is_constant, data):
        _check_values(tensor, "its constant operand")
    for key, allowed in (rule.attributes or {}).items():
        value = node.attrs.get(key, allowed[0])
        if value not in allowed:
            raise Skip(f"{key} is {value}: the target has integers only for {', '.join(allowed)}")
    if node.op == "Pad" and not pads_zero(node):
        raise Skip("it pads with something else than zero")
    if node.op == "Gemm" and (node.attrs.get("alpha", 1) != 1 or node.attrs.get("beta", 1) != 1):
        raise Skip("alpha or beta is not 1")
    if spec.bias is not None and len(node.inputs) > spec.bias and node.inputs[spec.bias].name:
        _check_bias(node, node.inputs[spec.bias])
    if weight is not None:
        _check_values(node.inputs[weight], "its weight")
    if spec.role in ("linear", "carry") and not data:
        raise Skip("all its inputs are constant")


def _is_integer(tensor: gs.Tensor) -> bool:
    """Whether a linear or carrying operator behind DequantizeLinear makes it, a clamp's layer."""
    maker = producer(tensor)
    if maker is None or maker.op not in OPS or OPS[maker.op].role not in ("linear", "carry"):
        return False
    sources = [producer(t) for t in maker.inputs[:1]]
    return any(source is not None and source.op == "DequantizeLinear" for source in sources)


def _check_values(constant: gs.Tensor, what: str) -> None:
    values = values_of(constant)
    if values is None or not np.isfinite(values).all():
        raise Skip(f"{what} has NaN or infinite values")
    if not values.size:
        raise Skip(f"{what} is empty")


def _check_bias(node: gs.Node, bias: gs.Tensor) -> None:
    values = values_of(bias)
    if values is None:
        raise Skip("its bias is not constant")
    if not np.isfinite(values).all():
        raise Skip("its bias has NaN or infinite values")
    if node.op == "Gemm" and values.size > 1 and values.size != values.shape[-1]:
        raise Skip("its bias is not one value a column")


class _Chooser:
    """The greatest set of nodes in which every one has a reason to be there."""

    def __init__(
        self,
        model: Model,
        target: Target,
        chosen: dict[int, gs.Node],
        shapes: Shapes,
        formats: Mapping[int, str],
        asked: Collection[int],
        apart: Collection[Apart],
    ) -> None:
        self.target, self.chosen, self.shapes = target, chosen, shapes
        self.formats, self.asked, self.apart = formats, asked, apart
        self.outputs = {id(t) for graph in model.graphs() for t in graph.outputs}
        self.graph_of = model.graph_of
        self.clamps: dict[int, gs.Node] = {}
        for node in chosen.values():
            if self.is_clamped(node) and (clamp := self.clamp(node)):
                self.clamps[id(node)] = clamp
        for clamp in self.clamps.values():
            chosen.pop(id(clamp), None)  # a part of what is in front of it

    def is_clamped(self, node: gs.Node) -> bool:
        """Whether a clamp behind the node is a part of it."""
        rule = self.target.operators[node.op]
        plain = rule.output != "float" and self.fixed_of(node) is None
        return plain and OPS[node.op].role in ("linear", "carry")

    def fixed_of(self, node: gs.Node) -> tuple[float, int] | None:
        """Scale and zero point that the node's output must have."""
        fixed = self.target.operators[node.op].fixed or {}
        return fixed.get(self.formats[id(node)])

    def placement(self, declined: list[Note]) -> Placement:
        if self.target.floats is None:
            self.prune()
            if self.target.costs is not None:
                declined += self.cut(self.target.costs)
                self.prune()
        produced = {id(t): t for n in self.chosen.values() if self.writes(n) for t in self.ends(n)}
        read = {
            id(n.inputs[i]): n.inputs[i]
            for n in self.chosen.values()
            for i in activation_inputs(n)
            if not is_constant(n.inputs[i]) and id(n.inputs[i]) not in produced
        }
        clamps = {k: c for k, c in self.clamps.items() if k in self.chosen}
        fixed = {
            t.name: params
            for n in self.chosen.values()
            if (params := self.fixed_of(n)) is not None
            for t in self.ends(n)
        }
        return Placement(
            self.chosen, produced, read, self.sources(), clamps, fixed, self.formats,
            tuple(declined),
        )  # fmt: skip

    def prune(self) -> None:
        while idle := [k for k, node in self.chosen.items() if not self.is_useful(node)]:
            for key in idle:
                del self.chosen[key]

    def cut(self, costs: Costs) -> list[Note]:
        """Leave float what integers would not make faster, conversions counted."""
        network = Network()
        for key, node in self.chosen.items():
            in_floats, in_integers = node_ns(node, costs, self.shapes)
            network.add("integers", key, INFINITE if key in self.asked else in_floats)
            network.add(key, "floats", in_integers)
        tensors = {
            id(t): t
            for node in self.chosen.values()
            for t in (*(node.inputs[i] for i in activation_inputs(node)), *self.ends(node))
            if not is_constant(t)
        }
        for key, tensor in tensors.items():
            self.add_conversions(network, key, tensor, costs)
        kept = network.cut("integers", "floats")
        dropped = [n for k, n in self.chosen.items() if k not in kept]
        for node in dropped:
            del self.chosen[id(node)]
        text = f"floats are faster here on {self.target.name}, conversions counted"
        return [
            Note(RULE, n.name, text, changed=False) for n in dropped if OPS[n.op].role == "linear"
        ]

    def add_conversions(self, network: Network, key: int, tensor: gs.Tensor, costs: Costs) -> None:
        """One QuantizeLinear if an integer node reads what a float node made; and the reverse."""
        maker = self.maker(tensor)
        source: str | int = "floats" if maker is None else id(maker)
        elements = size(tensor, self.shapes)
        integers = [id(node) for node, i in readers(tensor) if self.takes(node, i)]
        others = id(tensor) in self.outputs or len(integers) < sum(1 for _ in readers(tensor))
        for reader in integers:
            network.add(reader, ("quantize", key), INFINITE)
        shape = self.shapes.get(tensor.name, tensor.shape) or ()
        layout = costs.layout if maker is not None and len(shape) == 4 else 0.0
        made_by = tensor.inputs[0].op if tensor.inputs else ""
        rate = costs.quantize + layout + costs.operators.get(made_by, Rate()).hoisted
        network.add(("quantize", key), source, costs.float_node + rate * elements)
        if maker is None or self.target.operators[maker.op].output != "quantized":
            return
        rate = costs.float_node + (costs.dequantize + layout) * elements
        network.add(id(maker), ("dequantize", key), rate)
        for reader in integers:
            network.add(("dequantize", key), reader, INFINITE)
        if others:
            network.add(("dequantize", key), "floats", INFINITE)

    def is_useful(self, node: gs.Node) -> bool:
        if OPS[node.op].role == "linear":
            return True
        fed = any(self.feeds(node, node.inputs[i]) for i in activation_inputs(node))
        return fed and any(self.is_read(t) for t in self.ends(node))

    def feeds(self, node: gs.Node, tensor: gs.Tensor) -> bool:
        """Whether the tensor comes in integers anyway, so that the node can take them as they are.

        A MatMul could write integers, but floats cost it nothing and spare an error: elementwise
        operators behind it stay float; data movement between two of them gains.
        """
        source = self.maker(tensor)
        if source is None:
            return False
        output = self.target.operators[source.op].output
        if output != "any":
            return output == "quantized"
        return OPS[node.op].role == "move" and self.writes(source)

    def maker(self, tensor: gs.Tensor) -> gs.Node | None:
        """The chosen node that makes the tensor, a clamp between them left out."""
        node = tensor.inputs[0] if tensor.inputs else None
        if node is not None and OPS.get(node.op) and OPS[node.op].role == "absorb":
            before = node.inputs[0].inputs
            if before and self.clamps.get(id(before[0])) is node:
                node = before[0]
        return node if node is not None and id(node) in self.chosen else None

    def is_read(self, tensor: gs.Tensor) -> bool:
        return any(self.takes(node, i) for node, i in readers(tensor))

    def takes(self, node: gs.Node, index: int) -> bool:
        return id(node) in self.chosen and index in activation_inputs(node)

    def writes(self, node: gs.Node) -> bool:
        """Whether the node's result exists in integers only."""
        output = self.target.operators[node.op].output
        if output != "any":
            return output == "quantized"
        return all(
            id(t) not in self.outputs
            and any(True for _ in readers(t))
            and all(self.takes(reader, i) for reader, i in readers(t))
            for t in self.ends(node)
        )

    def ends(self, node: gs.Node) -> list[gs.Tensor]:
        """The tensors that are quantized as the node's result: those behind its clamp, if any."""
        clamp = self.clamps.get(id(node))
        return [t for t in (clamp or node).outputs if t.name]

    def clamp(self, node: gs.Node) -> gs.Node | None:
        """The Relu or Clip that alone reads the node's result, when zero is among its values."""
        (result, *_) = node.outputs
        if len(result.outputs) != 1 or id(result) in self.outputs:
            return None
        clamp = result.outputs[0]
        if clamp.op not in OPS or OPS[clamp.op].role != "absorb" or clamp.inputs[0] is not result:
            return None
        if self.graph_of(clamp) is not self.graph_of(node):
            return None
        bounds = clamp_bounds(clamp)
        return clamp if bounds and bounds[0] <= 0 <= bounds[1] else None

    def sources(self) -> dict[str, frozenset[str]]:
        """For each quantized tensor, the tensors whose common range is its own."""
        group: dict[str, str] = {}

        def find(name: str) -> str:
            while group.setdefault(name, name) != name:
                name = group[name]
            return name

        moved, covered = set(), list[tuple[str, str]]()
        for node in self.chosen.values():
            read = [node.inputs[i] for i in activation_inputs(node)]
            data = [t.name for t in read if not is_constant(t)]
            ends = [t.name for t in self.ends(node)]
            if keeps_scale(node, self.target):
                other = [name for name in data if (id(node), name) in self.apart]
                covered += [(ends[0], name) for name in other]
                first, *others = *(name for name in data if name not in other), *ends
                for name in others:
                    group[find(name)] = find(first)
                moved.update(ends if data else ends[1:])
            for name in (*data, *(ends if self.writes(node) else ())):
                find(name)
        members: dict[str, set[str]] = {}
        for name in group:
            members.setdefault(find(name), set()).add(name)
        for whole, part in covered:  # all of them must fit into the scale of the whole
            members[find(whole)] |= members[find(part)] - moved
        return {name: frozenset(members[find(name)] - moved) for name in group}
