"""Model: a graphsurgeon graph plus what graphsurgeon drops; load, edit helpers, save."""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]
from onnx.inliner import inline_local_functions
from onnx_graphsurgeon.logger import G_LOGGER

from onnxq.datafiles import DataFolder
from onnxq.errors import ModelError
from onnxq.files import PROTOBUF_LIMIT, atomic_writes, check_model, read_model
from onnxq.graphs import (
    DEFAULT_DOMAIN,
    Node,
    check_connected,
    local_tensors,
    opset_of,
    origin_of,
    place,
    plain_domain,
    remember,
    walk,
)
from onnxq.opsets import align_functions, carry, convert
from onnxq.pruned import Pruned
from onnxq.schemes import QParams
from onnxq.scratch import Scratch
from onnxq.serialization import Exporter, Importer
from onnxq.shapes import Merge, fill, inferred, same_types, shapes_with, symbols, take_types, update
from onnxq.sparse import parts
from onnxq.sweeping import sweep
from onnxq.tensors import index_of, producer, readers, redirect, values_of
from onnxq.weights import (
    SMALL,
    DataWriter,
    Fetch,
    Placeholders,
    Put,
    Stored,
    Values,
    Weight,
    bytes_in,
    inline,
    without,
)

EXTERNAL_ABOVE = 1_800_000_000
"""Bytes of weights above which a data file is written: protobuf ends at 2 GiB."""

G_LOGGER.severity = G_LOGGER.CRITICAL + 1  # it prints to stdout; errors still raise


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """An ONNX model that passes edit in place.

    Nodes have unique names, equal only themselves and can be in sets. Constants are read when
    they are looked at (`values_of`) and never kept in memory twice; their arrays are read-only.

    Initializers that the file lists as inputs are not in `graph.inputs`: nobody has to feed them.
    They stay listed while they are in the graph; when the IR version rises from 3 they are listed
    no more, since ONNX Runtime takes them for constants before that and for inputs after it.
    """

    graph: gs.Graph
    envelope: onnx.ModelProto
    names: set[str] = field(default_factory=set, repr=False)
    has_data_file: bool = field(default=False, repr=False)
    ranges: dict[str, tuple[QParams, ...]] = field(default_factory=dict, repr=False)
    """What tensors were quantized with before floats were recovered, by name (see onnxq.packed)."""
    moments: dict[str, tuple[Values, Values]] = field(default_factory=dict, repr=False)
    """Mean and deviation of tensors' channels that BatchNormalizations knew of, by name."""
    unquantized: list[Model] = field(default_factory=list, repr=False)
    """What the model was before its activations were quantized, for passes that correct what that
    costs: one, or none. Nodes and tensors have the same names there; weights are shared."""
    pruned: dict[str, Pruned] = field(default_factory=dict, repr=False)
    """Where pruning has made zeros, by the name of the layer's node (see onnxq.passes.masks)."""
    _counts: dict[str, int] = field(default_factory=dict, repr=False)
    _walked: list[gs.Graph] = field(default_factory=list, repr=False)
    scratch: Scratch = field(default_factory=lambda: Scratch(is_used=False), repr=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Model:
        """Read a model file; external data stay on disk until they are looked at.

        Raises ModelError, one line, when the file or its data files are not a model.
        """
        where = Path(path)
        proto = read_model(where)
        folder = DataFolder(where.parent)
        external = False

        def fetch(tensor: onnx.TensorProto) -> Stored:
            nonlocal external
            stored = Stored(tensor, folder)
            external = external or stored.file is not None
            return stored

        try:
            graph = _imported(proto, fetch)
            model = cls(
                graph,
                without(proto, "graph"),
                has_data_file=external,
                scratch=Scratch(is_used=external),
            )
            model._prepare()
        except ModelError as e:
            raise ModelError(f"{where}: {e}") from e
        except UnicodeDecodeError as e:
            raise ModelError(
                f"{where}: damaged (a name is not UTF-8); download or export it again"
            ) from e
        return model

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto) -> Model:
        """Wrap a model in memory.

        The proto is not modified and its weights are not copied: leave it as it is while the
        model is in use. Raises ModelError when it is no model or its weights are in data files.
        """
        check_model(proto, "model")
        model = cls(_imported(proto, Stored), without(proto, "graph"))
        model._prepare()
        return model

    def _prepare(self) -> None:
        self._name_nodes()
        self._infer(fill)
        remember(self.graph)

    def _name_nodes(self) -> None:
        """Give every node a name that no other node has; the first of twins keeps its name."""
        taken: set[str] = set()
        nameless = []
        for node in self.nodes():
            if node.name and node.name not in taken:
                taken.add(node.name)
            else:
                nameless.append(node)
        for graph in self._walked:
            self.names.update(local_tensors(graph), origin_of(graph).loose)
            self.names.update(t.name for node in graph.nodes for t in node.inputs)
        self.names.update(taken)
        for i, node in enumerate(nameless):
            node.name = self.unique(node.name or f"{node.op}_{i}")

    def to_proto(self) -> onnx.ModelProto:
        """The model as a proto, all weights inside.

        Raises ModelError when that is more than a proto can hold (save it to a file instead), or
        when a pass left the graph with a cycle or a loose end.
        """
        if sum(self.weight_sizes()) > PROTOBUF_LIMIT:
            raise ModelError("the model is over 2 GiB, too large for one proto: save it to a file")
        return self._export(inline)

    def skeleton(self) -> onnx.ModelProto:
        """The model as a proto with placeholders for large weights: cheap, not to be run."""
        return self._export(Placeholders(), infer=True)

    def _export(self, put: Put, *, infer: bool = False) -> onnx.ModelProto:
        check_connected(self.nodes())
        placed = place(self.graph)
        self._complete_envelope(placed)
        proto = onnx.ModelProto()
        proto.CopyFrom(self.envelope)
        Exporter(put, placed, infer).graph(self.graph, proto.graph)
        return proto

    def _complete_envelope(self, placed: dict[int, list[gs.Constant]]) -> None:
        """Import the domains that are used; leave IR 3 when there is an initializer it lacks."""
        imported = {plain_domain(entry.domain) for entry in self.envelope.opset_import}
        for node in self.nodes():
            domain = plain_domain(node.domain)
            if domain not in imported:
                imported.add(domain)
                version = 1 if domain else self.opset
                self.envelope.opset_import.add(domain=domain, version=version)
        known = {id(t) for t in origin_of(self.graph).initializers}
        if any(id(t) not in known for t in placed[id(self.graph)]):
            self._raise_ir(4)

    def _raise_ir(self, version: int) -> None:
        if self.envelope.ir_version < 4 <= version:
            origin = origin_of(self.graph)
            weights = {t.name for t in origin.initializers}
            origin.inputs = [info for info in origin.inputs if info.name not in weights]
        self.envelope.ir_version = max(self.envelope.ir_version, version)

    def weight_sizes(self) -> list[int]:
        """Bytes of each constant as it is written to a file."""
        attributes = (
            value
            for node in self.nodes()
            for value in node.attrs.values()
            if isinstance(value, gs.Constant)
        )
        return [bytes_in(t) for t in chain(*place(self.graph).values(), attributes)]

    def save(
        self, path: str | os.PathLike[str], *, also: Mapping[Path, bytes] | None = None
    ) -> None:
        """Write the model so that `path` holds the old file or the new one, never a part.

        Weights go to `path` + ".data" when they are too large for one file, or when they were in
        a data file before; that one is complete before the model takes its name. also: contents of
        other files that are written together with the model.
        Raises ModelError, one line, when the files cannot be written.
        """
        target, others = Path(path), dict(also or {})
        beside = target.with_name(f"{target.name}.data")
        paths = [beside, target] if self.wants_data_file() else [target]
        with atomic_writes(*others, *paths) as files:
            for other, content in zip(files, others.values(), strict=False):
                other.write(content)
            *data, file = files[len(others) :]
            put: Put = DataWriter(data[0], beside.name) if data else inline
            try:
                file.write(self._export(put).SerializeToString(deterministic=True))
            except (ValueError, EncodeError) as e:
                raise ModelError(f"{target}: cannot be written ({e})") from e

    def data_files(self) -> set[Path]:
        """The data files that weights are still read from."""
        constants = chain(*place(self.graph).values())
        held = (part for c in constants for part in parts(c._values))
        return {v.file.path for v in held if isinstance(v, Stored) and v.file is not None}

    def wants_data_file(self) -> bool:
        """Whether `save` writes a data file beside the model."""
        sizes = self.weight_sizes()
        return sum(sizes) > EXTERNAL_ABOVE or (
            self.has_data_file and max(sizes, default=0) >= SMALL
        )

    def copy(self) -> Model:
        """An independent copy; large weights are shared (and read-only from then on)."""
        weights = Placeholders()
        proto = self._export(weights)
        graph = _imported(proto, weights.fetch)
        model = Model(
            graph,
            without(proto, "graph"),
            has_data_file=self.has_data_file,
            scratch=self.scratch,
        )
        model.ranges.update(self.ranges)
        model.moments.update(self.moments)
        model.pruned.update(self.pruned)
        model.unquantized.extend(self.unquantized)
        model._name_nodes()
        same_types(self.graph, graph)
        remember(graph)
        for one, other in zip(walk(self.graph), walk(graph), strict=True):
            given = {t.name for t in origin_of(one).initializers}  # they keep their order
            origin = origin_of(other)
            origin.initializers = [t for t in origin.initializers if t.name in given]
        return model

    @property
    def opset(self) -> int:
        """The version of the default operator set."""
        return int(self.graph.opset)

    @property
    def functions(self) -> list[str]:
        """Names of the model-local functions, as domain::name; kept as they are."""
        return [f"{f.domain}::{f.name}" for f in self.envelope.functions]

    def raise_opset(self, version: int) -> None:
        """Convert to a newer default operator set, in place; older or equal versions do nothing.

        The graph's nodes and tensors are replaced by new ones: look them up again.
        Raises ModelError when the converter cannot do it; the model is then unchanged.
        """
        if version <= self.opset:
            return
        weights = Placeholders()
        proto = self._export(weights)
        before = _imported(proto, weights.fetch)
        same_types(self.graph, before)
        graph = _imported(convert(_copy(proto), self.opset, version), weights.fetch)
        carry(before, graph)
        for entry in self.envelope.opset_import:
            if entry.domain in DEFAULT_DOMAIN:
                entry.version = version
        needed = onnx.helper.find_min_ir_version_for(
            self.envelope.opset_import, ignore_unknown=True
        )
        self._take(graph, version)
        self._raise_ir(max(8, needed))

    def inline_functions(self) -> list[str]:
        """Replace calls of model-local functions by their bodies, nested ones too, in place.

        The graph's nodes and tensors are replaced by new ones: look them up again.
        Returns the names of the functions that are gone. One with other versions of operators than
        the model's stays, as do the calls of it. Raises ModelError for a call that does not fit.
        """
        if not self.functions:
            return []
        before = self.functions
        weights = Placeholders()
        proto = self._export(weights)
        align_functions(proto)
        try:
            proto = inline_local_functions(proto)
        except RuntimeError as e:  # an assertion in C++
            raise ModelError(f"a function cannot be inlined ({e}); export the model again") from e
        graph = _imported(proto, weights.fetch)
        self.envelope.CopyFrom(without(proto, "graph"))
        self._take(graph, self.opset)
        return [name for name in before if name not in self.functions]

    def _take(self, graph: gs.Graph, opset: int) -> None:
        """Become another graph with the same interface."""
        own = self.graph
        own.nodes, own.inputs, own.outputs = graph.nodes, graph.inputs, graph.outputs
        own.origin = origin_of(graph)
        for inner in walk(own):
            inner.opset = opset
        self._name_nodes()
        self._infer(fill)
        remember(own)

    def infer_shapes(self) -> None:
        """Bring dtypes and shapes up to date after edits; what cannot be inferred stays."""
        self._infer(update)

    def _infer(self, merge: Merge) -> None:
        proto = inferred(self._export(Placeholders(), infer=True))
        if proto is not None:
            take_types(self.graph, proto.graph, merge, symbols(self.graph))

    def shapes_for(self, inputs: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Shapes of tensors, by name, when the inputs have the given ones; bodies included.

        Tensors whose shape cannot be inferred, or not wholly, are left out.
        """
        return shapes_with(self._export(Placeholders(), infer=True), inputs)

    def graphs(self) -> list[gs.Graph]:
        """The main graph and all bodies of control flow, outermost first."""
        self._walked[:] = walk(self.graph)
        return list(self._walked)

    def nodes(self, *ops: str) -> list[gs.Node]:
        """All nodes of the given operators (none: all), bodies included; safe to edit under."""
        found = []
        for graph in self.graphs():
            for node in graph.nodes:
                node.home = graph
                if not ops or node.op in ops:
                    found.append(node)
        return found

    def unique(self, name: str) -> str:
        """Reserve a name that nothing in the model has yet, made from `name`."""
        candidate, i = name, self._counts.get(name, 0)
        while candidate in self.names:
            i += 1
            candidate = f"{name}_{i}"
        self._counts[name] = i
        self.names.add(candidate)
        return candidate

    def constant(self, name: str, values: Values) -> gs.Constant:
        """A new initializer, of an array or values that are stored; the name is made unique."""
        held = values if isinstance(values, Stored) else self.scratch.put(np.asarray(values))
        kind = Weight if isinstance(held, Stored) else gs.Constant
        return kind(self.unique(name), held)

    def emit(
        self,
        op: str,
        *inputs: gs.Tensor,
        name: str,
        like: gs.Tensor | None = None,
        dtype: Any = None,
        shape: Sequence[int | str | None] | None = None,
        at: gs.Node | gs.Graph | None = None,
        domain: str | None = None,
        **attrs: Any,
    ) -> gs.Variable:
        """Add a node with one output and return that output, named `name` (made unique).

        dtype and shape of the output are those of `like` unless given. The node goes into the graph
        `at`, or that holds the node `at` (default: the main graph); order does not matter, saving
        sorts the nodes.
        """
        out = gs.Variable(
            self.unique(name),
            dtype=dtype if dtype is not None else like.dtype if like is not None else None,
            shape=shape if shape is not None else like.shape if like is not None else None,
        )
        node = Node(
            op,
            self.unique(f"{name}/{op}"),
            attrs,
            inputs=list(inputs),
            outputs=[out],
            domain=domain,
        )
        node.home = at if isinstance(at, gs.Graph) else self.graph_of(at)
        node.home.nodes.append(node)
        return out

    def graph_of(self, node: gs.Node | None) -> gs.Graph:
        """The graph (main or body) that holds the node; the main graph for None.

        Known from the last walk (`nodes()`, `graphs()`): after moving nodes to another graph, walk.
        """
        if node is None:
            return self.graph
        if "home" not in node.__dict__:
            self.nodes()
        return node.__dict__.get("home", self.graph)

    def home(self, tensor: gs.Tensor) -> gs.Graph:
        """The graph (main or body) that makes or takes the tensor; the main one for constants."""
        if tensor.inputs:
            return self.graph_of(tensor.inputs[0])
        bodies = self._walked or self.graphs()
        return next((g for g in bodies if any(tensor is t for t in g.inputs)), self.graph)

    def separate_names(self) -> None:
        """Give tensors of different bodies different names (both branches of If may use one)."""
        taken = set[str]()
        for graph in self.graphs():
            for name, tensor in local_tensors(graph).items():
                if name in taken:
                    tensor.name = self.unique(name)
                taken.add(tensor.name)

    def is_output(self, tensor: gs.Tensor) -> bool:
        """Whether the tensor is an output of the main graph or of a body."""
        return any(tensor is t for g in self._walked or self.graphs() for t in g.outputs)

    def is_input(self, tensor: gs.Tensor) -> bool:
        """Whether the tensor is an input of the main graph or of a body."""
        return any(tensor is t for g in self._walked or self.graphs() for t in g.inputs)

    def replace(self, old: gs.Tensor, new: gs.Tensor) -> None:
        """Let everything that reads `old` read `new`; names of graph outputs are kept.

        `old`'s producer loses that output (or, having several, gets a new one that nothing reads).
        When `old` is a graph output, `new`'s producer produces `old` instead.
        Raises ValueError, before any edit, when `old` is a graph output and `new` cannot take its
        place: not the result of a node of the same graph, or itself a graph output.
        """
        if old is new:
            return
        if not self.is_output(old):
            self._detach(old)
            redirect(old, new)
            return
        source = producer(new)
        fixed = isinstance(old, gs.Constant) or self.is_input(old)
        if source is None or fixed or self.is_output(new):
            raise ValueError(
                f"{old.name} is a graph output and {new.name} is an input, a constant or an output "
                "too: neither can have the other's name"
            )
        if (maker := producer(old)) is not None and self.graph_of(maker) is not self.graph_of(
            source
        ):
            raise ValueError(f"{old.name} is a graph output, {new.name} is from another graph")
        self._detach(old)
        redirect(new, old)
        source.outputs[index_of(source.outputs, new)] = old

    def _detach(self, tensor: gs.Tensor) -> None:
        """Take the tensor from its producer; the places of the producer's other outputs stay."""
        for node in list(tensor.inputs):
            i = index_of(node.outputs, tensor)
            if len(node.outputs) == 1:
                del node.outputs[i]
            else:
                unread = gs.Variable(
                    self.unique(f"{tensor.name}_unread"), tensor.dtype, tensor.shape
                )
                node.outputs[i] = unread

    def sweep(self) -> None:
        """Remove nodes and initializers that no graph output needs; graph inputs stay.

        Kept: operators without outputs, and operators of foreign domains, which may have effects.
        """
        sweep(self.graph, {(f.domain, f.name) for f in self.envelope.functions})
        self.graphs()


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    return out


def _imported(proto: onnx.ModelProto, fetch: Fetch) -> gs.Graph:
    return Importer(fetch, opset_of(proto)).graph(proto.graph, ChainMap())


__all__ = ["EXTERNAL_ABOVE", "Model", "producer", "readers", "values_of"]
