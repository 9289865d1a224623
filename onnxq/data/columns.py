"""Samples from arrays with the sample axis first, and from lists of feeds.

A column is one such array; it is read row by row, so that it need not be in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.data.fitting import check_names, fitted, fitted_feed, inputs_of
from onnxq.data.samples import LABELS, Feed, Samples
from onnxq.errors import DataError
from onnxq.model import Model


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
class Memory:
    """A column that is an array, which may be mapped from a file."""

    array: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.array.shape

    def rows(self, start: int, size: int) -> Iterator[NDArray[Any]]:
        """Runs of rows, as views."""
        for i in range(start, len(self.array), size):
            yield self.array[i : i + size]


def stacked(
    columns: Mapping[str, Column], labels: NDArray[Any] | None, model: Model, text: str
) -> Samples:
    """Samples from arrays with the sample axis first, in batches of the model's fixed size."""
    inputs = inputs_of(model)
    check_names(columns, inputs, text)
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


def listed(load: Callable[[int], Feed], size: int, text: str, model: Model) -> Samples:
    """Samples that are a feed each; `load` gets the i-th one."""
    if not size:
        raise DataError(f"{text}: no samples")
    inputs = inputs_of(model)
    first = load(0)
    check_names(first, inputs, text)

    def read(start: int, stop: int) -> Iterator[Feed]:
        for i in range(start, stop):
            yield fitted_feed(load(i), inputs, i)

    labels = None
    if LABELS in first:
        labels = joined([np.asarray(load(i).get(LABELS)) for i in range(size)], size)
    return Samples(read, size, text, labels)


def joined(labels: list[NDArray[Any]], size: int) -> NDArray[Any] | None:
    """The labels of all samples as one array; None when some have none."""
    if len(labels) != size:
        return None
    return np.concatenate([np.atleast_1d(x) for x in labels])
