"""Compute once what is computed twice.

    u = f(x, 1)    v = f(x, 1)    =>    u = f(x, 1), and what read v reads u

Equal are nodes of the same operator, attributes and inputs, in one graph. Operators that draw
random numbers, and those with bodies, are left alone; so is what unpacks quantized values, which
runtimes look for in front of every reader.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Note
from onnxq.model import Model, values_of

NAME = "share_nodes"
NEVER = frozenset(
    (
        "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli "
        "Dropout Constant QuantizeLinear DequantizeLinear DynamicQuantizeLinear"
    ).split()
)
SMALL = 64  # bytes: constants up to that are compared by value (larger ones are shared already)


class ShareNodes:
    """All graphs, bodies included, each for itself; a pass without options."""

    name = NAME

    def __repr__(self) -> str:
        return NAME

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Share in place; a note for each node that went."""
        notes = []
        for graph in model.graphs():
            first: dict[Hashable, gs.Node] = {}
            for node in list(graph.nodes):  # in order: what made the inputs has been shared
                key = _key(node)
                twin = node if key is None else first.setdefault(key, node)
                if twin is not node and not any(model.is_output(t) for t in node.outputs):
                    for old, new in zip(node.outputs[:], twin.outputs, strict=True):
                        if old.name:
                            model.replace(old, new)
                    notes.append(Note(NAME, node.name, f"the same as {twin.name}"))
        if notes:
            model.sweep()
        return notes


def _key(node: gs.Node) -> Hashable | None:
    """What equal nodes have in common; None for those that are not shared."""
    if node.domain or node.op in NEVER or not node.outputs or not node.inputs:
        return None
    attributes = []
    for name, value in sorted(node.attrs.items()):
        if not isinstance(value, (int, float, str, bytes, list, tuple)):
            return None
        if isinstance(value, (list, tuple)):
            if any(isinstance(v, gs.Graph) for v in value):
                return None
            value = (list, *value)
        attributes.append((name, value))
    used = tuple(bool(t.name) for t in node.outputs)
    return (node.op, used, tuple(attributes), *(_identity(t) for t in node.inputs))


def _identity(tensor: gs.Tensor) -> Any:
    if not tensor.name:
        return ""
    if isinstance(tensor, gs.Constant):
        values = values_of(tensor) if np.prod(tensor.shape) <= SMALL else None
        if values is not None and values.nbytes <= SMALL and values.dtype.kind != "O":
            return str(values.dtype), values.shape, values.tobytes()
    return id(tensor)


share_nodes = ShareNodes()
