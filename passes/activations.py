"""Activation functions written as several operators, recognised by what they compute.

Exporters write Gelu in a dozen ways. So no forms are listed here: a region of elementwise operators
with one tensor going in and one coming out is evaluated on a grid of points, and compared with the
functions that ONNX has as one operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import erf, pi, sqrt
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.model import Model, producer, values_of
from onnxq.passes.ops import clamp_bounds

Values = NDArray[np.float64]

LARGEST = 10  # nodes of a region
GRID = np.concatenate([np.linspace(-12, 12, 2401), [-50.0, -20.0, 20.0, 50.0]])
CLOSE = 1e-6  # relative and absolute: constants are float32

_erf = np.vectorize(erf, otypes=[np.float64])


def _softplus(x: Values) -> Values:
    return np.asarray(np.logaddexp(0, x))


def _sigmoid(x: Values) -> Values:
    return np.asarray(np.exp(-np.logaddexp(0, -x)))


def _clamp(node: gs.Node, x: Values) -> Values:
    bounds = clamp_bounds(node)
    return np.full_like(x, np.nan) if bounds is None else np.clip(x, *bounds)


def _hard_sigmoid(node: gs.Node, x: Values) -> Values:
    line = node.attrs.get("alpha", 0.2) * x + node.attrs.get("beta", 0.5)
    return np.asarray(np.clip(line, 0, 1))


def _plain(function: Callable[..., Any]) -> Callable[..., Values]:
    return lambda node, *xs: np.asarray(function(*xs), np.float64)


EVALUATE: dict[str, Callable[..., Values]] = {
    "Add": _plain(np.add),
    "Sub": _plain(np.subtract),
    "Mul": _plain(np.multiply),
    "Div": _plain(np.divide),
    "Pow": _plain(np.power),
    "Neg": _plain(np.negative),
    "Exp": _plain(np.exp),
    "Erf": _plain(_erf),
    "Tanh": _plain(np.tanh),
    "Sigmoid": _plain(_sigmoid),
    "Softplus": _plain(_softplus),
    "Reciprocal": _plain(np.reciprocal),
    "Relu": _clamp,
    "Clip": _clamp,
    "HardSigmoid": _hard_sigmoid,
}
# What makes an activation of some multiplications: where the search starts.
CORES = ("Erf", "Tanh", "Softplus", "Clip", "HardSigmoid", "Relu")


@dataclass(frozen=True, slots=True)
class Activation:
    """A function that ONNX has as one operator, from an opset on."""

    op: str
    opset: int
    function: Callable[[Values], Values]
    attributes: Mapping[str, Any] = field(default_factory=dict)


ACTIVATIONS = (
    Activation("Gelu", 20, lambda x: x * (1 + _erf(x / sqrt(2))) / 2),
    Activation(
        "Gelu", 20,
        lambda x: x * (1 + np.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2,
        {"approximate": "tanh"},
    ),
    Activation("HardSwish", 14, lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    Activation(
        "HardSigmoid", 6, lambda x: np.clip(x / 6 + 0.5, 0, 1), {"alpha": 1 / 6, "beta": 0.5}
    ),
    Activation("Mish", 18, lambda x: x * np.tanh(_softplus(x))),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """An activation in the graph: what it reads, what it makes, the nodes between."""

    activation: Activation
    source: gs.Tensor
    result: gs.Tensor
    nodes: tuple[gs.Node, ...]


def find_activation(model: Model, core: gs.Node) -> Found | None:
    """The largest region around a node that computes an activation; None when there is none."""
    best: Found | None = None
    for source in _above(core):
        for result, nodes in _regions(model, source, model.graph_of(core)):
            if core not in nodes or len(nodes) < 2 or (best and len(nodes) <= len(best.nodes)):
                continue
            activation = _match(source, result, nodes)
            if activation is not None:
                best = Found(activation, source, result, tuple(nodes))
    return best


def is_part_of_activation(model: Model, node: gs.Node) -> bool:
    """Whether a product belongs to an activation that a runtime may know as one operator."""
    todo, seen = [node], set[int]()
    while todo and len(seen) < LARGEST:
        before = todo.pop()
        seen.add(id(before))
        if before.op in ("Erf", "Tanh"):
            found = find_activation(model, before)
            return found is not None and node in found.nodes
        for source in map(producer, before.inputs):
            if source is not None and id(source) not in seen and source.op in EVALUATE:
                todo.append(source)
    return False


def _above(core: gs.Node) -> Iterator[gs.Tensor]:
    """Tensors that the node's input is computed from, elementwise, nearest first."""
    todo, seen = [core.inputs[0]], set[int]()
    while todo and len(seen) < LARGEST:
        tensor = todo.pop(0)
        if id(tensor) in seen or isinstance(tensor, gs.Constant) or not tensor.name:
            continue
        seen.add(id(tensor))
        yield tensor
        node = producer(tensor)
        if node is not None and node.op in EVALUATE and not node.domain:
            todo += [t for t in node.inputs if _number(t) is None]


def _number(tensor: gs.Tensor) -> float | None:
    """The value of a constant of one element."""
    if not isinstance(tensor, gs.Constant) or np.prod(tensor.shape) != 1:
        return None
    values = values_of(tensor)
    if values is None or values.dtype.kind not in "fiu":
        return None
    return float(values.reshape(()))


def _regions(
    model: Model, source: gs.Tensor, home: gs.Graph
) -> Iterator[tuple[gs.Tensor, list[gs.Node]]]:
    """Results in one graph that depend elementwise on the source alone, with the nodes between."""
    behind: dict[int, list[gs.Node]] = {id(source): []}
    tensors = [source]
    for tensor in tensors:  # grows while it is gone through
        for node in tensor.outputs:
            if node.op not in EVALUATE or node.domain or len(node.outputs) != 1:
                continue
            if model.graph_of(node) is not home:
                continue
            out = node.outputs[0]
            operands = node.inputs if node.op != "Clip" else node.inputs[:1]
            free = [t for t in operands if _number(t) is None]
            if id(out) in behind or not free or any(id(t) not in behind for t in free):
                continue
            nodes = list({id(n): n for t in free for n in behind[id(t)]}.values())
            if len(nodes) >= LARGEST:
                continue
            behind[id(out)] = [*nodes, node]
            tensors.append(out)
    for result in tensors[1:]:
        nodes = behind[id(result)]
        inner = [n.outputs[0] for n in nodes if n.outputs[0] is not result]
        inside = {id(n) for n in nodes}
        if not any(
            model.is_output(t) or any(id(r) not in inside for r in t.outputs) for t in inner
        ):
            yield result, nodes


def _match(source: gs.Tensor, result: gs.Tensor, nodes: list[gs.Node]) -> Activation | None:
    values: dict[int, Values] = {id(source): GRID}
    for node in nodes:
        operands = node.inputs if node.op != "Clip" else node.inputs[:1]
        given = [values.get(id(t), _number(t)) for t in operands]
        with np.errstate(all="ignore"):
            values[id(node.outputs[0])] = EVALUATE[node.op](node, *given)
    for activation, expected in zip(ACTIVATIONS, _expected(), strict=True):
        if np.allclose(values[id(result)], expected, rtol=CLOSE, atol=CLOSE):
            return activation
    return None


@cache
def _expected() -> tuple[Values, ...]:
    return tuple(activation.function(GRID) for activation in ACTIVATIONS)
