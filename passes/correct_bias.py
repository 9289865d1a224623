"""Take out of biases what quantization adds to a layer's output on average.

Behind quantize_static, from samples: see `onnxq.passes.empirical_bias`. Before it, from what
BatchNormalizations know, no data needed:

    y = Conv(x, W, b)    =>    y = Conv(x, Wq, b - (Wq - W) E[x])

The mean of x is that of `onnxq.passes.moments`: from BatchNormalizations, through what lies between
(Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019,
section 4.2). Wq is the weight as quantize_static rounds it with the same options; it remembers its
integers, which the passes behind take as they are. Padding is not accounted for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Note, Skip
from onnxq.data import Samples
from onnxq.layers import Layers
from onnxq.model import Model, values_of
from onnxq.options import require_range
from onnxq.packed import Grid, Recovered
from onnxq.passes.biases import added_row
from onnxq.passes.channels import bias_row, check_layer, matrices
from onnxq.passes.empirical_bias import corrected
from onnxq.passes.formats import Granularity, Weights, formats_of
from onnxq.passes.linear import LINEAR, constant, outputs_of, rewrite
from onnxq.passes.moments import GUESSED, Moments, moments, of
from onnxq.passes.static_rounding import WeightMethod, is_balanced, rounded, scale_axis
from onnxq.sampling import NO_SAMPLES
from onnxq.schemes import PerTensor, QParams, QuantScheme
from onnxq.targets import Target
from onnxq.weights import Weight

NAME = "correct_bias"
LEAST = 1e-3
"""A shift, in deviations of the output, that is not worth a bias."""
Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CorrectBias:
    """Correct biases: by samples behind quantize_static, with rounded weights before it.

    Options are those of that quantize_static.
    """

    target: Target
    weights: Weights = "auto"
    granularity: Granularity = "auto"
    group_size: int = 32
    weight_range: WeightMethod = "minmax"
    bias: Literal["auto", "int32", "float"] = "auto"
    layers: tuple[str, ...] = ()
    samples: Samples | None = field(default=None, repr=False)
    progress: Callable[[int], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse options that cannot be."""
        require_range("group_size", self.group_size, 1)
        Layers.parse(self.layers)

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    @staticmethod
    def wants(field: str, options: Mapping[str, Any]) -> bool:
        """Never: there are samples behind quantize_static, and none are needed before it."""
        return False

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Edit weights and biases in place; a note for each layer.

        Raises DataError for samples that do not run.
        """
        if model.unquantized:
            floats = "float" in (self.bias, self.target.bias)
            return corrected(model, self.samples or NO_SAMPLES, self.progress, floats=floats)
        model.infer_shapes()
        choices = Layers.parse(self.layers).choices(model)
        formats = formats_of(
            model, self.target, choices, activations="auto", weights=self.weights,
            granularity=self.granularity, group_size=self.group_size,
        )  # fmt: skip
        found, notes = moments(model), []
        for node in model.nodes(*LINEAR):
            scheme = formats.weights.get(id(node))
            if scheme is None or id(node) in formats.floats or values_of(node.inputs[1]) is None:
                continue
            try:
                text = _correct(model, node, scheme, self, found)
            except Skip as reason:
                notes.append(Note(NAME, node.name, str(reason), changed=False))
            else:
                notes.append(Note(NAME, node.name, text))
        return notes


def _correct(
    model: Model,
    node: gs.Node,
    scheme: QuantScheme,
    options: CorrectBias,
    found: dict[int, Moments],
) -> str:
    check_layer(node)
    weight, tensor = constant(node, 1), node.inputs[1]
    data = of(node.inputs[0], found)
    if data.trust == GUESSED:
        raise Skip(f"no BatchNormalization tells the mean of {node.inputs[0].name}")
    add = added_row(model, node) if node.op == "MatMul" else None
    axis = scale_axis(node, 1, scheme)
    if axis is None:
        scheme = replace(scheme, granularity=PerTensor())
    lo, hi = min(float(data.lo.min()), 0.0), max(float(data.hi.max()), 0.0)
    q, params, _ = rounded(
        tensor, scheme, axis, options.weight_range,
        guarded=node if options.target.saturates else None,
        is_balanced=is_balanced(node, -lo / (hi - lo) if hi > lo else 0.0),
    )  # fmt: skip
    error = params.dequantize(q).astype(np.float64) - weight
    shift, deviation = _shifted(node, error, weight, data)
    if (np.abs(shift) <= LEAST * deviation).all():
        raise Skip("rounding its weight moves no mean of its results")
    if add is not None:
        other, index = add
        moved = np.asarray(values_of(other.inputs[index]))
        made = (moved - shift).astype(moved.dtype)
        other.inputs[index] = model.constant(f"{other.inputs[index].name}_corrected", made)
    else:
        bias = bias_row(node, outputs_of(node))
        rewrite(model, node, weight, -shift if bias is None else bias - shift)
    node.inputs[1] = _remembering(model, tensor, q, params)
    worst = float((np.abs(shift) / np.maximum(deviation, 1e-30)).max())
    return f"rounding moves means by up to {worst:.2g} deviations: bias corrected"


def _shifted(
    node: gs.Node, error: Values, weight: NDArray[np.generic], data: Moments
) -> tuple[Values, Values]:
    """By what the means of the outputs move, and the outputs' deviations."""
    wrong, right = matrices(node, error), matrices(node, weight)
    alpha = float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else 1.0
    groups, _, inputs, _ = right.shape
    axis = 1 if node.op in ("Conv", "ConvTranspose") else len(node.inputs[0].shape or (0, 0)) - 1
    data = data.spread(axis, groups * inputs)
    mean, variance = data.mean.reshape(groups, inputs), data.variance.reshape(groups, inputs)
    shift = alpha * np.einsum("goik,gi->go", wrong, mean).reshape(-1)
    power = alpha**2 * np.einsum("goik,gi->go", right**2, variance).reshape(-1)
    return shift, np.sqrt(power)


def _remembering(
    model: Model, tensor: gs.Tensor, q: NDArray[np.generic], params: QParams
) -> gs.Constant:
    """The rounded weight, as floats that remember their integers."""
    grid = Grid.of(
        q, params.scale, params.zero_point, axis=params.axis or 0, block=params.group_size or 0
    )
    held = Recovered(lambda: grid, q.shape, np.float32)
    return Weight(model.unique(f"{tensor.name}_rounded"), held)
