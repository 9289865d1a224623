"""Move the part of high biases that Relu hardly ever cuts into the layer behind; no data needed.

    y = Conv(Relu(Conv(x, V, b)), W, c)    =>    y = Conv(Relu(Conv(x, V, b - a)), W, c + W a)

with a = max(0, mean - 3 deviations) of what goes into the Relu, known from its BatchNormalization:
1 value in 740 is below, where results differ (Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", 2019, section 4.1.3). The range of the activation shrinks. Not in
front of padding, whose zeros would stand for a.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Skip, rewrites
from onnxq.model import Model
from onnxq.passes.channels import bias_row, check_layer, matrices
from onnxq.passes.linear import (
    LINEAR,
    constant,
    layer_before,
    only_reader,
    outputs_of,
    pads,
    rewrite,
)
from onnxq.passes.moments import SIGMAS

DEVIATIONS = 3.0
LEAST = 0.05
"""The share of its range that a tensor has to lose: results differ a little for it."""


@rewrites("Relu")
def absorb_bias(model: Model, relu: gs.Node) -> str | None:
    """Take a constant off the channels in front of a Relu, and add it behind."""
    source, result = relu.inputs[0], relu.outputs[0]
    before, known = layer_before(source), model.moments.get(source.name)
    if before is None or before.op == "MatMul" or known is None:
        return None
    mean, deviation = (np.asarray(v, np.float64) for v in known)
    taken = np.maximum(mean - DEVIATIONS * deviation, 0.0)
    if not taken.any():
        return None
    top, after = (float((m + SIGMAS * deviation).max()) for m in (mean, mean - taken))
    if after > (1 - LEAST) * top:
        raise Skip(f"its range would shrink by {100 * (1 - after / top):.0f} % only")
    if {source.name, result.name} & model.ranges.keys():
        raise Skip("its range is one that the model had before")
    behind = _behind(model, result)
    only_reader(model, source, relu)
    check_layer(before)
    bias = bias_row(before, outputs_of(before))
    moved = [(node, _bias_with(node, taken)) for node in behind]
    rewrite(model, before, constant(before, 1), (0.0 if bias is None else bias) - taken)
    for node, made in moved:
        rewrite(model, node, constant(node, 1), made)
    model.moments[source.name] = mean - taken, deviation
    return f"range up to {top:.3g} is one up to {after:.3g}"


def _behind(model: Model, result: gs.Tensor) -> Sequence[gs.Node]:
    """The layers that read the tensor; raises Skip where something else does."""
    if model.is_output(result):
        raise Skip(f"{result.name} is a graph output")
    for node in result.outputs:
        if node.op not in LINEAR or node.op == "MatMul" or node.inputs[0] is not result:
            raise Skip(f"{node.op} {node.name} reads it, which has no bias")
        if node.op in ("Conv", "ConvTranspose") and (pads(node) or node.op == "ConvTranspose"):
            raise Skip(f"{node.name} pads with zeros, which would stand for what is taken off")
        check_layer(node)
    return list(result.outputs)


def _bias_with(node: gs.Node, taken: NDArray[np.float64]) -> NDArray[np.float64]:
    weight = matrices(node, constant(node, 1))
    groups, _, inputs, _ = weight.shape
    if groups * inputs != taken.size:
        raise Skip(f"{node.name} reads other channels")
    alpha = float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else 1.0
    moved = alpha * np.einsum("goik,gi->go", weight, taken.reshape(groups, inputs)).reshape(-1)
    bias = bias_row(node, outputs_of(node))
    return np.asarray(moved if bias is None else moved + bias)
