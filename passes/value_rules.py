"""How operators make integers of sizes: one rule an operator, a table (see sizes.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.passes.size_algebra import Known, Size, product

if TYPE_CHECKING:
    from onnxq.passes.sizes import Sizes

LONGEST = 64  # elements of integer tensors that are followed
INTEGERS = (np.dtype(np.int64), np.dtype(np.int32), np.dtype(bool))


def _value_shape(sizes: Sizes, node: gs.Node) -> Known | None:
    shape = sizes.shape(node.inputs[0])
    if shape is None:
        return None
    return [*shape[node.attrs.get("start", 0) : node.attrs.get("end", None)]]


def _value_size(sizes: Sizes, node: gs.Node) -> Known | None:
    shape = sizes.shape(node.inputs[0])
    return [product(shape)] if shape is not None else None


def _value_gather(sizes: Sizes, node: gs.Node) -> Known | None:
    data, indices = sizes.values(node.inputs[0]), sizes.values(node.inputs[1])
    if data is None or indices is None or len(sizes.shape(node.inputs[0]) or ()) != 1:
        return None
    if any(not isinstance(i, int) or not -len(data) <= i < len(data) for i in indices):
        return None
    return [data[i] for i in indices if isinstance(i, int)]


def _value_slice(sizes: Sizes, node: gs.Node) -> Known | None:
    data = sizes.values(node.inputs[0])
    if data is None or len(sizes.shape(node.inputs[0]) or ()) != 1:
        return None
    if len(node.inputs) == 1:
        bounds = [node.attrs["starts"], node.attrs["ends"], [1]]
    else:
        bounds = [sizes.values(t) for t in node.inputs[1:3]]
        bounds.append(sizes.values(node.inputs[4]) if len(node.inputs) > 4 else [1])
    if any(b is None or len(b) != 1 or not isinstance(b[0], int) for b in bounds):
        return None
    return data[slice(*(b[0] for b in bounds))]


def _value_concat(sizes: Sizes, node: gs.Node) -> Known | None:
    result: Known = []
    for tensor in node.inputs:
        part = sizes.values(tensor)
        if part is None:
            shape = sizes.shape(tensor)
            if shape is None or len(shape) != 1 or not isinstance(shape[0], int):
                return None
            part = [None] * shape[0]
        result += part
    return result


def _value_same(sizes: Sizes, node: gs.Node) -> Known | None:
    """Identity, Squeeze, Unsqueeze and Reshape, where the result still has at most one axis."""
    shape = sizes.shape(node.outputs[0])
    return None if shape is None or len(shape) > 1 else sizes.values(node.inputs[0])


def _value_cast(sizes: Sizes, node: gs.Node) -> Known | None:
    values = sizes.values(node.inputs[0])
    dtype = node.outputs[0].dtype
    if values is None or dtype is None or np.dtype(dtype) not in INTEGERS:
        return None
    if np.dtype(dtype) == np.dtype(bool):
        return [int(v != 0) if isinstance(v, int) else None for v in values]
    return values


def _value_binary(sizes: Sizes, node: gs.Node) -> Known | None:
    parts = [sizes.values(t) or _unknown(sizes, t) for t in node.inputs]
    if any(p is None for p in parts):
        return None
    lists = [p for p in parts if p is not None]
    length = max(map(len, lists))
    if any(len(p) not in (1, length) for p in lists):
        return None
    rows = [[p[i if len(p) > 1 else 0] for p in lists] for i in range(length)]
    return [ARITHMETIC[node.op](*row) for row in rows]


def _unknown(sizes: Sizes, tensor: gs.Tensor) -> Known | None:
    """As many elements as there are, none of them known: 0 times any integer is 0."""
    shape = sizes.shape(tensor)
    count = None if shape is None or len(shape) > 1 else product(shape)
    return [None] * count if isinstance(count, int) and 0 < count <= LONGEST else None


Element = Size | None


def _add(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return b if a == 0 else a if b == 0 else None


def _sub(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    return a if b == 0 else None


def _mul(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    if a == 0 or b == 0:
        return 0
    if a is None or b is None or any(isinstance(v, int) and v < 0 for v in (a, b)):
        return None
    return product([a, b])


def _div(a: Element, b: Element) -> Element:
    if b == 1:
        return a
    if isinstance(a, int) and isinstance(b, int) and b > 0 and a >= 0:
        return a // b
    return None


def _equal(a: Element, b: Element) -> Element:
    if a is None or b is None:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return int(a == b)
    if a == b:
        return 1
    return 0 if any(isinstance(v, int) and v < 0 for v in (a, b)) else None


def _where(condition: Element, a: Element, b: Element) -> Element:
    if not isinstance(condition, int):
        return a if a == b else None
    return a if condition else b


def _not(a: Element) -> Element:
    return int(not a) if isinstance(a, int) else None


ARITHMETIC: dict[str, Callable[..., Element]] = {
    "Add": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
    "Equal": _equal,
    "Where": _where,
    "Not": _not,
}
VALUES: dict[str, Callable[[Sizes, gs.Node], Known | None]] = {
    "Shape": _value_shape,
    "Size": _value_size,
    "Gather": _value_gather,
    "Slice": _value_slice,
    "Concat": _value_concat,
    "Identity": _value_same,
    "Squeeze": _value_same,
    "Unsqueeze": _value_same,
    "Reshape": _value_same,
    "Cast": _value_cast,
    **dict.fromkeys(ARITHMETIC, _value_binary),
}
