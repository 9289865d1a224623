"""Two versions of one model in one graph, and how far the results of their layers are apart.

The later one has a correction for each layer, an input of the graph, that is added to its result:
so a session is made once for any number of corrections. onnxruntime computes all nodes whatever is
fetched, so there is a graph for each set of observations.

Results are compared behind the clamp that reads them, where one does: what it cuts off does not
matter. Large results are compared at some of their positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import ceil, prod
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.compose import add_prefix_graph

from onnxq.core import Skip
from onnxq.files import PROTOBUF_LIMIT
from onnxq.model import Model
from onnxq.passes.linear import outputs_of, rank_of
from onnxq.passes.ops import clamp_behind

EXACT = "exact/"
POSITIONS = 4096  # of a result that are compared, about
Means = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer in both models. bounds: of the clamp that alone reads its result in `exact`."""

    node: gs.Node
    exact: gs.Node
    rank: int
    channels: int
    bounds: tuple[float, float] | None

    @classmethod
    def of(cls, model: Model, node: gs.Node, before: Model, exact: gs.Node) -> Layer:
        """Raises Skip where the two cannot be compared."""
        if node.inputs[1].shape != exact.inputs[1].shape:
            raise Skip("a pass has changed its channels since activations were quantized")
        if node.outputs[0].dtype != np.float32 or exact.outputs[0].dtype != np.float32:
            raise Skip("its results are not float32")
        rank, channels = rank_of(exact), outputs_of(exact)
        if rank is None:
            raise Skip("the rank of its result is not known")
        return cls(node, exact, rank, channels, clamp_behind(before, exact))

    @property
    def axis(self) -> int:
        """The channels' axis of the result."""
        return 1 if self.node.op in ("Conv", "ConvTranspose") else self.rank - 1

    def shaped(self, row: Means) -> NDArray[np.float32]:
        """A value a channel, as it is added to the result."""
        shape = [1] * self.rank
        shape[self.axis] = -1
        return row.astype(np.float32).reshape(shape)


Observe = Callable[["Graph", Layer, str, str, str], list[str]]


def paired(
    model: Model,
    layers: Sequence[Layer],
    shapes: Mapping[str, Sequence[int]],
    observe: Observe,
    *,
    outputs: bool,
) -> tuple[onnx.ModelProto, list[list[str]]]:
    """The graph, and the names of what it gives of each layer.

    The correction of layer i is the input `correction(i)`. shapes: of the first model's tensors.
    observe: adds nodes that make something of a layer, both its results, and a name. outputs:
    those of both models as well; the earlier one's names begin with EXACT. Raises Skip where both
    do not go into one graph.
    """
    (before,) = model.unquantized
    if sum(model.weight_sizes()) + sum(before.weight_sizes()) > PROTOBUF_LIMIT:
        raise Skip("the model is too large to be run beside what it was")
    proto, earlier = model.to_proto(), _prefixed(before.to_proto().graph)
    graph = Graph(proto.graph, model.opset)
    own = list(proto.graph.node)
    interface = [o.name for o in proto.graph.output]
    for part in ("node", "output"):
        proto.graph.ClearField(part)
    constants = {t.name for t in earlier.initializer}
    for value in earlier.input:
        if value.name not in constants:
            source = value.name.removeprefix(EXACT)
            proto.graph.node.append(helper.make_node("Identity", [source], [value.name]))
    proto.graph.node.extend(earlier.node)
    proto.graph.initializer.extend(earlier.initializer)
    proto.graph.sparse_initializer.extend(earlier.sparse_initializer)
    at = {layer.node.name: i for i, layer in enumerate(layers)}
    for node in own:
        proto.graph.node.append(node)
        if (i := at.get(node.name)) is not None:
            graph.correct(proto.graph.node[-1], correction(i))
    keys = []
    for layer in layers:
        one, two = layer.node.outputs[0].name, EXACT + layer.exact.outputs[0].name
        steps = _steps(layer, shapes.get(layer.exact.outputs[0].name))
        one, two = (graph.thinned(name, steps) for name in (one, two))
        if layer.bounds is None:
            keys.append(observe(graph, layer, one, one, two))
        else:
            clamped = [graph.clamped(name, layer.bounds) for name in (one, two)]
            keys.append(observe(graph, layer, one, *clamped))
        for key in keys[-1]:
            graph.output(key)
    if outputs:
        for name in interface:
            graph.output(name)
            graph.output(EXACT + name)
    return proto, keys


def _prefixed(graph: onnx.GraphProto) -> onnx.GraphProto:
    """The graph with EXACT before all names; bodies may read initializers of the main graph."""
    names = [t.name for t in graph.initializer]
    names += [t.values.name for t in graph.sparse_initializer]
    known = {name: EXACT + name for name in names}
    return add_prefix_graph(graph, EXACT, inplace=True, name_map=known)


def correction(index: int) -> str:
    """The input that is added to the result of the index-th layer."""
    return f"correction/{index}"


def slopes(graph: Graph, layer: Layer, raw: str, one: str, two: str) -> list[str]:
    """Means of a channel: the error where the clamp lets the result through, and how often."""
    error = graph.node("Sub", one, two)
    if layer.bounds is None:
        return [graph.mean(error, layer)]
    passing = graph.passing(raw, layer.bounds)
    return [graph.mean(graph.node("Mul", error, passing), layer), graph.mean(passing, layer)]


def powers(graph: Graph, layer: Layer, raw: str, one: str, two: str) -> list[str]:
    """Means of a channel: the squared error, and the squared exact result."""
    del raw
    error = graph.node("Sub", one, two)
    return [graph.mean(graph.node("Mul", x, x), layer) for x in (error, two)]


def _steps(layer: Layer, shape: Sequence[int] | None) -> dict[int, int]:
    """Each how many-th position of which axes is compared: odd, as strides of networks are not."""
    if shape is None or len(shape) != layer.rank:
        return {}
    sizes = {axis: n for axis, n in enumerate(shape) if axis != layer.axis and n >= 8}
    excess = prod(n for axis, n in enumerate(shape) if axis != layer.axis) / POSITIONS
    if excess <= 1 or not sizes:
        return {}
    step = ceil(excess ** (1 / len(sizes))) | 1
    return dict.fromkeys(sizes, step)


@dataclass(slots=True)
class Graph:
    """Adds nodes to a graph."""

    proto: onnx.GraphProto
    opset: int
    numbers: Any = field(default_factory=count)

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; return its output."""
        name = f"paired/{op}_{next(self.numbers)}"
        self.proto.node.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, values: NDArray[Any]) -> str:
        """Add an initializer."""
        name = f"paired/constant_{next(self.numbers)}"
        self.proto.initializer.append(numpy_helper.from_array(values, name))
        return name

    def output(self, name: str) -> None:
        """Make a tensor an output; onnxruntime infers its type."""
        self.proto.output.append(onnx.ValueInfoProto(name=name))

    def correct(self, node: onnx.NodeProto, given: str) -> None:
        """Add an input of the graph to the node's result."""
        out, raw = node.output[0], f"paired/raw_{next(self.numbers)}"
        node.output[0] = raw
        self.proto.input.append(helper.make_tensor_value_info(given, TensorProto.FLOAT, None))
        self.proto.node.append(helper.make_node("Add", [raw, given], [out], name=f"{raw}/Add"))

    def thinned(self, name: str, steps: Mapping[int, int]) -> str:
        """Each so many-th position of some axes."""
        if not steps:
            return name
        axes = np.array(list(steps), np.int64)
        starts = np.zeros_like(axes)
        ends = np.full_like(axes, np.iinfo(np.int64).max)
        strides = np.array(list(steps.values()), np.int64)
        return self.node("Slice", name, *map(self.constant, (starts, ends, axes, strides)))

    def clamped(self, name: str, bounds: tuple[float, float]) -> str:
        """As Clip, which has no inputs before opset 11."""
        for op, bound in zip(("Max", "Min"), bounds, strict=True):
            if np.isfinite(bound):
                name = self.node(op, name, self.constant(np.array(bound, np.float32)))
        return name

    def passing(self, name: str, bounds: tuple[float, float]) -> str:
        """1 where a clamp lets a value through, else 0."""
        found = [
            self.node(op, name, self.constant(np.array(bound, np.float32)))
            for op, bound in zip(("Greater", "Less"), bounds, strict=True)
            if np.isfinite(bound)
        ]
        both = found[0] if len(found) == 1 else self.node("And", *found)
        return self.node("Cast", both, to=TensorProto.FLOAT)

    def mean(self, name: str, layer: Layer) -> str:
        """Over all axes but the channels'."""
        axes = [axis for axis in range(layer.rank) if axis != layer.axis]
        if not axes:
            return self.node("Identity", name)
        if self.opset >= 18:
            return self.node("ReduceMean", name, self.constant(np.array(axes)), keepdims=0)
        return self.node("ReduceMean", name, axes=axes, keepdims=0)
