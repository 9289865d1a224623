"""Which channels of which tensors must be scaled together for a network to compute the same.

Each channel has a label; channels of one label can only be scaled by one factor. Operators that
commute with a positive factor for each channel (Relu, pooling, data movement, sums) pass labels on
or join those of their inputs; a linear layer gives its outputs new ones, since its weight takes
factors on either side:

    W'[o, i] = W[o, i] s[in i] / s[out o]        b'[o] = b[o] / s[out o]

Whatever else reads or makes a tensor holds its channels where they are: label FIXED.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Note, Skip
from onnxq.graphs import sort
from onnxq.model import Model, values_of
from onnxq.packed import remembered
from onnxq.passes.channel_moves import MOVED, Channels, Labels, aligned, sizes
from onnxq.passes.linear import LINEAR, bias_of, constant, outputs_of
from onnxq.passes.ops import clamp_bounds

FIXED = 0  # numbers of labels: the least of those that are joined
# Operators that a positive factor for each channel goes through: one input, as many channels.
THROUGH = frozenset(("Relu", "LeakyRelu", "PRelu", "Abs", "Neg", "Identity", "Dropout", "Cast"))
POOLS = frozenset(
    ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool")
)
# Sums and the like: all inputs have the same factors, constants too.
TOGETHER = frozenset(("Add", "Sub", "Sum", "Max", "Min", "Mean"))
# Operators that look at no values.
BLIND = frozenset(("Shape", "Size"))


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer whose weight can take factors; labels by group: [groups, channels]."""

    node: gs.Node
    inputs: Labels
    outputs: Labels


@dataclass(frozen=True, slots=True)
class Shift:
    """A constant operand of a sum: takes the factors of what it is added to, along an axis."""

    node: gs.Node
    index: int
    axis: int
    labels: Labels


@dataclass(frozen=True, slots=True)
class Network:
    """The labels of a model's channels: tensors by id, and why nodes hold theirs FIXED."""

    layers: tuple[Layer, ...]
    shifts: tuple[Shift, ...]
    tensors: dict[int, tuple[gs.Tensor, Channels]]
    count: int
    declined: tuple[Note, ...]


def network(model: Model, rule: str) -> Network:
    """Label all channels of a model; notes are those of `rule`. Shapes have to be up to date."""
    return _Labeller(model, rule).done()


def matrices(node: gs.Node, weight: NDArray[Any]) -> NDArray[Any]:
    """A layer's weight as [groups, outputs, inputs, kernel positions]; no copy.

    Raises Skip for a MatMul of several matrices, or of a vector.
    """
    if node.op in ("Conv", "ConvTranspose"):
        groups = int(node.attrs.get("group", 1))
        split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return split if node.op == "Conv" else split.swapaxes(1, 2)
    if weight.ndim != 2:
        raise Skip("its weight is not one matrix")
    is_transposed = node.op == "Gemm" and node.attrs.get("transB", 0)
    return (weight if is_transposed else weight.T)[None, :, :, None]


def from_matrices(node: gs.Node, found: NDArray[np.float64], like: NDArray[Any]) -> NDArray[Any]:
    """The weight as the layer has it; the reverse of `matrices`."""
    if node.op == "ConvTranspose":
        found = found.swapaxes(1, 2)
    elif node.op == "MatMul" or (node.op == "Gemm" and not node.attrs.get("transB", 0)):
        found = found[0, :, :, 0].T
    return np.ascontiguousarray(found.reshape(like.shape).astype(like.dtype))


def channel_axis(node: gs.Node, tensor: gs.Tensor) -> int:
    """The axis of a layer's input or output that its channels are along; -1 where not known."""
    return 1 if node.op in ("Conv", "ConvTranspose") else len(tensor.shape or ()) - 1


def bias_row(node: gs.Node, outputs: int) -> NDArray[np.float64] | None:
    """The bias as one value an output; None without. Raises Skip where it is not."""
    bias = bias_of(node)
    if bias is None:
        return None
    if bias.size == 1:
        return np.full(outputs, float(bias.reshape(())))
    if bias.size != outputs or bias.shape[-1] != outputs:
        raise Skip("its bias is not one value a channel")
    return bias.reshape(-1)


def check_layer(node: gs.Node) -> None:
    """Raise Skip for a layer whose weight cannot be changed on its own."""
    weight = node.inputs[1]
    values = constant(node, 1)
    if node.op == "Gemm" and node.attrs.get("transA", 0):
        raise Skip("it transposes its input")
    if values.dtype.itemsize < 4:
        raise Skip(f"{weight.name} is {values.dtype}: rounding again would cost more")
    if len(weight.outputs) != 1 or sum(t is weight for t in node.inputs) != 1:
        raise Skip(f"{weight.name} is also used elsewhere")
    if remembered(weight) is not None:
        raise Skip(f"{weight.name} has its integers already")
    if not values.size or not np.isfinite(values).all():
        raise Skip(f"{weight.name} is empty, or has NaN or infinite values")
    bias = bias_row(node, outputs_of(node))
    if bias is not None and not np.isfinite(bias).all():
        raise Skip("its bias has NaN or infinite values")


class _Labeller:
    """Goes through the nodes in order; labels that turn out to be one are joined."""

    def __init__(self, model: Model, rule: str) -> None:
        self.model, self.rule = model, rule
        self.parent = [FIXED]
        self.of: dict[int, tuple[gs.Tensor, Channels]] = {}
        self.layers: list[Layer] = []
        self.shifts: list[Shift] = []
        self.declined: list[Note] = []
        for graph in model.graphs():
            sort(graph)
            for node in graph.nodes:
                self.see(node)
        for tensor, channels in self.of.values():
            if model.is_output(tensor):
                self.hold(channels)

    def find(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = label = self.parent[self.parent[label]]
        return label

    def join(self, a: Labels, b: Labels) -> None:
        """One factor for each pair."""
        for one, other in zip(a.reshape(-1), b.reshape(-1), strict=True):
            i, j = sorted((self.find(int(one)), self.find(int(other))))
            self.parent[j] = i

    def hold(self, channels: Channels | None) -> None:
        if channels is not None:
            self.join(channels.labels, np.full_like(channels.labels, FIXED))

    def known(self, tensor: gs.Tensor) -> Channels | None:
        found = self.of.get(id(tensor))
        return None if found is None else found[1]

    def give(self, tensor: gs.Tensor, channels: Channels) -> None:
        self.of[id(tensor)] = tensor, channels
        if tensor.name in self.model.ranges:  # as its channels are
            self.hold(channels)

    def done(self) -> Network:
        """All labels, numbered without gaps."""
        roots = np.array([self.find(i) for i in range(len(self.parent))], np.int64)
        _, numbers = np.unique(roots, return_inverse=True)

        def final(labels: Labels) -> Labels:
            return np.asarray(numbers[labels])

        return Network(
            tuple(Layer(v.node, final(v.inputs), final(v.outputs)) for v in self.layers),
            tuple(Shift(s.node, s.index, s.axis, final(s.labels)) for s in self.shifts),
            {k: (t, Channels(c.axis, final(c.labels))) for k, (t, c) in self.of.items()},
            int(numbers.max()) + 1,
            tuple(self.declined),
        )

    def see(self, node: gs.Node) -> None:
        """Label what the node makes, or hold what it reads."""
        if node.op in BLIND:
            return
        if node.op in LINEAR and not node.domain and self.layer(node):
            return
        labelled = [t for t in node.inputs if self.known(t) is not None]
        if not labelled:
            return
        rule = self.rule_of(node)
        made = None if rule is None or node.domain not in (None, "", "ai.onnx") else rule(node)
        if made is None:
            held = [c for c in map(self.known, labelled) if c is not None]
            if rule is not None and any(self.find(int(v)) for c in held for v in c.labels):
                self.declined.append(Note(self.rule, node.name, _why(node), changed=False))
            for channels in held:
                self.hold(channels)
            return
        for tensor, given in zip(node.outputs, made, strict=False):
            if given is not None and tensor.name:
                self.give(tensor, given)

    def rule_of(
        self, node: gs.Node
    ) -> Callable[[gs.Node], Sequence[Channels | None] | None] | None:
        if node.op in THROUGH or node.op in POOLS or node.op == "Clip":
            return self.through
        if node.op in TOGETHER:
            return self.together
        if node.op in ("Mul", "Div"):
            return self.product
        if node.op == "Concat":
            return self.concat
        return self.moved if node.op in MOVED else None

    def layer(self, node: gs.Node) -> bool:
        """A linear layer: new labels behind it; held on both sides where its weight must stay."""
        if node.op == "MatMul" and values_of(node.inputs[1]) is None:
            return False
        try:
            check_layer(node)
            groups, outputs, inputs, _ = matrices(node, constant(node, 1)).shape
        except Skip as reason:
            self.declined.append(Note(self.rule, node.name, str(reason), changed=False))
            return False
        data, out = node.inputs[0], node.outputs[0]
        labels = np.zeros(groups * outputs, np.int64)
        if (axis := channel_axis(node, out)) >= 0:
            labels = np.arange(len(self.parent), len(self.parent) + labels.size)
            self.parent += labels.tolist()
            self.give(out, Channels(axis, labels))
        before, taken = self.known(data), np.zeros(groups * inputs, np.int64)
        if before is None or (before.axis, before.labels.size) != (
            channel_axis(node, data),
            taken.size,
        ):
            self.hold(before)
        else:
            taken = before.labels
        for tensor in node.inputs[2:]:
            self.hold(self.known(tensor))
        self.layers.append(
            Layer(node, taken.reshape(groups, inputs), labels.reshape(groups, outputs))
        )
        return True

    def through(self, node: gs.Node) -> Sequence[Channels | None] | None:
        channels = self.known(node.inputs[0])
        if channels is None or any(self.known(t) is not None for t in node.inputs[1:]):
            return None
        if (node.op in POOLS and channels.axis != 1) or (
            node.op == "Clip" and not _is_homogeneous(node)
        ):
            return None
        if node.op == "PRelu" and not _slopes_fit(node):
            return None
        if node.op == "Cast" and node.outputs[0].dtype not in (np.float32, np.float64):
            return None  # factors could take a channel out of what 16 bits can be
        return [channels]

    def together(self, node: gs.Node) -> Sequence[Channels | None] | None:
        """All inputs alike; a constant takes the factors itself."""
        rank = len(node.outputs[0].shape or ())
        found = [self.known(t) for t in node.inputs]
        if any(t.shape is None for t in node.inputs):
            return None
        known = [aligned(c, t, rank) for c, t in zip(found, node.inputs, strict=True) if c]
        first = max(known, key=lambda c: c.labels.size)
        if rank == 0 or any(c.axis != first.axis for c in known):
            return None
        if any(c.labels.size not in (1, first.labels.size) for c in known):
            return None
        if sizes(node.outputs[0])[first.axis] != first.labels.size:
            return None
        shifts = []
        for index, tensor in enumerate(node.inputs):
            if found[index] is not None:
                continue
            values = values_of(tensor)
            if values is None or values.dtype.kind != "f" or values.ndim > rank:
                return None
            if values.any() or not np.isfinite(values).all():
                shifts.append(Shift(node, index, first.axis - rank, first.labels))
        for one in known:
            self.join(np.broadcast_to(one.labels, first.labels.shape), first.labels)
        self.shifts += shifts
        return [first]

    def product(self, node: gs.Node) -> Sequence[Channels | None] | None:
        """One factor carries labels, the other none (a gate, a constant)."""
        rank = len(node.outputs[0].shape or ())
        one, other = (self.known(t) for t in node.inputs)
        if rank == 0 or (one is not None and other is not None) or (node.op == "Div" and not one):
            return None
        at = 0 if one is not None else 1
        found = one or other
        assert found is not None
        found = aligned(found, node.inputs[at], rank)
        return [found] if sizes(node.outputs[0])[found.axis] == found.labels.size else None

    def concat(self, node: gs.Node) -> Sequence[Channels | None] | None:
        parts = [self.known(t) for t in node.inputs]
        axis = next(c.axis for c in parts if c is not None)
        rank = len(node.outputs[0].shape or ())
        if rank == 0 or any(c is not None and c.axis != axis for c in parts):
            return None
        labels = []
        for tensor, part in zip(node.inputs, parts, strict=True):
            size = sizes(tensor)[axis] if tensor.shape else None
            if part is None and not isinstance(size, int):
                return None
            labels.append(np.zeros(size or 0, np.int64) if part is None else part.labels)
        if node.attrs["axis"] % rank == axis:
            return [Channels(axis, np.concatenate(labels))]
        if len({part.size for part in labels}) > 1:
            return None
        for other in labels[1:]:
            self.join(labels[0], other)
        return [Channels(axis, labels[0])]

    def moved(self, node: gs.Node) -> Sequence[Channels | None] | None:
        """Data movement: labels go where their channels go."""
        found = self.known(node.inputs[0])
        if found is None or any(self.known(t) is not None for t in node.inputs[1:]):
            return None
        made = MOVED[node.op](node, found)
        if made is None:
            return None
        for same in made.joined:
            self.join(np.broadcast_to(same[:1], same.shape), same)
        return made.outputs


def _is_homogeneous(clip: gs.Node) -> bool:
    """Whether a Clip commutes with a positive factor: its bounds are 0 or none at all."""
    bounds = clamp_bounds(clip)
    return bounds is not None and all(b == 0 or np.isinf(b) for b in bounds)


def _why(node: gs.Node) -> str:
    """Why a node that lets factors through in other places does not here."""
    if node.op == "Clip":
        return "its bounds are not 0, and would have to move with the channels"
    return f"{node.op} does not let factors through as it is here"


def _slopes_fit(node: gs.Node) -> bool:
    slopes, shape = node.inputs[1].shape, node.inputs[0].shape
    return slopes is not None and shape is not None and len(slopes) <= len(shape)
