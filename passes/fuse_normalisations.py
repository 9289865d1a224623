"""Layer and RMS normalisation written as several operators become one.

    y = d / Sqrt(ReduceMean(d d) + eps) g + b    =>    y = LayerNormalization(x, g, b)
    y = x / Sqrt(ReduceMean(x x) + eps) g        =>    y = RMSNormalization(x, g)

with d = x - ReduceMean(x), over the last axes, float32, from opset 17 and 23 on. Time of the one
operator over that of the several on ONNX Runtime 1.31 (tests/bench/bench_fusions.py): 1.00 and
0.99, since it fuses these forms by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Skip, rewrites
from onnxq.model import Model, producer, readers, values_of
from onnxq.passes.shape_rules import axes_of

OPSETS = {"LayerNormalization": 17, "RMSNormalization": 23}


@dataclass(frozen=True, slots=True)
class Core:
    """(x - mean) / sqrt(variance + eps), or x / sqrt(mean of squares + eps)."""

    source: gs.Tensor
    epsilon: float
    axis: int
    op: str
    inner: tuple[gs.Tensor, ...]  # made and read only inside


@rewrites("Div", "Mul")
def fuse_normalisations(model: Model, node: gs.Node) -> str | None:
    """Anchored at the division by the root."""
    core = _core(node)
    if core is None:
        return None
    if model.opset < OPSETS[core.op]:
        raise Skip(f"{core.op} needs opset {OPSETS[core.op]}, the model has {model.opset}")
    source, result = core.source, node.outputs[0]
    if source.dtype is None or np.dtype(source.dtype) != np.float32:
        raise Skip(f"{source.name} is {source.dtype}: measured for float32 only")
    sizes = list(source.shape or ())[core.axis :]
    if not sizes or not all(isinstance(d, int) for d in sizes):
        raise Skip("the sizes of the normalised axes are not known")
    _check_inside(model, node, core)
    result, scale = _operand(model, result, "Mul", sizes)
    bias = None
    if core.op == "LayerNormalization":
        result, bias = _operand(model, result, "Add", sizes)
    if scale is None:
        scale = np.ones(sizes, np.float32)
    inputs = [source, model.constant(f"{node.name}_scale", scale)]
    if bias is not None:
        inputs.append(model.constant(f"{node.name}_bias", bias))
    made = model.emit(
        core.op, *inputs, name=result.name, like=result, at=node, axis=core.axis,
        epsilon=core.epsilon,
    )  # fmt: skip
    model.replace(result, made)
    return f"now one {core.op}"


def _core(node: gs.Node) -> Core | None:
    """The pattern up to the division, which may be a product with the reciprocal."""
    for data, other in ((0, 1), (1, 0)) if node.op == "Mul" else ((0, 1),):
        root = producer(node.inputs[other])
        inner = []
        if node.op == "Mul":
            if root is None or root.op != "Reciprocal":
                continue
            inner.append(root.outputs[0])
            root = producer(root.inputs[0])
        core = _under_root(node.inputs[data], root, inner)
        if core is not None:
            return core
    return None


def _under_root(data: gs.Tensor, root: gs.Node | None, inner: list[gs.Tensor]) -> Core | None:
    if root is None or root.op != "Sqrt":
        return None
    add = producer(root.inputs[0])
    if add is None or add.op != "Add":
        return None
    at = 0 if _number(add.inputs[0]) is not None else 1
    epsilon, mean = _number(add.inputs[at]), producer(add.inputs[1 - at])
    if epsilon is None or mean is None or (axis := _last_axes(mean)) is None:
        return None
    square = producer(mean.inputs[0])
    if square is None or not _is_square(square, data):
        return None
    inner += [t.outputs[0] for t in (root, add, mean, square)]
    centred = producer(data)
    if centred is not None and centred.op == "Sub":
        source, average = centred.inputs[0], producer(centred.inputs[1])
        if average is not None and average.inputs[0] is source and _last_axes(average) == axis:
            return Core(source, epsilon, axis, "LayerNormalization", (*inner, data))
    return Core(data, epsilon, axis, "RMSNormalization", tuple(inner))


def _number(tensor: gs.Tensor) -> float | None:
    if not isinstance(tensor, gs.Constant) or np.prod(tensor.shape) != 1:
        return None
    values = values_of(tensor)
    return None if values is None else float(values.reshape(()))


def _last_axes(mean: gs.Node) -> int | None:
    """The first of the axes that a ReduceMean keeps as 1, counted from the end, if all follow."""
    axes, shape = axes_of(mean), mean.inputs[0].shape
    if mean.op != "ReduceMean" or not mean.attrs.get("keepdims", 1) or not axes or shape is None:
        return None
    negative = sorted(a % len(shape) - len(shape) for a in axes)
    return negative[0] if negative == list(range(negative[0], 0)) else None


def _is_square(node: gs.Node, data: gs.Tensor) -> bool:
    if node.op == "Mul":
        return all(t is data for t in node.inputs)
    return node.op == "Pow" and node.inputs[0] is data and _number(node.inputs[1]) == 2


def _check_inside(model: Model, node: gs.Node, core: Core) -> None:
    """Raise Skip if something else reads a part: it would stay, and nothing be gained."""
    made = {id(t) for t in core.inner}
    for tensor in core.inner:
        for reader in tensor.outputs:
            if reader is not node and not (reader.outputs and id(reader.outputs[0]) in made):
                raise Skip(f"{tensor.name} is also used elsewhere")
        if model.is_output(tensor):
            raise Skip(f"{tensor.name} is also an output")


def _operand(
    model: Model, tensor: gs.Tensor, op: str, sizes: Sequence[int]
) -> tuple[gs.Tensor, np.ndarray | None]:
    """The constant that the tensor alone is multiplied with (or added to), and the result."""
    found = list(readers(tensor))
    if len(found) != 1 or model.is_output(tensor) or found[0][0].op != op:
        return tensor, None
    node, at = found[0]
    if model.graph_of(node) is not model.home(tensor):
        return tensor, None
    values = values_of(node.inputs[1 - at])
    if values is None or values.dtype != np.float32:
        return tensor, None
    while values.ndim > len(sizes) and values.shape[0] == 1 and values.ndim <= len(tensor.shape):
        values = values[0]
    try:
        return node.outputs[0], np.ascontiguousarray(np.broadcast_to(values, sizes))
    except ValueError:  # larger, or along other axes
        return tensor, None
