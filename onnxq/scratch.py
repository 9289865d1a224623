"""Where values go that passes make of a model of gigabytes: a file of this run, without a name."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq.datafiles import DataFile
from onnxq.errors import ModelError
from onnxq.weights import Stored, Values, data_type_of, raw_bytes, stored_size

SPILLED = 1 << 20
"""Bytes from which values that passes make are not kept in memory, where a model has data files."""


class Spilled(Stored):
    """Values that a pass has made, in a `Scratch`."""

    def __init__(self, tensor: onnx.TensorProto, file: DataFile, offset: int) -> None:
        super().__init__(tensor)
        self.file, self.offset = file, offset


@dataclass(slots=True)
class Scratch:
    """The file, made when it is first needed. folder: where (None: the system's place for such).

    is_used: whether values go there at all; those of a model that is in memory stay there. Several
    threads may write at once.
    """

    is_used: bool = True
    folder: Path | None = None
    _file: DataFile | None = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def put(self, values: NDArray[Any]) -> Values:
        """The values, written to the file; small ones, or on a full disk, as they are."""
        kind = data_type_of(values.dtype)
        size = stored_size(kind, values.shape)
        if not self.is_used or size < SPILLED or kind == onnx.TensorProto.STRING:
            return values
        try:
            file, offset = self._reserved(size)
            file.write(offset, raw_bytes(values))
        except OSError:
            return values
        return Spilled(onnx.TensorProto(dims=values.shape, data_type=kind), file, offset)

    def draft(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Draft:
        """Values that are about to be written piece by piece, as bytes."""
        tensor = onnx.TensorProto(dims=shape, data_type=data_type_of(dtype))
        size = stored_size(tensor.data_type, shape)
        if not self.is_used or size < SPILLED:
            return Draft(tensor, np.zeros(size, np.uint8))
        try:
            return Draft(tensor, *self._reserved(size))
        except OSError as e:
            raise _full(e, self.folder) from e

    def _reserved(self, size: int) -> tuple[DataFile, int]:
        with self._lock:
            self._file = self._file or DataFile.unnamed(self.folder)
            return self._file, self._file.reserve(size)


@dataclass(frozen=True, slots=True)
class Draft:
    """Bytes of a tensor on their way, into memory or a file."""

    tensor: onnx.TensorProto
    place: NDArray[np.uint8] | DataFile
    offset: int = 0

    def write(self, start: int, data: NDArray[np.uint8]) -> None:
        """Put bytes at a place. Raises ModelError when the disk is full."""
        if isinstance(self.place, DataFile):
            try:
                self.place.write(self.offset + start, data.data)
            except OSError as e:
                raise _full(e, self.place.path.parent) from e
        else:
            self.place[start : start + data.size] = data

    def values(self) -> Stored:
        """The tensor's values, when all is written."""
        if isinstance(self.place, DataFile):
            return Spilled(self.tensor, self.place, self.offset)
        tensor = onnx.TensorProto(dims=self.tensor.dims, data_type=self.tensor.data_type)
        tensor.raw_data = self.place.tobytes()
        return Stored(tensor)


def _full(error: OSError, folder: Path | None) -> ModelError:
    where = "the folder for temporary files (TMPDIR)" if folder is None else folder
    return ModelError(
        f"{where}: cannot be written ({error.strerror or error}); make room there, or choose "
        "another output"
    )
