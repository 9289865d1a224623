"""Insert Q/DQ pairs where a `Placement` wants them: the editing half of quantize_static."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Note
from onnxq.model import Model, readers, values_of
from onnxq.numerics.affine import next_power_of_two
from onnxq.numerics.grids import SMALLEST_SCALE
from onnxq.packed import fitted
from onnxq.passes.ops import (
    OPS,
    activation_inputs,
    bias_integers,
    bias_vector,
    clamp_bounds,
    is_constant,
    weight_input,
)
from onnxq.passes.placement import RULE, Placement, keeps_scale
from onnxq.passes.static_rounding import WeightMethod, is_balanced, rounded, scale_axis
from onnxq.schemes import (
    FORMATS,
    PerChannel,
    PerGroup,
    PerTensor,
    QParams,
    QuantScheme,
    integers,
    quantize_weight,
)
from onnxq.targets import Target


class Editor:
    """Inserts the pairs; holds what is shared while doing so.

    ranges: parameters by tensor name and format. schemes: of weights, by node id. float_bias:
    biases stay floats.
    """

    def __init__(
        self,
        model: Model,
        target: Target,
        placement: Placement,
        ranges: Mapping[tuple[str, str], QParams],
        schemes: Mapping[int, QuantScheme],
        *,
        weight_range: WeightMethod,
        float_bias: bool,
    ) -> None:
        self.model, self.target, self.placement = model, target, placement
        self.ranges, self.schemes = ranges, schemes
        self.weight_range, self.float_bias = weight_range, float_bias
        self.constants: dict[QParams, tuple[gs.Constant, gs.Constant]] = {}
        self.weights: dict[Any, tuple[gs.Tensor, QParams]] = {}
        self.params: dict[int, QParams] = {}  # of each dequantized activation, by id
        self.emitted: list[gs.Node] = []
        self.layers: dict[int, int] = {}  # with a weight, by id: channels that the guard touched

    def edit(self) -> list[Note]:
        """Insert all pairs; a note for each node."""
        placement, own = self.placement, self.placement.own_formats()
        kept = {
            key: self.ranges.get((placement.result(node).name, self.format_of(node)))
            for key, node in placement.nodes.items()
            if keeps_scale(node, self.target)
        }
        saturated = [
            (placement.nodes[key], clamp)
            for key, clamp in placement.clamps.items()
            if self.is_saturated(placement.nodes[key], clamp)
        ]
        for tensor in placement.read.values():
            self.dequantize_for(tensor)
        for tensor in placement.produced.values():
            self.requantize(tensor, own[tensor.name])
        for node, clamp in saturated:
            self.absorb(node, clamp)
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

    def format_of(self, node: gs.Node) -> str:
        """In which format the node reads activations."""
        return self.placement.formats[id(node)]

    def scheme_of(self, node: gs.Node) -> QuantScheme:
        """How the node's weight is quantized; in groups only where kernels read them."""
        scheme = self.schemes.get(id(node), self.target.weights_of(node.op))
        in_groups = isinstance(scheme.granularity, PerGroup)
        if in_groups and self.format_of(node) in self.target.simulated:
            return replace(scheme, granularity=PerChannel())
        return scheme

    def note(self, node: gs.Node) -> Note:
        """What was done to the node."""
        text = f"{node.op}: {self.format_of(node)} activations"
        if id(node) in self.layers:
            text += f", {self.scheme_of(node).format} weights"
        if self.format_of(node) in self.target.simulated:
            text += f", computed in floats: {self.target.name} has no integer kernels for them"
        if spared := self.layers.get(id(node)):
            text += f", scales of {spared} channels raised to keep sums of pairs in 16 bits"
        return Note(RULE, node.name, text)

    def is_saturated(self, node: gs.Node, clamp: gs.Node) -> bool:
        """Whether the QuantizeLinear of its output does what a clamp does."""
        out, bounds = clamp.outputs[0], clamp_bounds(clamp)
        params = self.ranges.get((out.name, self.format_of(node)))
        if params is None or bounds is None:
            return False
        numbers = FORMATS[self.format_of(node)]
        ends = params.dequantize(np.array([numbers.qmin, numbers.qmax], params.zero_point.dtype))
        slack = float(params.scale) / 2
        lowest = bounds[0] - (slack if bounds[0] else 0)
        return bool(ends[0] >= lowest and ends[1] <= bounds[1] + slack)

    def absorb(self, node: gs.Node, clamp: gs.Node) -> None:
        """Drop a clamp that saturation does, unless somebody reads its floats as they are."""
        (out,) = clamp.outputs
        if self.model.is_output(out) or any(n.op != "QuantizeLinear" for n, _ in readers(out)):
            return
        clamp.outputs.clear()
        clamp.inputs.clear()
        node.outputs[0] = out

    def scale_and_zero_point(self, params: QParams, name: str) -> tuple[gs.Constant, gs.Constant]:
        """The parameters as constants, once for each."""
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
            "QuantizeLinear", source, *constants, name=f"{name}_q",
            dtype=params.zero_point.dtype, shape=source.shape, at=self.model.home(source),
        )  # fmt: skip
        return self.dequantize(integers, constants, f"{name}_dq", result)

    def dequantize(
        self,
        integers: gs.Tensor,
        constants: tuple[gs.Constant, gs.Constant],
        name: str,
        result: gs.Tensor | None = None,
        **attrs: Any,
    ) -> gs.Tensor:
        """DequantizeLinear behind `integers`; it writes `result`, if one is given."""
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

    def dequantize_for(self, tensor: gs.Tensor, format: str | None = None) -> None:
        """Let integer nodes read a tensor through a pair, one for each format.

        format: the one in which they read it as it is.
        """
        uses: dict[str, list[tuple[gs.Node, int]]] = {}
        for node in {id(n): n for n in tensor.outputs}.values():
            if id(node) not in self.placement.nodes or self.format_of(node) == format:
                continue
            found = [(node, i) for i in activation_inputs(node) if node.inputs[i] is tensor]
            uses.setdefault(self.format_of(node), []).extend(found)
        for other, inputs in uses.items():
            if inputs:
                params = self.ranges[tensor.name, other]
                through = self.pair(tensor, params, tensor.name, None)
                self.params[id(through)] = params
                for node, i in inputs:
                    node.inputs[i] = through

    def requantize(self, tensor: gs.Tensor, format: str) -> None:
        """A tensor that exists in integers only: all that read it do so through the pair."""
        maker, params = tensor.inputs[0], self.ranges[tensor.name, format]
        index = next(i for i, t in enumerate(maker.outputs) if t is tensor)
        raw = gs.Variable(self.model.unique(f"{tensor.name}_float"), tensor.dtype, tensor.shape)
        maker.outputs[index] = raw
        self.pair(raw, params, tensor.name, tensor)
        self.params[id(tensor)] = params
        self.dequantize_for(tensor, format)

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
                activations, form = self.target.activations, self.format_of(node)
                scheme = replace(activations, granularity=PerTensor(), format=form)
                node.inputs[i] = self.weight(node.inputs[i], scheme, None)[0]

    def weight(
        self, tensor: gs.Tensor, scheme: QuantScheme, axis: int | None, node: gs.Node | None = None
    ) -> tuple[gs.Tensor, QParams]:
        """The dequantized constant; one that several nodes use is quantized once.

        node: the layer whose kernel must not saturate, where the target's can.
        """
        guarded = node if node is not None and self.target.saturates else None
        balances = node is not None and self.is_balanced(node)
        group = guarded and (guarded.op, guarded.attrs.get("transB", 0))
        key = (id(tensor), scheme, axis, group, balances)
        if key not in self.weights:
            q, params, raised = rounded(
                tensor, scheme, axis, self.weight_range, guarded=guarded, is_balanced=balances
            )
            if guarded is not None:
                self.layers[id(guarded)] = raised
            if scheme.format in self.target.widened:
                wide = self.target.weights.numbers.dtype
                params = replace(params, zero_point=params.zero_point.astype(wide))
            self.weights[key] = self.integer_constant(tensor.name, q, params), params
        return self.weights[key]

    def is_balanced(self, node: gs.Node) -> bool:
        """Whether rounding errors should cancel."""
        if node.op != "Conv":
            return False
        numbers, zero = FORMATS[self.format_of(node)], self.params[id(node.inputs[0])].zero_point
        return is_balanced(node, (float(zero) - numbers.qmin) / (numbers.qmax - numbers.qmin))

    def integer_constant(self, name: str, q: NDArray[Any], params: QParams) -> gs.Tensor:
        """A constant in integers, and what dequantizes it."""
        constant: gs.Tensor = self.model.constant(f"{name}_q", q)
        if q.dtype != params.zero_point.dtype:  # to the kernels' format, once, at load
            kind = onnx.helper.np_dtype_to_tensor_dtype(params.zero_point.dtype)
            constant = self.model.emit(
                "Cast", constant, name=f"{name}_widened", dtype=params.zero_point.dtype,
                shape=q.shape, to=kind,
            )  # fmt: skip
        attrs = {} if params.axis is None else {"axis": params.axis}
        if params.group_size is not None:
            attrs["block_size"] = params.group_size
        constants = self.scale_and_zero_point(params, name)
        return self.dequantize(constant, constants, f"{name}_dq", **attrs)

    def weight_and_bias(self, node: gs.Node) -> None:
        """Quantize a layer's weight, and its bias where that is to be integers."""
        index, at = weight_input(node), OPS[node.op].bias
        assert index is not None
        weight, scheme = node.inputs[index], self.scheme_of(node)
        axis = scale_axis(node, index, scheme)
        if axis is None:
            scheme = replace(scheme, granularity=PerTensor())
        self.layers[id(node)] = 0
        if self.format_of(node) in self.target.simulated:
            node.inputs[index] = self.unpacked(weight, scheme, axis)
            return
        dequantized, params = self.weight(weight, scheme, axis, node)
        has_bias = at is not None and len(node.inputs) > at and bool(node.inputs[at].name)
        if has_bias and not self.float_bias and params.group_size is None:
            x_scale = float(self.params[id(node.inputs[0])].scale)
            repeats = node.attrs.get("group", 1) if node.op == "ConvTranspose" else 1
            bias = bias_vector(node.inputs[at], weight.shape, axis, repeats)
            # As far as the integers go, with a bit to spare for the sum that they are added to.
            limit = 2.0 ** (self.target.bias_bits - 2)
            least = np.abs(bias).reshape(repeats, -1).max(0) / (x_scale * limit)
            least = least.max() if axis is None else least
            least = np.maximum(least, 2 * SMALLEST_SCALE / x_scale)  # the product is no zero
            saturates = (least > params.scale).any()
            if saturates and self.target.bias == "either" and self.is_wide(node):
                node.inputs[index] = dequantized
                return  # a float bias is as good, and spares the weight
            if saturates:  # a coarser weight is exact enough
                dequantized, params = self.coarser(weight, scheme, params, least)
            q, own = bias_integers(node.inputs[at], bias, x_scale, params, repeats)
            node.inputs[at] = self.integer_constant(node.inputs[at].name, q, own)
        node.inputs[index] = dequantized

    def is_wide(self, node: gs.Node) -> bool:
        """Whether its activations have more than 8 bits: sums come near the ends of 32."""
        return FORMATS[self.format_of(node)].bits > 8

    def coarser(
        self, weight: gs.Tensor, scheme: QuantScheme, params: QParams, least: NDArray[Any]
    ) -> tuple[gs.Tensor, QParams]:
        """The dequantized weight with scales of at least `least`."""
        scale = np.maximum(params.scale, least).astype(np.float32)
        if scheme.power_of_two:
            scale = next_power_of_two(scale)
        own = replace(
            params, scale=scale, zero_point=params.zero_point.astype(scheme.numbers.dtype)
        )
        q = integers(np.asarray(values_of(weight)), scheme, own)
        params = replace(own, zero_point=params.zero_point)
        return self.integer_constant(weight.name, q, params), params

    def unpacked(self, tensor: gs.Tensor, scheme: QuantScheme, axis: int | None) -> gs.Tensor:
        """The weight as a product of integers and scales, which is computed at load."""
        key = (id(tensor), scheme, axis, "unpacked")
        if key not in self.weights:
            values = np.asarray(values_of(tensor))
            known = fitted(tensor, scheme, axis)
            q, params = known or quantize_weight(values, scheme, axis, self.weight_range)
            wide, float32 = self.model.constant(f"{tensor.name}_q", q), np.dtype(np.float32)
            kind = onnx.TensorProto.FLOAT
            shape = [1] * values.ndim
            if params.axis is not None:
                shape[params.axis] = -1
            result = self.model.emit(
                "Cast", wide, name=f"{tensor.name}_cast", dtype=float32, shape=q.shape, to=kind
            )
            zero = params.zero_point.astype(np.float32).reshape(shape)
            if zero.any():
                offset = self.model.constant(f"{tensor.name}_zero_point", zero)
                result = self.model.emit(
                    "Sub", result, offset, name=f"{tensor.name}_sub", like=result
                )
            scale = self.model.constant(f"{tensor.name}_scale", params.scale.reshape(shape))
            self.weights[key] = (
                self.model.emit("Mul", result, scale, name=f"{tensor.name}_unpacked", like=result),
                params,
            )
        return self.weights[key][0]
