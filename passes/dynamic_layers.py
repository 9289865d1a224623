"""Layers on activations that are quantized at run time: what is written in place of each.

One DynamicQuantizeLinear a tensor (and body) serves all that read it. ONNX Runtime 1.31 fuses

    Mul(Cast(MatMulInteger(q, W, z)), Mul(s, s_W)) + b    =>    MatMulIntegerToFloat(q, W, .., b)

and, where nobody else reads what DynamicQuantizeLinear makes, both to DynamicQuantizeMatMul (seen
in its optimized models: scales a column and the bias included).

The weight stands on the right: only there kernels pack it and take a scale a column. For W x and
transA the integers of x are transposed, a byte an element.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.model import Model, values_of
from onnxq.numerics.saturation import safe_scale
from onnxq.packed import Grid, remembered
from onnxq.passes.ops import kernel_rows, weight_input
from onnxq.schemes import QParams, QuantScheme, integers, quantize_weight
from onnxq.targets.dynamic import DynamicRule

FLOAT = np.dtype(np.float32)
TINY = 1e-30  # what a row of zeros is divided by
LSTM_INPUTS = 8  # X, W, R, B, sequence_lens, initial_h, initial_c, P; then the scales
LSTM_ATTRIBUTES = (
    "activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size",
    "input_forget",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight in integers; zero is None where all zero points are 0."""

    values: gs.Constant
    scale: NDArray[np.float32]
    zero: gs.Constant | None
    raised: int  # scales that the guard against saturating sums made coarser


class Editor:
    """Writes the layers; holds what several of them share."""

    def __init__(
        self, model: Model, weight_range: Literal["minmax", "mse"], *, saturates: bool
    ) -> None:
        self.model, self.weight_range, self.saturates = model, weight_range, saturates
        self.quantized: dict[tuple[int, int, bool], list[gs.Tensor]] = {}
        self.packed: dict[tuple[Any, ...], Packed] = {}

    def rewrite(self, node: gs.Node, rule: DynamicRule, *, rows: bool = False) -> int:
        """Write the layer by the rule's kernel; how many scales the guard raised.

        rows: give each row of a MatMul's or Gemm's input a range of its own.
        """
        if rule.kernel == "DynamicQuantizeLSTM":
            return self.lstm(node, rule.weights)
        if rule.kernel == "ConvInteger":
            return self.conv(node, rule.weights)
        return self.matmul(node, rule.weights, rows=rows)

    def matmul(self, node: gs.Node, scheme: QuantScheme, *, rows: bool) -> int:
        """MatMul and Gemm: [.., M, K] x [K, N]; rows: a range for each of M."""
        index = weight_input(node)
        is_gemm, from_left = node.op == "Gemm", index == 0
        assert index is not None
        turned = from_left or bool(is_gemm and node.attrs.get("transB", 0))
        weight = self.weight(node, node.inputs[index], scheme, turned=turned)
        data, out = node.inputs[1 - index], node.outputs[0]
        across = from_left or bool(is_gemm and node.attrs.get("transA", 0))
        rank = 2 if is_gemm else len(data.shape or ())
        q, scale, zero, *sizes = self.integers_of(data, node, rows=rows and not across)
        if across:
            q = self.transposed(q, rank, node)
        alpha = np.float32(node.attrs.get("alpha", 1.0) if is_gemm else 1.0)
        bias = node.inputs[2] if is_gemm and len(node.inputs) > 2 else None
        y = self.product("MatMulInteger", q, scale, zero, weight, weight.scale * alpha, node, {})
        for size in sizes:
            y = self.emit("Mul", y, size, node=node, name=out.name)
        if bias is not None and bias.name:
            columns = int(weight.values.shape[1])
            y = self.emit("Add", y, self.scaled(bias, node, columns), node=node, name=out.name)
        if from_left:
            y = self.transposed(y, rank, node)
        self.finish(node, y)
        return weight.raised

    def conv(self, node: gs.Node, scheme: QuantScheme) -> int:
        """Conv: zero points pad, as zeros did; scales and bias a channel."""
        weight = self.weight(node, node.inputs[1], scheme, turned=False)
        q, scale, zero = self.integers_of(node.inputs[0], node)
        sides = [1] * (len(node.inputs[1].shape) - 2)
        ws = weight.scale if weight.scale.ndim == 0 else weight.scale.reshape(1, -1, *sides)
        y = self.product("ConvInteger", q, scale, zero, weight, ws, node, dict(node.attrs))
        if len(node.inputs) > 2 and node.inputs[2].name:
            bias = np.asarray(values_of(node.inputs[2]), np.float32).reshape(1, -1, *sides)
            added = self.model.constant(f"{node.inputs[2].name}_channels", bias)
            y = self.emit("Add", y, added, node=node, name=node.outputs[0].name)
        self.finish(node, y)
        return weight.raised

    def lstm(self, node: gs.Node, scheme: QuantScheme) -> int:
        """com.microsoft DynamicQuantizeLSTM: W [D, I, 4H], R [D, H, 4H]; zero points alike."""
        w, r = (self.gates(t, scheme) for t in node.inputs[1:3])
        hidden = int(node.inputs[2].shape[2])
        inputs = [*node.inputs, *(gs.Variable.empty() for _ in range(LSTM_INPUTS))][:LSTM_INPUTS]
        inputs[1], inputs[2] = w.values, r.values
        for weight, name in ((w, "W"), (r, "R")):
            kind = weight.values.dtype
            zero = np.zeros(weight.scale.shape, kind)
            inputs += [
                self.model.constant(f"{node.name}_{name}_scale", weight.scale),
                self.model.constant(f"{node.name}_{name}_zero_point", zero),
            ]
        attrs = {key: node.attrs[key] for key in LSTM_ATTRIBUTES if key in node.attrs}
        made = self.model.emit(
            "DynamicQuantizeLSTM", *inputs, name=node.outputs[0].name, at=node,
            domain="com.microsoft", **(attrs | {"hidden_size": hidden}),
        )  # fmt: skip
        outputs = list(node.outputs)
        node.outputs.clear()
        node.inputs.clear()
        made.inputs[0].outputs = outputs
        return w.raised + r.raised

    # Parts.

    def emit(
        self,
        op: str,
        *inputs: gs.Tensor,
        node: gs.Node,
        name: str,
        dtype: Any = FLOAT,
        **attrs: Any,
    ) -> gs.Tensor:
        """An operator beside the node, with an output of the shape of the node's."""
        shape = node.outputs[0].shape
        return self.model.emit(
            op, *inputs, name=f"{name}_{op.lower()}", dtype=dtype, shape=shape, at=node, **attrs
        )

    def finish(self, node: gs.Node, made: gs.Tensor) -> None:
        """Let the last operator write what the node wrote; its tensor keeps its name."""
        out = node.outputs[0]
        node.outputs.clear()
        node.inputs.clear()
        made.inputs[0].outputs[0] = out

    def product(
        self,
        op: str,
        q: gs.Tensor,
        scale: gs.Tensor,
        zero: gs.Tensor,
        weight: Packed,
        weight_scale: NDArray[np.float32],
        node: gs.Node,
        attrs: dict[str, Any],
    ) -> gs.Tensor:
        """Multiply in integers, and scale the sums."""
        name = node.outputs[0].name
        operands = [q, weight.values, zero, *([] if weight.zero is None else [weight.zero])]
        total = self.emit(op, *operands, node=node, name=name, dtype=np.dtype(np.int32), **attrs)
        wide = self.emit("Cast", total, node=node, name=name, to=onnx.TensorProto.FLOAT)
        constant = self.model.constant(f"{name}_weight_scale", np.asarray(weight_scale, np.float32))
        both = self.model.emit(
            "Mul", scale, constant, name=f"{name}_scale", dtype=FLOAT,
            shape=list(np.shape(weight_scale)), at=node,
        )  # fmt: skip
        return self.emit("Mul", wide, both, node=node, name=name)

    def integers_of(
        self, tensor: gs.Tensor, node: gs.Node, *, rows: bool = False
    ) -> list[gs.Tensor]:
        """[integers, scale, zero point] of a tensor, made in the graph that holds the node.

        rows: of the tensor divided by the greatest absolute value of each row, which comes last.
        """
        key = (id(tensor), id(self.model.graph_of(node)), rows)
        if key not in self.quantized:
            sizes = [self.row_sizes(tensor, node)] if rows else []
            source = tensor
            for size in sizes:
                source = self.model.emit(
                    "Div", tensor, size, name=f"{tensor.name}_rows", like=tensor, at=node
                )
            q = self.model.emit(
                "DynamicQuantizeLinear", source, name=f"{tensor.name}_quantized",
                dtype=np.dtype(np.uint8), shape=tensor.shape, at=node,
            )  # fmt: skip
            scale = gs.Variable(self.model.unique(f"{tensor.name}_scale"), FLOAT, [])
            zero = gs.Variable(self.model.unique(f"{tensor.name}_zero_point"), q.dtype, [])
            q.inputs[0].outputs += [scale, zero]
            self.quantized[key] = [q, scale, zero, *sizes]
        return self.quantized[key]

    def row_sizes(self, tensor: gs.Tensor, node: gs.Node) -> gs.Tensor:
        """The greatest |x| of each row, never zero: [.., M, 1]."""
        shape = None if tensor.shape is None else [*tensor.shape[:-1], 1]
        name, emit = f"{tensor.name}_row_sizes", self.model.emit
        positive = emit("Abs", tensor, name=f"{tensor.name}_abs", like=tensor, at=node)
        inputs, attrs = [positive], {"axes": [-1]}
        if self.model.opset >= 18:  # onnx Operators.md: axes is an input from there on
            inputs, attrs = [positive, self.model.constant(f"{name}_axes", np.array([-1]))], {}
        more: dict[str, Any] = {"keepdims": 1, **attrs}
        largest = emit("ReduceMax", *inputs, name=name, dtype=FLOAT, shape=shape, at=node, **more)
        least = self.model.constant(f"{name}_least", np.array(TINY, np.float32))
        return emit("Max", largest, least, name=name, like=largest, at=node)

    def transposed(self, tensor: gs.Tensor, rank: int, node: gs.Node) -> gs.Tensor:
        """The last two axes exchanged."""
        perm = [*range(rank - 2), rank - 1, rank - 2]
        shape = None if tensor.shape is None else [tensor.shape[i] for i in perm]
        return self.model.emit(
            "Transpose", tensor, name=f"{tensor.name}_transposed", dtype=tensor.dtype,
            shape=shape, at=node, perm=perm,
        )  # fmt: skip

    def scaled(self, bias: gs.Tensor, node: gs.Node, columns: int) -> gs.Tensor:
        """Gemm's bias times beta; a constant as a row, so that it is fused."""
        beta = np.float32(node.attrs.get("beta", 1.0))
        values = values_of(bias)
        if values is not None:
            values = np.asarray(values * beta, np.float32)
            if values.size == 1:
                values = np.broadcast_to(values.reshape(1), (columns,)).copy()
            return self.model.constant(f"{bias.name}_scaled", values)
        if beta == 1:
            return bias
        factor = self.model.constant(f"{bias.name}_beta", np.asarray(beta))
        return self.model.emit("Mul", bias, factor, name=f"{bias.name}_scaled", like=bias, at=node)

    def weight(
        self, node: gs.Node, tensor: gs.Tensor, scheme: QuantScheme, *, turned: bool
    ) -> Packed:
        """A weight in integers, once for all nodes that use it so; turned: as its transpose."""
        key = (id(tensor), scheme, turned, node.op == "Conv" and node.attrs.get("group", 1))
        if key not in self.packed:
            values, grid = np.asarray(values_of(tensor)), remembered(tensor)
            if turned:
                values = np.ascontiguousarray(values.T)
                grid = None if grid is None else grid.map(np.transpose)
            rows = kernel_rows(node, values) if node.op == "Conv" else values[None]
            axis = 0 if node.op == "Conv" else 1
            q, params, raised = self.guarded(values, scheme, axis, rows, grid)
            self.packed[key] = self.stored(tensor.name, q, params, raised)
        return self.packed[key]

    def gates(self, tensor: gs.Tensor, scheme: QuantScheme) -> Packed:
        """An LSTM's W or R [D, 4H, K] as [D, K, 4H], with scales [D, 4H] (or [D])."""
        key = (id(tensor), scheme, "gates")
        if key not in self.packed:
            values, grid = np.asarray(values_of(tensor)), remembered(tensor)
            parts = []
            for i, direction in enumerate(values):
                matrix = np.ascontiguousarray(direction.T)
                own = None if grid is None else grid.map(lambda a, i=i: a[i].T)  # type: ignore[misc]
                parts.append(self.guarded(matrix, scheme, 1, matrix[None], own))
            q, scale = np.stack([p[0] for p in parts]), np.stack([p[1].scale for p in parts])
            constant = self.model.constant(f"{tensor.name}_quantized", q)
            self.packed[key] = Packed(constant, scale, None, sum(p[2] for p in parts))
        return self.packed[key]

    def guarded(
        self,
        values: NDArray[Any],
        scheme: QuantScheme,
        axis: int,
        rows: NDArray[Any] | None,
        grid: Grid | None,
    ) -> tuple[NDArray[Any], QParams, int]:
        """Integers, parameters, and how many scales were raised so that no pair saturates.

        rows: [groups, K, N] as the kernel sums them (see `numerics.saturation`). grid: what the
        values were in integers before.
        """
        known = None if grid is None else grid.fitted(scheme, axis)
        q, params = known or quantize_weight(values, scheme, axis, self.weight_range)
        if not self.saturates or rows is None or scheme.format != "int8":
            return q, params, 0
        if params.axis is None:
            scale = safe_scale(np.hstack(list(rows)), params.scale)
        else:
            parts = np.split(params.scale, len(rows))
            scale = np.hstack([safe_scale(r, s) for r, s in zip(rows, parts, strict=True)])
        raised = int((scale > params.scale).sum())
        params = replace(params, scale=scale)
        if known is None or raised:
            q = integers(values, scheme, params)
        return q, params, raised

    def stored(self, name: str, q: NDArray[Any], params: QParams, raised: int) -> Packed:
        """The constants; zero points that are all alike are one."""
        zero = None
        if params.zero_point.any():
            same = params.zero_point.size and (params.zero_point == params.zero_point.flat[0]).all()
            value = params.zero_point.reshape(-1)[0] if same else params.zero_point
            zero = self.model.constant(f"{name}_zero_point", np.asarray(value))
        constant = self.model.constant(f"{name}_quantized", q)
        return Packed(constant, params.scale, zero, raised)
