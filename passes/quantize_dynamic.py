"""Quantize weights beforehand and activations at run time: no calibration.

    q, s, z = DynamicQuantizeLinear(x)
    y = MatMul(x, W) + b    =>    y = Mul(Cast(MatMulInteger(q, Wq, z)), Mul(s, s_W)) + b
    LSTM(x, W, R, ..)       =>    DynamicQuantizeLSTM(x, Wq, Rq, .., s_W, 0, s_R, 0)   com.microsoft

Each run takes the range of x from x itself, so no sample has to be representative; that costs two
more passes over x, which large products pay for and small ones do not. Standard operators, except
where a target names another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Note, Skip
from onnxq.layers import Choice, Layers, has_weight
from onnxq.model import Model, producer, values_of
from onnxq.passes.dynamic_costs import WORTH, products
from onnxq.passes.dynamic_layers import Editor
from onnxq.passes.ops import OPS, is_constant, weight_input
from onnxq.passes.sensitive import front_ends
from onnxq.passes.work import RECURRENT
from onnxq.schemes import PerTensor
from onnxq.targets import Target
from onnxq.targets.dynamic import DynamicRule, Product

NAME = "quantize_dynamic"
LAYERS = (*(op for op, spec in OPS.items() if spec.role == "linear"), *RECURRENT)
OPSET = 11  # onnx Operators.md: DynamicQuantizeLinear; MatMulInteger and ConvInteger are of 10
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
NORMALISATIONS = ("LayerNormalization", "RMSNormalization")
GUESSED = 64  # what free axes but the first are taken for: what synthetic samples try first


@dataclass(frozen=True, slots=True)
class QuantizeDynamic:
    """Layers with constant weights where the target has a kernel and it pays; in bodies too.

    per_row: whether each row of a MatMul's or Gemm's input (a token's values, say) has a range of
    its own, which is closer where rows differ, and slower; not where rows are even. weight_range:
    how scales of weights are chosen. scales: one scale of weights a tensor is what an LSTM's kernel
    is fastest with, one a channel is closer. layers: overrides, see `onnxq.layers`. shapes: of one
    sample's inputs by name, to know sizes; free axes count as 1 (the first) or 64 without.
    """

    target: Target
    per_row: bool = False
    weight_range: Literal["minmax", "mse"] = "minmax"
    scales: Literal["channel", "tensor"] = "channel"
    layers: tuple[str, ...] = ()
    shapes: Mapping[str, Sequence[int]] | None = None

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    @property
    def unfit(self) -> str | None:
        """Why the target can do nothing with it."""
        if self.target.dynamic:
            return None
        instead = ", or int8-weights" if self.target.stored_weights else ""
        return (
            f"{self.target.name} does not quantize activations at run time: use the recipe int8 "
            f"with --data{instead}"
        )

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Rewrite in place; a note for each layer, or why not."""
        if why := self.unfit or _too_old(model):
            return [Note(NAME, model.graph.name, why, changed=False)]
        inputs = _guessed(model) | {k: list(v) for k, v in (self.shapes or {}).items()}
        shapes, free = model.shapes_for(inputs), _free(model, inputs)
        asked = Layers.parse(self.layers).choices(model)
        floats = {id(node): reason for node, reason in front_ends(model)}
        editor = Editor(model, self.weight_range, saturates=self.target.saturates)
        notes = []
        for node in model.nodes(*LAYERS):
            if _is_quantized(node):
                continue
            choice, rows = asked.get(id(node)), self.per_row and not _is_even(node)
            try:
                rule = self._rule(node, choice)
                if choice is None or choice.weights is None:  # else it is what the user wants
                    if id(node) in floats:
                        raise Skip(floats[id(node)])
                    self._pays(node, rule, products(node, shapes, free), rows=rows)
            except Skip as reason:
                notes.append(Note(NAME, node.name, str(reason), changed=False))
                continue
            text = f"{node.op}: activations quantized at run time, {rule.weights.format} weights"
            if raised := editor.rewrite(node, rule, rows=rows):
                text += f", scales of {raised} channels raised to keep sums of pairs in 16 bits"
            notes.append(Note(NAME, node.name, text))
        if any(note.changed for note in notes):
            model.sweep()
        return notes

    def _rule(self, node: gs.Node, choice: Choice | None) -> DynamicRule:
        """How the target runs the node; raises Skip if it does not, or is asked not to."""
        if choice is not None and choice.is_float:
            raise Skip(choice.reason)
        rule = self.target.dynamic.get(node.op)
        if rule is None:
            raise Skip(f"{self.target.name} gains nothing by a dynamic {node.op}")
        if choice is not None and choice.weights not in (None, rule.weights.format):
            raise Skip(f"{choice.reason}: its kernel has {rule.weights.format} weights")
        check_lstm(node) if node.op == "LSTM" else check_product(node)
        if self.scales == "tensor":
            return replace(rule, weights=replace(rule.weights, granularity=PerTensor()))
        return rule

    def _pays(
        self, node: gs.Node, rule: DynamicRule, made: Sequence[Product], *, rows: bool
    ) -> None:
        """Raise Skip where floats are faster."""
        if rule.floats is None or rule.integers is None:
            return
        in_integers = rule.integers.ns(made)
        if rows:
            in_integers += rule.rowwise.ns(made)
        if in_integers > WORTH * rule.floats.ns(made):
            largest = max(made, key=lambda p: p.depth * p.columns)
            size = f"{largest.rows:g} x {largest.depth:g} x {largest.columns:g}"
            raise Skip(f"floats are faster here on {self.target.name}: it multiplies {size}")


def _is_even(node: gs.Node) -> bool:
    """Whether ranges of rows of the product's input are not worth their time.

    Attention averages rows, which leaves no outliers. Where several products (queries, keys,
    values) read normalised rows, each would pay for them. Without both MiniLM takes 0.52 of float
    time in place of 0.55, at 21.9 dB and 21.3; without any rows 0.46, at 17.9.
    """
    data = node.inputs[0]
    while (maker := producer(data)) is not None and maker.op in MOVES:
        data = maker.inputs[0]
    if maker is None:
        return False
    if maker.op == "MatMul" and weight_input(maker) is None:
        behind = producer(maker.inputs[0])
        return behind is not None and behind.op == "Softmax"
    return maker.op in NORMALISATIONS and _products_of(node.inputs[0]) > 1


def _products_of(tensor: gs.Tensor) -> int:
    """How many products read a tensor; those that are rewritten share its integers."""
    return sum(
        node.op in ("MatMul", "Gemm", "MatMulInteger")
        or (node.op == "DynamicQuantizeLinear" and _products_of(node.outputs[0]))
        for node in tensor.outputs
    )


def _too_old(model: Model) -> str | None:
    if model.opset >= OPSET:
        return None
    return f"opset {model.opset} has no DynamicQuantizeLinear: opset {OPSET} is needed"


def check_product(node: gs.Node) -> None:
    """Raise Skip if a MatMul, Gemm or Conv has no weight that its integer operator takes."""
    index = weight_input(node)
    if index is None:
        raise Skip(_not_constant(node))
    weight, data = node.inputs[index], node.inputs[0 if node.op != "MatMul" else 1 - index]
    if is_constant(data):
        raise Skip("all its inputs are constant")
    _check_floats(weight, data)
    rank = len(weight.shape)
    if node.op == "MatMul" and rank != 2:
        raise Skip("its weight is a vector" if rank < 2 else "its weight is a stack of matrices")
    if index == 0 and (data.shape is None or len(data.shape) < 2):
        raise Skip(f"nothing is known of the shape of {data.name}")
    has_bias = node.op == "Conv" and len(node.inputs) > 2 and bool(node.inputs[2].name)
    if has_bias and not is_constant(node.inputs[2]):
        raise Skip("its bias is not constant")


def check_lstm(node: gs.Node) -> None:
    """Raise Skip if DynamicQuantizeLSTM cannot do what the LSTM does."""
    if node.attrs.get("layout", 0):
        raise Skip("layout is 1: DynamicQuantizeLSTM has the sequence first")
    if not all(is_constant(t) for t in node.inputs[1:3]):
        raise Skip(_not_constant(node))
    for weight in node.inputs[1:3]:
        _check_floats(weight, node.inputs[0])


def _not_constant(node: gs.Node) -> str:
    return f"its weight is {'stored in integers already' if has_weight(node) else 'not constant'}"


def _check_floats(weight: gs.Tensor, data: gs.Tensor) -> None:
    for tensor in (weight, data):
        if tensor.dtype != np.float32:
            raise Skip(f"{tensor.name} is {tensor.dtype}, not float32")
    values = values_of(weight)
    if values is None or not values.size:
        raise Skip("its weight is empty")
    if not np.isfinite(values).all():
        raise Skip("its weight has NaN or infinite values")


def _is_quantized(node: gs.Node) -> bool:
    """Whether another pass gave it a weight behind DequantizeLinear: there is nothing to say."""
    held = node.inputs[:2] if node.op == "MatMul" else node.inputs[1:2]
    sources = [producer(tensor) for tensor in held]
    return any(
        s is not None and s.op == "DequantizeLinear" and is_constant(s.inputs[0]) for s in sources
    )


def _guessed(model: Model) -> dict[str, list[int]]:
    """Shapes of inputs without a sample."""
    return {
        tensor.name: [
            d if isinstance(d, int) and d > 0 else GUESSED if axis else 1
            for axis, d in enumerate(tensor.shape)
        ]
        for tensor in model.graph.inputs
        if tensor.shape is not None
    }


def _free(model: Model, inputs: Mapping[str, Sequence[int]]) -> int:
    """The largest size of a free axis that is not a batch: what sizes inside are taken for."""
    sizes = [
        inputs[tensor.name][axis]
        for tensor in model.graph.inputs
        if tensor.shape is not None and len(inputs.get(tensor.name, ())) == len(tensor.shape)
        for axis, d in enumerate(tensor.shape)
        if axis and not isinstance(d, int)
    ]
    return max(sizes, default=1)
