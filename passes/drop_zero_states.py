"""Leave out initial states of recurrent layers that are zero.

    y = LSTM(x, W, R, b, , zeros, zeros)    =>    y = LSTM(x, W, R, b)

Zero is what ONNX takes for a state that is left out. What made the zeros, often from the batch's
size, goes too.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxq.core import rewrites
from onnxq.model import Model, producer, values_of

STATES = (5, 6)  # initial_h, and LSTM's initial_c


@rewrites("LSTM", "GRU", "RNN")
def drop_zero_states(model: Model, node: gs.Node) -> str | None:
    """Both states, or one."""
    if node.domain:
        return None
    zeros = [i for i in STATES if i < len(node.inputs) and _is_zero(node.inputs[i])]
    if not zeros:
        return None
    for i in zeros:
        node.inputs[i] = gs.Variable.empty()
    while not node.inputs[-1].name:
        del node.inputs[-1]
    return f"{len(zeros)} initial states of zero"


def _is_zero(tensor: gs.Tensor) -> bool:
    values = values_of(tensor) if tensor.name else None
    if values is not None:
        return not values.any()
    node = producer(tensor)
    if node is None or node.domain or node.op not in ("ConstantOfShape", "Expand"):
        return False
    if node.op == "Expand":
        return _is_zero(node.inputs[0])
    value = node.attrs.get("value")
    filled = value.values if isinstance(value, gs.Constant) else value
    return filled is None or not filled.any()
