"""Fill up the channels of integer convolutions to what the target's fast kernel takes.

    q[n,3,h,w] -> Conv(W[16,3,3,3])     =>    Pad(q)[n,4,h,w] -> Conv(W'[16,4,3,3])
    Conv(W[3,16,3,3]) -> q[n,3,h,w]     =>    Conv(W'[16,16,3,3]) -> Slice(q')[n,3,h,w]

The further weights are zero, so that nothing else changes, to the bit. Tensors that channels go
through one by one (depthwise convolutions, pooling, elementwise operators) are widened together;
where convolutions are on both ends no Pad and no Slice is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Note
from onnxq.disjoint import DisjointSets
from onnxq.model import Model, producer, readers, values_of
from onnxq.passes.costs import rounded_up
from onnxq.passes.ops import is_constant
from onnxq.targets import Costs, Target
from onnxq.weights import bytes_in

NAME = "widen_channels"
# Operators that treat each channel on its own, as many going in as coming out.
UNARY = frozenset(("MaxPool", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"))
BINARY = frozenset(("Add", "Mul"))
# What Pad and Slice cost, and what a fast convolution does at least (see ort-cpu.toml), in ns.
EDGE_NODE, EDGE_ELEMENT, FAST_POSITION = 1500.0, 0.3, 4.0
# Pixels where the size is not known.
PIXELS = 1024
# Share of all bytes of weights that the zeros may add.
GROWTH = 0.04


@dataclass(slots=True)
class _Group:
    """Integer tensors of equally many channels that only widen together.

    made: by a convolution or by another of them; taken: made elsewhere, padded if anything.
    """

    made: list[gs.Tensor] = field(default_factory=list)
    taken: list[gs.Tensor] = field(default_factory=list)
    writers: list[gs.Node] = field(default_factory=list)
    readers: list[gs.Node] = field(default_factory=list)
    depthwise: list[gs.Node] = field(default_factory=list)

    def channels(self) -> int | None:
        """Of all its tensors; None where the convolutions do not agree."""
        counts: set[int] = {n.inputs[1].shape[0] for n in (*self.writers, *self.depthwise)}
        counts |= {n.inputs[1].shape[1] for n in self.readers}
        return counts.pop() if len(counts) == 1 else None


@dataclass(frozen=True, slots=True)
class WidenChannels:
    """Where the target has such a kernel, and the zeros stay a small share of the file."""

    target: Target

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Widen in place; a note for each group of tensors."""
        costs = self.target.costs
        if costs is None or model.opset < 13:
            return []
        model.infer_shapes()
        net = _Net(model)
        room = GROWTH * sum(
            bytes_in(t) for t in model.graph.tensors().values() if isinstance(t, gs.Constant)
        )
        notes = []
        for group in net.groups():
            channels = group.channels()
            if channels is None or any(map(model.is_output, group.made)):
                continue
            width = _width(group, channels, costs)
            added = _added_bytes(group, width - channels)
            if width == channels or added > room or not net.pays(group, width):
                continue
            room -= added
            net.widen(group, channels, width)
            first = (*group.writers, *group.readers, *group.depthwise)[0]
            layers = len(group.writers) + len(group.readers) + len(group.depthwise)
            text = f"{channels} to {width} channels between {layers} integer convolutions"
            notes.append(Note(NAME, first.name, text))
        model.sweep()
        return notes


def _width(group: _Group, channels: int, costs: Costs) -> int:
    width = channels
    if group.writers:
        width = max(width, costs.output_lanes)
    if group.readers:
        width = rounded_up(width, costs.input_lanes)
    if group.depthwise:
        width = rounded_up(width, costs.depthwise_lanes)
    return width


def _added_bytes(group: _Group, more: int) -> int:
    size: int = sum(prod(n.inputs[1].shape[1:]) for n in (*group.writers, *group.depthwise))
    size += sum(n.inputs[1].shape[0] * prod(n.inputs[1].shape[2:]) for n in group.readers)
    return size * more


class _Net:
    """What the integers of a model in Q/DQ form go through."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.units: dict[int, gs.Node] = {}  # integer nodes, by id
        self.source: dict[int, gs.Node] = {}  # tensor id -> the integer node that makes it
        self.tensors: dict[int, gs.Tensor] = {}
        quantizes = [n for n in model.nodes("QuantizeLinear") if _has_one_scale(n)]
        self.tensors.update((id(t), t) for n in quantizes for t in n.outputs)
        for pool in model.nodes("MaxPool"):
            if id(pool.inputs[0]) in self.tensors and len(pool.outputs) == 1:
                self.units[id(pool)] = self.source[id(pool.outputs[0])] = pool
                self.tensors[id(pool.outputs[0])] = pool.outputs[0]
        for quantize in quantizes:
            unit = _unit(model, quantize)
            # Through others than dense convolutions channels go one by one: all must be known here.
            if unit is not None and (
                _is_dense(unit) or all(id(t) in self.tensors for t in _integers(unit))
            ):
                self.units[id(unit)] = self.source[id(quantize.outputs[0])] = unit

    def groups(self) -> list[_Group]:
        """All sets of tensors that widen together."""
        sets = DisjointSets()
        for key, node in self.source.items():
            if not _is_dense(node):
                for tensor in _integers(node):
                    sets.join(id(tensor), key)
        groups: dict[int, _Group] = {}
        for key, tensor in self.tensors.items():
            group = groups.setdefault(sets.find(key), _Group())
            maker = self.source.get(key)
            (group.taken if maker is None else group.made).append(tensor)
            if maker is not None and maker.op == "Conv":
                (group.writers if _is_dense(maker) else group.depthwise).append(maker)
            group.readers += [n for n in self.internal(tensor) if _is_dense(n)]
        return [g for g in groups.values() if g.writers or g.readers or g.depthwise]

    def internal(self, tensor: gs.Tensor) -> Iterator[gs.Node]:
        """Integer nodes that read the tensor."""
        for node in tensor.outputs:
            if id(node) in self.units:
                yield node
            elif node.op == "DequantizeLinear":
                yield from (n for n in node.outputs[0].outputs if id(n) in self.units)

    def is_inside(self, node: gs.Node) -> bool:
        """Whether integer nodes alone read what the DequantizeLinear makes."""
        result = node.outputs[0]
        outside = self.model.is_output(result) or not result.outputs
        return not outside and all(id(n) in self.units for n in result.outputs)

    def pays(self, group: _Group, width: int) -> bool:
        """Whether the convolutions gain more than Pad and Slice cost."""
        gain = sum(
            FAST_POSITION * prod(n.inputs[1].shape[2:]) * _pixels(n.outputs[0])
            for n in (*group.writers, *group.readers, *group.depthwise)
        )
        edges = [t for t in group.taken if any(True for _ in self.internal(t))]
        edges += [t for t in group.made if self.outside(t)]
        loss = sum(EDGE_NODE + EDGE_ELEMENT * width * _pixels(t) for t in edges)
        return bool(gain > loss)

    def outside(self, tensor: gs.Tensor) -> list[gs.Node]:
        """What reads the tensor and is no integer node: operators, or DequantizeLinear for them."""
        return [
            n
            for n in tensor.outputs
            if id(n) not in self.units and not (n.op == "DequantizeLinear" and self.is_inside(n))
        ]

    def widen(self, group: _Group, channels: int, width: int) -> None:
        """Edit the layers, and what stands where the group ends."""
        more = width - channels
        for node in (*group.writers, *group.depthwise):
            _grow(self.model, node, 0, more)
        for node in group.depthwise:
            node.attrs["group"] = width
        for node in {id(n): n for n in group.readers}.values():
            _grow(self.model, node, 1, more)
        for tensor in group.taken:
            self.pad(tensor, more)
        for tensor in group.made:
            self.slice(tensor, channels)
            self.reshape(tensor, width)

    def split(self, tensor: gs.Tensor) -> list[tuple[gs.Node, int]]:
        """Readers of the tensor that are, or are for, integer nodes only: others get their own."""
        inside = []
        for node, i in list(readers(tensor)):
            if node.op == "DequantizeLinear" and not self.is_inside(node):
                mine = [(n, j) for n, j in readers(node.outputs[0]) if id(n) in self.units]
                if mine:
                    copy = self.model.emit(
                        "DequantizeLinear", *node.inputs, name=node.outputs[0].name,
                        like=node.outputs[0], at=node, **node.attrs,
                    )  # fmt: skip
                    for n, j in mine:
                        n.inputs[j] = copy
                    inside.append((copy.inputs[0], i))
            elif id(node) in self.units or node.op == "DequantizeLinear":
                inside.append((node, i))
        return inside

    def pad(self, tensor: gs.Tensor, more: int) -> None:
        """Further channels of zeros for the integer nodes that read the tensor."""
        inside = self.split(tensor)
        if not inside:
            return
        zero = producer(tensor).inputs[2]  # type: ignore[union-attr]
        rank = len(tensor.shape)
        ends = np.zeros(2 * rank, np.int64)
        ends[rank + 1] = more
        shape = list(tensor.shape)
        shape[1] += more
        wide = self.model.emit(
            "Pad", tensor, self.model.constant(f"{tensor.name}_ends", ends), zero,
            name=f"{tensor.name}_wide", dtype=tensor.dtype, shape=shape, at=producer(tensor),
        )  # fmt: skip
        for node, i in inside:
            node.inputs[i] = wide
            if node.op == "DequantizeLinear":
                node.outputs[0].shape = shape

    def slice(self, tensor: gs.Tensor, channels: int) -> None:
        """The channels that there were, for whatever else reads the tensor."""
        inside = {id(n) for n, _ in self.split(tensor)}
        outside = [(n, i) for n, i in readers(tensor) if id(n) not in inside]
        if not outside:
            return
        numbers = [
            self.model.constant(f"{tensor.name}_{what}", np.array([value], np.int64))
            for what, value in (("start", 0), ("end", channels), ("axis", 1))
        ]
        narrow = self.model.emit(
            "Slice", tensor, *numbers, name=f"{tensor.name}_narrow", like=tensor,
            at=producer(tensor),
        )  # fmt: skip
        for node, i in outside:
            node.inputs[i] = narrow

    def reshape(self, tensor: gs.Tensor, width: int) -> None:
        """Say so in the shapes of the tensor and of the floats around it."""
        maker = self.source[id(tensor)]
        touched = [tensor, *maker.outputs]
        if (quantize := producer(tensor)) is not maker and quantize is not None:
            touched.append(quantize.inputs[0])
        touched += [n.outputs[0] for n, _ in self.split(tensor) if n.op == "DequantizeLinear"]
        for t in touched:
            if t.shape is not None:
                t.shape = [t.shape[0], width, *t.shape[2:]]


def _has_one_scale(quantize: gs.Node) -> bool:
    """Whether scale and zero point are stated, for all channels alike."""
    scale = values_of(quantize.inputs[1])
    return len(quantize.inputs) > 2 and scale is not None and scale.ndim == 0


def _unit(model: Model, quantize: gs.Node) -> gs.Node | None:
    """The integer node in front of a QuantizeLinear."""
    tensor = quantize.inputs[0]
    node = producer(tensor)
    if node is None or len(tensor.outputs) != 1 or model.is_output(tensor):
        return None
    data = _integers(node)
    if not data or any(t.shape is None or len(t.shape) < 3 for t in (*data, tensor)):
        return None
    if node.op == "Conv":
        return node if _is_spread(node) and all(map(_can_grow, node.inputs[1:])) else None
    if node.op in UNARY and len(data) == 1:
        return node
    is_binary = node.op in BINARY and len(data) == 2
    same = {(len(t.shape), t.shape[1]) for t in (*data, tensor)}
    return node if is_binary and len(same) == 1 and tensor.shape[1] != 1 else None


def _can_grow(tensor: gs.Tensor) -> bool:
    """Whether a weight or bias is dequantized from constants, with scales of output channels."""
    dequantize = producer(tensor)
    if dequantize is None or dequantize.op != "DequantizeLinear":
        return bool(len(tensor.shape or ()) < 2 and (not tensor.name or is_constant(tensor)))
    rank, scale = len(tensor.shape or ()), values_of(dequantize.inputs[1])
    if scale is None or not all(map(is_constant, dequantize.inputs)):
        return False
    return scale.ndim == 0 or (scale.ndim == 1 and dequantize.attrs.get("axis", 1) in (0, -rank))


def _integers(node: gs.Node) -> list[gs.Tensor]:
    """The integer tensors that the node works on."""
    if node.inputs and node.inputs[0].dtype in (np.uint8, np.int8):
        return [node.inputs[0]]
    found = []
    for tensor in node.inputs[: 1 if node.op == "Conv" else 2]:
        before = producer(tensor)
        if before is not None and before.op == "DequantizeLinear":
            integers = before.inputs[0]
            if not isinstance(integers, gs.Constant):
                found.append(integers)
    return found


def _is_dense(node: gs.Node) -> bool:
    return bool(node.op == "Conv" and node.attrs.get("group", 1) == 1)


def _is_spread(node: gs.Node) -> bool:
    """Whether each output channel reads all inputs, or one of its own."""
    group, weight = node.attrs.get("group", 1), node.inputs[1].shape
    return bool(weight is not None and (group == 1 or (weight[1] == 1 and weight[0] == group)))


def _pixels(tensor: gs.Tensor) -> float:
    sizes = tensor.shape[2:] if tensor.shape is not None else (PIXELS,)
    return prod(d if isinstance(d, int) else int(PIXELS ** (1 / len(sizes))) for d in sizes)


def _grow(model: Model, node: gs.Node, axis: int, more: int) -> None:
    """Zeros at the end of an axis of the convolution's weight; bias and scales go with outputs."""
    node.inputs[1] = _grown(model, node.inputs[1], axis, more)
    if axis == 0 and len(node.inputs) > 2 and node.inputs[2].name:
        node.inputs[2] = _grown(model, node.inputs[2], 0, more)


def _grown(model: Model, tensor: gs.Tensor, axis: int, more: int) -> gs.Tensor:
    dequantize = producer(tensor)
    if dequantize is None or dequantize.op != "DequantizeLinear":
        return model.constant(f"{tensor.name}_wide", _padded(tensor, axis, more, "constant"))
    integers, *params = dequantize.inputs
    zero = np.asarray(values_of(params[1])) if len(params) > 1 else np.zeros((), np.int8)
    q = np.asarray(values_of(integers))
    zero = zero.reshape(-1, *[1] * (q.ndim - 1)) if zero.ndim else zero
    shifted = np.pad(q.astype(np.int64) - zero, _ends(q.ndim, axis, more))
    if axis == 0:
        params = [
            model.constant(f"{p.name}_wide", _padded(p, 0, more, "edge")) if p.shape else p
            for p in params
        ]
        if zero.ndim:
            zero = np.pad(zero, _ends(zero.ndim, 0, more), "edge")
    wide = model.constant(f"{integers.name}_wide", (shifted + zero).astype(q.dtype))
    shape = list(wide.shape)
    return model.emit(
        "DequantizeLinear", wide, *params, name=f"{tensor.name}_wide", dtype=tensor.dtype,
        shape=shape, at=dequantize, **dequantize.attrs,
    )  # fmt: skip


def _padded(
    tensor: gs.Tensor, axis: int, more: int, mode: Literal["constant", "edge"]
) -> NDArray[Any]:
    values = np.asarray(values_of(tensor))
    return np.asarray(np.pad(values, _ends(values.ndim, axis, more), mode))


def _ends(rank: int, axis: int, more: int) -> list[tuple[int, int]]:
    return [(0, more if i == axis else 0) for i in range(rank)]
