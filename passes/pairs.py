"""Q/DQ with one scale and an integer type: what they say, new ones, and moving over them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import Model, producer, readers, values_of
from onnxq.passes.moves import pad_with, why_not_on_integers
from onnxq.passes.ops import OPS, is_constant
from onnxq.ports import TYPES, Affine, constants
from onnxq.schemes import FORMATS

FLOAT32 = np.dtype(np.float32)
FLOATS = (FLOAT32, np.dtype(np.float16), np.dtype(np.float64))
MICROSOFT = "com.microsoft"  # has 16-bit pairs before opset 21


class Pairs:
    """The pairs of a model by node, kept up to date while some are added and moved.

    integer_moves: whether data movement may stand on integers.
    """

    def __init__(self, model: Model, *, integer_moves: bool) -> None:
        self.model, self.integer_moves = model, integer_moves
        self.known: dict[int, Affine] = {}
        self.constants: dict[Affine, tuple[gs.Constant, ...]] = {}
        for node in model.nodes("QuantizeLinear", "DequantizeLinear"):
            if (affine := _affine(node)) is not None:
                self.known[id(node)] = affine
                held = tuple(t for t in node.inputs[1:3] if isinstance(t, gs.Constant))
                if len(held) == 2 and not any(t.shape for t in held):
                    self.constants.setdefault(affine, held)

    def of(self, node: gs.Node) -> Affine | None:
        """The node's parameters; None if it is no such node."""
        return self.known.get(id(node))

    def wanted(self, tensor: gs.Tensor) -> Iterator[Affine]:
        """Parameters of the QuantizeLinear that the tensor goes into, data movement on the way."""
        for node, index in readers(tensor):
            if index == 0 and node.op == "QuantizeLinear":
                if (affine := self.of(node)) is not None:
                    yield affine
            elif (index == 0 and _hands_on(node)) or node.op == "Concat":
                for out in node.outputs:
                    yield from self.wanted(out)

    def behind(self, tensor: gs.Tensor) -> Affine | None:
        """Of the DequantizeLinear that the tensor comes from, data movement on the way."""
        node = producer(tensor)
        if node is None or is_constant(tensor):
            return None
        if node.op == "DequantizeLinear":
            return None if is_constant(node.inputs[0]) else self.of(node)
        if _casts(node):
            return self.behind(node.inputs[0])
        if self.why_stays(node) is not None:
            return None
        found = {self.behind(t) for t in _operands(node) if not is_constant(t)}
        return found.pop() if len(found) == 1 else None

    def why_stays(self, node: gs.Node) -> str | None:
        """Why the node cannot move integers where it moves floats; None: it can."""
        if _casts(node) or not (_hands_on(node) or node.op == "Concat"):
            return "it makes new values"
        if not self.integer_moves:
            return "the target wants pairs around data movement"
        if self.model.graph_of(node) is not self.model.graph:
            return "it is in a body"
        return why_not_on_integers(node, np.int8, self.model.opset)

    def push(self, dequantize: gs.Node) -> list[gs.Node]:
        """Bring a DequantizeLinear behind the data movement on the way to a Q that undoes it.

        Such a Q goes. Returns the DequantizeLinear behind what has been moved.
        """
        affine, (real,) = self.known[id(dequantize)], dequantize.outputs
        made = []
        for node, index in [*readers(real), *_recast(real)]:
            if node.op == "QuantizeLinear" and self.of(node) == affine:
                if not self.model.is_output(node.outputs[0]):
                    self.model.replace(node.outputs[0], dequantize.inputs[0])
            elif index < 0:  # floats of 32 bits again: their DequantizeLinear writes them
                made.append(self._rewritten(dequantize, node))
            elif (index == 0 or node.op == "Concat") and any(
                affine in self.wanted(t) for t in node.outputs
            ):
                made += self.moved(node, affine)
        return made

    def _rewritten(self, dequantize: gs.Node, cast: gs.Node) -> gs.Node:
        """A DequantizeLinear of its own for what a Cast made of its result."""
        out = cast.outputs[0]
        cast.outputs.clear()
        cast.inputs.clear()
        return self.dequantize(dequantize.inputs[0], self.known[id(dequantize)], out)

    def pull(self, tensor: gs.Tensor, affine: Affine) -> None:
        """Bring DequantizeLinear behind the data movement that makes the tensor."""
        node = producer(tensor)
        if node is None or node.op == "DequantizeLinear":
            return
        if _casts(node):
            self.pull(node.inputs[0], affine)
        if self.why_stays(node) is None:
            for operand in _operands(node):
                self.pull(operand, affine)
            self.moved(node, affine)

    def moved(self, node: gs.Node, affine: Affine) -> list[gs.Node]:
        """Let a node move integers if it can and all it moves is dequantized so; the new DQs."""
        dtype = FORMATS[affine.type].dtype
        if self.why_stays(node) or why_not_on_integers(node, dtype, self.model.opset):
            return []
        sources = [self._integers(tensor, affine, node) for tensor in _operands(node)]
        if any(source is None for source in sources):
            return []
        for index, source in enumerate(sources):
            node.inputs[index] = source
        if node.op == "Pad":
            pad_with(node, self.constants_of(affine, node.name)[1])
        made = []
        for index, tensor in enumerate(list(node.outputs)):
            if tensor.name and (node.op != "MaxPool" or index == 0):  # then come indices
                integers = gs.Variable(self.model.unique(f"{tensor.name}_q"), dtype, tensor.shape)
                node.outputs[index] = integers
                made.append(self.dequantize(integers, affine, tensor))
        return made

    def _integers(self, tensor: gs.Tensor, affine: Affine, node: gs.Node) -> gs.Tensor | None:
        """What stands for the node's operand; None if that is not dequantized so."""
        if node.op == "Concat" and (values := values_of(tensor)) is not None:
            return self.model.constant(f"{tensor.name}_q", affine.quantize(values))
        before = producer(tensor)
        if before is None or before.op != "DequantizeLinear" or self.of(before) != affine:
            return None
        return before.inputs[0]

    def resigned(self, integers: gs.Tensor, now: Affine, wanted: Affine, name: str) -> gs.Tensor:
        """The integers in the type of the other sign; themselves where it is the same.

        BitwiseXor and Cast would do it as well, not sooner in ONNX Runtime, and from opset 18 on.
        """
        if now == wanted:
            return integers
        real = self._emit("DequantizeLinear", integers, now, f"{name}_signed", FLOAT32)
        return self.quantize(real, wanted, f"{name}_resigned")

    def quantize(self, tensor: gs.Tensor, affine: Affine, name: str) -> gs.Tensor:
        """QuantizeLinear behind a tensor of floats."""
        if tensor.dtype is not None and np.dtype(tensor.dtype) != FLOAT32:
            tensor = self.model.emit(
                "Cast", tensor, name=f"{name}_float32", dtype=FLOAT32, shape=tensor.shape,
                to=FLOAT32,
            )  # fmt: skip
        return self._emit("QuantizeLinear", tensor, affine, name, FORMATS[affine.type].dtype)

    def dequantize(self, integers: gs.Tensor, affine: Affine, real: gs.Tensor) -> gs.Node:
        """DequantizeLinear that writes `real`, through a Cast where that is of other floats."""
        made = self._emit("DequantizeLinear", integers, affine, real.name, FLOAT32)
        node, last = made.inputs[0], made.inputs[0]
        if real.dtype is not None and np.dtype(real.dtype) != FLOAT32:
            last = self.model.emit("Cast", made, name=real.name, to=np.dtype(real.dtype)).inputs[0]
        last.outputs[0] = real
        return node

    def constants_of(self, affine: Affine, name: str) -> tuple[gs.Constant, ...]:
        """Scale and zero point, once for each."""
        if affine not in self.constants:
            self.constants[affine] = constants(self.model, affine, name)
        return self.constants[affine]

    def _emit(
        self, op: str, tensor: gs.Tensor, affine: Affine, name: str, dtype: np.dtype[Any]
    ) -> gs.Tensor:
        wide = FORMATS[affine.type].bits > 8 and self.model.opset < 21
        made = self.model.emit(
            op, tensor, *self.constants_of(affine, name), name=name, dtype=dtype,
            shape=tensor.shape, domain=MICROSOFT if wide else None,
        )  # fmt: skip
        self.known[id(made.inputs[0])] = affine
        return made


def _affine(node: gs.Node) -> Affine | None:
    """The parameters, if they are one constant scale and a zero point of an integer type."""
    scale = values_of(node.inputs[1])
    has_zero = len(node.inputs) > 2 and bool(node.inputs[2].name)
    zero = values_of(node.inputs[2]) if has_zero else np.zeros((), np.int8)
    integers = node.outputs[0] if node.op == "QuantizeLinear" else node.inputs[0]
    kind = node.inputs[2].dtype if has_zero else integers.dtype
    type_ = "" if kind is None else str(np.dtype(kind))
    if scale is None or zero is None or scale.size != 1 or zero.size != 1:
        return None
    if type_ not in TYPES or scale.dtype != FLOAT32 or not 0 < scale.item() < np.inf:
        return None
    return Affine(type_, float(scale.item()), int(zero.item()))


def _casts(node: gs.Node) -> bool:
    """Whether the node makes floats of other floats."""
    kinds = [node.inputs[0].dtype, node.outputs[0].dtype] if node.op == "Cast" else [None]
    return all(kind is not None and np.dtype(kind) in FLOATS for kind in kinds)


def _hands_on(node: gs.Node) -> bool:
    """Whether the values that the node makes are those of its first input."""
    moves = node.op in OPS and OPS[node.op].role == "move"
    return moves or node.op == "Identity" or _casts(node)


def _operands(node: gs.Node) -> list[gs.Tensor]:
    """What the node moves."""
    return list(node.inputs) if node.op == "Concat" else [node.inputs[0]]


def _recast(real: gs.Tensor) -> list[tuple[gs.Node, int]]:
    """Casts that make float32 again of what a Cast has made of the tensor; each with index -1."""
    casts = [node for node, _ in readers(real) if _casts(node)]
    return [
        (again, -1)
        for node in casts
        for again, _ in readers(node.outputs[0])
        if _casts(again) and np.dtype(again.outputs[0].dtype) == FLOAT32
    ]
