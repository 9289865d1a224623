"""Samples from NumPy's files: an .npz or .npy of many samples, folders of one sample a file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from onnxq.data.columns import Column, Memory, listed, stacked
from onnxq.data.fitting import only_input
from onnxq.data.samples import LABELS, Feed, Samples
from onnxq.errors import DataError
from onnxq.model import Model

SKIPPED = 1 << 18  # bytes read at a time to come to where reading begins


def from_npz(path: Path, model: Model) -> Samples:
    """An .npz: arrays named as the inputs, sample axis first, read row by row."""
    columns, labels = _members(path)
    return stacked(columns, labels, model, str(path))


def from_npz_folder(files: list[Path], text: str, model: Model) -> Samples:
    """A sample a file, arrays named as the inputs."""
    return listed(lambda i: _load(files[i]), len(files), text, model)


def from_npy(path: Path, model: Model) -> Samples:
    """A .npy for the only input, sample axis first; it is mapped into memory, not read."""
    name = only_input(model, str(path), "a .npy holds one array").name
    with _reading(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    return stacked({name: Memory(array)}, None, model, str(path))


def from_npy_folder(files: list[Path], text: str, model: Model) -> Samples:
    """A sample of the only input a file."""
    name = only_input(model, text, "a .npy holds one array").name

    def load(i: int) -> Feed:
        with _reading(files[i]):
            return {name: np.load(files[i], allow_pickle=False)}

    return listed(load, len(files), text, model)


def _load(path: Path) -> Feed:
    with _reading(path), np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise DataError for whatever is wrong with NumPy's files."""
    try:
        yield
    except (OSError, ValueError, EOFError, AttributeError, zlib.error, zipfile.BadZipFile) as e:
        text = str(e).splitlines()[0] if str(e) else type(e).__name__
        if "pickle" in text or "Python objects" in text:
            text = "it holds no array of numbers, save one with numpy.save or numpy.savez"
        raise DataError(f"{path}: cannot be read as {path.suffix}: {text}") from e


def _members(path: Path) -> tuple[dict[str, Column], NDArray[Any] | None]:
    """The arrays of an .npz as columns that are read from the file, and its labels."""
    columns: dict[str, Column] = {}
    labels = None
    with _reading(path), np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            with archive.zip.open(f"{name}.npy") as stream:
                shape, is_fortran, dtype = _header(stream)
            if name == LABELS:
                labels = archive[name]
            if is_fortran or not shape or name == LABELS:
                columns[name] = Memory(archive[name])
            else:
                columns[name] = _Member(path, f"{name}.npy", shape, dtype)
    return columns, labels


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of the .npy that begins here; the stream is then at its values."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0
    if version > (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, save arrays of numbers")
    return shape, is_fortran, dtype


@dataclass(frozen=True, slots=True)
class _Member:
    """A column that stays in its .npz file: one run of rows is in memory."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def rows(self, start: int, size: int) -> Iterator[NDArray[Any]]:
        width = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        with (
            _reading(self.path),
            zipfile.ZipFile(self.path) as archive,
            archive.open(self.name) as stream,
        ):
            _header(stream)
            left = start * width
            while left > 0:  # a seek would read all of it at once
                left -= len(stream.read(min(left, SKIPPED))) or left
            for i in range(start, self.shape[0], size):
                count = min(size, self.shape[0] - i)
                data = stream.read(count * width)
                yield np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])
