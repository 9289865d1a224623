"""How operators make shapes of shapes: one rule an operator, a table (see sizes.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from onnxq.model import values_of
from onnxq.passes.size_algebra import Known, Shape, Size, broadcast, cut, product, quotient

if TYPE_CHECKING:
    from onnxq.passes.sizes import Sizes

SAME = frozenset(
    (
        "Abs Acos Acosh Asin Asinh Atan Atanh BatchNormalization Cast Ceil Celu Clip Cos Cosh "
        "Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Hardmax Identity "
        "InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu Log LogSoftmax "
        "LpNormalization MeanVarianceNormalization Mish Neg Not RMSNormalization Reciprocal Relu "
        "Round Selu Shrink Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh "
        "ThresholdedRelu Trilu CumSum QuantizeLinear DequantizeLinear ScatterElements ScatterND"
    ).split()
)
BROADCAST = frozenset(
    (
        "Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual "
        "Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor"
    ).split()
)
REDUCE = frozenset(
    (
        "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
        "ReduceSum ReduceSumSquare"
    ).split()
)


def axes_of(node: gs.Node, index: int = 1) -> list[int] | None:
    """The `axes` of a node, an attribute in old opsets, an input in new ones; [] without."""
    if "axes" in node.attrs:
        return [int(a) for a in node.attrs["axes"]]
    if len(node.inputs) <= index or not node.inputs[index].name:
        return []
    found = values_of(node.inputs[index])
    return None if found is None else [int(a) for a in found.reshape(-1)]


Shapes = Sequence[Shape | None]
ShapeRule = Callable[["Sizes", gs.Node, Shapes], Sequence[Size | None] | None]


def _first(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Shape | None:
    return shapes[0]


def _broadcast(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Sequence[Size | None] | None:
    return broadcast(shapes)


def _matmul(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Sequence[Size | None] | None:
    a, b = shapes[:2]
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    stack = broadcast([a[:-2], b[:-2]])
    return None if stack is None else [*stack, a[-2], b[-1]]


def _gemm(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Sequence[Size | None] | None:
    a, b = shapes[:2]
    if a is None or b is None:
        return None
    return [a[1 if node.attrs.get("transA", 0) else 0], b[0 if node.attrs.get("transB", 0) else 1]]


def _transpose(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Shape | None:
    shape = shapes[0]
    if shape is None:
        return None
    return [shape[a] for a in node.attrs.get("perm", range(len(shape))[::-1])]


def _squeeze(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Shape | None:
    shape, axes = shapes[0], axes_of(node)
    if shape is None or not axes:
        return None
    gone = {a % len(shape) for a in axes}
    return [d for i, d in enumerate(shape) if i not in gone]


def _unsqueeze(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Shape | None:
    shape, axes = shapes[0], axes_of(node)
    if shape is None or axes is None:
        return None
    rank = len(shape) + len(axes)
    new, old = {a % rank for a in axes}, iter(shape)
    return [1 if i in new else next(old) for i in range(rank)]


def _reshape(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Sequence[Size | None] | None:
    source = shapes[0]
    target = sizes.values(node.inputs[1]) if len(node.inputs) > 1 else None
    if target is None:
        return None
    result: Known = []
    for i, size in enumerate(target):
        if size == 0 and not node.attrs.get("allowzero", 0):
            result.append(None if source is None or i >= len(source) else source[i])
        else:
            result.append(None if size == -1 else size)
    if source is not None and target.count(-1) == 1 and result.count(None) == 1:
        result[target.index(-1)] = quotient(source, [d for d in result if d is not None])
    return result


def _flatten(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Sequence[Size | None] | None:
    shape = shapes[0]
    if shape is None:
        return None
    axis = node.attrs.get("axis", 1)
    axis += len(shape) if axis < 0 else 0
    return [product(shape[:axis]), product(shape[axis:])]


def _expand(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Sequence[Size | None] | None:
    target = sizes.values(node.inputs[1])
    if target is None or any(d is None for d in target):
        return None
    return broadcast([shapes[0], [d for d in target if d is not None]])


def _concat(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Sequence[Size | None] | None:
    known = [s for s in shapes if s is not None]
    if not known:
        return None
    axis = node.attrs.get("axis", 1) % len(known[0])
    result: Known = []
    for i, dims in enumerate(zip(*known, strict=False)):
        numbers = [d for d in dims if isinstance(d, int)]
        if i != axis:
            result.append(numbers[0] if numbers else dims[0])
        else:
            result.append(sum(numbers) if len(numbers) == len(shapes) else None)
    return result


def _slice(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Sequence[Size | None] | None:
    shape = shapes[0]
    if shape is None:
        return None
    if len(node.inputs) == 1:
        starts, axes = node.attrs["starts"], node.attrs.get("axes")
    else:
        starts, axes = sizes.values(node.inputs[1]), axes_of(node, 3)
        if axes is None:
            return None
    if starts is None:
        return None
    result: Known = list(shape)
    for i, axis in enumerate(axes or range(len(starts))):
        result[axis] = None if i or len(starts) > 1 else _first_ones(sizes, node, shape[axis])
    return result


def _first_ones(sizes: Sizes, node: gs.Node, size: Size) -> Size | None:
    """The size of a Slice from the start to an end that is known."""
    if len(node.inputs) < 3 or sizes.values(node.inputs[1]) != [0]:
        return None
    ends = sizes.values(node.inputs[2])
    steps = sizes.values(node.inputs[4]) if len(node.inputs) > 4 else [1]
    if ends is None or len(ends) != 1 or ends[0] is None or steps != [1]:
        return None
    return cut(ends[0], size)


def _gather(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Sequence[Size | None] | None:
    data, indices = shapes[:2]
    if not data or indices is None:
        return None
    axis = node.attrs.get("axis", 0) % len(data)
    return [*data[:axis], *indices, *data[axis + 1 :]]


def _indices(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Shape | None:
    return shapes[1]


def _along_axis(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Sequence[Size | None] | None:
    shape = shapes[0]
    if not shape:
        return None
    axis = node.attrs.get("axis", 0) % len(shape)
    return [None if i == axis else d for i, d in enumerate(shape)]


def _reduce(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Shape | None:
    shape, axes = shapes[0], axes_of(node)
    if shape is None or not axes:
        return None
    gone = {a % len(shape) for a in axes}
    if node.attrs.get("keepdims", 1):
        return [1 if i in gone else d for i, d in enumerate(shape)]
    return [d for i, d in enumerate(shape) if i not in gone]


def _layer(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Sequence[Size | None] | None:
    """Convolutions and pooling keep the batch; numbers are what the model says.

    Equal sizes slid over in the same way give equal sizes; "same" padding keeps them. The weight of
    a convolution tells the rank where the input's is not known.
    """
    shape = shapes[0]
    if shape is None and node.op == "Conv" and (weight := node.inputs[1].shape):
        return [None, weight[0], *[None] * (len(weight) - 2)]
    if not shape:
        return None
    keeps = shape[1] if "Pool" in node.op and len(shape) > 1 else None
    if node.op.startswith("Global"):
        return [shape[0], keeps, *[1] * (len(shape) - 2)]
    return [shape[0], keeps, *(_slid(node, i, d) for i, d in enumerate(shape[2:]))]


def _slid(node: gs.Node, i: int, size: Size) -> Size | None:
    """The size of an axis that a kernel slides over; i: among the spatial axes."""
    weight = node.inputs[1].shape if len(node.inputs) > 1 else None
    kernel = node.attrs.get("kernel_shape", weight[2:] if weight else None)
    if not kernel or isinstance(size, int) or not isinstance(kernel[i], int):
        return None
    count, auto = len(kernel), node.attrs.get("auto_pad", "NOTSET")
    stride, reach = (int(node.attrs.get(a, [1] * count)[i]) for a in ("strides", "dilations"))
    reach *= int(kernel[i]) - 1
    pads = node.attrs.get("pads", [0] * 2 * count)
    padded = pads[i] + pads[i + count] if auto == "NOTSET" else 0 if auto == "VALID" else None
    if stride == 1 and (padded is None or padded == reach):
        return size
    ceil = node.attrs.get("ceil_mode", 0)
    return f"slid({size},{stride},{reach},{padded},{ceil})".replace("*", ".")


def _of_shape(sizes: Sizes, node: gs.Node, shapes: Shapes) -> Known | None:
    return sizes.values(node.inputs[0])


SHAPES: dict[str, ShapeRule] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Expand": _expand,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _indices,
    "Split": _along_axis,
    "Conv": _layer,
    "MaxPool": _layer,
    "AveragePool": _layer,
    "LpPool": _layer,
    "GlobalAveragePool": _layer,
    "GlobalMaxPool": _layer,
    "ConstantOfShape": _of_shape,
}


def shape_rule(node: gs.Node) -> ShapeRule | None:
    """How the node's first output gets its shape; None when that is not known here."""
    if node.op in SAME:
        return _first
    if node.op in BROADCAST:
        return None if "broadcast" in node.attrs else _broadcast  # before opset 7
    return _reduce if node.op in REDUCE else SHAPES.get(node.op)
