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
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.calibration import calibrate, load_calibration, save_calibration
from onnxq.core import Note
from onnxq.data import Samples
from onnxq.errors import DataError
from onnxq.fingerprint import fingerprint
from onnxq.model import Model, readers, values_of
from onnxq.numerics.affine import next_power_of_two
from onnxq.numerics.saturation import safe_scale
from onnxq.passes.ops import (
    OPS,
    activation_inputs,
    clamp_bounds,
    is_constant,
    kernel_rows,
    weight_axis,
    weight_input,
)
from onnxq.passes.placement import RULE, Placement, keeps_scale, place
from onnxq.passes.ranges import activation_params
from onnxq.passes.sensitive import graph_rules, range_rules
from onnxq.passes.work import macs
from onnxq.schemes import PerChannel, PerTensor, QParams, QuantScheme, integers, quantize_weight
from onnxq.statistics import Histogram, Method
from onnxq.targets import Target

WeightMethod = Literal["minmax", "mse"]


@dataclass(frozen=True, slots=True)
class QuantizeStatic:
    """Quantize what the target can run in integers, with ranges calibrated on samples.

    range: how activation ranges are chosen (minmax, percentile, entropy, mse). weight_range: minmax
    or mse. calibration: a file; re-used when it is there, written when it is not, completed when
    the same samples are given.
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
        if model.opset < 21 and target.activations.numbers.bits > 8:
            text = f"opset {model.opset} has no 16-bit QuantizeLinear: opset 21 is needed"
            return [Note(RULE, model.graph.name, text, changed=False)]
        if model.opset < 13:
            target = target.without_channels()
        model.separate_names()
        first = next(iter(self.samples))
        shapes = model.shapes_for({name: np.shape(values) for name, values in first.items()})
        floats = {} if target.floats is not None else graph_rules(model, macs(model, shapes))
        placement = place(model, target, floats, shapes)
        statistics = self._statistics(model, placement)
        declined: list[Note] = []
        while more := range_rules(placement, statistics, strict=target.floats is not None):
            declined += [
                Note(RULE, placement.nodes[key].name, text, changed=False)
                for key, text in more.items()
                if OPS[placement.nodes[key].op].role != "linear"  # placing tells of those
            ]
            floats |= more
            placement = place(model, target, floats, shapes)
            statistics = self._completed(model, placement, statistics)
        ranges = activation_params(model, target, placement, statistics, self.range)
        notes = _Editor(model, target, ranges, self.weight_range).edit(placement)
        model.sweep()
        return [*notes, *declined, *placement.declined]

    def _statistics(self, model: Model, placement: Placement) -> Mapping[str, Histogram]:
        wanted = {name for sources in placement.sources.values() for name in sources}
        # Range rules may take a Concat out: then its result has a range of its own.
        joins = (node for node in placement.nodes.values() if node.op == "Concat")
        wanted |= {placement.result(node).name for node in joins}
        if self.calibration is not None and self.calibration.exists():
            found, meta = load_calibration(self.calibration)
            missing = sorted(wanted - found.keys())
            is_same = meta.get("model") == fingerprint(model)
            if is_same and missing and meta.get("of") == self.samples.fingerprint():
                return self._calibrated(model, set(missing), cast(Mapping[str, Histogram], found))
            if missing or not is_same:
                what = f"has no statistics of {missing[0]!r}" if missing else "is of other weights"
                raise DataError(
                    f"{self.calibration}: {what}: it was made from another model or target, or "
                    "with other passes before; delete it, or give another --calibration"
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
            meta = {
                "samples": len(self.samples),
                "of": self.samples.fingerprint(),
                "model": fingerprint(model),
            }
            save_calibration(self.calibration, together, meta=meta)
        return together


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
        self.weights: dict[Any, tuple[gs.Tensor, QParams]] = {}
        self.params: dict[int, QParams] = {}  # of each dequantized activation, by id
        self.emitted: list[gs.Node] = []
        self.layers: dict[int, int] = {}  # with a weight, by id: channels that the guard touched

    def edit(self, placement: Placement) -> list[Note]:
        kept = {
            key: self.ranges.get(placement.result(node).name)
            for key, node in placement.nodes.items()
            if keeps_scale(node, self.target)
        }
        for key, clamp in placement.clamps.items():
            self.absorb(placement.nodes[key], clamp)
        for tensor in placement.read.values():
            self.dequantize_for(tensor, placement.nodes)
        for tensor in placement.produced.values():
            self.requantize(tensor)
        for key, node in placement.nodes.items():
            params = kept.get(key)
            if params is not None:
                self.rescale(node, params)
            else:
                self.constant_activations(node)
            if weight_input(node) is not None:
                self.weight_and_bias(node)
        self.bring_home(placement.nodes)
        return [self.note(node) for node in placement.nodes.values()]

    def note(self, node: gs.Node) -> Note:
        text = f"{node.op}: {self.target.activations.format} activations"
        if id(node) in self.layers:
            text += f", {self.target.weights_of(node.op).format} weights"
        if spared := self.layers.get(id(node)):
            text += f", scales of {spared} channels raised to keep sums of pairs in 16 bits"
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
            "QuantizeLinear", source, *constants, name=f"{name}_quantized",
            dtype=params.zero_point.dtype, shape=source.shape, at=self.model.home(source),
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
            "DequantizeLinear", integers, *constants, name=name, dtype=np.dtype(np.float32),
            shape=integers.shape, at=self.model.home(integers), **attrs,
        )  # fmt: skip
        self.emitted.append(made.inputs[0])
        if result is None:
            return made
        made.inputs[0].outputs[0] = result
        return result

    def bring_home(self, nodes: Mapping[int, gs.Node]) -> None:
        """Let integer nodes in bodies dequantize there: kernels do not see what is outside."""
        graph_of = self.model.graph_of
        for dequantize in self.emitted:
            tensor = dequantize.outputs[0]
            local: dict[int, gs.Tensor] = {id(graph_of(dequantize)): tensor}
            for node, i in list(readers(tensor)):
                graph = graph_of(node)
                if id(node) not in nodes:
                    continue
                if id(graph) not in local:
                    local[id(graph)] = self.model.emit(
                        "DequantizeLinear", *dequantize.inputs, name=tensor.name, like=tensor,
                        at=graph, **dequantize.attrs,
                    )  # fmt: skip
                node.inputs[i] = local[id(graph)]

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

    def rescale(self, node: gs.Node, params: QParams) -> None:
        """Let a node that keeps one scale read everything in it.

        An operand has another one where a target fixes it (Sigmoid in front of Concat).
        """
        for i in activation_inputs(node):
            tensor = node.inputs[i]
            if is_constant(tensor):
                q = params.quantize(np.asarray(values_of(tensor)))
                node.inputs[i] = self.integer_constant(tensor.name, q, params)
            elif self.params[id(tensor)] is not params:
                node.inputs[i] = self.pair(tensor, params, tensor.name, None)

    def constant_activations(self, node: gs.Node) -> None:
        """Constant operands of elementwise operators, in the activations' format."""
        for i in activation_inputs(node):
            if is_constant(node.inputs[i]):
                scheme = replace(self.target.activations, granularity=PerTensor())
                node.inputs[i] = self.weight(node.inputs[i], scheme, None)[0]

    def weight(
        self, tensor: gs.Tensor, scheme: QuantScheme, axis: int | None, node: gs.Node | None = None
    ) -> tuple[gs.Tensor, QParams]:
        """The dequantized constant; one that several nodes use is quantized once.

        node: the layer whose kernel must not saturate, where the target's can.
        """
        guarded = node if node is not None and self.target.saturates else None
        key = (id(tensor), scheme, axis, guarded and (guarded.op, guarded.attrs.get("transB", 0)))
        if key not in self.weights:
            values = np.asarray(values_of(tensor))
            q, params = quantize_weight(values, scheme, axis, self.weight_range)
            if guarded is not None:
                params = self.guard(guarded, values, params)
                q = integers(values, scheme, params)
            self.weights[key] = self.integer_constant(tensor.name, q, params), params
        return self.weights[key]

    def guard(self, node: gs.Node, values: NDArray[Any], params: QParams) -> QParams:
        """Scales with which no pair of products exceeds 16 bits, see `numerics.saturation`."""
        rows = kernel_rows(node, values)
        if rows is None:
            return params
        if params.axis is None:
            scale = safe_scale(np.hstack(list(rows)), params.scale)
        else:
            parts = np.split(params.scale, len(rows))
            scale = np.hstack([safe_scale(r, s) for r, s in zip(rows, parts, strict=True)])
        self.layers[id(node)] = int((scale > params.scale).sum())
        return replace(params, scale=scale)

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
        if not isinstance(self.target.weights_of(node.op).granularity, PerChannel):
            return None
        if node.op == "MatMul" and (index == 0 or len(node.inputs[index].shape) != 2):
            return None
        return weight_axis(node, index)

    def weight_and_bias(self, node: gs.Node) -> None:
        index, at = weight_input(node), OPS[node.op].bias
        assert index is not None
        weight, axis = node.inputs[index], self.axis(node, index)
        scheme = self.target.weights_of(node.op)
        if axis is None:
            scheme = replace(scheme, granularity=PerTensor())
        self.layers[id(node)] = 0
        dequantized, params = self.weight(weight, scheme, axis, node)
        has_bias = at is not None and len(node.inputs) > at and bool(node.inputs[at].name)
        if has_bias and self.target.bias != "float":
            x_scale = float(self.params[id(node.inputs[0])].scale)
            repeats = node.attrs.get("group", 1) if node.op == "ConvTranspose" else 1
            bias = _bias_vector(node.inputs[at], weight.shape, axis, repeats)
            # As far as the integers go, with a bit to spare for the sum that they are added to.
            limit = 2.0 ** (self.target.bias_bits - 2)
            least = np.abs(bias).reshape(repeats, -1).max(0) / (x_scale * limit)
            if axis is None:
                least = least.max()
            if (
                least > params.scale
            ).any():  # the bias would saturate: a coarser weight is exact enough
                scale = np.maximum(params.scale, least).astype(np.float32)
                if scheme.power_of_two:
                    scale = next_power_of_two(scale)
                params = replace(params, scale=scale)
                q = integers(np.asarray(values_of(weight)), scheme, params)
                dequantized = self.integer_constant(weight.name, q, params)
            node.inputs[at] = self.bias(node.inputs[at].name, bias, x_scale, params, repeats)
        node.inputs[index] = dequantized

    def bias(
        self, name: str, bias: NDArray[np.float64], x_scale: float, params: QParams, repeats: int
    ) -> gs.Tensor:
        """The bias as int32 in the accumulator's scale."""
        axis = None if params.axis is None else 0
        w_scale = params.scale if axis is None else np.tile(params.scale, repeats)
        scale = (x_scale * w_scale).astype(np.float32)
        q = np.rint(bias / scale.astype(np.float64)).astype(np.int32)
        return self.integer_constant(name, q, QParams(scale, np.zeros(scale.shape, np.int32), axis))


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
