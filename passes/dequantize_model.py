"""Recover the float model from a quantized one: the first half of re-quantization.

    Conv(DQ(Q(x)), DQ(w))                          =>    Conv(x, W)          Q/DQ, also storage
    QLinearConv(x, .., w, .., b)                   =>    Conv(x, W, B)       QOperator
    MatMulNBits(x, w, s, z)                        =>    MatMul(x, W)
    Mul(Cast(MatMulInteger(Q(x), w)), s s_w)       =>    MatMul(x, W)        dynamic

Weights remember their integers (`onnxq.packed`): quantized into a format that holds them, they come
out as they were. The model remembers the scales of its activations (`Model.ranges`), so that they
can be quantized again without samples. What a node computes besides is the same; rounding is gone.
The integers of the model's own inputs and outputs stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Note, Skip
from onnxq.graphs import sort
from onnxq.model import Model, readers
from onnxq.passes.bitmaps import restored
from onnxq.passes.packed_weights import Stands, shape_of, stands_for, weights_of
from onnxq.passes.recover_dynamic import recover_dynamic
from onnxq.passes.recover_qoperators import recover_qoperator
from onnxq.passes.recovery import FLOAT, Recovery, drop, ranges_by_name

NAME = "dequantize_model"


@dataclass(frozen=True, slots=True)
class DequantizeModel:
    """Recover floats from all forms of quantized layers, bodies included.

    ranges: keep the scales of activations, for quantization without samples.
    """

    ranges: bool = True

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Rewrite in place; a note for each layer and pair, or why not."""
        for graph in model.graphs():
            sort(graph)
        model.separate_names()  # ranges are kept by name
        recovery, notes = Recovery(model), []
        spread = [Note(NAME, n.name, f"{c.name}: from a bitmap") for n, c in restored(model)]
        constants = _constants(recovery, model)
        for node in model.nodes():
            if not node.outputs:  # it went with another
                continue
            try:
                text = _recovered(recovery, node)
            except Skip as reason:
                notes.append(Note(NAME, node.name, f"{node.op}: {reason}", changed=False))
                continue
            if text is not None:
                notes.append(Note(NAME, node.name, text))
        recovery.finish()
        notes = [*spread, *constants, *notes]
        if any(note.changed for note in notes):
            model.sweep()
        if self.ranges:
            model.ranges.update(ranges_by_name(recovery))
        else:
            model.ranges.clear()
        return notes


def _constants(recovery: Recovery, model: Model) -> list[Note]:
    """Replace all that is computed from stored integers alone."""
    known: dict[int, Stands | None] = {}

    def found(tensor: gs.Tensor) -> Stands | None:
        if id(tensor) not in known:
            known[id(tensor)] = None if not tensor.inputs else stands_for(tensor)
        return known[id(tensor)]

    notes = []
    tensors = {id(t): t for node in model.nodes() for t in node.outputs if t.name}
    for tensor in tensors.values():
        stands = found(tensor)
        if stands is None or stands.read is None or model.is_output(tensor):
            continue
        users = [n for n, _ in readers(tensor) if not any(found(t) for t in n.outputs)]
        if not users:
            continue
        known_shape = tensor.shape is not None and all(isinstance(d, int) for d in tensor.shape)
        shape = tensor.shape if known_shape else stands.read().numbers.shape
        dtype = tensor.dtype or stands.read().dtype  # nobody infers com.microsoft's types
        weight = recovery.constant(stands.numbers, stands.read, tensor.name, shape, dtype)
        for node, i in list(readers(tensor)):
            if any(node is user for user in users):
                node.inputs[i] = weight
        text = f"{tensor.name}: {stands.form}, {np.dtype(stands.numbers.dtype)} numbers"
        notes.append(Note(NAME, users[0].name, text))
    return notes


def _recovered(recovery: Recovery, node: gs.Node) -> str | None:
    """What was done with a node; None where there is nothing to do."""
    if node.op == "DequantizeLinear":
        return _pair(recovery, node) if recovery.is_read(node.outputs[0]) else None
    if node.op in ("MatMulNBits", "GatherBlockQuantized"):
        return _nbits(recovery, node)
    return recover_qoperator(recovery, node) or recover_dynamic(recovery, node)


def _pair(recovery: Recovery, node: gs.Node) -> str | None:
    """DequantizeLinear of an activation's integers."""
    out, zero = node.outputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    made = recovery.lifted(node.inputs[0], node.inputs[1], zero, node)
    if made is None:
        return None
    if None not in (made.dtype, out.dtype) and made.dtype != out.dtype:
        raise Skip(f"its result is {out.dtype}, what was quantized is {made.dtype}")
    recovery.replace(out, made)
    return "floats in place of the pair"


def _nbits(recovery: Recovery, node: gs.Node) -> str:
    """MatMulNBits, GatherBlockQuantized."""
    (index, stands), *_ = [*weights_of(node), (0, None)]
    if stands is None:
        raise Skip("its weight is not constant")
    if node.attrs.get("weight_prepacked", 0):
        raise Skip("its weight is packed for one machine")
    if stands.read is None:
        raise Skip(f"how {stands.bits} bits are packed is not known")
    model, out, tensor = recovery.model, node.outputs[0], node.inputs[index]
    shape = shape_of(node, tensor, stands)
    weight = recovery.weight(stands, shape, tensor.name, node.inputs[2].dtype or FLOAT)
    if node.op == "GatherBlockQuantized":
        made = model.emit(
            "Gather", weight, node.inputs[1], name=f"{out.name}_float", like=out, at=node,
            axis=int(node.attrs.get("gather_axis", 0)),
        )  # fmt: skip
    else:
        made = model.emit(
            "MatMul", node.inputs[0], weight, name=f"{out.name}_float", like=out, at=node
        )
        if len(node.inputs) > 5 and node.inputs[5].name:
            made = model.emit(
                "Add", made, node.inputs[5], name=f"{out.name}_float", like=out, at=node
            )
    drop(node)
    made.inputs[0].outputs[0] = out
    return f"{node.op}: now in floats"
