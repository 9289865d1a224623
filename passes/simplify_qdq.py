"""Fold scales: no pair of Q/DQ that does nothing, none twice, none around data movement.

    Q(DQ(q))                 =>    q                    same scale and zero point
    DQ(q), DQ(q)             =>    DQ(q)                the same for Q(x), Q(x)
    Q(Move(DQ(q)))           =>    Move(q)              same scale and zero point
    Q2(Move(DQ1(q)))         =>    Move(q) in scale 1   when the move is all that stands between

All but the last are exact; the last is closer to the float model than what it replaces, because
values that are only moved are rounded once instead of twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxq.core import Fixpoint, Note, Pipeline, Skip, rewrites
from onnxq.model import Model, producer
from onnxq.passes.moves import pad_with, same_params, set_input, why_not_on_integers
from onnxq.passes.ops import OPS


@rewrites("QuantizeLinear")
def drop_requantize(model: Model, quantize: gs.Node) -> str | None:
    """Q(DQ(q)) => q, with equal scale and zero point."""
    source = producer(quantize.inputs[0])
    if source is None or source.op != "DequantizeLinear":
        return None
    if not same_params(source, quantize):
        return None
    if source.inputs[0].dtype != quantize.outputs[0].dtype:
        return None  # without zero points the types may differ
    if model.is_output(quantize.outputs[0]):
        raise Skip(f"{quantize.outputs[0].name} is an output")
    model.replace(quantize.outputs[0], source.inputs[0])
    return "Q(DQ(q)) to q"


@rewrites("QuantizeLinear", "DequantizeLinear")
def merge_twins(model: Model, node: gs.Node) -> str | None:
    """Two equal Q of one tensor, or two equal DQ, become one."""
    for twin in node.inputs[0].outputs:
        if twin is node:
            return None  # the first of its kind stays
        if twin.op != node.op or not twin.outputs or not same_params(twin, node):
            continue
        if model.is_output(node.outputs[0]) or model.graph_of(twin) is not model.graph_of(node):
            continue
        model.replace(node.outputs[0], twin.outputs[0])
        return f"the same as {twin.name}"
    return None


@rewrites(*(op for op, spec in OPS.items() if spec.role == "move"))
def move_integers(model: Model, move: gs.Node) -> str | None:
    """Q(Move(DQ(q))) => Move(q); the pair behind the move takes the scale of the one before."""
    before, out = producer(move.inputs[0]), move.outputs[0]
    if before is None or before.op != "DequantizeLinear" or not _is_per_tensor(before):
        return None
    after = [[n for n in t.outputs if n.op == "QuantizeLinear"] for t in move.outputs]
    if not all(len(t.outputs) == len(q) == 1 for t, q in zip(move.outputs, after, strict=True)):
        return None
    if any(model.is_output(t) for t in move.outputs):
        return None
    if why := why_not_on_integers(move, before.inputs[0].dtype, model.opset):
        raise Skip(why)
    quantizes = [q for (q,) in after]
    for quantize in quantizes:
        rescalable = all(n.op == "DequantizeLinear" for n in quantize.outputs[0].outputs)
        if not rescalable and not same_params(before, quantize):
            return None
    if any(model.is_output(q.outputs[0]) for q in quantizes):
        raise Skip(f"{out.name} is an output in integers")
    for tensor, quantize in zip(list(move.outputs), quantizes, strict=True):
        _rescale(quantize.outputs[0], before)
        integers = quantize.outputs[0]
        quantize.outputs.clear()
        quantize.inputs.clear()
        move.outputs[next(i for i, t in enumerate(move.outputs) if t is tensor)] = integers
    move.inputs[0] = before.inputs[0]
    pad_with(move, before.inputs[2])
    return f"{move.op} moves integers"


def _rescale(integers: gs.Tensor, before: gs.Node) -> None:
    """Let every reader of the integers take them in the scale they had before the move."""
    integers.dtype = before.inputs[0].dtype
    for reader in integers.outputs:
        for i in (1, 2):
            set_input(reader, i, before.inputs[i])


def _is_per_tensor(node: gs.Node) -> bool:
    """Whether it has one scale, and a zero point that says which type the integers have."""
    return len(node.inputs) == 3 and all(
        isinstance(t, gs.Constant) and not t.shape for t in node.inputs[1:3]
    )


@dataclass(frozen=True, slots=True)
class SimplifyQdq:
    """The rules until nothing changes.

    integer_moves: whether data movement may stand on integers, or keeps its pairs.
    """

    integer_moves: bool = True

    @property
    def name(self) -> str:
        """The pass's name."""
        return "simplify_qdq"

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Fold pairs in place; see the module's text for what is exact."""
        moves = (move_integers,) if self.integer_moves else ()
        rules = Pipeline(self.name, (drop_requantize, merge_twins, *moves))
        return [note for note in Fixpoint(rules)(model) if note.changed]


simplify_qdq = SimplifyQdq()
