"""How indices into a codebook are written into the graph: unpacked at load, in standard operators.

    W = Mul(Gather(codebook, Cast(indices)), s)             Reshape (Slice, Transpose) behind it

Indices lie in rows, [channels, values] (of vectors [channels, values / dim]), as the codes do;
the codebook is [entries] or [entries, dim]. One scale for all is multiplied into the codebook.

Indices of 2 and 4 bits are uint2 and uint4 where the opset has them, those of 7 and 8 uint8. Others
share bytes: `count` of them are the digits of one number in base 2^bits, which is stored in
`size` bytes, and ONNX gets them back with

    index_i = Mod(Div(ReduceSum(Mul(Cast(bytes), 256^j)), 2^(bits i)), 2^bits)              in int32

None of these numbers has more than 24 bits: runtimes that fold in float32 compute them exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.codebooks import Codes
from onnxq.passes.encodings import CAST_SINCE, Emitter
from onnxq.passes.layouts import Held
from onnxq.schemes import FORMATS
from onnxq.scratch import Scratch
from onnxq.weights import Stored

SINCE = 10  # Mod, and Slice with inputs
AXES_SINCE = 13  # ReduceSum with axes as an input
STEP = 1 << 16  # numbers that are packed at once
TYPES = {2: "uint2", 4: "uint4", 7: "uint8", 8: "uint8"}


@dataclass(frozen=True, slots=True)
class Digits:
    """So many indices in so many bytes."""

    count: int
    size: int


PACKED = {
    1: Digits(8, 1), 2: Digits(4, 1), 3: Digits(8, 3),
    4: Digits(2, 1), 5: Digits(3, 2), 6: Digits(4, 3),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class IndexStorage:
    """How indices of some bits are stored: in a type of their own, or several in some bytes."""

    bits: int
    type: str | None = None

    @classmethod
    def of(cls, bits: int, opset: int, allowed: tuple[str, ...] = ()) -> IndexStorage:
        """The shortest one; allowed: the types that the target unpacks at load, all if empty."""
        named = TYPES.get(bits)
        if named is None or opset < CAST_SINCE.get(named, 0):
            return cls(bits)
        fits = named == "uint8" or not allowed or named in allowed
        return cls(bits, named if fits else None)

    @property
    def each(self) -> float:
        """Bits that an index takes."""
        if self.type is not None:
            return FORMATS[self.type].bits
        return 8 * PACKED[self.bits].size / PACKED[self.bits].count


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A weight as it is stored: indices as the constant that they become, codebook and scales.

    shape: of the indices; size: how many values of a row share a scale. scale: None if all are 1.
    """

    held: Held
    storage: IndexStorage
    indices: Stored
    shape: tuple[int, int]
    size: int
    codebook: NDArray[np.float32]
    scale: NDArray[np.float32] | None

    @classmethod
    def of(cls, held: Held, codes: Codes, storage: IndexStorage, scratch: Scratch) -> Coded:
        """Indices go to the scratch. Raises ModelError when its disk is full."""
        dim = codes.codebook.shape[1] if codes.codebook.ndim > 1 else 1
        channels, length = len(codes.indices), held.length
        size = codes.group_size or -(-length // dim) * dim
        shape = channels, -(-length // size) * size // dim
        indices = codes.indices
        if indices.shape != shape:
            indices = np.zeros(shape, np.uint8)
            indices[:, : codes.indices.shape[1]] = codes.indices
        return cls(
            held, storage, _stored(indices, storage, scratch), shape, size, *_absorbed(codes)
        )


def _stored(indices: NDArray[np.uint8], storage: IndexStorage, scratch: Scratch) -> Stored:
    """The indices as bytes; ONNX, too, has the first one of a byte in its lowest bits."""
    if storage.type is not None and FORMATS[storage.type].bits == 8:
        draft = scratch.draft(indices.dtype, indices.shape)
        draft.write(0, indices.reshape(-1))
        return draft.values()
    digits, flat = PACKED[storage.bits], indices.reshape(-1)
    if storage.type is not None:
        draft = scratch.draft(FORMATS[storage.type].dtype, indices.shape)
    else:
        draft = scratch.draft(np.dtype(np.uint8), (-(-flat.size // digits.count), digits.size))
    for first in range(0, flat.size, digits.count * STEP):
        part = pack(flat[first : first + digits.count * STEP], storage.bits)
        draft.write(first // digits.count * digits.size, part.reshape(-1))
    return draft.values()


def coded(on: Emitter, weight: Coded) -> gs.Tensor:
    """Write a weight as indices, codebook and scales."""
    codebook, scale, size, length = weight.codebook, weight.scale, weight.size, weight.held.length
    channels, groups = weight.shape[0], -(-length // size)
    wide = on.emit(
        "Gather", on.constant("codebook", codebook), _unpacked(on, weight),
        name="entries", shape=weight.shape + codebook.shape[1:],
    )  # fmt: skip
    if scale is not None:
        wide = _reshaped(on, wide, (channels, groups, size))
        factor = on.constant("scale", scale.reshape(channels, groups, 1))
        wide = on.emit("Mul", wide, factor, name="unpacked", shape=wide.shape)
    if groups * size != length:
        wide = on.cut(_reshaped(on, wide, (channels, groups * size)), 1, length)
    return on.narrowed(on.as_weight(wide, weight.held))


def _reshaped(on: Emitter, tensor: gs.Tensor, shape: tuple[int, ...]) -> gs.Tensor:
    return tensor if tuple(tensor.shape) == shape else on.reshaped(tensor, shape)


def _absorbed(codes: Codes) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """The codebook, and scales where they are not all one."""
    first = codes.scale.reshape(-1)[:1]
    if (codes.scale == first).all():
        return codes.codebook * first, None
    return codes.codebook, codes.scale


def _unpacked(on: Emitter, weight: Coded) -> gs.Tensor:
    """The indices as int32, of their shape."""
    storage = weight.storage
    if storage.type is not None:
        return on.cast(on.constant(storage.type, weight.indices), np.int32)
    digits = PACKED[storage.bits]
    places = np.int32(256) ** np.arange(digits.size, dtype=np.int32)
    bases = np.int32(1 << storage.bits) ** np.arange(digits.count, dtype=np.int32)
    numbers = on.cast(on.constant("packed", weight.indices), np.int32)
    if digits.size > 1:
        numbers = _summed(on, _emit(on, "Mul", numbers, "places", places[None]))
    found = _emit(on, "Div", numbers, "bases", bases[None])
    found = _emit(on, "Mod", found, "base", np.array(1 << storage.bits, np.int32))
    count = prod(weight.shape)
    if prod(found.shape) != count:
        found = on.cut(on.reshaped(found, (prod(found.shape),)), 0, count)
    return _reshaped(on, found, weight.shape)


def pack(indices: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Indices as bytes, [numbers, size]: the lowest digit first, in the lowest bits."""
    digits = PACKED[bits]
    flat = indices.reshape(-1)
    whole = np.zeros((-(-flat.size // digits.count), digits.count), np.uint8)
    whole.reshape(-1)[: flat.size] = flat
    numbers = np.zeros(len(whole), "<u4")
    for place in range(digits.count):
        numbers |= whole[:, place].astype("<u4") << np.uint32(bits * place)
    return np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, 4)[:, : digits.size])


def _emit(on: Emitter, op: str, numbers: gs.Tensor, name: str, values: NDArray[Any]) -> gs.Tensor:
    shape = np.broadcast_shapes(tuple(numbers.shape), values.shape)
    return on.emit(op, numbers, on.constant(name, values), name=name, shape=shape, dtype=np.int32)


def _summed(on: Emitter, numbers: gs.Tensor) -> gs.Tensor:
    shape, attributes = (numbers.shape[0], 1), {"keepdims": 1}
    if on.model.opset < AXES_SINCE:
        inputs: list[gs.Tensor] = []
        attributes["axes"] = [1]  # type: ignore[assignment]
    else:
        inputs = [on.constant("axis", np.array([1]))]
    return on.emit(
        "ReduceSum", numbers, *inputs, name="summed", shape=shape, dtype=np.int32, **attributes
    )
