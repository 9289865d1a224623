"""OPS: the one table of what quantization knows about operators.

A new operator is a new row. Roles:

    linear   has multiply-accumulates over a weight: the gain is here
    carry    computes in int8 with input and output scales of its own; worth it only between others
    move     moves data only: output values are input values, so both share one scale
    absorb   a clamp, which the saturation of QuantizeLinear does for free behind another operator;
             elsewhere it is a carry, where the target has it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.model import Model, readers, values_of
from onnxq.packed import fitted
from onnxq.schemes import PerChannel, QParams, QuantScheme

Role = Literal["linear", "carry", "move", "absorb"]


@dataclass(frozen=True, slots=True)
class OpSpec:
    """What quantization knows about an operator.

    weight: input that holds the weight, if there is one by definition (MatMul has one only if an
    input is constant). axis: the weight's output-channel axis. contract: the weight's axes that a
    multiply-accumulate sums over. bias: input that is added in the accumulator's scale.
    activations: inputs that are quantized as activations; None: all of them.
    """

    role: Role
    weight: int | None = None
    axis: Callable[[gs.Node], int] | None = None
    bias: int | None = None
    activations: tuple[int, ...] | None = (0,)


def _gemm_axis(node: gs.Node) -> int:
    return 0 if node.attrs.get("transB", 0) else 1


MOVE = OpSpec("move")
CARRY = OpSpec("carry")
CARRY_ALL = OpSpec("carry", activations=None)

OPS: dict[str, OpSpec] = {
    "Conv": OpSpec("linear", weight=1, axis=lambda _: 0, bias=2),
    "ConvTranspose": OpSpec("linear", weight=1, axis=lambda _: 1, bias=2),
    "Gemm": OpSpec("linear", weight=1, axis=_gemm_axis, bias=2),
    "MatMul": OpSpec("linear", weight=1, axis=lambda _: -1, activations=(0, 1)),
    "Add": CARRY_ALL,
    "Mul": CARRY_ALL,
    "Sub": CARRY_ALL,
    "Div": CARRY_ALL,
    "PRelu": CARRY_ALL,
    "Concat": CARRY_ALL,
    "AveragePool": CARRY,
    "GlobalAveragePool": CARRY,
    "ReduceMean": CARRY,
    "LeakyRelu": CARRY,
    "Elu": CARRY,
    "Exp": CARRY,
    "Log": CARRY,
    "Sqrt": CARRY,
    "HardSigmoid": CARRY,
    "HardSwish": CARRY,
    "Sigmoid": CARRY,
    "Softmax": CARRY,
    "Tanh": CARRY,
    "MaxPool": MOVE,
    "Resize": MOVE,
    "Reshape": MOVE,
    "Flatten": MOVE,
    "Squeeze": MOVE,
    "Unsqueeze": MOVE,
    "Transpose": MOVE,
    "Slice": MOVE,
    "Split": MOVE,
    "Tile": MOVE,
    "Pad": MOVE,
    "Expand": MOVE,
    "DepthToSpace": MOVE,
    "SpaceToDepth": MOVE,
    "Gather": MOVE,
    "Relu": OpSpec("absorb"),
    "Clip": OpSpec("absorb"),
}


def weight_input(node: gs.Node) -> int | None:
    """Which input of the node is its constant weight; None when there is none.

    For MatMul that is whichever input is constant (the second, if both are).
    """
    spec = OPS.get(node.op)
    if spec is None or spec.weight is None or len(node.inputs) <= spec.weight:
        return None
    candidates = (1, 0) if node.op == "MatMul" else (spec.weight,)
    return next((i for i in candidates if is_constant(node.inputs[i])), None)


def weight_axis(node: gs.Node, index: int) -> int | None:
    """The output-channel axis (not negative) of the node's weight; None where it has none.

    A constant left operand of MatMul has its output channels on the rows, a vector has none, and
    for transposed convolutions in groups the axis is that of one group.
    """
    rank = len(node.inputs[index].shape)
    if node.op == "MatMul":
        return None if rank < 2 else rank - 1 if index == 1 else rank - 2
    axis_of = OPS[node.op].axis
    return None if axis_of is None else axis_of(node) % rank


def kernel_rows(node: gs.Node, values: NDArray[Any]) -> NDArray[Any] | None:
    """The layer's weight as [groups, K, N], rows in the order in which kernels sum them.

    Convolutions sum channels fastest, then kernel positions. None for layers that do not run as
    matrix products: depthwise and transposed convolutions, constant left operands.
    """
    if node.op == "Conv":
        group = node.attrs.get("group", 1)
        if group > 1 and values.shape[1] == 1 and values.shape[0] == group:
            return None
        return conv_rows(values, group)
    if node.op == "Gemm":
        return np.asarray(values.T if node.attrs.get("transB", 0) else values)[None]
    if node.op == "MatMul" and values.ndim == 2 and weight_input(node) in (1, None):
        return values[None]
    return None


def paired_rows(node: gs.Node, values: NDArray[Any]) -> NDArray[Any] | None:
    """`kernel_rows` with every pair of neighbours that can come to be, also by widen_channels.

    A channel of zeros behind an odd number of them changes who is whose neighbour.
    """
    rows = kernel_rows(node, values)
    if rows is None or node.op != "Conv" or values.shape[1] % 2 == 0:
        return rows
    widened = np.pad(values, [(0, 1) if axis == 1 else (0, 0) for axis in range(values.ndim)])
    even = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2), (0, 0)))
    return np.concatenate([even, conv_rows(widened, len(rows))], 1)


def conv_rows(values: NDArray[Any], group: int) -> NDArray[Any]:
    """A convolution's weight as [groups, K, N], channels fastest, then kernel positions."""
    rows = np.moveaxis(values, 1, -1).reshape(group, values.shape[0] // group, -1)
    return np.asarray(np.swapaxes(rows, 1, 2))


def activation_inputs(node: gs.Node) -> list[int]:
    """Inputs of the node that are quantized as activations (its weight is not among them)."""
    spec = OPS[node.op]
    wanted = range(len(node.inputs)) if spec.activations is None else spec.activations
    weight = weight_input(node)
    return [i for i in wanted if i < len(node.inputs) and i != weight and node.inputs[i].name]


def clamp_behind(model: Model, node: gs.Node) -> tuple[float, float] | None:
    """What a node's result is clamped to, where the clamp alone reads it."""
    (result, *_) = node.outputs
    found = [reader for reader, _ in readers(result)]
    if model.is_output(result) or len(found) != 1 or found[0].op not in ("Relu", "Clip"):
        return None
    return clamp_bounds(found[0])


def clamp_bounds(node: gs.Node) -> tuple[float, float] | None:
    """The interval that a Relu or Clip clamps to; None when it is not constant."""
    if node.op == "Relu":
        return 0.0, float("inf")
    bounds = [node.attrs.get("min", -np.inf), node.attrs.get("max", np.inf)]
    for i, tensor in enumerate(node.inputs[1:3]):
        if tensor.name:
            value = values_of(tensor)
            if value is None or value.size != 1:
                return None
            bounds[i] = float(value.reshape(()))
    return float(bounds[0]), float(bounds[1])


def pads_zero(node: gs.Node) -> bool:
    """Whether a Pad adds nothing but zeros, or values that are there already (reflect, edge)."""
    if node.attrs.get("mode", "constant") != "constant":
        return True
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return bool(node.attrs.get("value", 0.0) == 0.0)
    value = values_of(node.inputs[2])
    return value is not None and not value.any()


def bias_vector(
    tensor: gs.Tensor, weight_shape: Sequence[int], axis: int | None, repeats: int
) -> NDArray[np.float64]:
    """The bias as one value an output channel: Gemm's may be a scalar or a row."""
    bias = np.asarray(values_of(tensor), np.float64).reshape(-1)
    return (
        np.repeat(bias, weight_shape[axis] * repeats)
        if bias.size == 1 and axis is not None
        else bias
    )


BIAS, BIASES = QuantScheme("int32"), QuantScheme("int32", PerChannel(0))


def bias_integers(
    tensor: gs.Tensor, bias: NDArray[np.float64], x_scale: float, params: QParams, repeats: int
) -> tuple[NDArray[np.int32], QParams]:
    """The bias as int32 in the accumulator's scale; one that was so already is as it was.

    params: of the weight; repeats: groups that share its scales.
    """
    axis = None if params.axis is None else 0
    w_scale = params.scale if axis is None else np.tile(params.scale, repeats)
    scale = (x_scale * w_scale).astype(np.float32)
    own = QParams(scale, np.zeros(scale.shape, np.int32), axis)
    known = fitted(tensor, BIAS if axis is None else BIASES, None)
    if known is not None and np.array_equal(known[1].scale, scale):
        return known[0], own
    return np.rint(bias / scale.astype(np.float64)).astype(np.int32), own


def useful_range(model: Model, tensor: gs.Tensor) -> tuple[float, float]:
    """The interval outside of which no reader of the tensor tells one value from another.

    Exact for HardSwish, HardSigmoid, Relu and Clip. Sigmoid, and x * Sigmoid(x) on its negative
    side, are flat to within 3e-3 beyond SATURATED.
    """
    if model.is_output(tensor):
        return -np.inf, np.inf
    lo, hi = np.inf, -np.inf
    for node in tensor.outputs:
        bounds = _useful(node, tensor)
        lo, hi = min(lo, bounds[0]), max(hi, bounds[1])
    return (lo, hi) if lo < hi else (-np.inf, np.inf)


SATURATED = 8.0


def _useful(node: gs.Node, tensor: gs.Tensor) -> tuple[float, float]:
    if node.op in ("Relu", "Clip") and node.inputs[0] is tensor:
        return clamp_bounds(node) or (-np.inf, np.inf)
    if node.op == "HardSwish":
        return -3.0, np.inf
    if node.op == "HardSigmoid":
        alpha, beta = node.attrs.get("alpha", 0.2), node.attrs.get("beta", 0.5)
        return (-beta / alpha, (1 - beta) / alpha) if alpha > 0 else (-np.inf, np.inf)
    if node.op == "Sigmoid":
        return -SATURATED, SATURATED
    if node.op == "Mul" and any(
        t.inputs and t.inputs[0].op == "Sigmoid" and t.inputs[0].inputs[0] is tensor
        for t in node.inputs
    ):
        return -SATURATED, np.inf
    return -np.inf, np.inf


def is_constant(tensor: gs.Tensor) -> bool:
    """Whether the tensor's values are in the file (initializer or Constant node)."""
    return isinstance(tensor, gs.Constant) or bool(
        tensor.inputs and tensor.inputs[0].op == "Constant"
    )
