"""Layers whose weights can make up for channels that go: what they read, and what they should give.

    s = W x + b;  y = clamp(s + other)        x: some of it goes;  other: what is added behind (a
                                              shortcut), if anything

A weight is rows [outputs, values of x]; `Reading.columns` tells the unit of each value. What the
rows are fitted to is s + other of the original: where a shortcut is off, the layer beside it makes
up for that, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Skip
from onnxq.model import Model, readers, values_of
from onnxq.numerics.patches import Lay, Patches, spacing
from onnxq.passes.grams import Layer
from onnxq.passes.layouts import Held, held_by
from onnxq.passes.ops import clamp_bounds, is_constant
from onnxq.passes.removal import Structure

FITTED = ("Conv", "Gemm", "MatMul")
Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A layer's weight as rows, the units that it reads, and where its bias is.

    columns: [K], the unit of each value of a row. bias: the node and input that hold one value an
    output, or where one can be added; None where there is none and none can be. sum: the tensor
    whose value the rows make with the bias; aim: what is to be met; beside: what is added to get
    there from the sum.
    """

    node: gs.Node
    held: Held
    lay: Lay
    columns: NDArray[np.int64]
    outputs: NDArray[np.int64]
    bias: tuple[gs.Node, int] | None
    aim: gs.Tensor
    beside: gs.Tensor | None
    clamp: tuple[float, float] | None

    @property
    def name(self) -> str:
        """The node's."""
        return str(self.node.name)

    @property
    def source(self) -> gs.Tensor:
        """What it reads."""
        return self.node.inputs[0]

    def rows(self) -> Rows:
        """The weight [outputs, values]."""
        values = np.asarray(values_of(self.node.inputs[1]), np.float32)
        return np.ascontiguousarray(self.held.rows(values))

    def weight(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows as the node has its weight."""
        made = self.held.unrolled(rows).astype(self.node.inputs[1].dtype)
        return np.ascontiguousarray(made)

    def bias_values(self) -> Rows:
        """One value an output; zeros without a bias."""
        if self.bias is not None and self.bias[1] < len(self.bias[0].inputs):
            tensor = self.bias[0].inputs[self.bias[1]]
            if tensor.name:
                return np.asarray(values_of(tensor), np.float32).reshape(-1)
        return np.zeros(len(self.outputs), np.float32)

    def at(self, units: NDArray[np.int64]) -> NDArray[np.intp] | None:
        """The columns of each unit [units, taps]; None where it does not have as many of each."""
        order = np.argsort(self.columns, kind="stable")
        low, high = (
            np.searchsorted(self.columns[order], units, side) for side in ("left", "right")
        )
        taps = set((high - low).tolist())
        if len(taps) != 1 or 0 in taps:
            return None
        return np.asarray(order[low[:, None] + np.arange(taps.pop())], np.intp)

    def vectors(self, value: NDArray[Any], limit: int, offset: int) -> Rows:
        """Some of what the rows are multiplied with, in one sample's tensor: [count, K]."""
        return np.asarray(self.lay.of(value, limit, offset)[0][0])

    def results(self, value: NDArray[Any], source: Sequence[int], limit: int, offset: int) -> Rows:
        """The values [count, outputs] of a tensor where `vectors` has those of the source."""
        is_image = isinstance(self.lay, Patches)
        rows = np.moveaxis(value, 1, -1) if is_image else value
        rows = rows.reshape(-1, rows.shape[-1])
        line = value.shape[-1] if is_image else source[-1]
        step = spacing(len(rows), limit, line)
        return np.ascontiguousarray(rows[offset % step :: step], np.float32)


def readings(model: Model, found: Structure) -> Iterator[Reading]:
    """All layers that can be fitted, in graph order."""
    place = {id(node): i for i, node in enumerate(model.graph.nodes)}
    layers = [v for v in found.layers if v.node.op in FITTED and id(v.node) in place]
    for layer in sorted(layers, key=lambda v: place[id(v.node)]):
        node = layer.node
        if layer.index != 1 or layer.inputs.shape[0] != 1:
            continue  # grouped: each group would have covariances of its own
        held = next((h for h in held_by(node) if h.index == 1), None)
        try:
            if held is None or not _is_own(node):
                continue
            lay = Layer.of(model, node, held).lay
        except Skip:
            continue
        columns = np.repeat(layer.inputs[0], held.length // layer.inputs.shape[1])
        outputs = layer.outputs.reshape(-1)
        bias, made = _bias(node, len(outputs))
        aim, beside = _aim(model, made)
        yield Reading(node, held, lay, columns, outputs, bias, aim, beside, _clamp(model, aim))


def _is_own(node: gs.Node) -> bool:
    """Whether the weight can be changed for this node alone."""
    weight = node.inputs[1]
    plain = all(float(node.attrs.get(a, 1.0)) == 1 for a in ("alpha", "beta"))
    return (
        plain
        and not node.attrs.get("transA", 0)
        and is_constant(weight)
        and len(weight.outputs) == 1
        and weight.dtype in (np.float32, np.float64)
        and bool(np.isfinite(np.asarray(values_of(weight))).all())
    )


def _bias(node: gs.Node, outputs: int) -> tuple[tuple[gs.Node, int] | None, gs.Tensor]:
    """Where the bias is or can be, and the tensor behind it."""
    made = node.outputs[0]
    if node.op in ("Conv", "Gemm"):
        if len(node.inputs) < 3 or not node.inputs[2].name:
            return (node, 2), made
        return ((node, 2) if _is_row(node.inputs[2], outputs) else None), made
    found = _readers(made)
    if len(found) == 1 and found[0][0].op == "Add":
        add, index = found[0]
        if _is_row(add.inputs[1 - index], outputs):
            return (add, 1 - index), add.outputs[0]
    return None, made


def _readers(tensor: gs.Tensor) -> list[tuple[gs.Node, int]]:
    return list(readers(tensor))


def _is_row(tensor: gs.Tensor, outputs: int) -> bool:
    values = values_of(tensor)
    return (
        values is not None
        and values.size == outputs
        and values.shape[-1] == outputs
        and values.dtype.kind == "f"
    )


def _aim(model: Model, made: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor | None]:
    """What is to be met, and what is added to get there: through one Add of two activations."""
    found = _readers(made)
    if model.is_output(made) or len(found) != 1 or found[0][0].op != "Add":
        return made, None
    add, index = found[0]
    other = add.inputs[1 - index]
    same = (
        made.shape is not None and other.shape is not None and len(made.shape) == len(other.shape)
    )
    if is_constant(other) or other is made or not same or made.shape[1:] != other.shape[1:]:
        return made, None
    return add.outputs[0], other


def _clamp(model: Model, aim: gs.Tensor) -> tuple[float, float] | None:
    found = _readers(aim)
    if model.is_output(aim) or len(found) != 1 or found[0][0].op not in ("Relu", "Clip"):
        return None
    return clamp_bounds(found[0][0])
