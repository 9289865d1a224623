"""Store weights of layers that compute in floats as 8-bit integers.

    y = Layer(x, W)    =>    y = Layer(x, Mul(Cast(Wq), s))

Runtimes compute the Mul once, when they load the model: the file is a quarter of the size and the
speed is that of floats. (A DequantizeLinear would be computed at every run.) Scales are per output
channel: one for all the products that are summed into one value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Note, Skip
from onnxq.model import Model, values_of
from onnxq.passes.ops import is_constant
from onnxq.passes.sensitive import OUTPUT_SHARE, output_convolutions
from onnxq.schemes import PerChannel, QuantScheme

NAME = "quantize_weights"
# Inputs that hold weights, and for each the axes that are summed over (share a scale).
WEIGHTS: dict[str, tuple[tuple[int, tuple[int, ...]], ...]] = {
    "Conv": ((1, (1, 2, 3, 4)),),
    "ConvTranspose": ((1, (0, 2, 3, 4)),),
    "Gemm": ((1, (0,)),),  # transB: (1,)
    "MatMul": ((0, (-1,)), (1, (-2,))),
    "Gather": ((0, (-1,)),),
    "LSTM": ((1, (-1,)), (2, (-1,))),
    "GRU": ((1, (-1,)), (2, (-1,))),
    "RNN": ((1, (-1,)), (2, (-1,))),
}


# float16 has steps of 2^-24 near zero: scales from here on are right to a 128th.
LEAST: dict[Any, float] = {np.dtype(np.float16): 2.0**-18}


@dataclass(frozen=True, slots=True)
class QuantizeWeights:
    """Weights of at least `smallest` elements that are still floats, in bodies too."""

    smallest: int = 512

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Store weights in integers in place; a note for each, or why not."""
        made: dict[tuple[int, tuple[int, ...]], gs.Tensor] = {}
        notes = []
        spared = _output_layers(model)
        for node in model.nodes(*WEIGHTS):
            if id(node) in spared:
                why = "a small output layer: its result shows each step"
                notes.append(Note(NAME, node.name, why, changed=False))
                continue
            for index, axes in _weights(node):
                try:
                    text = self._store(model, node, index, axes, made)
                except Skip as reason:
                    notes.append(Note(NAME, node.name, str(reason), changed=False))
                else:
                    if text is not None:
                        notes.append(Note(NAME, node.name, text))
        if made:
            model.sweep()
        return notes

    def _store(
        self,
        model: Model,
        node: gs.Node,
        index: int,
        axes: tuple[int, ...],
        made: dict[tuple[int, tuple[int, ...]], gs.Tensor],
    ) -> str | None:
        tensor = node.inputs[index]
        if not is_constant(tensor) or tensor.dtype not in (np.float32, np.float16):
            return None
        if len(tensor.shape) < 2 or prod(tensor.shape) < self.smallest:
            return None
        key = (id(tensor), axes)
        if key not in made:
            # What several graphs read is unpacked once, in the main graph; bodies capture it.
            users = {id(model.graph_of(user)) for user in tensor.outputs}
            made[key] = _unpacked(model, node if len(users) == 1 else None, tensor, axes)
        node.inputs[index] = made[key]
        return f"{node.op}: weights stored as int8, computed in floats"


def _output_layers(model: Model) -> set[int]:
    """Ids of convolutions that write an output, if their weights are a small share of all."""
    last = output_convolutions(model)
    total = sum(prod(t.shape) for t in model.graph.tensors().values() if isinstance(t, gs.Constant))
    small = sum(prod(node.inputs[1].shape or ()) for node in last) <= OUTPUT_SHARE * total
    return {id(node) for node in last} if small else set()


def _weights(node: gs.Node) -> list[tuple[int, tuple[int, ...]]]:
    """Which inputs of the node hold weights, with the axes (not negative) that share a scale."""
    if node.domain:
        return []
    found = []
    for index, axes in WEIGHTS[node.op]:
        if index >= len(node.inputs) or node.inputs[index].shape is None:
            continue
        rank = len(node.inputs[index].shape)
        if node.op == "Gemm" and node.attrs.get("transB", 0):
            axes = (1,)
        found.append((index, tuple(sorted({a % rank for a in axes if -rank <= a < rank}))))
    return found


def _unpacked(
    model: Model, node: gs.Node | None, tensor: gs.Tensor, axes: tuple[int, ...]
) -> gs.Tensor:
    values = np.asarray(values_of(tensor))
    if not np.isfinite(values).all():
        raise Skip("its weight has NaN or infinite values")
    q, scale = quantized(values, axes)
    if (scale < LEAST.get(values.dtype, 0.0)).any():
        raise Skip(f"its weight is too small: {values.dtype} cannot hold the scales")
    integers = model.constant(f"{tensor.name}_int8", q)
    kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    wide = model.emit(
        "Cast",
        integers,
        name=f"{tensor.name}_cast",
        dtype=values.dtype,
        shape=q.shape,
        at=node,
        to=kind,
    )
    factor = model.constant(f"{tensor.name}_scale", scale.astype(values.dtype))
    return model.emit("Mul", wide, factor, name=f"{tensor.name}_unpacked", like=wide, at=node)


def quantized(values: NDArray[Any], axes: tuple[int, ...]) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """Symmetric int8 and the scales, which keep the reduced axes with size 1."""
    wide = values.astype(np.float32)
    scheme = QuantScheme("int8", PerChannel(0))
    lo, hi = wide.min(axes, keepdims=True), wide.max(axes, keepdims=True)
    scale = scheme.params(lo.reshape(-1), hi.reshape(-1), axis=0).scale.reshape(lo.shape)
    limit = scheme.numbers.qmax
    return np.clip(np.rint(wide / scale), -limit, limit).astype(np.int8), scale
