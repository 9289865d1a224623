"""Divide a tensor by a factor for each channel without a node: what makes it takes the factor in.

    t = LayerNormalization(x, g, b)    =>    t / s = LayerNormalization(x, g / s, b / s)
    t = Relu(x W + b)                  =>    t / s = Relu(x (W / s) + b / s)
    t = x c + d                        =>    t / s = x (c / s) + d / s

The factor goes against the flow of data, through what commutes with positive factors or only moves
data, until constants take it in: scales and biases of normalisations, weights and biases of linear
layers, tables, constant operands. A factor is an array of its tensor's rank; each axis has the
tensor's size or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Skip
from onnxq.model import Model, producer
from onnxq.packed import remembered
from onnxq.passes.activations import is_part_of_activation
from onnxq.passes.linear import LINEAR, Values, constant, only_reader, outputs_of, scaled
from onnxq.passes.ops import clamp_bounds, is_constant, pads_zero
from onnxq.passes.shape_rules import axes_of

Factor = NDArray[np.float64]

# Scale and bias of normalisations; where their channels are: the last axes, or axis 1.
LAST, SECOND = "last", "second"
NORMALISATIONS: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {
    ("", "LayerNormalization"): ((1, 2), LAST),
    ("", "RMSNormalization"): ((1,), LAST),
    ("", "SimplifiedLayerNormalization"): ((1,), LAST),
    ("com.microsoft", "SkipLayerNormalization"): ((2, 3), LAST),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): ((2,), LAST),
    ("com.microsoft", "EmbedLayerNormalization"): ((5, 6), LAST),
    ("", "BatchNormalization"): ((1, 2), SECOND),
    ("", "InstanceNormalization"): ((1, 2), SECOND),
    ("", "GroupNormalization"): ((1, 2), SECOND),
}
# They commute with a positive factor on each value, whatever their other inputs are.
COMMUTING = ("Identity", "Neg", "Relu", "LeakyRelu", "PRelu", "Dropout")
POOLS = ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool")
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True, slots=True)
class Edit:
    """A constant input of a node, and what makes its new values."""

    node: gs.Node
    index: int
    made: Callable[[], Values]

    def apply(self, model: Model) -> None:
        """Put the new constant in its place: others may read the old one."""
        old = self.node.inputs[self.index]
        self.node.inputs[self.index] = model.constant(f"{old.name}_scaled", self.made())


@dataclass(frozen=True, slots=True)
class Division:
    """What has to be edited so that a tensor is divided; takes: whether a layer may be scaled."""

    model: Model
    takes: Callable[[gs.Node], bool] = lambda _: True
    edits: list[Edit] = field(default_factory=list)

    def divide(self, tensor: gs.Tensor, factor: Factor) -> None:
        """Plan it; raises Skip, with the place that takes no factor, where it cannot be."""
        node = producer(tensor)
        if (factor == 1).all():
            return
        if is_constant(tensor):
            raise Skip(f"{tensor.name} is constant, and moved")
        if node is None or self.model.is_input(tensor):
            raise Skip(f"{tensor.name} is an input of the graph")
        if node.op != "Split" and node.outputs[0] is not tensor:
            raise Skip(f"{tensor.name} is a further output of {node.op} {node.name}")
        if tensor.name in self.model.ranges:
            raise Skip(f"{tensor.name} has a range from before")
        if tensor.shape is None or len(tensor.shape) != factor.ndim:
            raise Skip(f"the rank of {tensor.name} is not known")
        domain = node.domain or ""
        if (domain, node.op) in NORMALISATIONS:
            self._normalisation(node, factor, *NORMALISATIONS[domain, node.op])
        elif domain:
            raise Skip(f"{node.op} {node.name} takes no factor")
        elif node.op in ("Mul", "Div"):
            self._product(node, factor)
        elif node.op in ("Add", "Sub", "Sum"):
            for index in range(len(node.inputs)):
                self._operand(node, index, factor)
        elif node.op in LINEAR and is_constant(node.inputs[1]):
            self._linear(node, factor)
        elif node.op == "MatMul":
            if factor.ndim < 2 or factor.shape[-2] != 1:
                raise Skip(f"the factor differs from row to row of {node.name}")
            self._operand(node, 1, factor)
        elif node.op == "Gather":
            self._table(node, factor)
        else:
            for source, part in self._through(node, tensor, factor):
                self._follow(source, part, node)

    def apply(self) -> None:
        """Edit the model as planned."""
        for edit in self.edits:
            edit.apply(self.model)

    def _follow(self, tensor: gs.Tensor, factor: Factor, reader: gs.Node) -> None:
        """Go on at an input of a node, which has to be all that reads it."""
        if (factor == 1).all():
            return
        only_reader(self.model, tensor, reader)
        self.divide(tensor, factor)

    def _edit(self, node: gs.Node, index: int, made: Callable[[], Values]) -> None:
        tensor = node.inputs[index]
        if len(tensor.shape or ()) > 1:
            if len(tensor.outputs) > 1:
                raise Skip(f"{tensor.name} is also used elsewhere")
            if remembered(tensor) is not None:
                raise Skip(f"{tensor.name} keeps its integers")
        self.edits.append(Edit(node, index, made))

    def _constant(self, node: gs.Node, index: int, factor: Factor) -> None:
        """Divide a constant input, which the factor may make larger (one value for all)."""

        def made() -> Values:
            values = constant(node, index)
            return np.asarray((values.astype(np.float64) / factor).astype(values.dtype))

        constant(node, index)
        self._edit(node, index, made)

    def _operand(self, node: gs.Node, index: int, factor: Factor) -> None:
        """Divide an input that is broadcast to the result."""
        tensor = node.inputs[index]
        if is_constant(tensor):
            self._constant(node, index, _without_leading(factor))
            return
        shape = list(tensor.shape or ())
        part = factor[(0,) * max(0, factor.ndim - len(shape))]
        if not _fits(factor, len(shape)) or not _is_fixed(part, shape):
            raise Skip(f"{tensor.name} is one value for several channels")
        self._follow(tensor, part, node)

    def _product(self, node: gs.Node, factor: Factor) -> None:
        """One of the operands takes the factor; constants rather than others."""
        if is_part_of_activation(self.model, node):
            raise Skip(f"{node.name} is part of a Gelu, which runtimes know as one operator")
        order = [0] if node.op == "Div" else [0, 1]
        if node.op == "Div" and is_constant(node.inputs[1]):
            self._constant(node, 1, _without_leading(1 / factor))
            return
        order.sort(key=lambda i: not is_constant(node.inputs[i]))
        reasons = []
        for index in order:
            before = len(self.edits)
            try:
                self._operand(node, index, factor)
            except Skip as reason:
                del self.edits[before:]
                reasons.append(str(reason))
            else:
                return
        raise Skip(reasons[0])

    def _normalisation(
        self, node: gs.Node, factor: Factor, indices: Sequence[int], where: str
    ) -> None:
        for index in indices:
            if index >= len(node.inputs) or not node.inputs[index].name:
                continue
            if not is_constant(node.inputs[index]):
                raise Skip(f"{node.inputs[index].name} is not constant")
            part = _without_leading(factor) if where == LAST else _vector(factor, 1)
            shape = tuple(node.inputs[index].shape)
            if len(part.shape) > len(shape) or np.broadcast_shapes(part.shape, shape) != shape:
                raise Skip(f"{node.inputs[index].name} is not one value a channel")
            self._constant(node, index, part)

    def _linear(self, node: gs.Node, factor: Factor) -> None:
        """Weight and bias of a layer, by output channel."""
        if not self.takes(node):
            raise Skip(f"the weight of {node.name} has one scale for all channels")
        vector = _vector(factor, 1 if node.op in ("Conv", "ConvTranspose") else factor.ndim - 1)
        if vector.size != outputs_of(node):
            raise Skip(f"{node.name} has another number of channels")
        self._edit(node, 1, lambda: scaled(node, constant(node, 1), 1 / vector))
        if node.op != "MatMul" and len(node.inputs) > 2 and node.inputs[2].name:
            self._constant(node, 2, vector)

    def _table(self, node: gs.Node, factor: Factor) -> None:
        """Rows of a constant that are looked up."""
        table = node.inputs[0]
        if not is_constant(table) or node.attrs.get("axis", 0) != 0:
            raise Skip(f"Gather {node.name} takes no factor")
        width = len(table.shape) - 1
        if not _fits(factor, width):
            raise Skip("the factor differs from index to index")
        self._constant(node, 0, factor.reshape(factor.shape[factor.ndim - width :]))

    def _through(
        self, node: gs.Node, tensor: gs.Tensor, factor: Factor
    ) -> Iterator[tuple[gs.Tensor, Factor]]:
        """The inputs to go on at, for what commutes with the factor or moves data."""
        source = node.inputs[0] if node.inputs else tensor
        shape = list(source.shape or ())
        if node.op in COMMUTING or _commutes(node, factor, shape):
            yield source, factor
        elif node.op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"):
            axes = axes_of(node)
            if not axes or not node.attrs.get("keepdims", 1) or not shape:
                raise Skip(f"{node.op} {node.name} takes no factor")
            yield source, factor  # 1 along the reduced axes, as the result is
        elif node.op == "Transpose":
            order = node.attrs.get("perm", list(range(factor.ndim))[::-1])
            yield source, factor.transpose(np.argsort(order))
        elif node.op in RESHAPES:
            yield source, _reshaped(factor, list(tensor.shape), shape)
        elif node.op == "Concat":
            yield from _parts(node, factor)
        elif node.op == "Split":
            yield source, _whole(node, tensor, factor)
        else:
            raise Skip(f"{node.op} {node.name} takes no factor")


def multiplied(node: gs.Node, weight: Values, factor: Factor) -> Values:
    """A layer's weight with each input channel multiplied; factor is [channels]."""
    wide, behind = weight.astype(np.float64), [1] * (weight.ndim - 2)
    if node.op == "Conv":  # [outputs, inputs / group, ...]: groups are along the outputs
        group = int(node.attrs.get("group", 1))
        each = np.repeat(factor.reshape(group, -1), weight.shape[0] // group, axis=0)
        wide = wide * each.reshape(*each.shape, *behind)
    elif node.op == "ConvTranspose":
        wide = wide * factor.reshape(-1, 1, *behind)
    elif node.op == "Gemm" and node.attrs.get("transB", 0):
        wide = wide * factor
    else:
        wide = wide * factor[:, None]
    return np.asarray(wide.astype(weight.dtype))


def along(factor: NDArray[np.float64], axis: int, rank: int) -> Factor:
    """A vector as a factor of a tensor of that rank."""
    return factor.reshape([-1 if i == axis else 1 for i in range(rank)])


def _without_leading(factor: Factor) -> Factor:
    """The factor without axes of 1 before the first other."""
    first = next((i for i, n in enumerate(factor.shape) if n != 1), factor.ndim - 1)
    return factor.reshape(factor.shape[first:])


def _fits(factor: Factor, rank: int) -> bool:
    """Whether only the last axes of the factor, so many, are not 1."""
    return rank <= factor.ndim and prod(factor.shape[: factor.ndim - rank]) == 1


def _vector(factor: Factor, axis: int) -> Factor:
    """The factor as [channels]; raises Skip where it differs along other axes."""
    if factor.size != factor.shape[axis]:
        raise Skip("the factor differs along an axis that is not that of channels")
    return factor.reshape(-1)


def _commutes(node: gs.Node, factor: Factor, shape: Sequence[int | str | None]) -> bool:
    """Whether it does with a factor of this shape; shape: that of what it reads."""
    if node.op == "Clip":
        return clamp_bounds(node) == (0.0, np.inf)
    if node.op in POOLS:
        return prod(factor.shape[2:]) == 1
    return node.op == "Pad" and pads_zero(node) and _is_fixed(factor, shape)


def _is_fixed(factor: Factor, shape: Sequence[int | str | None]) -> bool:
    """Whether a tensor of that shape has as many channels as the factor."""
    return len(shape) == factor.ndim and all(
        n in (1, d) for n, d in zip(factor.shape, shape, strict=True)
    )


def _reshaped(
    factor: Factor, after: Sequence[int | str | None], before: Sequence[int | str | None]
) -> Factor:
    """The factor of what a Reshape reads: last axes of both shapes that hold the same values.

    Raises Skip where their sizes are not known or do not fit.
    """
    if factor.size == 1:
        return factor.reshape([1] * len(before))
    first = next(i for i, n in enumerate(factor.shape) if n != 1)
    sizes = [d for d in after[first:] if isinstance(d, int)]
    if len(sizes) < len(after) - first:
        raise Skip("sizes around a Reshape are not known")
    count, known = 1, list[int]()
    for size in reversed(before):
        if count == prod(sizes) or not isinstance(size, int):
            break
        known.insert(0, size)
        count *= size
    if count != prod(sizes):
        raise Skip("a Reshape mixes channels with other axes")
    part = np.broadcast_to(factor.reshape(factor.shape[first:]), sizes).reshape(known)
    for axis in range(part.ndim):  # back to 1 where nothing differs
        start = part.take([0], axis)
        part = start if (part == start).all() else part
    return part.reshape([1] * (len(before) - len(known)) + list(part.shape))


def _parts(node: gs.Node, factor: Factor) -> Iterator[tuple[gs.Tensor, Factor]]:
    """The share of each input of a Concat."""
    axis, start = node.attrs["axis"] % factor.ndim, 0
    for tensor in node.inputs:
        if factor.shape[axis] == 1:
            yield tensor, factor
            continue
        size = tensor.shape[axis] if tensor.shape is not None else None
        if not isinstance(size, int):
            raise Skip(f"the size of {tensor.name} is not known")
        yield tensor, factor.take(range(start, start + size), axis)
        start += size


def _whole(node: gs.Node, tensor: gs.Tensor, factor: Factor) -> Factor:
    """The factor of what is split: 1 for the other parts."""
    axis = node.attrs.get("axis", 0) % factor.ndim
    if factor.shape[axis] == 1:
        raise Skip(f"Split {node.name} takes no factor that is the same for its parts")
    parts = []
    for out in node.outputs:
        size = out.shape[axis] if out.shape is not None else None
        if not isinstance(size, int):
            raise Skip(f"the size of {out.name} is not known")
        ones = [size if i == axis else n for i, n in enumerate(factor.shape)]
        parts.append(factor if out is tensor else np.ones(ones))
    return np.concatenate(parts, axis)
