"""Divide a graph into 16-bit and float32 regions with as few Casts as there can be.

Each node is a place on one side of a minimum cut, as are the values that If, Loop and Scan carry in
and out of their bodies. A tensor that is read on the other side than it is made on costs one Cast,
however many read it there. What has to be float32 is tied to the one side, layers with weights to
the other; operators between would rather be in 16 bits, by less than a Cast. Data movement goes
with its neighbours. Constants are written in either type, or both, without a Cast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.graphs import bodies_of
from onnxq.mincut import INFINITE, Network
from onnxq.model import Model, values_of
from onnxq.passes.half_forms import CONTROL, SCAN_SINCE, Form, form_of
from onnxq.passes.half_storage import HalfConstants
from onnxq.passes.halves import FLOAT32, is_float32, retype
from onnxq.passes.ops import OPS, is_constant
from onnxq.passes.work import RECURRENT
from onnxq.tensors import index_of

Place = Any
HALF, SINGLE = "half", "single"  # source and sink of the network
LOOP = 8.0  # a Cast in a loop's body runs each time
LAYERS = (
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "Einsum",
    "Attention",
    "DeformConv",
    *RECURRENT,
)
WISH, MOVED = 0.45, 0.01  # what it costs, in Casts, to leave an operator in float32
FREE = ("Shape", "Size")  # types are nothing to them
ALSO_MOVES = ("Concat", "Identity", "GatherElements", "GatherND", "ScatterND", "ScatterElements")
MOVES = frozenset([op for op, spec in OPS.items() if spec.role == "move"] + list(ALSO_MOVES))


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """A tensor that a node reads, or that a graph hands out, at `index`; and on which side."""

    tensor: gs.Tensor
    place: Place
    reader: gs.Node | gs.Graph
    index: int


@dataclass(frozen=True, slots=True)
class Division:
    """How many nodes compute in 16 bits, and in float32; the Casts between; layers in 16 bits."""

    half: int
    single: int
    casts: int
    layers: tuple[str, ...]


class Regions:
    """One division of one model.

    kept: ids of nodes that stay float32; None: all do. interface: inputs and outputs in 16 bits.
    """

    def __init__(
        self,
        model: Model,
        constants: HalfConstants,
        kept: Mapping[int, str] | None,
        *,
        interface: bool,
    ) -> None:
        self.model, self.constants, self.half = model, constants, constants.half
        self.kept = kept
        self.edge = HALF if interface else SINGLE
        self.made: dict[int, tuple[gs.Tensor, Place]] = {}
        self.reads: list[_Read] = []
        self._seen: set[tuple[int, int]] = set()
        self.forms: dict[int, Form] = {}
        self.network = Network()
        self.depth: dict[int, int] = {}
        self.casts = 0

    def write(self) -> Division:
        """Decide and edit the model."""
        graphs = self.model.graphs()
        self._measure(self.model.graph, 0)
        for tensor in self.model.graph.inputs:
            self._make(tensor, self.edge)
        for graph in graphs:
            for node in graph.nodes:
                self._place(node)
        for index, tensor in enumerate(self.model.graph.outputs):
            self._read(tensor, self.edge, self.model.graph, index)
        self._read_rest(graphs)
        self._tie()
        halves = self.network.cut(HALF, SINGLE)
        return self._edit(halves)

    def _measure(self, graph: gs.Graph, depth: int) -> None:
        self.depth[id(graph)] = depth
        for node in graph.nodes:
            for body in bodies_of(node):
                self._measure(body, depth + (node.op != "If"))

    def _place(self, node: gs.Node) -> None:
        """Say where the node's floats are made and read."""
        if node.op == "Constant":
            return
        if node.op in CONTROL and not node.domain:
            self._place_bodies(node)
        form = None if self.kept is None else form_of(node, self.model.opset, self.half)
        place: Place = SINGLE
        if isinstance(form, Form) and self.kept is not None and id(node) not in self.kept:
            self.forms[id(node)] = form
            place = HALF if node.op in LAYERS else id(node)
            if place != HALF:
                self.network.add(HALF, place, self._wish(node))
        follows = form if place != SINGLE and isinstance(form, Form) else None
        for index, tensor in enumerate(node.inputs):
            with_node = follows is not None and index in follows.inputs
            self._read(tensor, place if with_node else SINGLE, node, index)
        for index, tensor in enumerate(node.outputs):
            with_node = follows is not None and index in follows.outputs
            self._make(tensor, place if with_node else SINGLE)

    def _wish(self, node: gs.Node) -> float:
        if node.op == "Cast":  # one there and back is none
            ends = (node.inputs[0].dtype, onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
            if set(ends) == {FLOAT32, self.half.dtype}:
                return self._weight(self.model.graph_of(node))
        return 0.0 if node.op in FREE else MOVED if node.op in MOVES else WISH

    def _weight(self, graph: gs.Graph) -> float:
        return LOOP ** self.depth.get(id(graph), 0)

    def _place_bodies(self, node: gs.Node) -> None:
        """Each value that a body takes or gives is a place of its own."""
        if self.kept is None or (node.op == "Scan" and self.model.opset < SCAN_SINCE):
            return
        for number, (read, made) in enumerate(_carried(node)):
            slot = (id(node), number)
            self.network.add(HALF, slot, MOVED)
            for tensor, reader, index in read:
                self._read(tensor, slot, reader, index)
            for tensor in made:
                self._make(tensor, slot)

    def _make(self, tensor: gs.Tensor, place: Place) -> None:
        if is_float32(tensor) and not is_constant(tensor):
            self.made.setdefault(id(tensor), (tensor, place))

    def _read(
        self, tensor: gs.Tensor, place: Place, reader: gs.Node | gs.Graph, index: int
    ) -> None:
        if is_float32(tensor) and (id(reader), index) not in self._seen:
            self._seen.add((id(reader), index))
            self.reads.append(_Read(tensor, place, reader, index))

    def _read_rest(self, graphs: list[gs.Graph]) -> None:
        """What bodies of other operators take and give is float32."""
        for graph in graphs[1:]:
            for tensor in graph.inputs:
                self._make(tensor, SINGLE)
            for index, tensor in enumerate(graph.outputs):
                self._read(tensor, SINGLE, graph, index)
        for read in self.reads:
            self._make(read.tensor, SINGLE)

    def _tie(self) -> None:
        """One Cast for a tensor that is read on the other side, whoever reads it there."""
        places: dict[int, set[Place]] = {}
        for read in self.reads:
            if not is_constant(read.tensor):
                places.setdefault(id(read.tensor), set()).add(read.place)
        for key, found in places.items():
            tensor, maker = self.made[key]
            weight = self._weight(self.model.home(tensor))
            others = sorted(found - {maker}, key=str)
            if others:
                self.network.add(maker, ("to single", key), weight)
                self.network.add(("to half", key), maker, weight)
            for place in others:
                self.network.add(("to single", key), place, INFINITE)
                self.network.add(place, ("to half", key), INFINITE)

    def _edit(self, halves: set[Place]) -> Division:
        half = [node for node in self.model.nodes() if self._computes_half(node, halves)]
        floats = [n for n in self.model.nodes() if _has_floats(n)]
        for node in half:
            if node.op == "ConstantOfShape":
                node.attrs.setdefault("value", np.zeros(1, np.float32))
            retype(node, frozenset([FLOAT32]), self.half.dtype)
        sides = {key: place in halves for key, (_, place) in self.made.items()}
        inner = {key: tensor for key, (tensor, _) in self.made.items()}
        other: dict[int, gs.Tensor] = {}
        for tensor in self.model.graph.outputs:
            self._split_output(tensor, sides, inner, other)
        for key, tensor in inner.items():
            if sides[key]:
                tensor.dtype = self.half.dtype
        for read in self.reads:
            if read.reader is not self.model.graph:
                self._connect(read, read.place in halves, sides, inner, other)
        self._cancel()
        layers = tuple(node.name for node in half if node.op in LAYERS)
        return Division(len(half), len(floats) - len(half), self.casts, layers)

    def _computes_half(self, node: gs.Node, halves: set[Place]) -> bool:
        if id(node) not in self.forms:
            return False
        return node.op in LAYERS or id(node) in halves

    def _split_output(
        self,
        tensor: gs.Tensor,
        sides: dict[int, bool],
        inner: dict[int, gs.Tensor],
        other: dict[int, gs.Tensor],
    ) -> None:
        """Put a Cast before an output of the other type; it keeps its name."""
        key, wanted = id(tensor), self.edge == HALF
        if key not in sides or sides[key] == wanted or not tensor.inputs or key in other:
            return
        maker = tensor.inputs[0]
        inside = gs.Variable(self.model.unique(f"{tensor.name}_inside"), FLOAT32, tensor.shape)
        maker.outputs[index_of(maker.outputs, tensor)] = inside
        inner[key], other[key] = inside, tensor
        cast = self._cast(inside, wanted, tensor.name)
        node = cast.inputs[0]
        node.outputs[0] = tensor
        tensor.dtype = cast.dtype

    def _connect(
        self,
        read: _Read,
        wanted: bool,
        sides: dict[int, bool],
        inner: dict[int, gs.Tensor],
        other: dict[int, gs.Tensor],
    ) -> None:
        """Let a reader have the tensor in its type."""
        key, tensor, in_graph = id(read.tensor), read.tensor, isinstance(read.reader, gs.Graph)
        if is_constant(tensor):
            if wanted and in_graph:  # a result must not be of another graph
                tensor = self.model.constant(
                    tensor.name, self.half.rounded(np.asarray(values_of(tensor)))
                )
            elif wanted:
                tensor = self.constants.of(tensor)
        elif sides[key] == wanted:
            tensor = inner[key]
        elif in_graph and self.model.home(inner[key]) is not read.reader:
            tensor = self._cast(inner[key], wanted, tensor.name, read.reader)
        else:
            if key not in other:
                other[key] = self._cast(inner[key], wanted, tensor.name)
            tensor = other[key]
        held = read.reader.outputs if isinstance(read.reader, gs.Graph) else read.reader.inputs
        if held[read.index] is not tensor:
            held[read.index] = tensor

    def _cast(
        self, tensor: gs.Tensor, to_half: bool, name: str, at: gs.Graph | None = None
    ) -> gs.Variable:
        self.casts += 1
        dtype, kind = (
            (self.half.dtype, self.half.kind) if to_half else (FLOAT32, onnx.TensorProto.FLOAT)
        )
        return self.model.emit(
            "Cast", tensor, name=f"{name}_{dtype}", dtype=dtype, shape=tensor.shape,
            at=at or self.model.home(tensor), to=kind,
        )  # fmt: skip

    def _cancel(self) -> None:
        """Take out Casts of the model that have become Casts to the same type."""
        for node in self.model.nodes("Cast"):
            source, out = node.inputs[0], node.outputs[0]
            if source.dtype != self.half.dtype or out.dtype != self.half.dtype:
                continue
            with suppress(ValueError):  # an output of an input: nothing else can have its name
                self.model.replace(out, source)


def _has_floats(node: gs.Node) -> bool:
    return any(is_float32(t) for t in (*node.inputs, *node.outputs)) and node.op != "Constant"


Uses = list[tuple[gs.Tensor, gs.Node | gs.Graph, int]]


def _carried(node: gs.Node) -> Iterator[tuple[Uses, list[gs.Tensor]]]:
    """What has one type inside and outside of a body: where it is read, and the tensors it is."""
    if node.op == "If":
        branches = list(bodies_of(node))
        for index, tensor in enumerate(node.outputs):
            handed: Uses = [(b.outputs[index], b, index) for b in branches]
            yield handed, [tensor]
        return
    body = node.attrs["body"]
    if node.op == "Loop":
        state, shift = len(body.inputs) - 2, 2
    else:
        state, shift = len(body.inputs) - node.attrs["num_scan_inputs"], 0
    first = 1 if node.op == "Loop" else 0  # the condition is a body's first output
    for index, tensor in enumerate(body.inputs[shift:]):
        read: Uses = [(t, node, index + shift) for t in node.inputs[index + shift :][:1]]
        made = [tensor]
        if index < state:
            read += [(t, body, index + first) for t in body.outputs[index + first :][:1]]
            made += node.outputs[index : index + 1]
        yield read, made
    for index in range(state, len(body.outputs) - first):
        yield (
            [(body.outputs[index + first], body, index + first)],
            list(node.outputs[index : index + 1]),
        )
