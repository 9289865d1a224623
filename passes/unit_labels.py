"""Labels on the channels of tensors: what carries one label is removed together.

A tensor's labels are along one axis (the channels of a convolution), or along several where
channels were folded up: [batch, time, heads, size] behind the Reshape of an attention. Labels that
turn out to be one are joined; labels that have to stay are held, with the reason. Label FIXED is
what nothing is known of: it always stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Skip
from onnxq.model import Model, values_of
from onnxq.passes.ops import is_constant
from onnxq.passes.size_algebra import Shape
from onnxq.passes.sizes import Sizes

FIXED = 0
MOST = 1 << 22  # labels of one tensor that are worth following
Marks = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Labels along some axes of a tensor (ascending, not negative): one dimension for each.

    What the labels become in a finished structure: units, -1 for what stays. Along an axis of free
    size, [batch * heads, time, size], they are those of the inner part, repeated.
    """

    axes: tuple[int, ...]
    labels: Marks

    def shifted(self, by: int) -> Block:
        """The labels where the tensor has more axes in front."""
        return Block(tuple(a + by for a in self.axes), self.labels)

    def over(self, axes: Sequence[int], dims: Sequence[int]) -> Marks:
        """The labels along more axes, of these sizes."""
        index = tuple(slice(None) if a in self.axes else None for a in axes)
        shape = [d if a not in self.axes else self.dim(a) for a, d in zip(axes, dims, strict=True)]
        if prod(shape) > MOST:
            raise Skip("it mixes too many channels with other axes")
        return np.broadcast_to(self.labels[index], shape)

    def dim(self, axis: int) -> int:
        """Labels along an axis."""
        return int(self.labels.shape[self.axes.index(axis)])


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A constant input that loses what the labels lose, where it is as long along the axis.

    Axes that it does not have are negative.
    """

    node: gs.Node
    index: int
    block: Block


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A weight whose rows make units, whose columns read them; labels by group.

    index: the input that holds the weight. inputs: [groups, inputs], outputs: [groups, outputs].
    The two weights of a recurrent layer are two layers: W reads what comes in, R the hidden units.
    A table (Gather) reads none: inputs [1, 1] that stay. is_depthwise: whole groups of it are
    units, of one channel (a depthwise convolution) or several: it passes them on.
    """

    node: gs.Node
    index: int
    inputs: Marks
    outputs: Marks
    is_depthwise: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Shuffle:
    """A Reshape that ends Reshape, Transpose, Reshape: channels in another order, and no more.

    y[.., i, ..] = data[.., order[i], ..] along an axis.
    """

    node: gs.Node
    data: gs.Tensor
    axis: int
    order: Marks


@dataclass(slots=True)
class Net:
    """What is known while the nodes are gone through."""

    model: Model
    sizes: Sizes
    parent: list[int] = field(default_factory=lambda: [FIXED])
    reasons: dict[int, str] = field(default_factory=lambda: {FIXED: "it is not a channel"})
    blocks: dict[int, tuple[gs.Tensor, Block]] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    shuffles: list[Shuffle] = field(default_factory=list)
    declined: dict[int, tuple[gs.Node, str]] = field(default_factory=dict)

    def new(self, count: int) -> Marks:
        """Labels that nothing else has."""
        first = len(self.parent)
        self.parent += range(first, first + count)
        return np.arange(first, first + count)

    def find(self, label: int) -> int:
        """The label that stands for all that were joined."""
        while self.parent[label] != label:
            self.parent[label] = label = self.parent[self.parent[label]]
        return label

    def roots(self, labels: Marks) -> Marks:
        """`find` for each."""
        known, index = np.unique(labels, return_inverse=True)
        found = np.array([self.find(int(v)) for v in known], np.int64)
        return found[index].reshape(labels.shape)

    def join(self, a: Marks, b: Marks, reason: str) -> None:
        """Pairs of labels become one; reason: why one has to stay that meets what stays."""
        a, b = np.broadcast_arrays(a, b)
        pairs = np.unique(np.stack([a.reshape(-1), b.reshape(-1)]), axis=1)
        for one, other in pairs.T.tolist():
            i, j = sorted((self.find(one), self.find(other)))
            if i == FIXED:  # no class of labels: each that meets it has a reason of its own
                self.reasons.setdefault(j, reason)
            elif i != j:
                self.parent[j] = i
                if j in self.reasons:
                    self.reasons.setdefault(i, self.reasons[j])

    def hold(self, labels: Marks | Block | None, reason: str) -> None:
        """These stay."""
        if labels is None:
            return
        for label in np.unique(labels.labels if isinstance(labels, Block) else labels).tolist():
            self.reasons.setdefault(self.find(label), reason)

    def of(self, tensor: gs.Tensor) -> Block | None:
        """The tensor's labels."""
        found = self.blocks.get(id(tensor))
        return None if found is None else found[1]

    def give(self, tensor: gs.Tensor, block: Block) -> None:
        """Label a tensor."""
        self.blocks[id(tensor)] = tensor, block

    def shape(self, tensor: gs.Tensor) -> Shape:
        """The tensor's sizes, numbers or symbols. Raises Skip where its rank is not known."""
        found = self.sizes.shape(tensor)
        if found is None:
            raise Skip(f"the rank of {tensor.name} is not known")
        return found

    def drop(self, block: Block | None, axis: int, reason: str) -> Block | None:
        """Let labels be the same all along an axis; held where there is no other axis."""
        if block is None or axis not in block.axes:
            return block
        at = block.axes.index(axis)
        rest = tuple(a for a in block.axes if a != axis)
        if not rest or block.labels.size == block.labels.shape[at]:
            self.hold(block, reason)
            return None
        first = block.labels.take([0], at)
        self.join(first, block.labels, reason)
        return Block(rest, first.squeeze(at))

    def only(self, block: Block | None, axes: Sequence[int], reason: str) -> Block | None:
        """Let labels be along these axes only."""
        for axis in () if block is None else block.axes:
            if axis not in axes:
                block = self.drop(block, axis, reason)
        return block

    def take(self, node: gs.Node, axis: int, size: int) -> Marks | None:
        """The labels that a layer reads along an axis; all others go together, or stay."""
        block, who = self.of(node.inputs[0]), f"{node.name} ({node.op})"
        if block is None:
            return None
        if axis not in block.axes:
            self.hold(block, f"{who} reads it along another axis")
            return None
        block = self.only(block, (axis,), f"{who} reads it along several axes")
        if block is None:
            return None
        if block.labels.size != size:
            self.hold(block, f"{who} has a weight that does not fit it")
            return None
        return block.labels

    def cut(self, node: gs.Node, index: int, block: Block) -> None:
        """A constant input goes with the labels; raises Skip where it is computed."""
        if not is_constant(node.inputs[index]):
            raise Skip(f"{node.inputs[index].name} is not constant")
        self.cuts.append(Cut(node, index, block))

    def numbers(self, tensor: gs.Tensor) -> list[int] | None:
        """Constant integers."""
        values = values_of(tensor) if tensor.name else None
        return None if values is None else [int(v) for v in values.reshape(-1)]


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """An input of an operator that broadcasts: its labels and sizes along the output's axes."""

    index: int
    tensor: gs.Tensor
    block: Block | None
    dims: Shape


def aligned(net: Net, node: gs.Node, index: int, rank: int) -> Operand:
    """An input as an elementwise operator reads it."""
    tensor = node.inputs[index]
    shape = net.shape(tensor)
    block, more = net.of(tensor), rank - len(shape)
    if more < 0:
        raise Skip(f"{tensor.name} has more axes than the result")
    return Operand(
        index, tensor, None if block is None else block.shifted(more), [*[1] * more, *shape]
    )


def merged(net: Net, node: gs.Node, operands: Sequence[Operand], out: Shape) -> Block | None:
    """Labels of a result of several operands that broadcast: joined; constants are cut.

    Where an operand has one value for all along an axis, its labels do not vary along it.
    """
    known: list[tuple[Operand, Block]] = []
    for operand in operands:
        block = operand.block
        for axis in () if block is None else block.axes:
            if operand.dims[axis] != out[axis]:
                why = f"{node.name} ({node.op}) repeats it along its channels"
                block = net.drop(block, axis, why)
        if block is not None:
            known.append((operand, block))
    if not known:
        return None
    axes = sorted({a for _, block in known for a in block.axes})
    dims = [max(block.dim(a) for _, block in known if a in block.axes) for a in axes]
    for _, block in known:
        for a, d in zip(axes, dims, strict=True):
            is_other = isinstance(out[a], int) and out[a] != d
            if is_other or (a in block.axes and block.dim(a) != d):
                raise Skip("the size of its channels is not known")
    first = net_labels = None
    for operand, block in known:
        own = [d if operand.dims[a] == out[a] else 1 for a, d in zip(axes, dims, strict=True)]
        labels = np.broadcast_to(block.over(axes, own), dims)
        if first is None:
            first = net_labels = labels
        else:
            why = f"{node.name} ({node.op}) combines it with channels that stay"
            net.join(first, labels, why)
    assert net_labels is not None
    result: Block | None = Block(tuple(axes), np.array(net_labels))
    labelled = {id(operand) for operand, _ in known}
    for operand in operands:
        if id(operand) in labelled or is_constant(operand.tensor):
            continue
        for axis in axes:
            if operand.dims[axis] != 1:
                why = f"{node.name} ({node.op}) combines it with {operand.tensor.name}, which stays"
                result = net.drop(result, axis, why)
    if result is not None:
        for operand in operands:
            if id(operand) not in labelled and any(operand.dims[a] != 1 for a in result.axes):
                more = len(operand.tensor.shape) - len(out)
                net.cut(node, operand.index, result.shifted(more))
    return result
