"""Layers on activations that are quantized at run time, done in floats again.

    q, s, z = DynamicQuantizeLinear(x)
    y = Mul(Cast(MatMulInteger(q, w, z, z_w)), Mul(s, s_w))    =>    y = MatMul(x, (w - z_w) s_w)

and ConvInteger, MatMulIntegerToFloat, DynamicQuantizeMatMul and DynamicQuantizeLSTM alike. Where
rows were divided by their sizes before, and multiplied with them behind, both go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Skip
from onnxq.model import producer, readers, values_of
from onnxq.packed import Grid
from onnxq.passes.packed_weights import Stands, weights_of
from onnxq.passes.recovery import FLOAT, MOVES, Recovery, drop

INTEGER = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}
LSTM_INPUTS = 8


def recover_dynamic(recovery: Recovery, node: gs.Node) -> str | None:
    """Do the node in floats; None where it is none of these. Raises Skip before any edit."""
    if node.op in INTEGER and not node.domain:
        return _integer(recovery, node)
    if node.op in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
        return _matmul(recovery, node)
    return _lstm(recovery, node) if node.op == "DynamicQuantizeLSTM" else None


def _integer(recovery: Recovery, node: gs.Node) -> str:
    """MatMulInteger, ConvInteger: the scales come behind."""
    source, zero = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    quantizer = _quantizer(source, zero)
    weight = dict(weights_of(node)).get(1)
    if quantizer is None:
        raise Skip("its input is not quantized by a DynamicQuantizeLinear")
    if weight is None:
        raise Skip("its weight is not constant")
    end, scale = _scaled(recovery, node, quantizer.outputs[1])
    is_conv = node.op == "ConvInteger"
    if scale.size > 1:
        scale = scale.reshape(-1)
        if scale.size != weight.numbers.shape[0 if is_conv else -1]:
            raise Skip("its scales are not one for each output channel")
    else:
        scale = scale.reshape(())
    axis, numbers = 0 if is_conv else -1, weight.numbers
    zeros = node.inputs[3] if len(node.inputs) > 3 and node.inputs[3].name else None

    def read() -> Grid:
        held = values_of(numbers)
        assert held is not None
        points = None if zeros is None else values_of(zeros)
        return Grid.of(held, scale, points, axis=axis)

    x, end = _without_sizes(recovery, quantizer.inputs[0], end)
    x = _moved(recovery, source, x, node)
    w = recovery.constant(numbers, read, numbers.name, numbers.shape)
    _put(recovery, node, INTEGER[node.op], (x, w), end, dict(node.attrs))
    return f"{node.op}: now {INTEGER[node.op]} in floats"


def _quantizer(tensor: gs.Tensor, zero: gs.Tensor | None) -> gs.Node | None:
    """The DynamicQuantizeLinear that makes integers, data movement between left out."""
    node = producer(tensor)
    while node is not None and node.op in MOVES and node.op != "Concat":
        node = producer(node.inputs[0])
    if node is None or node.op != "DynamicQuantizeLinear":
        return None
    return node if zero is node.outputs[2] else None


def _moved(recovery: Recovery, tensor: gs.Tensor, x: gs.Tensor, node: gs.Node) -> gs.Tensor:
    """Do to x what was done to its integers."""
    source = producer(tensor)
    assert source is not None
    if source.op == "DynamicQuantizeLinear":
        return recovery.now(x)
    inner = _moved(recovery, source.inputs[0], x, node)
    return recovery.model.emit(
        source.op, inner, *source.inputs[1:], name=f"{tensor.name}_float", dtype=FLOAT,
        shape=tensor.shape, at=node, **source.attrs,
    )  # fmt: skip


def _scaled(
    recovery: Recovery, node: gs.Node, scale: gs.Tensor
) -> tuple[gs.Tensor, NDArray[np.float32]]:
    """The tensor behind Cast and all scales, and the weight's scales; Skip where it has none."""
    cast = _only_reader(recovery, node.outputs[0])
    if cast is None or cast.op != "Cast":
        raise Skip("its sums are not scaled as those of a quantized layer")
    end, product = cast.outputs[0], np.ones((), np.float32)
    is_input_scaled = is_weight_scaled = False
    while not (is_input_scaled and is_weight_scaled):
        factor = _only_reader(recovery, end)
        if factor is None or factor.op != "Mul":
            raise Skip("its sums are not scaled as those of a quantized layer")
        other = factor.inputs[1] if factor.inputs[0] is end else factor.inputs[0]
        for part in _factors(other):
            if part is scale and not is_input_scaled:
                is_input_scaled = True
            elif (values := values_of(part)) is not None and values.dtype == np.float32:
                is_weight_scaled = True
                product = np.asarray(product * values, np.float32)
            else:
                raise Skip(
                    f"its sums are multiplied with {part.name}, which is no scale of its own"
                )
        end = factor.outputs[0]
    return end, product


def _factors(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
    node = producer(tensor)
    if node is not None and node.op == "Mul" and values_of(tensor) is None:
        for part in node.inputs:
            yield from _factors(part)
    elif node is not None and node.op in ("Reshape", "Unsqueeze") and not _is_dynamic(tensor):
        yield from _factors(node.inputs[0])  # of scales of channels: their order stays
    else:
        yield tensor


def _is_dynamic(tensor: gs.Tensor) -> bool:
    node = producer(tensor)
    return node is not None and values_of(node.inputs[0]) is None


def _only_reader(recovery: Recovery, tensor: gs.Tensor) -> gs.Node | None:
    found = [node for node, _ in readers(tensor)]
    is_output = recovery.model.is_output(tensor)
    return found[0] if len(found) == 1 and not is_output else None


def _without_sizes(recovery: Recovery, x: gs.Tensor, end: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor]:
    """X and y of x / sizes ... * sizes, where sizes are of rows."""
    divide, multiply = producer(x), _only_reader(recovery, end)
    if divide is None or divide.op != "Div" or multiply is None or multiply.op != "Mul":
        return x, end
    sizes = divide.inputs[1]
    if not any(t is sizes for t in multiply.inputs) or not _is_row_size(sizes):
        return x, end
    return divide.inputs[0], multiply.outputs[0]


def _is_row_size(sizes: gs.Tensor) -> bool:
    """Whether it is Max(ReduceMax(Abs(..), axes = -1), c): a number a row."""
    node = producer(sizes)
    if node is not None and node.op == "Max":
        node = producer(node.inputs[0])
    if node is None or node.op != "ReduceMax" or not node.attrs.get("keepdims", 1):
        return False
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1 and (values := values_of(node.inputs[1])) is not None:
        axes = values.reshape(-1).tolist()
    return list(axes or ()) == [-1]


def _put(
    recovery: Recovery,
    node: gs.Node,
    op: str,
    inputs: tuple[gs.Tensor, ...],
    end: gs.Tensor,
    attributes: dict[str, Any],
) -> None:
    """Write the operator in the place of the node; it makes `end`."""
    made = recovery.model.emit(
        op, *inputs, name=f"{end.name}_float", dtype=FLOAT, shape=end.shape, at=node, **attributes
    )
    for maker in list(end.inputs):
        drop(maker)
    drop(node)
    made.inputs[0].outputs[0] = end


def _matmul(recovery: Recovery, node: gs.Node) -> str:
    """DynamicQuantizeMatMul(A, B, b_scale ..), MatMulIntegerToFloat(A, B, a_scale, b_scale ..)."""
    weight = dict(weights_of(node)).get(1)
    if weight is None or weight.read is None:
        raise Skip("its weight is not constant")
    if node.op == "DynamicQuantizeMatMul":
        x, at = node.inputs[0], 4
    else:
        at = 6
        zero = node.inputs[4] if len(node.inputs) > 4 and node.inputs[4].name else None
        quantizer = _quantizer(node.inputs[0], zero)
        if quantizer is not None and node.inputs[2] is quantizer.outputs[1]:
            x = _moved(recovery, node.inputs[0], quantizer.inputs[0], node)
        else:
            x = recovery.floats(node.inputs[0], node.inputs[2], zero, node)
    tensor, out = node.inputs[1], node.outputs[0]
    bias = node.inputs[at] if len(node.inputs) > at and node.inputs[at].name else None
    inputs = (recovery.now(x), recovery.weight(weight, tensor.shape, tensor.name, FLOAT))
    if bias is not None:
        made = recovery.model.emit(
            "MatMul", *inputs, name=f"{out.name}_product", dtype=FLOAT, shape=out.shape, at=node
        )
        inputs = (made, bias)
    _put(recovery, node, "MatMul" if bias is None else "Add", inputs, out, {})
    return f"{node.op}: now MatMul in floats"


def _lstm(recovery: Recovery, node: gs.Node) -> str:
    weights: dict[int, Stands] = dict(weights_of(node))
    if len(weights) < 2:
        raise Skip("its weights are not constant")
    inputs = list(node.inputs[:LSTM_INPUTS])
    for index, stands in weights.items():
        directions, depth, width = stands.numbers.shape
        name = node.inputs[index].name
        inputs[index] = recovery.weight(stands, (directions, width, depth), name, FLOAT)
    while inputs and not inputs[-1].name:
        inputs.pop()
    outputs = list(node.outputs)
    made = recovery.model.emit(
        "LSTM", *inputs, name=f"{node.name}_float", dtype=FLOAT, at=node, **node.attrs
    )
    drop(node)
    made.inputs[0].outputs = outputs
    return "DynamicQuantizeLSTM: now LSTM in floats"
