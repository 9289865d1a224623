"""A tensor by itself: who makes it, who reads it, its values if it is constant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.graphs import DEFAULT_DOMAIN
from onnxq.weights import values_in


def index_of(tensors: Sequence[gs.Tensor], tensor: gs.Tensor) -> int:
    """The place of this very tensor."""
    return next(i for i, t in enumerate(tensors) if t is tensor)


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that makes the tensor; None for inputs, constants and omitted inputs."""
    return tensor.inputs[0] if tensor.inputs else None


def values_of(tensor: gs.Tensor) -> NDArray[Any] | None:
    """The tensor's values if it is a constant (initializer or Constant node), else None.

    Values stored in a file are read every time, and read-only: hold them only while you use them.
    Raises ModelError when the stored data do not fit their shape.
    """
    if isinstance(tensor, gs.Constant):
        return values_in(tensor)
    node = producer(tensor)
    if node is None or node.op != "Constant" or node.domain not in DEFAULT_DOMAIN:
        return None
    for key, value in node.attrs.items():
        if isinstance(value, gs.Constant):
            return values_in(value)
        if isinstance(value, np.ndarray):
            return value
        if key in _CONSTANT_DTYPES:
            return np.array(value, _CONSTANT_DTYPES[key])
    return None


_CONSTANT_DTYPES: dict[str, Any] = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_string": object,
    "value_strings": object,
}


def readers(tensor: gs.Tensor) -> Iterator[tuple[gs.Node, int]]:
    """Each (node, input index) that reads the tensor."""
    for node in {id(n): n for n in tensor.outputs}.values():
        for i, t in enumerate(node.inputs):
            if t is tensor:
                yield node, i


def redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let all readers of `old` read `new`."""
    for node, i in list(readers(old)):
        node.inputs[i] = new
