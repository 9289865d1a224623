"""Sample inputs: from .npz files, folders of them, Python functions, arrays in memory.

A sample is a feed: one array for each input of the model. Files are read when they are asked for.
"""

from __future__ import annotations

import importlib
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.errors import DataError
from onnxq.model import Model

Feed = dict[str, NDArray[Any]]
LABELS = "labels"
SKIPPED = 1 << 18  # bytes read at a time to come to where reading begins


@dataclass(frozen=True, slots=True)
class Samples:
    """A sequence of feeds that is read anew each time it is gone through.

    labels: one row a sample, sample axis first, kept for metrics; None without. counts: how many
    true samples each feed holds when the model's batch is larger than 1.
    """

    read: Callable[[int, int], Iterator[Feed]]  # (start, stop)
    size: int
    description: str
    labels: NDArray[Any] | None = None
    synthetic: bool = False
    start: int = 0
    batch: int = 1

    def __iter__(self) -> Iterator[Feed]:
        return self.read(self.start, self.start + self.size)

    def __len__(self) -> int:
        return self.size

    def take(self, n: int) -> Samples:
        """The first n feeds."""
        n = min(n, self.size)
        labels = None if self.labels is None else self.labels[: n * self.batch]
        return replace(self, size=n, labels=labels)

    def skip(self, n: int) -> Samples:
        """All but the first n feeds."""
        n = min(n, self.size)
        labels = None if self.labels is None else self.labels[n * self.batch :]
        return replace(self, start=self.start + n, size=self.size - n, labels=labels)


Spec = str | os.PathLike[str] | Mapping[str, Any] | Iterable[Mapping[str, Any]] | Callable[[], Any]


def open_samples(spec: Spec, model: Model) -> Samples:
    """Samples for the model's inputs.

    spec: an .npz file or a mapping (arrays named as the inputs, sample axis first), a folder of
    .npz files (one a sample), 'module:function' or a function (yields feeds), or an iterable of
    feeds. An array `labels` is kept for metrics. Arrays of the input's rank are cut into batches of
    the model's fixed batch size (1 where it is free), those of one rank more hold one sample a row.
    Safe conversions (float64 to float32, integers that fit) are made.

    Raises DataError: no samples, names that are no inputs, missing inputs, shapes and types
    that the model does not take, NaN or infinities (when the sample is read).
    """
    if isinstance(spec, Samples):
        return spec
    if isinstance(spec, Mapping):
        arrays = {name: np.asarray(array) for name, array in spec.items()}
        labels = arrays.get(LABELS)
        return _stacked(
            {n: _Memory(a) for n, a in arrays.items()}, labels, model, "arrays in memory"
        )
    if isinstance(spec, str | os.PathLike):
        return _from_path(os.fspath(spec), model)
    if callable(spec):
        return _from_function(spec, getattr(spec, "__name__", "function"), model)
    feeds = list(spec)
    return _listed(lambda i: dict(feeds[i]), len(feeds), "feeds in memory", model)


def _from_path(text: str, model: Model) -> Samples:
    path = Path(text)
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise DataError(f"{text}: no .npz files in this folder; each one is a sample")
        return _listed(
            lambda i: _load(files[i]), len(files), f"{len(files)} files of {text}", model
        )
    if path.is_file():
        columns, labels = _members(path)
        return _stacked(columns, labels, model, text)
    module, colon, name = text.rpartition(":")
    if colon and module.replace(".", "").replace("_", "").isalnum():
        return _from_function(_imported(module, name), text, model)
    raise DataError(
        f"{text}: no such file or folder; give an .npz, a folder of .npz or module:function"
    )


def _load(path: Path) -> Feed:
    with _reading(path), np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise DataError for whatever is wrong with an .npz file."""
    try:
        yield
    except (OSError, ValueError, EOFError, AttributeError, zlib.error, zipfile.BadZipFile) as e:
        text = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DataError(f"{path}: cannot be read as .npz: {text}") from e


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
                columns[name] = _Memory(archive[name])
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


class Column(Protocol):
    """One array with the sample axis first, read row by row."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        ...

    def rows(self, start: int, size: int) -> Iterator[NDArray[Any]]:
        """Runs of `size` rows from `start` on; the last one may be shorter."""
        ...


@dataclass(frozen=True, slots=True)
class _Memory:
    """A column that is an array."""

    array: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def rows(self, start: int, size: int) -> Iterator[NDArray[Any]]:
        for i in range(start, len(self.array), size):
            yield self.array[i : i + size]


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


def _imported(module: str, name: str) -> Callable[[], Any]:
    sys.path.insert(0, os.getcwd())  # as python -m does
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as e:  # whatever the user's module raises
        raise DataError(f"{module}:{name}: {type(e).__name__}: {e}") from e
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise DataError(f"{module}:{name} is not a function that yields feeds")
    return found  # type: ignore[no-any-return]


def _from_function(function: Callable[[], Any], text: str, model: Model) -> Samples:
    inputs = _inputs(model)

    def feeds() -> Iterator[Feed]:
        try:
            yield from function()
        except DataError:
            raise
        except Exception as e:  # whatever the user's function raises
            raise DataError(f"{text}: {type(e).__name__}: {e}") from e

    labels, size = [], 0
    for feed in feeds():
        if not isinstance(feed, Mapping):
            raise DataError(
                f"{text}: yields {type(feed).__name__}, not a dict of arrays by input name"
            )
        size += 1
        if LABELS in feed:
            labels.append(np.asarray(feed[LABELS]))
    if not size:
        raise DataError(f"{text}: yields no samples")

    def read(start: int, stop: int) -> Iterator[Feed]:
        for i, feed in enumerate(islice(feeds(), start, stop), start):
            yield _one(feed, inputs, i)

    return Samples(read, size, text, _joined(labels, size))


def _joined(labels: list[NDArray[Any]], size: int) -> NDArray[Any] | None:
    if len(labels) != size:
        return None
    return np.concatenate([np.atleast_1d(x) for x in labels])


def _listed(load: Callable[[int], Feed], size: int, text: str, model: Model) -> Samples:
    """One feed an item."""
    if not size:
        raise DataError(f"{text}: no samples")
    inputs = _inputs(model)
    first = load(0)
    _check_names(first, inputs, text)

    def read(start: int, stop: int) -> Iterator[Feed]:
        for i in range(start, stop):
            yield _one(load(i), inputs, i)

    labels = None
    if LABELS in first:
        labels = _joined([np.asarray(load(i).get(LABELS)) for i in range(size)], size)
    return Samples(read, size, text, labels)


def _one(feed: Mapping[str, Any], inputs: Mapping[str, gs.Variable], index: int) -> Feed:
    _check_names(feed, inputs, f"sample {index}")
    return {
        name: fitted(_with_batch(np.asarray(feed[name]), tensor), tensor, index)
        for name, tensor in inputs.items()
        if name in feed
    }


def _with_batch(array: NDArray[Any], tensor: gs.Variable) -> NDArray[Any]:
    """A sample without its batch axis gets one, where the model's batch may be 1."""
    shape = tensor.shape
    lacks = shape is not None and array.ndim == len(shape) - 1
    return array[None] if lacks and (not isinstance(shape[0], int) or shape[0] == 1) else array


def _stacked(
    columns: Mapping[str, Column], labels: NDArray[Any] | None, model: Model, text: str
) -> Samples:
    """Arrays with the sample axis first."""
    inputs = _inputs(model)
    _check_names(columns, inputs, text)
    data = {name: columns[name] for name in inputs if name in columns}
    counts = {name: column.shape[0] if column.shape else 0 for name, column in data.items()}
    if len(set(counts.values())) != 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"{text}: arrays of different numbers of samples: {listed}")
    (total,) = set(counts.values())
    if not total:
        raise DataError(f"{text}: no samples: give arrays with the sample axis first")
    if labels is not None and len(np.atleast_1d(labels)) != total:
        raise DataError(f"{text}: {len(np.atleast_1d(labels))} labels for {total} samples")
    batch = _batch_size(data, inputs)

    def read(start: int, stop: int) -> Iterator[Feed]:
        runs = {name: column.rows(start * batch, batch) for name, column in data.items()}
        for i in range(start, stop):
            yield {
                name: fitted(_cut(next(run), data[name], inputs[name], batch), inputs[name], i)
                for name, run in runs.items()
            }

    return Samples(read, -(-total // batch), text, labels, batch=batch)


def _holds_samples(column: Column, tensor: gs.Variable) -> bool:
    """Whether each row is a whole sample, without the input's own first axis being the batch."""
    return tensor.shape is not None and len(column.shape) == len(tensor.shape) + 1


def _batch_size(data: Mapping[str, Column], inputs: Mapping[str, gs.Variable]) -> int:
    """The model's fixed batch size; 1 where it is free, or where a row is a whole sample."""
    fixed = [
        inputs[name].shape[0]
        for name, column in data.items()
        if inputs[name].shape
        and not _holds_samples(column, inputs[name])
        and isinstance(inputs[name].shape[0], int)
    ]
    return int(max(fixed, default=1))


def _cut(part: NDArray[Any], column: Column, tensor: gs.Variable, batch: int) -> NDArray[Any]:
    if _holds_samples(column, tensor):
        return np.asarray(part[0])
    if len(part) < batch:  # the last batch is filled up with its last sample
        part = np.concatenate([part, np.repeat(part[-1:], batch - len(part), 0)])
    return part


def _inputs(model: Model) -> dict[str, gs.Variable]:
    return {tensor.name: tensor for tensor in model.graph.inputs}


def _check_names(feed: Mapping[str, Any], inputs: Mapping[str, gs.Variable], where: str) -> None:
    stray = sorted(set(feed) - set(inputs) - {LABELS})
    missing = sorted(set(inputs) - set(feed))
    if stray or missing:
        what = f"{stray[0]!r} is no input" if stray else f"input {missing[0]!r} is missing"
        raise DataError(f"{where}: {what}; the model's inputs are {describe(inputs.values())}")


def describe(inputs: Iterable[gs.Variable]) -> str:
    """Inputs as text: name, shape, type."""
    return ", ".join(f"{t.name!r} {_shape_text(t.shape)} {t.dtype}" for t in inputs)


def _shape_text(shape: Sequence[Any] | None) -> str:
    if shape is None:
        return "of any shape"
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


def fitted(array: NDArray[Any], tensor: gs.Variable, index: int) -> NDArray[Any]:
    """The array in the input's type; raises DataError when it does not fit the input."""
    where = f"sample {index}: input {tensor.name!r}"
    shape = tensor.shape
    if shape is not None:
        same_rank = array.ndim == len(shape)
        if not same_rank or any(
            isinstance(d, int) and d != n for d, n in zip(shape, array.shape, strict=True)
        ):
            got = _shape_text(array.shape)
            raise DataError(f"{where} is {got}, the model wants {_shape_text(shape)}")
    if array.dtype.kind in "fc" and not np.isfinite(array).all():
        what = "NaN" if np.isnan(array).any() else "infinite values"
        raise DataError(f"{where} has {what}")
    if tensor.dtype is None or array.dtype == tensor.dtype:
        return np.ascontiguousarray(array).reshape(array.shape)
    return _converted(array, np.dtype(tensor.dtype), where)


def _converted(array: NDArray[Any], dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    is_safe = array.dtype.kind in "biuf" and dtype.kind not in "OSU"
    if is_safe and array.dtype.kind == "f" and dtype.kind in "biu":
        is_safe = False
    if is_safe:
        with np.errstate(over="ignore", invalid="ignore"):
            made = array.astype(dtype)
        if dtype.kind not in "iu" or np.array_equal(made, array):
            return np.ascontiguousarray(made).reshape(array.shape)
    raise DataError(f"{where} is {array.dtype}, the model wants {dtype}")
