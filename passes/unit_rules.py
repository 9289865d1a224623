"""What operators do with labels: one rule an operator, a table.

A rule gives the labels of the node's outputs (None: none), joins what goes together, holds what has
to stay and cuts constants. It raises Skip where the labels it reads cannot go through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Skip
from onnxq.passes.ops import is_constant
from onnxq.passes.shape_rules import BROADCAST, REDUCE, axes_of
from onnxq.passes.unit_labels import FIXED, Block, Net, Operand, aligned, merged
from onnxq.passes.unit_moves import MOVES

Rule = Callable[[Net, gs.Node], Sequence[Block | None]]
# One value in, one out; other inputs are one value for all, or follow the first (Clip, PRelu).
EACH = frozenset(
    (
        "Abs Acos Acosh Asin Asinh Atan Atanh Cast Ceil Celu Clip Cos Cosh Elu Erf Exp Floor Gelu "
        "HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu "
        "Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh "
        "ThresholdedRelu"
    ).split()
)
POOLS = frozenset(
    ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool")
)


def _each(net: Net, node: gs.Node) -> Sequence[Block | None]:
    """Elementwise, with broadcasting."""
    if "broadcast" in node.attrs or "axis" in node.attrs:
        raise Skip("its operands are aligned as before opset 7")
    out = net.shape(node.outputs[0])
    operands = [aligned(net, node, i, len(out)) for i, t in enumerate(node.inputs) if t.name]
    return [merged(net, node, operands, out)]


def _dropout(net: Net, node: gs.Node) -> Sequence[Block | None]:
    block = net.of(node.inputs[0])
    return [block] * len(node.outputs)


def _pool(net: Net, node: gs.Node) -> Sequence[Block | None]:
    if any(t.outputs or net.model.is_output(t) for t in node.outputs[1:]):
        raise Skip("its indices are read")
    return [net.only(net.of(node.inputs[0]), (0, 1), f"{node.name} ({node.op}) goes across it")]


def _batchnorm(net: Net, node: gs.Node) -> Sequence[Block | None]:
    if node.attrs.get("training_mode", 0) or any(t.outputs for t in node.outputs[1:]):
        raise Skip("it is in training mode")
    return [_with_vectors(net, node, range(1, 5))]


def _instancenorm(net: Net, node: gs.Node) -> Sequence[Block | None]:
    return [_with_vectors(net, node, range(1, 3))]


def _with_vectors(net: Net, node: gs.Node, indices: Sequence[int]) -> Block | None:
    """Constants of one value a channel, the second axis."""
    if any(not is_constant(node.inputs[i]) for i in indices):
        raise Skip("its parameters are not constant")
    block = net.only(net.of(node.inputs[0]), (1,), f"{node.name} ({node.op}) is not along it")
    if block is not None:
        if any(list(node.inputs[i].shape) != [block.labels.size] for i in indices):
            raise Skip("its parameters are not one value a channel")
        for index in indices:
            net.cut(node, index, Block((0,), block.labels))
    return block


def _softmax(net: Net, node: gs.Node) -> Sequence[Block | None]:
    """Across one axis; before opset 13 across all from one on."""
    rank = len(net.shape(node.inputs[0]))
    old = net.model.opset < 13
    axis = node.attrs.get("axis", 1 if old else -1) % rank
    return [_across(net, node, range(axis, rank) if old else (axis,))]


def _lp(net: Net, node: gs.Node) -> Sequence[Block | None]:
    return [_across(net, node, (node.attrs.get("axis", -1) % len(net.shape(node.inputs[0])),))]


def _layernorm(net: Net, node: gs.Node) -> Sequence[Block | None]:
    rank = len(net.shape(node.inputs[0]))
    block = _across(net, node, range(node.attrs.get("axis", -1) % rank, rank))
    return [block] if len(node.outputs) == 1 else [block, *[None] * (len(node.outputs) - 1)]


def _lrn(net: Net, node: gs.Node) -> Sequence[Block | None]:
    return [_across(net, node, (1,))]


def _across(net: Net, node: gs.Node, axes: Sequence[int]) -> Block | None:
    """Labels do not vary along axes that values are computed across."""
    block = net.of(node.inputs[0])
    for axis in axes:
        block = net.drop(block, axis, f"{node.name} ({node.op}) computes across its channels")
    return block


def _reduced(net: Net, node: gs.Node) -> Sequence[Block | None]:
    axes, rank = axes_of(node), len(net.shape(node.inputs[0]))
    if axes is None:
        raise Skip("its axes are computed")
    if not axes and node.attrs.get("noop_with_empty_axes", 0):
        return [net.of(node.inputs[0])]
    gone = {a % rank for a in axes} or set(range(rank))
    block = _across(net, node, sorted(gone))
    if block is None or node.attrs.get("keepdims", 1):
        return [block]
    return [Block(tuple(a - sum(g < a for g in gone) for a in block.axes), block.labels)]


def _concat(net: Net, node: gs.Node) -> Sequence[Block | None]:
    """Along labels: one after the other. Along another axis: the same labels in each part."""
    out = net.shape(node.outputs[0])
    at = node.attrs["axis"] % len(out)
    parts = [(t, net.shape(t), net.of(t)) for t in node.inputs]
    axes = {a for _, _, block in parts if block is not None for a in block.axes}
    along = any(block is not None and at in block.axes for _, _, block in parts)
    labels = []
    for index, (tensor, shape, block) in enumerate(parts):
        dims = [shape[a] for a in sorted(axes)]
        if any(not isinstance(d, int) for d in dims):
            raise Skip(f"the size of {tensor.name} is not known")
        sizes = [d for d in dims if isinstance(d, int)]
        if block is None and along and len(axes) == 1 and is_constant(tensor):
            block = Block((at,), net.new(sizes[0]))
            net.cut(node, index, block)
        fixed = np.full([1] * len(sizes), FIXED)
        labels.append(
            np.broadcast_to(fixed, sizes) if block is None else block.over(sorted(axes), sizes)
        )
    if along:
        return [Block(tuple(sorted(axes)), np.concatenate(labels, sorted(axes).index(at)))]
    first = next(v for v, (_, _, block) in zip(labels, parts, strict=True) if block is not None)
    result: Block | None = Block(tuple(sorted(axes)), np.array(first))
    for one in labels:
        net.join(first, one, f"{node.name} (Concat) puts it behind values that stay")
    return [result]


def _matmul(net: Net, node: gs.Node) -> Sequence[Block | None]:
    """Two tensors: both have the labels of stacked axes, either its own; none are summed over."""
    out, rank = net.shape(node.outputs[0]), len(net.shape(node.outputs[0]))
    operands = []
    for index, tensor in enumerate(node.inputs):
        shape = net.shape(tensor)
        if len(shape) < 2:
            raise Skip("it multiplies with a vector")
        more = rank - len(shape)
        summed = len(shape) - (1 if index == 0 else 2)
        other = node.inputs[1 - index].name
        why = f"{node.name} (MatMul) sums over its channels with {other}, which is computed"
        block = net.drop(net.of(tensor), summed, why)
        dims = [*[1] * more, *shape]
        dims[rank - 2 :] = [out[-2], 1] if index == 0 else [1, out[-1]]
        if block is not None:  # the left operand's rows, the right one's columns
            block = block.shifted(more)
        operands.append(Operand(index, tensor, block, dims))
    for operand in operands:
        is_stack = len(operand.tensor.shape or ()) > 2
        if is_constant(operand.tensor) and is_stack:
            raise Skip("it has a constant of several matrices")
    return [merged(net, node, operands, out)]


def _shape(net: Net, node: gs.Node) -> Sequence[Block | None]:
    """What reads sizes gets those that were (see removal_edits)."""
    if net.model.is_output(node.outputs[0]):
        raise Skip("its result is an output")
    shape, block = net.shape(node.inputs[0]), net.of(node.inputs[0])
    ends = slice(node.attrs.get("start", 0), node.attrs.get("end"))
    read = range(len(shape))[ends]
    if block is not None and any(not isinstance(shape[a], int) for a in block.axes if a in read):
        raise Skip("a size is read that is a multiple of its channels")
    return [None]


RULES: dict[str, Rule] = {
    **dict.fromkeys(EACH | BROADCAST | {"Sum"}, _each),
    **dict.fromkeys(POOLS, _pool),
    **dict.fromkeys(REDUCE, _reduced),
    **MOVES,
    "BatchNormalization": _batchnorm,
    "InstanceNormalization": _instancenorm,
    "LayerNormalization": _layernorm,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "LpNormalization": _lp,
    "LRN": _lrn,
    "Dropout": _dropout,
    "Concat": _concat,
    "MatMul": _matmul,
    "Shape": _shape,
}
