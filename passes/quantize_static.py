"""Quantize weights and activations with fixed ranges, in Q/DQ form.

    y = Conv(x, W, b)    =>    y = DQ(Q(Conv(DQ(Q(x)), DQ(Wq), DQ(bq))))

Tensors are quantized, not nodes: one QuantizeLinear/DequantizeLinear pair a tensor, and the float
tensor keeps its name behind the pair, so that layers of the result can be compared with the
original's. Bias is int32 in the accumulator's scale, s_b = s_x s_W (Jacob et al., "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018, section 2.4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.calibration import calibrate, load_calibration, save_calibration
from onnxq.core import Note
from onnxq.data import Samples
from onnxq.errors import DataError
from onnxq.model import Model, values_of
from onnxq.passes.ops import (
    OPS,
    activation_inputs,
    clamp_bounds,
    is_constant,
    useful_range,
    weight_axis,
    weight_input,
)
from onnxq.passes.placement import RULE, Placement, place
from onnxq.passes.sensitive import graph_rules, range_rules
from onnxq.passes.work import macs
from onnxq.schemes import PerChannel, PerTensor, QParams, QuantScheme, quantize_weight
from onnxq.statistics import Histogram, Method
from onnxq.targets import Target

WeightMethod = Literal["minmax", "mse"]
# int32 bias: as far as the accumulator goes, with a bit to spare for the sum it is added to.
BIAS_LIMIT = 2.0**30


@dataclass(frozen=True, slots=True)
class QuantizeStatic:
    """Quantize what the target can run in integers, with ranges calibrated on samples.

    range: how activation ranges are chosen (minmax, percentile, entropy, mse). weight_range: minmax
    or mse. calibration: a file; re-used when it is there, written when it is not.
    """

    target: Target
    samples: Samples
    range: Method = "minmax"
    weight_range: WeightMethod = "minmax"
    calibration: Path | None = None
    progress: Callable[[int], None] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The pass's name."""
        return RULE

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Place, calibrate, and insert; nothing is edited before calibration is done.

        Raises DataError for samples that do not fit and a calibration of another model.
        """
        if model.opset < 10:
            text = f"opset {model.opset} has no QuantizeLinear: opset 10 is needed"
            return [Note(RULE, model.graph.name, text, changed=False)]
        target = self.target
        if model.opset < 13:  # DequantizeLinear has no axis there
            target = replace(target, weights=replace(target.weights, granularity=PerTensor()))
        first = next(iter(self.samples))
        shapes = model.shapes_for({name: np.shape(values) for name, values in first.items()})
        floats = graph_rules(model, macs(model, shapes))
        placement = place(model, target, floats, shapes)
        statistics = self._statistics(model, placement)
        declined: list[Note] = []
        while more := range_rules(placement, statistics):
            declined += [
                Note(RULE, placement.nodes[key].name, text, changed=False)
                for key, text in more.items()
            ]
            floats |= more
            placement = place(model, target, floats, shapes)
            statistics = self._completed(model, placement, statistics)
        ranges = self._params(model, placement, statistics)
        notes = _Editor(model, target, ranges, self.weight_range).edit(placement)
        model.sweep()
        return [*notes, *declined, *placement.declined]

    def _statistics(self, model: Model, placement: Placement) -> Mapping[str, Histogram]:
        wanted = {name for sources in placement.sources.values() for name in sources}
        if self.calibration is not None and self.calibration.exists():
            found, _ = load_calibration(self.calibration)
            if missing := sorted(wanted - found.keys()):
                raise DataError(
                    f"{self.calibration}: has no statistics of {missing[0]!r}: it was made from "
                    "another model or target; delete it, or give another --calibration"
                )
            return cast(Mapping[str, Histogram], found)
        if not wanted:
            return {}
        return self._calibrated(model, wanted, {})

    def _completed(
        self, model: Model, placement: Placement, known: Mapping[str, Histogram]
    ) -> Mapping[str, Histogram]:
        """Statistics of tensors that were another's copy while their producer was quantized."""
        wanted = {name for sources in placement.sources.values() for name in sources}
        missing = wanted - known.keys()
        return self._calibrated(model, missing, known) if missing else known

    def _calibrated(
        self, model: Model, wanted: set[str], known: Mapping[str, Histogram]
    ) -> Mapping[str, Histogram]:
        made = calibrate(
            model, dict.fromkeys(sorted(wanted), Histogram), self.samples, progress=self.progress
        )
        together = {**known, **cast(Mapping[str, Histogram], made)}
        if self.calibration is not None:
            save_calibration(self.calibration, together, meta={"samples": len(self.samples)})
        return together

    def _params(
        self, model: Model, placement: Placement, statistics: Mapping[str, Histogram]
    ) -> dict[str, QParams]:
        """Scale and zero point of each quantized tensor; those of one group are one object."""
        activations, numbers = self.target.activations, self.target.activations.numbers
        known: dict[frozenset[str], QParams] = {}
        useful: dict[frozenset[str], tuple[float, float]] = {}
        for tensor in placement.tensors():
            group, (lo, hi) = placement.sources[tensor.name], useful_range(model, tensor)
            before = useful.get(group, (np.inf, -np.inf))
            useful[group] = min(lo, before[0]), max(hi, before[1])
        result = {}
        for tensor in placement.tensors():
            group = placement.sources[tensor.name]
            if group not in known:
                merged = reduce(Histogram.merge, (statistics[name] for name in sorted(group)))
                found = merged.range(self.range, bits=numbers.bits, symmetric=activations.symmetric)
                known[group] = activations.params(*np.clip(found, *useful[group]))
            result[tensor.name] = known[group]
        return result


class _Editor:
    """Inserts the pairs; holds what is shared while doing so."""

    def __init__(
        self,
        model: Model,
        target: Target,
        ranges: Mapping[str, QParams],
        weight_range: WeightMethod,
    ) -> None:
        self.model, self.target, self.ranges, self.weight_range = (
            model,
            target,
            ranges,
            weight_range,
        )
        self.constants: dict[QParams, tuple[gs.Constant, gs.Constant]] = {}
        self.weights: dict[tuple[int, QuantScheme, int | None], tuple[gs.Tensor, QParams]] = {}
        self.params: dict[int, QParams] = {}  # of each dequantized activation, by id

    def edit(self, placement: Placement) -> list[Note]:
        notes = [self.note(node) for node in placement.nodes.values()]
        for key, clamp in placement.clamps.items():
            self.absorb(placement.nodes[key], clamp)
        for tensor in placement.read.values():
            self.dequantize_for(tensor, placement.nodes)
        for tensor in placement.produced.values():
            self.requantize(tensor)
        for node in placement.nodes.values():
            self.constant_activations(node)
            if weight_input(node) is not None:
                self.weight_and_bias(node)
        return notes

    def note(self, node: gs.Node) -> Note:
        text = f"{node.op}: {self.target.activations.format} activations"
        if weight_input(node) is not None:
            text += f", {self.target.weights.format} weights"
        return Note(RULE, node.name, text)

    def absorb(self, node: gs.Node, clamp: gs.Node) -> None:
        """Drop a clamp that the saturation of its output's QuantizeLinear does anyway."""
        out, bounds = clamp.outputs[0], clamp_bounds(clamp)
        params = self.ranges.get(out.name)
        if params is None or bounds is None:
            return
        numbers = self.target.activations.numbers
        ends = params.dequantize(np.array([numbers.qmin, numbers.qmax], params.zero_point.dtype))
        slack = float(params.scale) / 2
        if ends[0] >= bounds[0] - (slack if bounds[0] else 0) and ends[1] <= bounds[1] + slack:
            clamp.outputs.clear()
            clamp.inputs.clear()
            node.outputs[0] = out

    def scale_and_zero_point(self, params: QParams, name: str) -> tuple[gs.Constant, gs.Constant]:
        if params not in self.constants:
            self.constants[params] = (
                self.model.constant(f"{name}_scale", params.scale),
                self.model.constant(f"{name}_zero_point", params.zero_point),
            )
        return self.constants[params]

    def pair(
        self, source: gs.Tensor, params: QParams, name: str, result: gs.Tensor | None
    ) -> gs.Tensor:
        """QuantizeLinear and DequantizeLinear behind `source`; the latter writes `result`."""
        constants = self.scale_and_zero_point(params, name)
        integers = self.model.emit(
            "QuantizeLinear", source, *constants,
            name=f"{name}_quantized", dtype=params.zero_point.dtype, shape=source.shape,
        )  # fmt: skip
        return self.dequantize(integers, constants, f"{name}_dequantized", result)

    def dequantize(
        self,
        integers: gs.Tensor,
        constants: tuple[gs.Constant, gs.Constant],
        name: str,
        result: gs.Tensor | None = None,
        **attrs: Any,
    ) -> gs.Tensor:
        made = self.model.emit(
            "DequantizeLinear", integers, *constants,
            name=name, dtype=np.dtype(np.float32), shape=integers.shape, **attrs,
        )  # fmt: skip
        if result is None:
            return made
        made.inputs[0].outputs[0] = result
        return result

    def dequantize_for(self, tensor: gs.Tensor, nodes: Mapping[int, gs.Node]) -> None:
        """A float tensor: only the integer nodes read it through a pair."""
        uses = [
            (node, i)
            for node in {id(n): n for n in tensor.outputs}.values()
            if id(node) in nodes
            for i in activation_inputs(node)
            if node.inputs[i] is tensor
        ]
        through = self.pair(tensor, self.ranges[tensor.name], tensor.name, None)
        self.params[id(through)] = self.ranges[tensor.name]
        for node, i in uses:
            node.inputs[i] = through

    def requantize(self, tensor: gs.Tensor) -> None:
        """A tensor that exists in integers only: all that read it do so through the pair."""
        maker = tensor.inputs[0]
        index = next(i for i, t in enumerate(maker.outputs) if t is tensor)
        raw = gs.Variable(self.model.unique(f"{tensor.name}_float"), tensor.dtype, tensor.shape)
        maker.outputs[index] = raw
        self.pair(raw, self.ranges[tensor.name], tensor.name, tensor)
        self.params[id(tensor)] = self.ranges[tensor.name]

    def constant_activations(self, node: gs.Node) -> None:
        """Constant operands of elementwise operators, in the activations' format."""
        for i in activation_inputs(node):
            if is_constant(node.inputs[i]):
                scheme = replace(self.target.activations, granularity=PerTensor())
                node.inputs[i] = self.weight(node.inputs[i], scheme, None)[0]

    def weight(
        self, tensor: gs.Tensor, scheme: QuantScheme, axis: int | None
    ) -> tuple[gs.Tensor, QParams]:
        """The dequantized constant; one that several nodes use is quantized once."""
        key = (id(tensor), scheme, axis)
        if key not in self.weights:
            values = np.asarray(values_of(tensor))
            q, params = quantize_weight(values, scheme, axis, self.weight_range)
            self.weights[key] = self.integer_constant(tensor.name, q, params), params
        return self.weights[key]

    def integer_constant(self, name: str, q: NDArray[Any], params: QParams) -> gs.Tensor:
        constant = self.model.constant(f"{name}_quantized", q)
        attrs = {} if params.axis is None else {"axis": params.axis}
        constants = self.scale_and_zero_point(params, name)
        return self.dequantize(constant, constants, f"{name}_dequantized", **attrs)

    def axis(self, node: gs.Node, index: int) -> int | None:
        """The axis of the weight's scales; None: one scale.

        MatMul kernels take a scale a column of a matrix, not of a stack of matrices or of a left
        operand's rows.
        """
        if not isinstance(self.target.weights.granularity, PerChannel):
            return None
        if node.op == "MatMul" and (index == 0 or len(node.inputs[index].shape) != 2):
            return None
        return weight_axis(node, index)

    def weight_and_bias(self, node: gs.Node) -> None:
        index, at = weight_input(node), OPS[node.op].bias
        assert index is not None
        weight, axis = node.inputs[index], self.axis(node, index)
        dequantized, params = self.weight(weight, self.target.weights, axis)
        if at is not None and len(node.inputs) > at and node.inputs[at].name:
            x_scale = float(self.params[id(node.inputs[0])].scale)
            repeats = node.attrs.get("group", 1) if node.op == "ConvTranspose" else 1
            bias = _bias_vector(node.inputs[at], weight.shape, axis, repeats)
            least = np.abs(bias).reshape(repeats, -1).max(0) / (x_scale * BIAS_LIMIT)
            if axis is None:
                least = least.max()
            if (
                least > params.scale
            ).any():  # the bias would saturate: a coarser weight is exact enough
                params = replace(params, scale=np.maximum(params.scale, least).astype(np.float32))
                q = params.quantize(np.asarray(values_of(weight)))
                dequantized = self.integer_constant(weight.name, q, params)
            node.inputs[at] = self.bias(node.inputs[at].name, bias, x_scale, params, repeats)
        node.inputs[index] = dequantized

    def bias(
        self, name: str, bias: NDArray[np.float64], x_scale: float, params: QParams, repeats: int
    ) -> gs.Tensor:
        """The bias as int32 in the accumulator's scale."""
        scale = (x_scale * np.tile(np.atleast_1d(params.scale), repeats)).astype(np.float32)
        q = np.rint(bias / scale.astype(np.float64)).astype(np.int32)
        zero = np.zeros(scale.shape, np.int32)
        if params.axis is None:
            return self.integer_constant(name, q, QParams(scale[0], zero[0]))
        return self.integer_constant(name, q, QParams(scale, zero, axis=0))


def _bias_vector(
    tensor: gs.Tensor, weight_shape: Sequence[int], axis: int | None, repeats: int
) -> NDArray[np.float64]:
    """The bias as one value an output channel: Gemm's may be a scalar or a row."""
    bias = np.asarray(values_of(tensor), np.float64).reshape(-1)
    return (
        np.repeat(bias, weight_shape[axis] * repeats)
        if bias.size == 1 and axis is not None
        else bias
    )
