"""Operators that take a weight as integers: where its scales and zero points stand, how it lies.

A new operator is a new row. Sources: onnx Operators.md (QLinearConv, QLinearMatMul, MatMulInteger,
ConvInteger) and ONNX Runtime's docs/ContribOperators.md (the rest, com.microsoft).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.model import values_of
from onnxq.packed import Grid
from onnxq.schemes import FORMATS


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """A weight at an input of a node: the inputs that belong to it, what its grid is.

    read: None where the scale is not at this node. bits: of a number, if several are in a byte.
    """

    index: int
    others: tuple[int, ...]
    form: Literal["qoperator", "nbits", "dynamic"]
    read: Callable[[], Grid] | None
    bits: int | None = None


Rows = Callable[[gs.Node], Iterator[Beside]]


def _given(node: gs.Node, *indices: int) -> list[gs.Tensor | None]:
    """The tensors at inputs, None where there is none: they are there when the node is gone."""
    count = len(node.inputs)
    return [node.inputs[i] if i < count and node.inputs[i].name else None for i in indices]


def _value(tensor: gs.Tensor | None) -> NDArray[Any]:
    """The values of a constant that is there."""
    values = None if tensor is None else values_of(tensor)
    assert values is not None
    return values


def _optional(tensor: gs.Tensor | None) -> NDArray[Any] | None:
    return None if tensor is None else _value(tensor)


def _plain(
    index: int,
    scale: int | None,
    zero: int,
    axis: Callable[[gs.Node], int],
    form: Literal["qoperator", "dynamic"],
) -> Rows:
    """Numbers as DequantizeLinear has them, scales along an axis."""

    def rows(node: gs.Node) -> Iterator[Beside]:
        numbers, factor, points = _given(node, index, index if scale is None else scale, zero)
        along = axis(node)

        def read() -> Grid:
            return Grid.of(_value(numbers), _value(factor), _optional(points), axis=along)

        if index < len(node.inputs):
            others = tuple(i for i in (scale, zero) if i is not None)
            yield Beside(index, others, form, None if scale is None else read)

    return rows


def _all(*parts: Rows) -> Rows:
    def rows(node: gs.Node) -> Iterator[Beside]:
        for part in parts:
            yield from part(node)

    return rows


def _gemm_axis(node: gs.Node) -> int:
    return 0 if node.attrs.get("transB", 0) else 1


def _lstm(node: gs.Node) -> Iterator[Beside]:
    """W [D, I, 4H] and R [D, H, 4H], the transposes of LSTM's; scales [D] or [D, 4H]."""
    for index, scale, zero in ((1, 8, 9), (2, 10, 11)):
        given = _given(node, index, scale, zero)

        def read(given: list[gs.Tensor | None] = given) -> Grid:
            numbers, factor, points = map(_optional, given)
            assert numbers is not None
            assert factor is not None

            def laid(params: NDArray[Any]) -> NDArray[Any]:
                shape = (len(numbers), 1, -1)
                return np.broadcast_to(params.reshape(shape), numbers.shape)

            grid = Grid(numbers, laid(factor), None if points is None else laid(points))
            return grid.map(lambda a: a.transpose(0, 2, 1))

        yield Beside(index, (scale, zero), "dynamic", read)


def unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[Any]:
    """Numbers of 2, 4 or 8 bits from bytes, the lowest bits first: [..., n] -> [..., n * 8 / bits].

    Of the unsigned type of that width.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    kind = FORMATS[f"uint{bits}"].dtype
    return np.asarray(parts.reshape(*packed.shape[:-1], -1).astype(kind))


def _matmul_nbits(node: gs.Node) -> Iterator[Beside]:
    """B [N, blocks, bytes of a block], scales [N, blocks], as the weight [K, N].

    Zero points are packed in the same way, [N, bytes], or of the scales' type; without, the middle.
    g_idx [K]: which block's scale each row has.
    """
    bits, block = int(node.attrs.get("bits", 4)), int(node.attrs["block_size"])
    k, n = int(node.attrs["K"]), int(node.attrs["N"])
    count = -(-k // block)

    given = _given(node, 1, 2, 3, 4)

    def read() -> Grid:
        packed, scale = map(_value, given[:2])
        zero, groups = map(_optional, given[2:])
        numbers = unpacked(packed.reshape(n, -1), bits)[:, :k]
        points: NDArray[Any] = np.full((n, count), 1 << (bits - 1), numbers.dtype)
        if zero is not None and zero.dtype == np.uint8:
            points = unpacked(zero.reshape(n, -1), bits)[:, :count]
        elif zero is not None:
            points = zero.reshape(n, count)
        place = np.arange(k) // block if groups is None else groups[:k]
        grid = Grid(
            numbers, scale.reshape(n, count)[:, place].astype(np.float32, copy=False),
            points[:, place], dtype=scale.dtype,
        )  # fmt: skip
        return grid.map(np.transpose)

    yield Beside(1, (2, 3, 4), "nbits", read if bits in (2, 4, 8) else None, bits)


def _gather_nbits(node: gs.Node) -> Iterator[Beside]:
    """GatherBlockQuantized: 4 bits as such or two a byte (along the last axis), or 8 bits."""
    axis, block = int(node.attrs.get("quantize_axis", 1)), int(node.attrs.get("block_size", 128))
    kind = str(np.dtype(node.inputs[0].dtype))
    bits = int(node.attrs.get("bits", 4)) if kind == "uint8" else 4

    given = _given(node, 0, 2, 3)

    def read() -> Grid:
        numbers, scale = map(_value, given[:2])
        zero = _optional(given[2])
        if kind == "uint8" and bits < 8:
            numbers = unpacked(numbers, bits)
            zero = None if zero is None else unpacked(zero, bits)[..., : scale.shape[-1]]
        if zero is None and kind == "uint8":
            zero = np.full(scale.shape, 1 << (bits - 1), numbers.dtype)
        return Grid.of(numbers, scale, zero, axis=axis, block=block)

    yield Beside(0, (2, 3), "nbits", read, bits if kind == "uint8" else None)


def _last(node: gs.Node) -> int:
    return -1


def _first(node: gs.Node) -> int:
    return 0


_BINARY = _all(
    _plain(0, 1, 2, _last, "qoperator"), _plain(3, 4, 5, _last, "qoperator")
)  # constant operands
INTEGER_WEIGHTS: dict[str, Rows] = {
    "QLinearConv": _plain(3, 4, 5, _first, "qoperator"),
    "QLinearMatMul": _BINARY,
    "QGemm": _plain(3, 4, 5, _gemm_axis, "qoperator"),
    "QLinearAdd": _BINARY,
    "QLinearMul": _BINARY,
    "MatMulInteger": _plain(1, None, 3, _last, "dynamic"),
    "ConvInteger": _plain(1, None, 3, _first, "dynamic"),
    "MatMulIntegerToFloat": _plain(1, 3, 5, _last, "dynamic"),
    "DynamicQuantizeMatMul": _plain(1, 2, 3, _last, "dynamic"),
    "DynamicQuantizeLSTM": _lstm,
    "MatMulNBits": _matmul_nbits,
    "GatherBlockQuantized": _gather_nbits,
}
