"""Fill up the channels of float convolutions to the blocks that the target's kernels work in.

    Conv(W[200,32,1,1]) -> MaxPool -> Conv(W[40,200,1,1])
        =>  Conv(W'[208,32,1,1]) -> MaxPool -> Conv(W'[40,208,1,1])

The further weights are zero: the same values, and channels that nothing reads. ONNX Runtime keeps
tensors between convolutions in blocks of channels (NCHWc), 16 with AVX-512. A convolution fills its
last block up by itself, but pooling, resizing and sums take whole blocks only, and a convolution of
fewer channels than a block reads plain rows: in front of each the tensor is brought into another
layout. Time with 16 or 208 channels over that with 8, 24 or 200 (convolutions 1x1, 80x80): read by
a 1x1 convolution 8: 0.77, 12: 0.66, 22: 0.95, 24 or 200: 1.00; with a MaxPool between 8: 0.70,
24: 0.63, 200: 0.53; read by 3x3 convolutions 8: 1.5, 12: 1.2, for the products with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Note
from onnxq.disjoint import DisjointSets
from onnxq.model import Model, producer, readers, values_of
from onnxq.passes.costs import rounded_up
from onnxq.passes.sizes import Sizes
from onnxq.targets import Costs, Target
from onnxq.weights import bytes_in

NAME = "fill_blocks"
# Each channel on its own; no value of a channel of zeros gets lost or infinite.
UNARY = frozenset(("Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"))
WHOLE = frozenset(("MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "Upsample"))
BINARY = frozenset(("Add", "Mul", "Sub"))
# Nanoseconds: for each change of the layout, and for each of its elements; for a pixel that a
# convolution reads from plain rows, and for each channel that it makes of it.
NODE, ELEMENT, PLAIN, PLAIN_CHANNEL = 1000.0, 0.45, 2.0, 0.3
# A convolution from or to a number of channels that is no multiple of it does not work in blocks.
UNIT = 4
# Where the size is not known.
PIXELS = 1024
# Share of all bytes of weights that the zeros may add.
GROWTH = 0.1


@dataclass(slots=True)
class _Group:
    """Tensors of equally many channels that only widen together."""

    tensors: list[gs.Tensor] = field(default_factory=list)
    writers: list[gs.Node] = field(default_factory=list)
    readers: list[gs.Node] = field(default_factory=list)
    depthwise: list[gs.Node] = field(default_factory=list)
    others: list[gs.Node] = field(default_factory=list)
    is_closed: bool = True

    def channels(self) -> int | None:
        """Of all its tensors; None where the convolutions do not agree."""
        counts = {n.inputs[1].shape[0] for n in (*self.writers, *self.depthwise)}
        counts |= {n.inputs[1].shape[1] for n in self.readers}
        return int(counts.pop()) if len(counts) == 1 else None


@dataclass(frozen=True, slots=True)
class FillBlocks:
    """Where the target has such kernels, it pays, and the zeros stay a small share of the file."""

    target: Target

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Widen in place; a note for each group of tensors."""
        costs = self.target.costs
        if costs is None or costs.block < 2:
            return []
        model.infer_shapes()
        room = GROWTH * sum(
            bytes_in(t) for t in model.graph.tensors().values() if isinstance(t, gs.Constant)
        )
        notes, sizes = [], Sizes(model)
        found = [(g, g.channels()) for g in _groups(model) if g.writers and g.readers]
        for worth, group, channels in sorted(
            (
                (_gain(g, c, costs, sizes) / (1 + _added_bytes(g, costs.block, c)), g, c)
                for g, c in found
                if c is not None and c % costs.block
            ),
            key=lambda triple: -triple[0],
        ):
            added = _added_bytes(group, costs.block, channels)
            if worth <= 0 or added > room:
                continue
            room -= added
            width = rounded_up(channels, costs.block)
            _widen(model, group, channels, width)
            layers = len(group.writers) + len(group.readers) + len(group.depthwise)
            text = f"{channels} to {width} channels between {layers} float convolutions"
            notes.append(Note(NAME, group.writers[0].name, text))
        model.sweep()
        return notes


def _groups(model: Model) -> list[_Group]:
    """All sets of tensors that widen together, in the order of the nodes that make them."""
    sets = DisjointSets()
    tensors: dict[int, gs.Tensor] = {}
    nodes = [n for n in model.nodes("Conv", *UNARY, *WHOLE, *BINARY) if n.outputs]
    for node in nodes:
        ends = [node.outputs[0], *_through(node)]
        for tensor in ends:
            tensors[id(tensor)] = tensor
            sets.join(id(tensor), id(ends[0]))
    groups: dict[int, _Group] = {}
    for key, tensor in tensors.items():
        group = groups.setdefault(sets.find(key), _Group())
        group.tensors.append(tensor)
        group.is_closed &= _is_made(tensor) and not model.is_output(tensor)
        for node, _ in readers(tensor):
            if _is_dense(node):
                group.readers.append(node)
            elif not any(t is tensor for t in _through(node)):
                group.is_closed = False
    for node in nodes:
        group = groups[sets.find(id(node.outputs[0]))]
        if _is_dense(node):
            group.writers.append(node)
        else:
            (group.depthwise if node.op == "Conv" else group.others).append(node)
    return [g for g in groups.values() if g.is_closed]


def _is_plain(node: gs.Node) -> bool:
    """Whether it is a convolution of images with float constants."""
    weights = [t for t in node.inputs[1:] if t.name]
    return (
        node.op == "Conv"
        and not node.domain
        and all(isinstance(t, gs.Constant) and t.dtype == np.float32 for t in weights)
        and len(weights[0].shape) == 4
    )


def _is_dense(node: gs.Node) -> bool:
    return _is_plain(node) and node.attrs.get("group", 1) == 1


def _through(node: gs.Node) -> list[gs.Tensor]:
    """The node's inputs whose channels go through it one by one; none where that is not known."""
    if node.domain or len([t for t in node.outputs if t.name]) != 1:
        return []
    if node.op == "Conv":
        channels = node.inputs[1].shape[:2] if _is_plain(node) else []
        is_depthwise = list(channels) == [node.attrs.get("group", 1), 1] and channels[0] > 1
        return [node.inputs[0]] if is_depthwise else []
    if node.op in UNARY or (node.op in WHOLE and _keeps_channels(node)):
        return [node.inputs[0]]
    if node.op not in BINARY:
        return []
    rest = [t for t in node.inputs if not (isinstance(t, gs.Constant) and prod(t.shape) == 1)]
    shapes = [[] if isinstance(t, gs.Constant) or not t.shape else t.shape for t in rest]
    channels = {s[1] if len(s) == 4 else None for s in shapes}
    return rest if len(channels) == 1 and isinstance(channels.pop(), int) else []


def _keeps_channels(node: gs.Node) -> bool:
    """Whether a Resize does, by scales that say so."""
    if node.op not in ("Resize", "Upsample"):
        return True
    if node.op == "Resize" and ("axes" in node.attrs or len(node.inputs) != 3):
        return False
    scales = values_of(node.inputs[-1])
    return scales is not None and scales.size == 4 and bool((scales[:2] == 1).all())


def _is_made(tensor: gs.Tensor) -> bool:
    """Whether a node that takes part makes the tensor."""
    node = producer(tensor)
    return node is not None and (_is_dense(node) or bool(_through(node)))


def _gain(group: _Group, channels: int, costs: Costs, sizes: Sizes) -> float:
    """Nanoseconds: layouts that are not changed, less products with zeros."""
    gain, block = 0.0, costs.block
    for node in group.others:
        ends = [*_through(node), node.outputs[0]]
        moved = ELEMENT * channels * max(map(_pixels, ends))
        if node.op in WHOLE:
            gain += moved
        elif node.op in BINARY:
            is_equal = len({str(sizes.shape(t)) for t in ends}) == 1
            # A sum is computed by the convolution, unless it broadcasts; then blocks are slower.
            gain += moved if is_equal else -moved if node.op == "Add" else 0.0
    for node in group.readers:
        gain += NODE if channels < block or channels % UNIT else 0.0
        made, taps = node.inputs[1].shape[0], prod(node.inputs[1].shape[2:])
        read, written = _pixels(node.inputs[0]), _pixels(node.outputs[0])
        if channels < block:
            gain += 0.0 if made % UNIT else (PLAIN + PLAIN_CHANNEL * made) * read
            made = rounded_up(made, block)
            mac = costs.operators["Conv"].float_mac * (1 + 0.5 * (block / made) ** 2)
            gain -= (block - channels) * made * taps * mac * written
        elif channels % UNIT:
            gain += ELEMENT * channels * read
    return gain


def _pixels(tensor: gs.Tensor) -> int:
    known = [d if isinstance(d, int) else int(PIXELS**0.5) for d in (tensor.shape or ())[2:]]
    return prod(known) if known else PIXELS


def _added_bytes(group: _Group, block: int, channels: int) -> int:
    size: int = sum(1 + prod(n.inputs[1].shape[1:]) for n in (*group.writers, *group.depthwise))
    size += sum(n.inputs[1].shape[0] * prod(n.inputs[1].shape[2:]) for n in group.readers)
    return 4 * size * (rounded_up(channels, block) - channels)


def _widen(model: Model, group: _Group, channels: int, width: int) -> None:
    """Zeros at the end of the axis of weights and biases, and the new size in the shapes."""
    more = width - channels
    for node in (*group.writers, *group.depthwise):
        for i, tensor in enumerate(node.inputs[1:], 1):
            if tensor.name:
                node.inputs[i] = _padded(model, tensor, 0, more)
    for node in group.depthwise:
        node.attrs["group"] = width
    for node in group.readers:
        node.inputs[1] = _padded(model, node.inputs[1], 1, more)
    for tensor in group.tensors:
        if tensor.shape is not None:
            tensor.shape = [tensor.shape[0], width, *tensor.shape[2:]]


def _padded(model: Model, tensor: gs.Tensor, axis: int, more: int) -> gs.Constant:
    values = np.asarray(values_of(tensor))
    ends = [(0, more if i == axis else 0) for i in range(values.ndim)]
    return model.constant(f"{tensor.name}_filled", np.pad(values, ends))
