"""Check a model against a target: every broken rule, and what falls back to floats.

Q/DQ form: an operator runs in integers when what it reads comes from DequantizeLinear and, where
the target's kernel wants that, what it writes goes into QuantizeLinear. Operators on integers
(QLinearConv, MatMulInteger, ...) are held to the target's list of those.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.conformance import Conformance, Finding
from onnxq.loadable import FLOATS, cannot_be_loaded, found, free_shapes, is_folded
from onnxq.model import Model, producer, values_of
from onnxq.numerics.saturation import excess
from onnxq.operands import (
    DYNAMIC,
    Operand,
    clamp_behind,
    dequantized,
    dynamic_rows,
    operand,
    parameters,
    results,
    roles,
)
from onnxq.passes.ops import (
    OPS,
    activation_inputs,
    kernel_rows,
    weight_axis,
)
from onnxq.preconditions import blames_the_model
from onnxq.schemes import FORMATS, PerChannel, QuantScheme
from onnxq.targets import Target, load_target

INTEGER_OPS = frozenset(
    """ConvInteger MatMulInteger DynamicQuantizeLinear QGemm MatMulIntegerToFloat QAttention
    DynamicQuantizeMatMul DynamicQuantizeLSTM QEmbedLayerNormalization QMoE""".split()
)
# Of operators on integers: (values, scale, zero point) of what they read and write, by role.
OPERANDS: dict[str, tuple[tuple[str, int, int, int], ...]] = {
    "QLinearConv": (("activations", 0, 1, 2), ("weights", 3, 4, 5), ("activations", -1, 6, 7)),
    "QLinearMatMul": (("activations", 0, 1, 2), ("weights", 3, 4, 5), ("activations", -1, 6, 7)),
}
LAYER = {"QLinearConv": "Conv", "QLinearMatMul": "MatMul"}
# How far a bias's scale may be from s_x s_w: float32 products are rounded.
SAME_SCALE = 1e-5


def check(
    model: str | os.PathLike[str] | Model | onnx.ModelProto, *, target: str = "ort-cpu"
) -> Conformance:
    """Hold a model against a target's rules; nothing is run.

    Raises ModelError for what is no model, RecipeError for an unknown target.
    """
    name = "model in memory"
    if isinstance(model, onnx.ModelProto):
        model = Model.from_proto(model)
    elif not isinstance(model, Model):
        name, model = os.fspath(model), Model.load(model)
    aim = load_target(target)
    with blames_the_model(model, name, None):
        return conformance(model, aim, name)


def conformance(model: Model, target: Target, name: str = "") -> Conformance:
    """Hold a loaded model against a target."""
    lint = _Lint(model, target)
    violations = [*cannot_be_loaded(model, target)]
    fallbacks = [*free_shapes(model, target)]
    integers = 0
    for node in model.nodes():
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            violations += lint.pair(node)
        elif lint.is_integer_op(node):
            violations += lint.integer_op(node)
            integers += 1
        elif lint.is_float(node):
            why = lint.why_float(node)
            if why is None:
                integers += 1
                violations += lint.layer(node)
            elif target.floats is None or node.op in target.floats:
                fallbacks.append(lint.found("floats", node, why))
            else:
                text = f"{target.name} computes nothing in floats: {why}"
                violations.append(lint.found("floats", node, text))
    return Conformance(name, target.name, tuple(violations), tuple(fallbacks), integers)


class _Lint:
    """The rules; holds what each of them looks at."""

    def __init__(self, model: Model, target: Target) -> None:
        self.model, self.target = model, target

    def found(self, rule: str, node: gs.Node, text: str, op: str = "") -> Finding:
        return found(self.target, rule, node, text, op)

    # Which form a node has.

    def is_integer_op(self, node: gs.Node) -> bool:
        if node.op.startswith("QLinear") or node.op in INTEGER_OPS:
            return True
        return self.is_bare_move(node)

    def is_bare_move(self, node: gs.Node) -> bool:
        """Whether it moves quantized integers, without a pair around it."""
        if node.op not in OPS or OPS[node.op].role != "move" or not node.inputs:
            return False
        tensor = node.inputs[0]
        while (source := producer(tensor)) is not None:
            if source.op == "QuantizeLinear":
                return True
            if source.op not in OPS or OPS[source.op].role != "move":
                return False
            tensor = source.inputs[0]
        return False

    def is_float(self, node: gs.Node) -> bool:
        """Whether it computes floats at run time."""
        if node.op == "Constant" or not any(str(t.dtype) in FLOATS for t in node.outputs):
            return False
        return not is_folded(node)

    def why_float(self, node: gs.Node) -> str | None:
        """Why the target runs the node in floats; None: it runs in integers."""
        rule = self.target.operators.get(node.op)
        before = producer(node.inputs[0]) if node.inputs else None
        if before is not None and clamp_behind(before) is node and self.is_float(before):
            fused = self.target.operators.get(before.op)
            if self.why_float(before) is None and fused is not None and fused.output != "float":
                return None  # a part of the operator before
        if rule is None or node.op not in OPS:
            return f"{self.target.name} has no integer {node.op}"
        floats = [i for i in self.data(node) if dequantized(node.inputs[i]) is None]
        if floats:
            return f"input {floats[0]} is not quantized"
        for i in self.data(node):
            read = dequantized(node.inputs[i])
            if read is not None and read.format in self.target.simulated:
                return f"{self.target.name} computes {read.format} in floats"
        for key, allowed in (rule.attributes or {}).items():
            if (value := node.attrs.get(key, allowed[0])) not in allowed:
                return f"{key} is {value}: integers only for {', '.join(allowed)}"
        if rule.output == "quantized" and results(self.model, node) is None:
            return "its result is not quantized"
        return None

    def data(self, node: gs.Node) -> list[int]:
        """Inputs that have to be quantized: activations and the weight."""
        spec = OPS[node.op]
        weight = () if spec.weight is None else (spec.weight,)
        found = sorted({*activation_inputs(node), *weight})
        return [i for i in found if i < len(node.inputs)]

    # Rules of Q/DQ form.

    def layer(self, node: gs.Node) -> Iterator[Finding]:
        """Bias, shared scales, fixed output parameters."""
        rule, spec = self.target.operators.get(node.op), OPS.get(node.op)
        if rule is None or spec is None:
            return
        if spec.bias is not None and len(node.inputs) > spec.bias:
            tensor = node.inputs[spec.bias]
            if self.target.bias == "int32" and tensor.name and dequantized(tensor) is None:
                yield self.found("bias", node, f"bias {tensor.name} is not int32")
        if self.target.saturates:
            yield from self.sums(node)
        made = results(self.model, node) or []
        if rule.shared:
            read = [dequantized(node.inputs[i]) for i in activation_inputs(node)]
            first, *others = [o for o in (*read, *made) if o is not None]
            if not all(first.has_params(o) for o in others):
                text = "inputs and output must have the same scale and zero point"
                yield self.found("shared", node, text)
        for out in made:
            want = (rule.fixed or {}).get(out.format)
            if want is None or out.params is None:
                continue
            if out.params.scale != np.float32(want[0]) or out.params.zero_point != want[1]:
                text = f"its output must have scale {want[0]:g} and zero point {want[1]}"
                yield self.found("fixed", node, text)

    def sums(self, node: gs.Node) -> Iterator[Finding]:
        """Products of uint8 and int8 that are added in pairs in 16 bits."""
        if len(node.inputs) < 2:
            return
        x, w = (dequantized(t) for t in node.inputs[:2])
        if x is None or w is None or (x.format, w.format) != ("uint8", "int8"):
            return
        if (values := w.values) is None:
            return
        rows = kernel_rows(node, values)
        yield from self.saturating(node, () if rows is None else tuple(rows))

    def saturating(self, node: gs.Node, rows: Sequence[NDArray[Any]]) -> Iterator[Finding]:
        """Channels of int8 weights, matrices [K, N], in which a pair can exceed 16 bits."""
        count = sum(int((excess(r) > 1).any(0).sum()) for r in rows)
        if count:
            text = f"sums of pairs exceed 16 bits in {count} channels, and saturate"
            yield self.found("saturates", node, text)

    def pair(self, node: gs.Node) -> Iterator[Finding]:
        """Formats and parameters of one Q or DQ node."""
        if node.op == "QuantizeLinear":
            yield from self.activation(operand(node, node.outputs[0].dtype))
            return
        of = operand(node, node.inputs[0].dtype)
        before = producer(node.inputs[0])
        if before is not None and before.op == "QuantizeLinear":
            made = operand(before, before.outputs[0].dtype)
            if made.format == of.format and made.has_params(of):
                return  # said there
        if not of.is_constant:
            yield from self.activation(of)
            return
        constants = {*self.target.activation_formats, *self.target.weight_formats}
        seen = set()
        for role, reader, i in roles(node):
            if (role, reader.op) in seen and role != "bias":
                continue
            seen.add((role, reader.op))
            if role == "bias":
                yield from self.bias(of, reader)
            elif role == "weights":
                if self.has_kernel(reader, i):
                    yield from self.kernel(of, reader)
                else:
                    yield from self.weight(of, reader.op, weight_axis(reader, i))
            elif reader.op in self.target.operators and of.format not in constants:
                yield self.found("activations", node, f"a constant in {of.format}")

    def has_kernel(self, reader: gs.Node, index: int) -> bool:
        """Whether floats are multiplied with integer weights there."""
        kernels = self.target.weight_kernels
        if kernels is None or reader.op not in kernels.operators or index != 1:
            return False
        return dequantized(reader.inputs[0]) is None

    def kernel(self, of: Operand, reader: gs.Node) -> Iterator[Finding]:
        kernels, rule, op = self.target.weight_kernels, "weight_kernels", reader.op
        assert kernels is not None
        size = int(of.node.attrs.get("block_size", 0))
        if of.format not in kernels.formats:
            listed = ", ".join(kernels.formats)
            yield self.found(rule, of.node, f"weights of {op} in {of.format}, not in {listed}")
        if of.blocked and size not in kernels.groups:
            yield self.found(rule, of.node, f"weights of {op} in groups of {size}: no kernel")
        if not of.blocked and not kernels.channels:
            yield self.found(rule, of.node, f"weights of {op} must have scales of groups")
        zero = values_of(of.node.inputs[2]) if len(of.node.inputs) > 2 else None
        if kernels.symmetric and zero is not None and np.any(zero.astype(np.int32)):
            yield self.found(rule, of.node, f"weights of {op} must have no zero points")

    def activation(self, of: Operand) -> Iterator[Finding]:
        target, rule = self.target, "activations"
        if of.format not in target.activation_formats:
            listed = ", ".join(target.activation_formats)
            yield self.found(rule, of.node, f"activations in {of.format}, not in {listed}")
        elif of.params is not None:
            if of.blocked or np.unique(of.params.scale).size > 1:
                yield self.found(rule, of.node, "activations must have one scale a tensor")
            yield from self.params(of, target.activations, rule)

    def weight(self, of: Operand, op: str, axis: int | None) -> Iterator[Finding]:
        target, rule = self.target, "weights"
        scheme, formats = target.weights_of(op), target.kernel_formats(op)
        if of.format not in formats:
            listed = ", ".join(formats)
            text = f"weights of {op} in {of.format}, not in {listed}"
            yield self.found(rule, of.node, text, op)
            return
        if of.blocked:
            if not target.grouped or FORMATS[of.format].bits >= 8:
                yield self.found(rule, of.node, f"weights of {op} have scales of blocks", op)
            return
        if of.params is None:
            return
        if of.params.axis is not None:
            if not isinstance(scheme.granularity, PerChannel):
                yield self.found(rule, of.node, f"weights of {op} must have one scale", op)
            elif axis is not None and of.params.axis != axis:
                text = f"scales of {op} weights lie along axis {of.params.axis}, not {axis}"
                yield self.found(rule, of.node, text, op)
        yield from self.params(of, scheme, rule, op)
        numbers = FORMATS[of.format]
        if target.narrow and numbers.signed and np.any(of.values == numbers.qmin):
            yield self.found("narrow", of.node, f"a weight is {numbers.qmin}")

    def params(
        self, of: Operand, scheme: QuantScheme, rule: str, op: str = ""
    ) -> Iterator[Finding]:
        """Zero points and powers of two."""
        assert of.params is not None
        numbers = FORMATS[of.format]
        if scheme.symmetric and (numbers.signed or of.format == scheme.format):
            middle = (numbers.qmin + numbers.qmax + 1) // 2
            if (of.params.zero_point != middle).any():
                yield self.found(rule, of.node, f"the zero point must be {middle}", op)
        if scheme.power_of_two and (np.frexp(of.params.scale)[0] != 0.5).any():
            yield self.found(rule, of.node, "the scale must be a power of two", op)

    def bias(self, of: Operand, layer: gs.Node) -> Iterator[Finding]:
        target = self.target
        if target.bias == "float":
            yield self.found("bias", of.node, f"a bias in {of.format}: it must be float")
            return
        if of.format != "int32":
            yield self.found("bias", of.node, f"a bias in {of.format}: it must be int32")
            return
        x, w = dequantized(layer.inputs[0]), dequantized(layer.inputs[1])
        if of.params is None or x is None or w is None or x.params is None or w.params is None:
            return
        if np.any(of.params.zero_point):
            yield self.found("bias", of.node, "the zero point of a bias must be 0")
        product = np.atleast_1d(x.params.scale * w.params.scale).astype(np.float64)
        scale = np.atleast_1d(of.params.scale)
        repeats = scale.size // product.size or 1
        if not np.allclose(scale, np.tile(product, repeats), rtol=SAME_SCALE, atol=0):
            yield self.found("bias", of.node, "its scale must be that of input times weight")
        values = of.values
        if values is not None and values.size:
            limit = 2.0 ** (target.bias_bits - 1)
            if np.abs(values.astype(np.float64)).max() >= limit:
                text = f"a bias does not fit into {target.bias_bits} bits"
                yield self.found("bias_bits", of.node, text)

    # Operators on integers.

    def integer_op(self, node: gs.Node) -> Iterator[Finding]:
        if self.is_bare_move(node):
            if not self.target.integer_moves:
                text = f"{node.op} stands on integers: it needs a Q/DQ pair around it"
                yield self.found("integer_moves", node, text)
            return
        if node.op not in self.target.integer_operators:
            text = f"{self.target.name} does not read {node.op}: use Q/DQ form"
            yield self.found("integer_operators", node, text)
            return
        if self.target.saturates and node.op in DYNAMIC:
            yield from self.saturating(node, list(dynamic_rows(node)))
        for role, x, s, z in OPERANDS.get(node.op, ()):
            tensor = node.outputs[0] if x < 0 else node.inputs[x]
            params = parameters(node.inputs[s], node.inputs[z], node)
            if params is None:
                continue
            of = Operand(node, str(params.zero_point.dtype), params, tensor)
            if role == "weights" and of.is_constant:
                yield from self.weight(of, LAYER[node.op], None)
            else:
                yield from self.activation(of)
        if node.op == "QLinearConv" and self.target.bias == "float" and len(node.inputs) > 8:
            yield self.found("bias", node, "a bias in int32: it must be float")


__all__ = ["Conformance", "Finding", "check", "conformance"]
