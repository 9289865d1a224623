"""Data files: where the bytes of weights are, beside a model, or of this run."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq.errors import ModelError
from onnxq.leftovers import create_without_name

CHUNK = 1 << 24
"""Bytes copied at a time from one data file to another."""


class DataFile:
    """A file with the bytes of weights.

    A kept file stays open, so that it can still be read after a save has put another one in its
    place. Not all can be kept: some exporters write one file a tensor, systems limit open files.
    """

    def __init__(self, path: Path, *, keep: bool) -> None:
        self.path = path
        descriptor = os.open(path, _READ)
        self.size = os.fstat(descriptor).st_size
        self._identity = _identity(descriptor)
        self._descriptor: int | None = None
        if keep:
            self._descriptor = descriptor
            weakref.finalize(self, os.close, descriptor)
        else:
            os.close(descriptor)

    @classmethod
    def unnamed(cls, folder: Path | None = None) -> DataFile:
        """A new file to write, that goes with this value. Raises OSError."""
        place = Path(tempfile.gettempdir()) if folder is None else folder
        out = cls.__new__(cls)
        out.path, out.size = place / "temporary", 0
        out._descriptor, out._identity = create_without_name(place), ()
        weakref.finalize(out, os.close, out._descriptor)
        return out

    def reserve(self, size: int) -> int:
        """Make room at the end, in a file of this run; return where. One thread at a time."""
        offset = -(-self.size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self.size = offset + size
        return offset

    def write(self, offset: int, data: Any) -> None:
        """Write bytes, into a file of this run. Raises OSError."""
        assert self._descriptor is not None
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done : done + CHUNK], offset + done)

    def read(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Read as many bytes as fit; nothing stays mapped. Raises ModelError at the file's end."""
        if not hasattr(os, "preadv"):
            out[...] = self.map(offset, out.size)
            return
        view, done = out.data, 0
        with self._open() as descriptor:
            while done < len(view):
                count = os.preadv(descriptor, [view[done : done + CHUNK]], offset + done)
                if not count:
                    raise ModelError(f"{self.path}: became shorter while it was read")
                done += count

    @contextmanager
    def _open(self) -> Iterator[int]:
        if self._descriptor is not None:
            yield self._descriptor
            return
        try:
            descriptor = os.open(self.path, _READ)
        except OSError as e:
            raise ModelError(f"{self.path}: cannot be read any more ({e.strerror})") from e
        try:
            if _identity(descriptor) != self._identity:
                raise ModelError(f"{self.path}: was changed after the model was loaded; load again")
            yield descriptor
        finally:
            os.close(descriptor)

    def map(self, offset: int, size: int) -> NDArray[np.uint8]:
        """A read-only view of bytes; the pages are given back when it is garbage."""
        if size == 0:
            return np.empty(0, np.uint8)
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        with self._open() as descriptor:
            pages = mmap.mmap(
                descriptor, offset + size - start, access=mmap.ACCESS_READ, offset=start
            )
        return np.frombuffer(pages, np.uint8, size, offset - start)

    def copy_to(self, out: BinaryIO, offset: int, size: int) -> None:
        """Append bytes to a file, in pieces, so that a tensor of gigabytes takes megabytes."""
        out.flush()
        with self._open() as descriptor:
            done = self._copied_by_the_system(descriptor, out, offset, size)
            buffer = np.empty(min(size - done, CHUNK), np.uint8)
            while done < size:
                piece = buffer[: size - done]
                self.read(offset + done, piece)
                out.write(piece.data)
                done += piece.size

    def _copied_by_the_system(self, descriptor: int, out: BinaryIO, offset: int, size: int) -> int:
        """How much was copied without coming here; some file systems only share it."""
        done = 0
        with suppress(OSError, AttributeError):  # another file system, or another system
            while done < size:
                count = os.copy_file_range(descriptor, out.fileno(), size - done, offset + done)
                if not count:
                    break
                done += count
        out.seek(0, os.SEEK_END)
        return done


_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)


def _identity(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class DataFolder:
    """The folder of a model, as far as its external data may reach."""

    KEEP = 32
    """Data files held open; the rest are opened when they are read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, DataFile] = {}

    def locate(self, tensor: onnx.TensorProto, size: int) -> tuple[DataFile, int]:
        """The file and offset of a tensor that needs `size` bytes.

        Raises ModelError when the place lies outside of the folder, is missing or too short.
        """
        entries = {entry.key: entry.value for entry in tensor.external_data}
        what = f"tensor {tensor.name!r}"
        try:
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", size))
        except ValueError as e:
            raise ModelError(f"{what}: offset or length of its data is not a number") from e
        location = entries.get("location", "")
        file = self._open(location, what)
        if offset < 0 or length < size or offset + max(length, size) > file.size:
            raise ModelError(
                f"{what}: needs {size} bytes at {offset} of {location!r}, declared {length}, the "
                f"file has {file.size}; download or export the data file again"
            )
        return file, offset

    def _open(self, location: str, what: str) -> DataFile:
        if location in self._files:
            return self._files[location]
        path = self.folder / _inside(location, what)
        try:
            if not path.resolve().is_relative_to(self.folder.resolve()):
                raise ModelError(
                    f"{what}: data file {location!r} is a link that leaves the model's folder; "
                    "copy the real file there"
                )
            if not path.is_file():
                raise ModelError(f"{what}: data file {location!r} is missing beside the model")
            file = DataFile(path, keep=len(self._files) < self.KEEP)
        except (OSError, RuntimeError) as e:  # RuntimeError: links in a circle
            reason = getattr(e, "strerror", None) or str(e)
            raise ModelError(f"{what}: data file {location!r} cannot be read ({reason})") from e
        self._files[location] = file
        return file


def _inside(location: str, what: str) -> PurePosixPath:
    """The location as a path that cannot leave its folder, on any system."""
    path, windows = PurePosixPath(location), PureWindowsPath(location)
    bad = not location or "\0" in location or ".." in path.parts or ".." in windows.parts
    if bad or path.is_absolute() or windows.anchor:
        raise ModelError(
            f"{what}: data location {location!r} is not inside the model's folder; "
            "put the data file beside the model"
        )
    return path
