"""What is known of sizes: shapes with symbols for free axes, and small integer tensors' values.

onnx's shape inference forgets which free axis is which. Here every axis of every tensor has a size,
a number or a symbol; equal symbols are equal sizes in every run. Integers computed from sizes
(Shape, Gather, Concat ...) are followed element by element, so that it is known that a Reshape
goes to [batch, 50, 96]. Symbols stand for sizes, which are never negative.

Where the model names free axes of its inputs, equal names are equal sizes, as the format says;
but not a name that occurs twice in one shape, which is how placeholders ("None") look.
"""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.graphs import bodies_of
from onnxq.model import Model, producer, values_of
from onnxq.passes.shape_rules import shape_rule
from onnxq.passes.size_algebra import Known, Shape, Size, symbol
from onnxq.passes.value_rules import INTEGERS, LONGEST, VALUES


class Sizes:
    """Sizes of all tensors of a model as it is now; to be made anew after edits."""

    def __init__(self, model: Model) -> None:
        self._shapes: dict[int, Shape] = {}
        self._values: dict[int, Known] = {}
        self._keep: list[gs.Tensor] = []  # an id is good while its tensor lives
        for tensor in model.graph.inputs:
            self._name(tensor)
        self._walk(model.graph)

    def shape(self, tensor: gs.Tensor) -> Shape | None:
        """The tensor's shape; None when not even its rank is known."""
        if isinstance(tensor, gs.Constant):
            return [int(d) for d in tensor.shape]
        if id(tensor) not in self._shapes and tensor.name and tensor.shape is not None:
            self._set(tensor, [_size(tensor, i, d) for i, d in enumerate(tensor.shape)])
        return self._shapes.get(id(tensor))

    def values(self, tensor: gs.Tensor) -> Known | None:
        """The elements of an integer tensor of rank 0 or 1; None when nothing is known of them."""
        if id(tensor) in self._values:
            return self._values[id(tensor)]
        if not tensor.name or tensor.dtype is None or tensor.dtype not in INTEGERS:
            return None
        if tensor.shape is None or len(tensor.shape) > 1:
            return None
        if isinstance(tensor, gs.Constant) and prod(tensor.shape) > LONGEST:
            return None
        found = values_of(tensor)
        if found is None or found.size > LONGEST:
            return None
        return [int(v) for v in found.reshape(-1)]

    def _name(self, tensor: gs.Tensor) -> None:
        if tensor.shape is None:
            return
        shape = list(tensor.shape)
        self._set(
            tensor,
            [
                symbol(d) if isinstance(d, str) and shape.count(d) == 1 else _size(tensor, i, d)
                for i, d in enumerate(shape)
            ],
        )

    def _set(self, tensor: gs.Tensor, shape: Shape) -> None:
        self._shapes[id(tensor)] = shape
        self._keep.append(tensor)

    def _walk(self, graph: gs.Graph) -> None:
        for node in graph.nodes:
            for body in bodies_of(node):
                self._walk(body)
            if not node.domain and node.outputs and node.inputs:
                self._infer(node)

    def _infer(self, node: gs.Node) -> None:
        out = node.outputs[0]
        shapes = [self.shape(t) if t.name else None for t in node.inputs]
        rule = shape_rule(node)
        found = rule(self, node, shapes) if rule is not None else None
        for made in node.outputs if node.op == "Split" else [out]:
            if found is not None and (made.shape is None or len(made.shape) == len(found)):
                own = [_size(made, i, d) for i, d in enumerate(made.shape or [None] * len(found))]
                pairs = zip(found, own, strict=True)
                self._set(made, [b if a is None or isinstance(b, int) else a for a, b in pairs])
        if (value := VALUES.get(node.op)) is not None:
            known = value(self, node)
            known = None if known is None else _without_overflow(known, out)
            if known is not None and len(known) <= LONGEST and any(k is not None for k in known):
                self._values[id(out)] = known
                self._keep.append(out)


def _size(tensor: gs.Tensor, axis: int, dim: int | str | None) -> Size:
    """A number, or a symbol that no other axis has."""
    return int(dim) if isinstance(dim, int) and dim >= 0 else f"?{id(tensor)}.{axis}"


def _without_overflow(known: Known, tensor: gs.Tensor) -> Known:
    """Elements as they are, but nothing is known of numbers that the tensor's type cannot hold."""
    kind = np.dtype(np.int64 if tensor.dtype is None else tensor.dtype)
    if kind not in INTEGERS or kind == np.dtype(bool):
        return known
    limits = np.iinfo(kind)
    return [None if isinstance(k, int) and not limits.min <= k <= limits.max else k for k in known]


def shape_nodes_behind(tensor: gs.Tensor) -> list[gs.Node]:
    """The Shape nodes that an integer tensor is computed from."""
    found, todo, seen = [], [tensor], set[int]()
    while todo:
        node = producer(todo.pop())
        if node is None or id(node) in seen or node.domain:
            continue
        seen.add(id(node))
        if node.op == "Shape":
            found.append(node)
        elif node.op in VALUES:
            todo.extend(node.inputs)
    return found


def array_of(known: Known, like: gs.Tensor) -> np.ndarray:
    """Known elements as an array of a tensor's type and rank."""
    values = np.array(known, like.dtype)
    return values.reshape(()) if like.shape is not None and len(like.shape) == 0 else values
