"""Model: a graphsurgeon graph plus what graphsurgeon drops; load, edit helpers, save."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.errors import ModelError



@dataclass(frozen=True, slots=True)
class Model:
    """An ONNX model that passes edit in place."""

    graph: gs.Graph
    envelope: onnx.ModelProto
    names: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Model:
        """Read a model file (external data stays on disk until it is looked at)."""
        try:
            return cls.from_proto(onnx.load(os.fspath(path)))
        except OSError as e:
            raise ModelError(f"{path}: {e.strerror}") from e

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto) -> Model:
        """Wrap a model in memory; the proto is not modified."""
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        graph = gs.import_onnx(inferred)
        envelope = onnx.ModelProto()
        envelope.CopyFrom(proto)
        envelope.ClearField("graph")
        model = cls(graph, envelope)
        model._name_everything()
        return model

    def _name_everything(self) -> None:
        for graph in self.graphs():
            self.names.update(graph.tensors())
        for node in self.nodes():
            node.name = self.unique(node.name or f"{node.op}_{len(self.names)}")

    def to_proto(self) -> onnx.ModelProto:
        """The model as a proto, all weights inside."""
        for graph in self.graphs():
            graph.toposort()
        proto = onnx.ModelProto()
        proto.CopyFrom(self.envelope)
        proto.graph.CopyFrom(gs.export_onnx(self.graph).graph)
        return proto

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model atomically."""
        onnx.save(self.to_proto(), os.fspath(path))

    def copy(self) -> Model:
        """An independent copy."""
        return Model.from_proto(self.to_proto())

    @property
    def opset(self) -> int:
        """The version of the default operator set."""
        return int(self.graph.opset)

    def raise_opset(self, version: int) -> None:
        """Convert to a newer default operator set, in place; older or equal versions do nothing.

        Raises ModelError when the converter cannot do it; the model is then unchanged.
        """
        if version <= self.opset:
            return
        raise NotImplementedError

    def graphs(self) -> list[gs.Graph]:
        """The main graph and all bodies of control flow, outermost first."""
        return [self.graph, *self.graph.subgraphs(recursive=True)]

    def nodes(self, *ops: str) -> list[gs.Node]:
        """All nodes of the given operators (none: all), bodies included; safe to edit under."""
        return [n for g in self.graphs() for n in g.nodes if not ops or n.op in ops]

    def unique(self, name: str) -> str:
        """Reserve a name that nothing in the model has yet, made from `name`."""
        candidate, i = name, 0
        while candidate in self.names:
            i += 1
            candidate = f"{name}_{i}"
        self.names.add(candidate)
        return candidate

    def constant(self, name: str, values: NDArray[Any]) -> gs.Constant:
        """A new initializer; the name is made unique."""
        return gs.Constant(self.unique(name), np.asarray(values))

    def emit(
        self,
        op: str,
        *inputs: gs.Tensor,
        name: str,
        like: gs.Tensor | None = None,
        dtype: Any = None,
        shape: Sequence[int | str] | None = None,
        at: gs.Node | None = None,
        domain: str | None = None,
        **attrs: Any,
    ) -> gs.Variable:
        """Add a node with one output and return that output, named `name` (made unique).

        dtype and shape of the output are those of `like` unless given. The node goes into the graph
        that holds `at` (default: the main graph); order does not matter, saving sorts the nodes.
        """
        out = gs.Variable(
            self.unique(name),
            dtype=dtype if dtype is not None else like.dtype if like is not None else None,
            shape=shape if shape is not None else like.shape if like is not None else None,
        )
        node = gs.Node(
            op, self.unique(f"{name}/{op}"), attrs, inputs=list(inputs), outputs=[out], domain=domain
        )
        self.graph_of(at).nodes.append(node)
        return out

    def graph_of(self, node: gs.Node | None) -> gs.Graph:
        """The graph (main or body) that holds the node; the main graph for None."""
        for graph in self.graphs() if node is not None else ():
            if any(n is node for n in graph.nodes):
                return graph
        return self.graph

    def is_output(self, tensor: gs.Tensor) -> bool:
        """Whether the tensor is an output of the main graph or of a body."""
        return any(tensor is t for g in self.graphs() for t in g.outputs)

    def is_input(self, tensor: gs.Tensor) -> bool:
        """Whether the tensor is an input of the main graph or of a body."""
        return any(tensor is t for g in self.graphs() for t in g.inputs)

    def replace(self, old: gs.Tensor, new: gs.Tensor) -> None:
        """Let everything that reads `old` read `new`; names of graph outputs are kept.

        `old`'s producer loses that output. When `old` is a graph output, `new`'s producer produces
        `old` instead, so `new` must be produced by a node of the same graph and not be an interface.
        """
        if self.is_output(old):
            (source,) = new.inputs
            i = next(i for i, t in enumerate(source.outputs) if t is new)
            old.inputs.clear()
            for node in list(new.outputs):
                for j, t in enumerate(node.inputs):
                    if t is new:
                        node.inputs[j] = old
            source.outputs[i] = old
            return
        for node in list(old.outputs):
            for j, t in enumerate(node.inputs):
                if t is old:
                    node.inputs[j] = new
        old.inputs.clear()

    def sweep(self) -> None:
        """Remove nodes that nothing uses (pure operators whose outputs have no reader)."""
        for graph in self.graphs():
            graph.cleanup(remove_unused_graph_inputs=False)


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that makes the tensor; None for inputs, constants and omitted inputs."""
    return tensor.inputs[0] if tensor.inputs else None


def values_of(tensor: gs.Tensor) -> NDArray[Any] | None:
    """The tensor's values if it is a constant (initializer or Constant node), else None."""
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    node = producer(tensor)
    if node is not None and node.op == "Constant" and "value" in node.attrs:
        return np.asarray(node.attrs["value"].values)
    return None


def readers(tensor: gs.Tensor) -> Iterator[tuple[gs.Node, int]]:
    """Each (node, input index) that reads the tensor."""
    for node in {id(n): n for n in tensor.outputs}.values():
        for i, t in enumerate(node.inputs):
            if t is tensor:
                yield node, i
