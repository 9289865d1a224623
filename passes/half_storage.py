"""Store constants in 16 bits, for operators that compute in float32.

    y = f(x, W)    =>    y = f(x, Cast(W16))

Runtimes that fold constants compute the Cast once, when they load the model: half the file, and the
speed and the arithmetic of float32. Only the weights are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Note
from onnxq.graphs import DEFAULT_DOMAIN
from onnxq.model import Model, readers, values_of
from onnxq.numerics.halving import balanced_halves
from onnxq.passes.halves import FLOAT32, HalfType, is_float32, why_unfit
from onnxq.passes.ops import is_constant

# Their scales are looked for as initializers when kernels are chosen.
PAIRS = ("QuantizeLinear", "DequantizeLinear")


@dataclass(slots=True)
class HalfConstants:
    """Constants in 16 bits, each made once, whoever reads it."""

    model: Model
    half: HalfType
    made: dict[int, gs.Constant] = field(default_factory=dict)
    sources: list[gs.Tensor] = field(default_factory=list)  # kept, so that ids stay theirs

    def of(self, tensor: gs.Tensor) -> gs.Constant:
        """The constant in 16 bits."""
        if id(tensor) not in self.made:
            values = self._rounded(tensor, np.asarray(values_of(tensor)))
            name = f"{tensor.name}_{self.half.name}"
            self.made[id(tensor)] = self.model.constant(name, values)
            self.sources.append(tensor)
        return self.made[id(tensor)]

    def _rounded(self, tensor: gs.Tensor, values: NDArray[Any]) -> NDArray[Any]:
        """To the nearest; in convolutions so that errors cancel."""
        uses = list(readers(tensor))
        if values.ndim < 3 or not all(node.op == "Conv" and i == 1 for node, i in uses):
            return self.half.rounded(values)
        rows = np.ascontiguousarray(values.reshape(len(values), -1))
        return balanced_halves(rows, self.half.dtype).reshape(values.shape)


def store(
    constants: HalfConstants,
    rule: str,
    smallest: int,
    first_share: float,
    floats: Mapping[int, str],
) -> Iterator[Note]:
    """Store float32 matrices and more of at least `smallest` elements, and say so; or why not.

    Biases and the like stay: they are few, and are added to what many products have made.

    first_share: the first ones, if of convolutions, stay float32 while they hold at most so much of
    all values. floats: nodes that are to read what they read, with a reason.
    """
    model, half = constants.model, constants.half
    found = [(t, node) for t, node in _stored(model) if len(t.shape or ()) > 1]
    found = [(t, node) for t, node in found if prod(t.shape) >= smallest]
    left = first_share * sum(prod(tensor.shape or ()) for tensor, _ in found)
    for tensor, node in found:
        size = prod(tensor.shape or ())
        left = left - size if node.op == "Conv" else -1.0
        why = None
        if left >= 0 and not _is_exact(tensor, half):
            why = "among the first, its error would go through all layers"
        why = why or _why_not(model, tensor, floats)
        if why is None:
            why = why_unfit(np.asarray(values_of(tensor)), half)
        if why is not None:
            yield Note(rule, node.name, f"{tensor.name} stays float32: {why}", changed=False)
            continue
        uses = list(readers(tensor))
        narrow = constants.of(tensor)
        # What several graphs read is cast once, in the main one; bodies capture it.
        homes = {id(model.graph_of(user)) for user, _ in uses}
        wide = model.emit(
            "Cast", narrow, name=f"{tensor.name}_float32", dtype=FLOAT32, shape=tensor.shape,
            at=node if len(homes) == 1 else None, to=onnx.TensorProto.FLOAT,
        )  # fmt: skip
        for user, index in uses:
            user.inputs[index] = wide
        yield Note(rule, node.name, f"{size} values of {tensor.name} stored as {half.name}")


def _is_exact(tensor: gs.Tensor, half: HalfType) -> bool:
    """Whether the format holds all values as they are: those of a 16-bit model."""
    values = np.asarray(values_of(tensor))
    return bool((half.rounded(values).astype(FLOAT32) == values).all())


def _stored(model: Model) -> list[tuple[gs.Tensor, gs.Node]]:
    """Float32 constants that nodes read, each with its first reader."""
    found: dict[int, tuple[gs.Tensor, gs.Node]] = {}
    for node in model.nodes():
        for tensor in node.inputs:
            if is_float32(tensor) and is_constant(tensor):
                found.setdefault(id(tensor), (tensor, node))
    return list(found.values())


def _why_not(model: Model, tensor: gs.Tensor, floats: Mapping[int, str]) -> str | None:
    if model.is_output(tensor):
        return "it is an output"
    for node, _ in readers(tensor):
        if id(node) in floats:
            return floats[id(node)]
        if node.op in PAIRS or node.domain not in DEFAULT_DOMAIN:
            return f"{node.op} reads it"
    return None
