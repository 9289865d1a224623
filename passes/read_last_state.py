"""Read the last state of a recurrent layer where it is all there is.

    Y, Y_h = LSTM(x[1, batch, I], ..)    Reshape(Y, ..)    =>    Reshape(Y_h, ..)

A sequence of one step, as streaming models have it: Y [1, directions, batch, H] holds the values of
Y_h [directions, batch, H]. That often has the wanted shape already, and the Reshape goes.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxq.core import rewrites
from onnxq.model import Model, producer, values_of
from onnxq.passes.work import RECURRENT


@rewrites("Reshape")
def read_last_state(model: Model, node: gs.Node) -> str | None:
    """Of a target without zeros, which would mean the sizes of Y."""
    whole = node.inputs[0]
    layer = producer(whole)
    if layer is None or layer.op not in RECURRENT or layer.domain or layer.outputs[0] is not whole:
        return None
    data, target = layer.inputs[0], values_of(node.inputs[1]) if len(node.inputs) > 1 else None
    is_step = data.shape is not None and len(data.shape) == 3 and data.shape[0] == 1
    has_lengths = len(layer.inputs) > 4 and bool(layer.inputs[4].name)
    if target is None or (target == 0).any() or not is_step or has_lengths:
        return None
    if layer.attrs.get("layout", 0) or model.graph_of(layer) is not model.graph_of(node):
        return None
    while len(layer.outputs) < 2:
        layer.outputs.append(gs.Variable.empty())
    if not layer.outputs[1].name:
        shape = None if whole.shape is None else list(whole.shape[1:])
        layer.outputs[1] = gs.Variable(model.unique(f"{whole.name}_last"), whole.dtype, shape)
    last = layer.outputs[1]
    if list(target) == last.shape and not model.is_output(node.outputs[0]):
        model.replace(node.outputs[0], last)
        return f"{last.name} is the same"
    node.inputs[0] = last
    return f"of {last.name}, which is the same"
