"""What a node costs in floats and in integers, by a target's measured rates.

    float layer      c (e + m K)                                  per output element
    integer layer    e + m K + (t taps + p K) / C                 K products, C output channels

with K the products that one output element sums, and taps the positions of a convolution's kernel,
whose inputs are gathered once a position and not once a channel. Float channels come in blocks:
with C of them c = ceil(C / block) block / C, and one block alone reads its inputs for little work,
so that m grows by half. Integer channels come in lanes; layers are counted as `widen_channels`
makes them.
"""

from __future__ import annotations

from math import ceil, prod

import onnx_graphsurgeon as gs

from onnxq.passes.ops import OPS
from onnxq.passes.work import Shapes, products
from onnxq.targets import Costs, Rate


def size(tensor: gs.Tensor, shapes: Shapes) -> float:
    """Number of elements; an unknown dimension counts as 1."""
    shape = shapes.get(tensor.name, tensor.shape) or ()
    return float(prod(d if isinstance(d, int) and d > 0 else 1 for d in shape))


def node_ns(node: gs.Node, costs: Costs, shapes: Shapes) -> tuple[float, float]:
    """Nanoseconds of one run in floats and in integers, without Q and DQ around it."""
    elements = max((size(t, shapes) for t in node.outputs), default=0.0)
    if OPS[node.op].role == "linear":
        in_floats, in_integers = _layer_ns(node, costs, shapes)
    else:
        rate = costs.operators.get(node.op, Rate())
        in_floats, in_integers = rate.float_element, rate.integer_element
    return (
        costs.float_node + elements * in_floats,
        costs.integer_node + elements * in_integers,
    )


def _layer_ns(node: gs.Node, costs: Costs, shapes: Shapes) -> tuple[float, float]:
    """Per output element."""
    k = products(node, shapes)
    if node.op not in ("Conv", "ConvTranspose"):
        rate = costs.operators.get(node.op, Rate())
        columns = (shapes.get(node.outputs[0].name) or node.outputs[0].shape or [1])[-1]
        rows = size(node.outputs[0], shapes) / max(1, columns if isinstance(columns, int) else 1)
        # With few rows each weight is read for few products: memory, not arithmetic, is the limit.
        in_floats = rate.float_element + rate.float_mac * k * (1 + rate.float_rows / rows)
        return in_floats, rate.integer_element + rate.integer_mac * k * (
            1 + rate.integer_rows / rows
        )
    return _convolution_ns(node, costs, k)


def _convolution_ns(node: gs.Node, costs: Costs, k: float) -> tuple[float, float]:
    """Per output element; k: products for each."""
    group, channels = node.attrs.get("group", 1), node.inputs[1].shape[0]
    is_depthwise = group > 1 and group == channels
    rate = costs.operators.get("depthwise" if is_depthwise else node.op, Rate())
    blocks = ceil(channels / costs.block) * costs.block
    alone = 1.0 if is_depthwise else 1 + 0.5 * (costs.block / blocks) ** 2
    in_floats = blocks / channels * (rate.float_element + rate.float_mac * alone * k)
    taps = prod(node.inputs[1].shape[2:])
    wide = channels / group
    if is_depthwise:
        wide = rounded_up(channels, costs.depthwise_lanes)
    elif group == 1:
        inputs = node.inputs[1].shape[1]
        k *= rounded_up(inputs, costs.input_lanes) / inputs
        wide = max(channels, costs.output_lanes)
    a_channel = rate.integer_element + rate.integer_mac * k
    a_position = rate.tap * taps + rate.patch * k
    return in_floats, (a_channel * wide + a_position) / (
        channels if is_depthwise or group == 1 else channels / group
    )


def rounded_up(count: int, step: int) -> int:
    """The next multiple of step."""
    return -(-count // step) * step
