"""Samples from a text file of token ids: a sample a line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.data.columns import Memory, listed, stacked
from onnxq.data.fitting import describe, shape_text
from onnxq.data.samples import Feed, Samples
from onnxq.errors import DataError
from onnxq.model import Model

# What inputs beside the ids are filled with, by what is in their names.
FILLERS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "mask": np.copy,  # from 1 for an id, 0 for what was filled up
    "type": np.zeros_like,
    "segment": np.zeros_like,
    "position": lambda used: np.arange(len(used)),
}


def from_text(path: Path, model: Model) -> Samples:
    """A sample a line of ids, between blanks or commas.

    An input of a fixed length gets its ids cut or filled up with 0. Beside them, inputs are filled
    by their names where they have the ids' shape: masks with ones (0 where ids were filled up),
    token types and segments with zeros, positions with 0, 1, 2 ...

    Raises DataError: text that is no ids, ids that the type cannot hold, inputs that ids do not
    fill.
    """
    ids, others = _inputs(model, str(path))
    rows = _rows(path, np.dtype(ids.dtype))
    length, batch = ids.shape[-1], ids.shape[0] if len(ids.shape) == 2 else None
    said = f"{len(rows)} lines of ids of {path}"
    if not isinstance(length, int) and not (isinstance(batch, int) and batch > 1):
        lead = (1,) * (len(ids.shape) - 1)

        def load(i: int) -> Feed:
            feed = _filled(rows[i], len(rows[i]), ids, others)
            return {name: row.reshape(lead + row.shape) for name, row in feed.items()}

        return listed(load, len(rows), said, model)
    if not isinstance(length, int):
        length = max(map(len, rows))
    cut, short = sum(len(r) > length for r in rows), sum(len(r) < length for r in rows)
    feeds = [_filled(row, length, ids, others) for row in rows]
    columns = {name: Memory(np.stack([feed[name] for feed in feeds])) for name in feeds[0]}
    said = f"{said}, length {length}: {cut} cut, {short} filled up"
    return stacked(columns, None, model, said)


def _inputs(model: Model, where: str) -> tuple[gs.Variable, dict[str, str]]:
    """The input for the ids, and the filler of each other input by its name."""
    others: dict[str, str] = {}
    ids = []
    for tensor in model.graph.inputs:
        name = tensor.name.lower()
        filler = next((word for word in FILLERS if word in name), None)
        if filler is not None and len(model.graph.inputs) > 1:
            others[tensor.name] = filler
        else:
            ids.append(tensor)
    if len(ids) == 1:
        (found,) = ids
        is_rows = found.shape is not None and len(found.shape) in (1, 2)
        if is_rows and found.dtype is not None and np.dtype(found.dtype).kind in "iu":
            for tensor in model.graph.inputs:
                if tensor is not found and not _same(tensor.shape, found.shape):
                    raise DataError(
                        f"{where}: input {tensor.name!r} is {shape_text(tensor.shape)}, the ids "
                        f"{shape_text(found.shape)}: give an .npz or module:function"
                    )
            return found, others
    raise DataError(
        f"{where}: ids fill one integer input [batch, length], and masks, token types and "
        f"positions beside it; the model's inputs are {describe(model.graph.inputs)}: give an .npz"
    )


def _same(a: Any, b: Any) -> bool:
    """Whether two shapes can be equal."""
    return (
        a is not None
        and len(a) == len(b)
        and all(
            x == y or not (isinstance(x, int) and isinstance(y, int))
            for x, y in zip(a, b, strict=True)
        )
    )


def _rows(path: Path, dtype: np.dtype[Any]) -> list[list[int]]:
    limits = np.iinfo(dtype)
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot be read as text: {str(e).splitlines()[0]}") from e
    for number, line in enumerate(text.splitlines(), 1):
        words = re.split(r"[\s,]+", line.strip(" \t,"))
        if words == [""]:
            continue
        where = f"{path}: line {number}"
        stray = next((w for w in words if not re.fullmatch(r"[+-]?[0-9]{1,30}", w)), None)
        if stray is not None:
            raise DataError(
                f"{where}: {stray[:40]!r} is no token id: write the tokenizer's numbers"
            )
        values = [int(w) for w in words]
        odd = next((v for v in values if not limits.min <= v <= limits.max), None)
        if odd is not None:
            raise DataError(f"{where}: {odd} is out of the range of the input's type {dtype}")
        rows.append(values)
    if not rows:
        raise DataError(f"{path}: no samples: write token ids, a sample a line")
    return rows


def _filled(
    row: list[int], length: int, ids: gs.Variable, others: dict[str, str]
) -> dict[str, NDArray[Any]]:
    """The ids at their length, and what the other inputs get for them."""
    kept = row[:length]
    used = np.zeros(length, np.int64)
    used[: len(kept)] = 1
    values = np.zeros(length, ids.dtype)
    values[: len(kept)] = kept
    return {ids.name: values} | {name: FILLERS[word](used) for name, word in others.items()}
