"""What a node costs in floats and in integers, by a target's measured rates.

    float layer      c (e + m K)                                per output element
    integer layer    c (e + m K) + p K / C                  K products, C output channels a group

with K the products that one output element sums. The patch term p is what it takes to gather a
convolution's inputs, once a position and not once a channel. Narrow layers (fewer than `block`
channels) waste vector lanes: c = block / C in floats, and p grows in integers.
"""

from __future__ import annotations

from math import prod

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
    group, channels = node.attrs.get("group", 1), node.inputs[1].shape[0]
    is_depthwise = group > 1 and group == channels
    rate = costs.operators.get("depthwise" if is_depthwise else node.op, Rate())
    lanes = max(1.0, costs.block / channels)
    in_floats = lanes * (rate.float_element + rate.float_mac * k)
    if is_depthwise:
        return in_floats, (rate.integer_element + rate.integer_mac * k) * (
            1 + rate.patch / channels
        )
    inputs = node.inputs[1].shape[1]
    patch = rate.patch * (rate.narrow if inputs < costs.block else 1.0)
    return in_floats, rate.integer_element + rate.integer_mac * k + patch * k / (channels / group)
