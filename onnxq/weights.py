"""Weights: constants that stay where they are stored until they are looked at.

A `Stored` points at the values (in a proto, or in a data file); `Weight.values` reads them and
keeps no copy, so that looking at the weights of a 7 GB model one by one does not fill the memory.
The ways to write a constant as a TensorProto (`inline`, `Placeholders`, `DataWriter`) are here too.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import Message  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx.numpy_helper import from_array, to_array
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxq.datafiles import DataFile, DataFolder
from onnxq.errors import ModelError

Values = Any
"""What a gs.Constant holds: an array, or a LazyValues such as `Stored`."""

UNFIT = "its data do not fit its shape; export the model again"

SMALL = 1024
"""Bytes below which a constant is always written into the model file itself."""

ALIGNMENT = 4096
"""Where tensors begin in a data file: pages, so that a runtime can map them."""

_BITS = {
    onnx.TensorProto.INT2: 2,
    onnx.TensorProto.UINT2: 2,
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.FLOAT4E2M1: 4,
    getattr(onnx.TensorProto, "FLOAT6E2M3", -1): 6,
    getattr(onnx.TensorProto, "FLOAT6E3M2", -1): 6,
}


def without(message: Message, *names: str) -> Any:
    """A copy of a message that leaves some fields out (and does not copy them either)."""
    out = type(message)()
    for descriptor, value in message.ListFields():
        if descriptor.name in names:
            continue
        if descriptor.is_repeated:
            getattr(out, descriptor.name).extend(value)
        elif descriptor.message_type is not None:
            getattr(out, descriptor.name).CopyFrom(value)
        else:
            setattr(out, descriptor.name, value)
    return out


def data_type_of(dtype: Any) -> int:
    """The TensorProto.DataType of a numpy dtype (or of a number that is one already)."""
    if isinstance(dtype, int):
        return dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype).newbyteorder("=")))


def dtype_of(data_type: int) -> np.dtype[Any] | None:
    """The numpy dtype of a TensorProto.DataType; None when undefined or unknown."""
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type)) if data_type else None
    except KeyError:
        return None


def stored_size(data_type: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor as ONNX stores it: elements below 8 bits are packed."""
    dtype = dtype_of(data_type)
    bits = _BITS.get(data_type, 8 * dtype.itemsize if dtype is not None else 0)
    return (int(np.prod(shape, dtype=np.int64)) * bits + 7) // 8


class Stored(LazyValues):  # type: ignore[misc]
    """Values that stay in their TensorProto or data file; never modified."""

    def __init__(self, tensor: onnx.TensorProto, folder: DataFolder | None = None) -> None:
        """Point at the values.

        Raises ModelError when they are in a data file that cannot be used, or of no known type.
        """
        self.tensor = tensor
        self.shape = tuple(tensor.dims)
        self.dtype = dtype_of(tensor.data_type)
        self.file: DataFile | None = None
        self.offset = 0
        if self.dtype is None or min(self.shape, default=0) < 0:
            raise ModelError(
                f"tensor {tensor.name!r}: data type {tensor.data_type} or shape {self.shape} not "
                f"known to onnx {onnx.__version__}; export the model again or install a newer onnx"
            )
        self.nbytes = stored_size(tensor.data_type, self.shape)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            if folder is None:
                raise ModelError(
                    f"tensor {tensor.name!r} is in a data file; load the model by its path"
                )
            if tensor.data_type == onnx.TensorProto.STRING:
                raise ModelError(f"tensor {tensor.name!r}: strings cannot be in a data file")
            self.file, self.offset = folder.locate(tensor, self.nbytes)

    def load(self) -> NDArray[Any]:
        """The values, read-only; a view of the file or of the proto's bytes where possible.

        Raises ModelError when they do not fill the shape.
        """
        try:
            values = self._values()
        except (ValueError, TypeError) as e:
            raise ModelError(f"tensor {self.tensor.name!r}: {UNFIT}") from e
        values.flags.writeable = False
        return values

    def _values(self) -> NDArray[Any]:
        if self.tensor.data_type == onnx.TensorProto.STRING:
            return _strings(self.tensor)
        if self.file is None and not self.tensor.HasField("raw_data"):
            return to_array(self.tensor)
        raw = self.raw()
        if raw.nbytes != self.nbytes:
            raise ValueError(raw.nbytes)
        if self.tensor.data_type in _BITS:
            packed = onnx.TensorProto(
                dims=self.shape, data_type=self.tensor.data_type, raw_data=raw.tobytes()
            )
            return to_array(packed)
        return raw.view(np.dtype(self.dtype).newbyteorder("<")).reshape(self.shape)

    def reshaped(self, shape: tuple[int, ...]) -> Stored:
        """The same values with another shape of as many."""
        out = copy(self)
        out.tensor = without(self.tensor, "dims", "raw_data")
        out.tensor.dims.extend(shape)
        if self.file is None and self.tensor.HasField("raw_data"):
            out.tensor.raw_data = self.tensor.raw_data
        out.shape = shape
        return out

    def raw(self) -> NDArray[np.uint8]:
        """The bytes as stored; only for values in a file or in raw_data."""
        if self.file is not None:
            return self.file.map(self.offset, self.nbytes)
        return np.frombuffer(self.tensor.raw_data, np.uint8)


def _strings(tensor: onnx.TensorProto) -> NDArray[Any]:
    """Texts as str; all as bytes if one of them is not UTF-8."""
    out = np.empty(len(tensor.string_data), object)
    try:
        out[:] = [s.decode() for s in tensor.string_data]
    except UnicodeDecodeError:
        out[:] = list(tensor.string_data)
    return out.reshape(tuple(tensor.dims))


class Weight(gs.Constant):  # type: ignore[misc]
    """A gs.Constant that reads stored values every time instead of keeping a copy of them."""

    @property
    def values(self) -> NDArray[Any]:
        """The values; read-only while they are the stored ones."""
        return values_in(self)

    @values.setter
    def values(self, values: Values) -> None:
        self._values = values


def values_in(constant: gs.Constant) -> NDArray[Any]:
    """The constant's values; stored ones are read and not kept."""
    held = constant._values
    return np.asarray(held.load() if isinstance(held, LazyValues) else held)


def reader(values: Values) -> Callable[[int, NDArray[np.float32]], None]:
    """Reads values from a place on (counted in values), as many as fit, as float32.

    Of those in a data file nothing is mapped: pages of a mapped file count as resident memory.
    """
    is_plain = isinstance(values, Stored) and values.tensor.data_type not in _BITS
    if is_plain and values.file is not None:
        dtype = np.dtype(values.dtype).newbyteorder("<")

        def read(start: int, out: NDArray[np.float32]) -> None:
            raw = out if dtype == out.dtype else np.empty(out.size, dtype)
            place = values.offset + start * dtype.itemsize
            values.file.read(place, raw.view(np.uint8))
            if raw is not out:
                out[...] = raw

        return read
    flat = np.asarray(values.load() if isinstance(values, LazyValues) else values).reshape(-1)

    def copied(start: int, out: NDArray[np.float32]) -> None:
        out[...] = flat[start : start + out.size]

    return copied


def bytes_of(values: Values) -> Callable[[int, int], Any]:
    """Reads bytes as a file has them, from a place on, so many; nothing is mapped."""
    if isinstance(values, Stored) and values.file is not None:
        file, offset = values.file, values.offset

        def read(start: int, count: int) -> Any:
            out = np.empty(count, np.uint8)
            file.read(offset + start, out)
            return out.data

        return read
    whole = raw_bytes(np.asarray(values.load() if isinstance(values, LazyValues) else values))
    return lambda start, count: whole[start : start + count]


def reshaped(values: Values, shape: tuple[int, ...]) -> Values:
    """Values with another shape; stored ones stay where they are."""
    return values.reshaped(shape) if isinstance(values, Stored) else values.reshape(shape)


def bytes_in(constant: gs.Constant) -> int:
    """The size of the constant's values in a file."""
    held = constant._values
    if isinstance(held, Stored) and held.tensor.data_type == onnx.TensorProto.STRING:
        return int(held.tensor.ByteSize())
    if isinstance(held, LazyValues):
        return int(held.nbytes)
    return stored_size(data_type_of(held.dtype), held.shape)


def header(constant: gs.Constant) -> onnx.TensorProto:
    """The constant's name, type, shape and documentation, without the values."""
    held = constant._values
    out = onnx.TensorProto(dims=held.shape)
    if isinstance(held, Stored):
        out.data_type = held.tensor.data_type
        out.metadata_props.extend(held.tensor.metadata_props)
        if held.tensor.HasField("doc_string"):
            out.doc_string = held.tensor.doc_string
        if not held.tensor.HasField("name") and not constant.name:
            return out
    else:
        out.data_type = data_type_of(held.dtype)
    out.name = constant.name
    return out


def inline(constant: gs.Constant) -> onnx.TensorProto:
    """The constant with its values inside; a stored one is returned as it is, not copied."""
    held = constant._values
    if isinstance(held, Stored) and held.file is None:
        if held.tensor.name == constant.name:
            return held.tensor
        out = onnx.TensorProto()
        out.CopyFrom(held.tensor)
        out.name = constant.name
        return out
    out = header(constant)
    if isinstance(held, Stored):
        out.raw_data = held.raw().tobytes()
        return out
    values = values_in(constant)
    native = object if values.dtype.kind in "US" else values.dtype.newbyteorder("=")
    made = from_array(values.astype(native, copy=False))
    out.MergeFrom(without(made, "dims", "data_type", "name"))
    return out


@dataclass(frozen=True, slots=True)
class Placeholders:
    """Writes large constants as a mark that `fetch` turns back into the same values.

    The marks look like external data; shape inference and the version converter carry them along.
    """

    held: list[Values] = field(default_factory=list)

    def __call__(self, constant: gs.Constant) -> onnx.TensorProto:
        """The constant, with a mark in the place of large values."""
        values = constant._values
        is_plain = isinstance(values, np.ndarray | Stored)
        if is_plain and bytes_in(constant) < SMALL:
            return inline(constant)
        if isinstance(values, np.ndarray):  # shared from now on: nobody may write into it
            values = constant._values = values.view()
            values.flags.writeable = False
        out = header(constant)
        out.data_location = onnx.TensorProto.EXTERNAL
        out.external_data.add(key="location", value=f"#{len(self.held)}")
        self.held.append(values)
        return out

    def fetch(self, tensor: onnx.TensorProto) -> Values:
        """The values behind a mark, or stored in the tensor."""
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return Stored(tensor)
        return self.held[int(tensor.external_data[0].value[1:])]


@dataclass(frozen=True, slots=True)
class DataWriter:
    """Writes the values of large constants into a data file, one after the other."""

    file: BinaryIO
    location: str

    def __call__(self, constant: gs.Constant) -> onnx.TensorProto:
        """The constant, with the place of its values in the data file."""
        held, size = constant._values, bytes_in(constant)
        text = data_type_of(held.dtype) == onnx.TensorProto.STRING
        if size < SMALL or text:
            return inline(constant)
        self.file.write(bytes(-self.file.tell() % ALIGNMENT))
        offset = self.file.tell()
        if isinstance(held, Stored) and held.file is not None:
            held.file.copy_to(self.file, held.offset, held.nbytes)
        else:
            self.file.write(raw_bytes(values_in(constant)))
        out = header(constant)
        out.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", offset), ("length", size)):
            out.external_data.add(key=key, value=str(value))
        return out


def raw_bytes(values: NDArray[Any]) -> Any:
    """The bytes of the values, little-endian and packed, without a copy where possible."""
    if data_type_of(values.dtype) in _BITS:
        return from_array(values).raw_data
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


Put = Callable[[gs.Constant], onnx.TensorProto]
Fetch = Callable[[onnx.TensorProto], Values]
