"""Constants of which many values are one and the same, as a bitmap and the others.

    i = Max(Gather(PLACES, bytes) + CumSum(Gather(COUNTS, bytes)), 0)        [bytes, 8], int32
    W = Reshape(Gather(values, i))

Each bit says whether a value is another than the commonest (of weights: zero), the lowest bit of a
byte first. values: the commonest one, then the others in their order. COUNTS has the bits that are
set in a byte, PLACES [256, 8] which of them a bit is, from 1 on, and a huge negative number where
it is not set: index 0. Summed are bytes, not bits: of 10 M float weights, half of them zeros,
onnxruntime makes a matrix in 0.6 s at load (0.14 s as they are; by sums of bits 1.8 s), with 22
bytes a weight on the way: it keeps what it folds until all is folded.

Gather reads no 4-bit numbers (onnxruntime 1.31): these are cast to 8 bits, and back if somebody
needs them as they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxq.graphs import DEFAULT_DOMAIN
from onnxq.model import Model, producer, values_of
from onnxq.passes.encodings import Emitter
from onnxq.tensors import readers, redirect
from onnxq.weights import Weight, bytes_in, data_type_of, stored_size, values_in

SINCE = 12  # Max of integers; CumSum is of 11
WIDENED = {
    "int4": np.dtype(np.int8), "int2": np.dtype(np.int8),
    "uint4": np.dtype(np.uint8), "uint2": np.dtype(np.uint8),
}  # fmt: skip
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
COUNTS = _BITS.sum(1, dtype=np.int32)
PLACES = np.where(_BITS > 0, np.cumsum(_BITS, 1, dtype=np.int32), np.int32(-(1 << 30)))
TABLES = COUNTS.nbytes + PLACES.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Bitmap:
    """A constant's values: bytes of a bit each, the commonest and the others, the shape."""

    bits: NDArray[np.uint8]
    values: NDArray[Any]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, dense: NDArray[Any], fill: Any) -> Bitmap:
        """Of values, many of which are `fill`."""
        flat = dense.reshape(-1)
        is_other = flat != np.asarray(fill, dense.dtype)
        first = np.full(1, fill, dense.dtype)
        bits = np.packbits(is_other, bitorder="little")
        return cls(bits, np.concatenate([first, flat[is_other]]), dense.shape)

    def dense(self) -> NDArray[Any]:
        """The values as they were."""
        count = prod(self.shape)
        out = np.full(count, self.values[0], self.values.dtype)
        is_other = np.unpackbits(self.bits, count=count, bitorder="little").view(bool)
        out[is_other] = self.values[1:]
        return out.reshape(self.shape)


@dataclass(slots=True, eq=False)
class Tables:
    """COUNTS and PLACES in a model, made when they are first needed."""

    model: Model
    made: tuple[gs.Constant, gs.Constant] | None = None

    def get(self) -> tuple[gs.Constant, gs.Constant]:
        """Both constants."""
        if self.made is None:
            self.made = (
                self.model.constant("bitmap_counts", COUNTS),
                self.model.constant("bitmap_places", PLACES),
            )
        return self.made


def expanded(on: Emitter, bitmap: Bitmap, tables: Tables, *, keep: bool) -> gs.Tensor:
    """Write nodes that compute the constant. keep: also 4-bit numbers in their own type."""
    counts, places = tables.get()
    size, count = bitmap.bits.size, prod(bitmap.shape)
    own = bitmap.values.dtype
    wide = WIDENED.get(str(own), own)

    def emit(op: str, *inputs: gs.Tensor, name: str, shape: tuple[int, ...], **a: Any) -> gs.Tensor:
        return on.emit(op, *inputs, name=name, shape=shape, dtype=np.int32, **a)

    numbers = on.cast(on.constant("bits", bitmap.bits), np.int32, name="bytes")
    each = emit("Gather", counts, numbers, name="counts", shape=(size,))
    axis = on.constant("axis", np.array(0, np.int64))
    before = emit("CumSum", each, axis, name="before", shape=(size,), exclusive=1)
    within = emit("Gather", places, numbers, name="within", shape=(size, 8))
    summed = emit("Add", within, on.reshaped(before, (size, 1)), name="places", shape=(size, 8))
    none = on.constant("none", np.array(0, np.int32))
    index = emit("Max", summed, none, name="index", shape=(size, 8))
    values: gs.Tensor = on.constant("values", bitmap.values)
    if wide != own:
        values = on.cast(values, wide, name="wide")
    made = on.emit("Gather", values, index, name="spread", shape=(size, 8), dtype=wide)
    if size * 8 != count:
        made = on.cut(on.reshaped(made, (size * 8,)), 0, count)
    made = on.reshaped(made, bitmap.shape)
    return on.cast(made, own, name="narrow") if keep and wide != own else made


class Spread(LazyValues):  # type: ignore[misc]
    """The values of a constant that is stored as a bitmap.

    nbytes: of bits and values, or is_plain: of the dense values, as which it will be written.
    """

    def __init__(
        self, bits: gs.Constant, values: gs.Constant, shape: tuple[int, ...], *, is_plain: bool
    ) -> None:
        self.bits, self.numbers, self.shape = bits, values, shape
        self.dtype = np.dtype(values.dtype)
        dense = stored_size(data_type_of(values.dtype), shape)
        self.nbytes = dense if is_plain else bytes_in(bits) + bytes_in(values)

    def load(self) -> NDArray[Any]:
        """The dense values, read-only."""
        out = Bitmap(values_in(self.bits), values_in(self.numbers), self.shape).dense()
        out.flags.writeable = False
        return out


def spread_constant(tensor: gs.Tensor) -> gs.Constant | None:
    """What a tensor that `expanded` made stands for; None for all others. Reads no weights."""
    node = producer(tensor)
    if node is not None and node.op == "Cast" and str(node.outputs[0].dtype) in WIDENED:
        node = producer(node.inputs[0])
    if node is None or node.op != "Reshape" or node.domain not in DEFAULT_DOMAIN:
        return None
    if any(reader.op == "Slice" for reader, _ in readers(node.outputs[0])):
        return None  # which cuts off what fills the last byte
    parts = _parts(node.inputs[0])
    target = values_of(node.inputs[1]) if parts is not None else None
    if parts is None or target is None:
        return None
    known = node.__dict__.get("spread")
    if known is None or (known._values.bits, known._values.numbers) != parts:
        shape = tuple(int(d) for d in target)
        known = node.__dict__["spread"] = Weight(
            parts[1].name, Spread(*parts, shape, is_plain=False)
        )
    return known


def _parts(tensor: gs.Tensor) -> tuple[gs.Constant, gs.Constant] | None:
    """The bits and the values."""
    gather = producer(tensor)
    for op in ("Slice", "Reshape"):
        if gather is not None and gather.op == op:
            gather = producer(gather.inputs[0])
    if gather is None or gather.op != "Gather" or gather.attrs.get("axis", 0):
        return None
    values, index = gather.inputs
    if (cast := producer(values)) is not None and cast.op == "Cast":
        values = cast.inputs[0]
    within = _input(_input(producer(index), "Max"), "Add")
    offsets = _input(_input(producer(index), "Max"), "Add", 1)
    counted = _input(_input(offsets, "Reshape"), "CumSum")
    bits = _looked_up(within, PLACES)
    if not isinstance(values, gs.Constant) or bits is None or len(values.shape) != 1:
        return None
    return (bits, values) if _looked_up(counted, COUNTS) is bits else None


def _input(node: gs.Node | None, op: str, index: int = 0) -> gs.Node | None:
    """What makes an input of the node, if this is that operator."""
    return producer(node.inputs[index]) if node is not None and node.op == op else None


def _looked_up(node: gs.Node | None, table: NDArray[Any]) -> gs.Constant | None:
    """The bytes that index the table."""
    cast = _input(node, "Gather", 1)
    if node is None or cast is None or cast.op != "Cast":
        return None
    bits, known = cast.inputs[0], values_of(node.inputs[0])
    if known is None or known.shape != table.shape or not np.array_equal(known, table):
        return None
    is_bytes = isinstance(bits, gs.Constant) and str(bits.dtype) == "uint8"
    return bits if is_bytes and len(bits.shape) == 1 else None


def restored(model: Model, *, floats: bool = False) -> list[tuple[gs.Node, gs.Constant]]:
    """Let all that reads such a constant read it as one, in place; (the last node, the constant).

    floats: only those of floats. Values stay where they are stored until somebody looks at them.
    """
    found = []
    for node in model.nodes("Reshape", "Cast"):
        constant = spread_constant(node.outputs[0])
        if constant is None or model.is_output(node.outputs[0]):
            continue
        if not floats or np.dtype(constant.dtype).kind == "f":
            held = constant._values
            constant._values = Spread(held.bits, held.numbers, held.shape, is_plain=True)
            redirect(node.outputs[0], constant)
            found.append((node, constant))
    if found:
        model.sweep()
    return found
