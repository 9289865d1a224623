"""Where operators keep their weights, and which of a weight's values are summed into one result.

A weight is looked at as rows [channels, values]: a row holds what is multiplied and added up for
one output channel, in the order of the weight's axes. Scales belong to rows, or to groups within
them. `Held.rows` and `Held.unrolled` go there and back.

A convolution's row is one over input channels and kernel positions, as they lie in the weight
([O, I kh kw]): groups go through kernel positions first. A transposed one's values are not beside
each other ([I, O, kh, kw]); its rows are over I, kh and kw as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

# Inputs that hold weights, and for each: the axes that are summed over; the operator's input or
# output that they meet there, and along which axis (None: a table, nothing is multiplied).
INPUT, OUTPUT = "input", "output"
Meets = tuple[str, int, int] | None
WEIGHTS: dict[str, tuple[tuple[int, tuple[int, ...], Meets], ...]] = {
    "Conv": ((1, (1, 2, 3, 4), (INPUT, 0, 1)),),
    "ConvTranspose": ((1, (0, 2, 3, 4), (INPUT, 0, 1)),),
    "Gemm": ((1, (0,), (INPUT, 0, -1)),),  # transB: (1,); transA: axis 0
    "MatMul": ((0, (-1,), (INPUT, 1, -2)), (1, (-2,), (INPUT, 0, -1))),
    "Gather": ((0, (-1,), None),),
    "LSTM": ((1, (-1,), (INPUT, 0, -1)), (2, (-1,), (OUTPUT, 0, -1))),
    "GRU": ((1, (-1,), (INPUT, 0, -1)), (2, (-1,), (OUTPUT, 0, -1))),
    "RNN": ((1, (-1,), (INPUT, 0, -1)), (2, (-1,), (OUTPUT, 0, -1))),
}


@dataclass(frozen=True, slots=True)
class Held:
    """A weight of a node: its input index, shape, and the axes (ascending) that are summed over.

    meets: the tensor that the summed values are multiplied with, and its axis. blocks: groups of a
    convolution: how many parts of that axis the weight's output channels are divided among.
    """

    index: int
    shape: tuple[int, ...]
    summed: tuple[int, ...]
    meets: tuple[gs.Tensor, int] | None = None
    blocks: int = 1

    @property
    def key(self) -> tuple[int, ...]:
        """What decides how the weight's values are divided into rows."""
        return self.summed

    @property
    def order(self) -> tuple[int, ...]:
        """The weight's axes with the summed ones last."""
        kept = [a for a in range(len(self.shape)) if a not in self.summed]
        return (*kept, *self.summed)

    @property
    def length(self) -> int:
        """Values in a row."""
        return prod(self.shape[a] for a in self.summed)

    @property
    def taps(self) -> int:
        """Values in a row for each index of the first summed axis: a convolution's kernel."""
        return prod(self.shape[a] for a in self.summed[1:])

    def rows(self, values: NDArray[Any]) -> NDArray[Any]:
        """The weight as [channels, values]; a view where the summed axes are last."""
        return values.transpose(self.order).reshape(-1, self.length)

    def unrolled(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows (or one value a row, [channels, 1]) in the weight's axes."""
        one = rows.shape[1] == 1
        dims = [1 if one and a in self.summed else self.shape[a] for a in self.order]
        return rows.reshape(dims).transpose(np.argsort(self.order))

    def importance(self, squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean squares along the axis that the weight meets, as they meet the rows' values.

        Of shape [1, values], or [channels, values] where convolution groups differ.
        """
        dims = [self.shape[a] for a in self.summed]
        if self.blocks == 1 or len(squares) == dims[0]:
            each = squares.reshape(1, -1)
        else:
            channels = prod(self.shape) // self.length
            each = np.repeat(squares.reshape(self.blocks, -1), channels // self.blocks, axis=0)
        return np.repeat(each, self.length // each.shape[1], axis=1)


def held_by(node: gs.Node) -> Iterator[Held]:
    """The node's inputs that hold weights, whether they are constant or not."""
    if node.domain or node.op not in WEIGHTS:
        return
    for index, axes, meets in WEIGHTS[node.op]:
        if index >= len(node.inputs) or node.inputs[index].shape is None:
            continue
        shape = tuple(node.inputs[index].shape)
        rank = len(shape)
        if node.op == "Gemm" and node.attrs.get("transB", 0):
            axes = (1,)
        summed = tuple(sorted({a % rank for a in axes if -rank <= a < rank}))
        blocks = int(node.attrs.get("group", 1)) if node.op == "Conv" else 1
        yield Held(index, shape, summed, _meets(node, meets), blocks)


def _meets(node: gs.Node, meets: Meets) -> tuple[gs.Tensor, int] | None:
    if meets is None:
        return None
    side, index, axis = meets
    tensors = node.inputs if side == INPUT else node.outputs
    if index >= len(tensors) or not tensors[index].name:
        return None
    if node.op == "Gemm" and node.attrs.get("transA", 0):
        axis = 0
    return tensors[index], axis
