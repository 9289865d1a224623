"""Sample inputs made up from the graph, for when there is no data.

They respect what the graph says of its inputs: ids stay inside the table they index, masks are
ones, scalars that are compared with constants take such a constant. Ranges calibrated on them are a
guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq import runtime
from onnxq.data import Feed, Samples, describe
from onnxq.errors import DataError
from onnxq.model import Model, readers, values_of
from onnxq.operands import quantizers

# Sizes tried for free axes, in turn: of images' sides first, then of sequences.
SIZES = (64, 224, 32, 16, 128, 256, 512, 1, 4096, 16000)
MOST = 1 << 28  # elements in one sample: two gigabytes while it is drawn
PASSING = frozenset(
    [
        "Cast",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Flatten",
        "Identity",
        "Slice",
        "Transpose",
        "Expand",
    ]
)


@dataclass(frozen=True, slots=True)
class Input:
    """How values of one input are drawn: integers from [low, high), floats from a normal.

    ends: of the range that the model quantizes the input in; floats are then drawn from it.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype[Any]
    low: int = 0
    high: int = 2
    ends: tuple[float, float] | None = None

    def sides(self, size: int) -> list[int]:
        """The shape where free axes (some exporters write -1) get `size`, the first one 1."""
        return [
            d if isinstance(d, int) and d >= 0 else 1 if axis == 0 else size
            for axis, d in enumerate(self.shape)
        ]

    def draw(self, rng: np.random.Generator, size: int) -> NDArray[Any]:
        """One value; free axes get `size`."""
        shape = self.sides(size)
        if self.dtype.kind == "f":
            drawn = rng.normal(0, 1, shape)
            if self.ends is not None:
                low, high = self.ends
                drawn = np.clip((low + high) / 2 + drawn * (high - low) / 4, low, high)
            return np.asarray(drawn, self.dtype)
        return np.asarray(rng.integers(self.low, self.high, shape), self.dtype)


def synthetic_samples(model: Model, n: int, seed: int = 0) -> Samples:
    """N samples drawn with a fixed seed that the model runs on.

    Raises DataError when no sizes for the free axes are found that the model runs with.
    """
    batch = {t.shape[0] for t in model.graph.inputs if t.shape} - {None}
    inputs = [_input(model, t, batch) for t in model.graph.inputs]
    session = runtime.session(model)
    sizes = (s for s in SIZES if sum(prod(i.sides(s)) for i in inputs) <= MOST)
    size = next((s for s in sizes if _runs(session, _feed(inputs, s, seed, 0))), None)
    if size is None:
        raise DataError(
            "no synthetic input was found that the model runs on: give samples with --data; "
            f"its inputs are {describe(model.graph.inputs)}"
        )

    def read(start: int, stop: int) -> Iterator[Feed]:
        for i in range(start, stop):
            yield _feed(inputs, size, seed, i)

    return Samples(read, n, f"{n} synthetic samples, seed {seed}", synthetic=True)


def _feed(inputs: list[Input], size: int, seed: int, index: int) -> Feed:
    rng = np.random.default_rng([seed, index])
    return {i.name: i.draw(rng, size) for i in inputs}


def _runs(session: Any, feed: Feed) -> bool:
    try:
        outputs = session.run(None, feed)
    except Exception:  # whatever onnxruntime throws: these sizes do not fit
        return False
    return all(
        np.isfinite(o).all() for o in outputs if getattr(o, "dtype", np.dtype("O")).kind == "f"
    )


def _input(model: Model, tensor: gs.Variable, batch: set[int | str]) -> Input:
    """What to draw; axes that are called like some input's first one are the batch, of size 1."""
    if tensor.dtype is not None and np.dtype(tensor.dtype).kind not in "fiub":
        what = "strings" if tensor.dtype == object else str(np.dtype(tensor.dtype))
        raise DataError(
            f"input {tensor.name!r} is of {what}: no synthetic samples are made of these; "
            "give samples with --data"
        )
    if tensor.shape is None or tensor.dtype is None:
        raise DataError(
            f"input {tensor.name!r} has no known shape or type: give samples with --data"
        )
    dtype = np.dtype(tensor.dtype)
    low, high = _bounds(tensor, dtype)
    shape = tuple(1 if isinstance(d, str) and d in batch else d for d in tensor.shape)
    return Input(tensor.name, shape, dtype, low, high, _quantized_range(model, tensor))


def _quantized_range(model: Model, tensor: gs.Variable) -> tuple[float, float] | None:
    """What the model can represent of an input that it quantizes, or did (`Model.ranges`)."""
    found = [q.params for q in quantizers(tensor) if q.params is not None]
    found = [*model.ranges.get(tensor.name, ()), *found]
    ends = [p.ends for p in found if p.scale.ndim == 0]
    return (min(e[0] for e in ends), max(e[1] for e in ends)) if ends else None


def _bounds(tensor: gs.Variable, dtype: np.dtype[Any]) -> tuple[int, int]:
    """[low, high) for an integer input, from what reads it."""
    todo, seen = [tensor], set[int]()
    is_mask = dtype == np.bool_
    while todo:
        for node, index in readers(todo.pop()):
            if node.op in ("Gather", "GatherElements") and index == 1:
                table = node.inputs[0].shape
                axis = int(node.attrs.get("axis", 0))
                rows = table[axis] if table and -len(table) <= axis < len(table) else None
                if isinstance(rows, int) and rows > 0:
                    return 0, rows
            if node.op == "Equal":
                other = values_of(node.inputs[1 - index])
                if other is not None and other.size == 1 and dtype.kind in "iu":
                    return int(other.reshape(())), int(other.reshape(())) + 1
            is_mask |= node.op in ("Sub", "Mul", "Where", "ReduceSum", "Not", "And")
            if id(node) not in seen and node.op in PASSING:
                seen.add(id(node))
                todo.extend(node.outputs)
    if dtype == np.uint8:
        return 0, 256
    return (1, 2) if is_mask else (0, 2)
