"""Activation functions written as several operators become one.

    y = 0.5 x (1 + Erf(x / sqrt(2)))    =>    y = Gelu(x)

Found by what they compute (activations.py), float32, where the model's opset has the operator:
Gelu with erf or tanh (20), HardSwish (14), HardSigmoid (6), Mish (18). Time of the one operator
over that of the several on ONNX Runtime 1.31, one thread (tests/bench/bench_fusions.py): Gelu 1.00
(it fuses the erf form by itself) and 0.34 to 0.61 with tanh, HardSwish 0.98 to 1.05 from
HardSigmoid and Mul (noise: it is expanded to them), 0.60 to 0.86 from Clip, HardSigmoid from Clip
0.44 to 0.84, Mish 1.00. Not done: Swish (24), 1.2 to 2.4: x Sigmoid(x) has a kernel of its own
there, and Swish does not reach it. Nor Attention (23), 0.97 to 1.00: it would hide two products
that targets compute in integers.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Skip, rewrites
from onnxq.model import Model
from onnxq.passes.activations import CORES, find_activation


@rewrites(*CORES)
def fuse_activations(model: Model, node: gs.Node) -> str | None:
    """Put the one operator in the place of all."""
    found = find_activation(model, node) if not node.domain else None
    if found is None:
        return None
    op, source, result = found.activation.op, found.source, found.result
    if model.opset < found.activation.opset:
        raise Skip(f"{op} needs opset {found.activation.opset}, the model has {model.opset}")
    if source.dtype is None or np.dtype(source.dtype) != np.float32:
        raise Skip(f"{op} of {source.dtype}: measured for float32 only")
    if source.shape is None or result.shape is None or len(source.shape) != len(result.shape):
        raise Skip("a constant may change its rank")
    made = model.emit(
        op, source, name=result.name, like=result, at=node, **found.activation.attributes
    )
    model.replace(result, made)
    for old in found.nodes:
        old.inputs.clear()
        old.outputs.clear()
    return f"{len(found.nodes)} nodes are one {op}"
