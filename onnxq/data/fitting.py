"""Whether an array fits an input of the model, and what is said when it does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.data.samples import LABELS, Feed
from onnxq.errors import DataError
from onnxq.model import Model


def inputs_of(model: Model) -> dict[str, gs.Variable]:
    """The model's inputs by name, in order, as they are now: passes may change them."""
    return {tensor.name: tensor.copy() for tensor in model.graph.inputs}


def only_input(model: Model, where: str, why: str) -> gs.Variable:
    """The model's only input; raises DataError when there are more."""
    tensors = list(model.graph.inputs)
    if len(tensors) != 1:
        raise DataError(
            f"{where}: {why}, but the model has {len(tensors)} inputs: {describe(tensors)}; "
            "give an .npz or a folder of .npz with an array for each"
        )
    return tensors[0]


def check_names(feed: Mapping[str, Any], inputs: Mapping[str, gs.Variable], where: str) -> None:
    """Raise DataError unless the feed has all inputs and nothing else but labels."""
    stray = sorted(set(feed) - set(inputs) - {LABELS})
    missing = sorted(set(inputs) - set(feed))
    if stray or missing:
        what = f"{stray[0]!r} is no input" if stray else f"input {missing[0]!r} is missing"
        raise DataError(f"{where}: {what}; the model's inputs are {describe(inputs.values())}")


def describe(inputs: Iterable[gs.Variable]) -> str:
    """Inputs as text: name, shape, type."""
    return ", ".join(f"{t.name!r} {shape_text(t.shape)} {t.dtype}" for t in inputs)


def shape_text(shape: Sequence[Any] | None) -> str:
    """A shape as text."""
    if shape is None:
        return "of any shape"
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


def fitted_feed(feed: Mapping[str, Any], inputs: Mapping[str, gs.Variable], index: int) -> Feed:
    """A feed with every array in its input's shape and type; raises DataError when one is not."""
    check_names(feed, inputs, f"sample {index}")
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


def fitted(array: NDArray[Any], tensor: gs.Variable, index: int) -> NDArray[Any]:
    """The array in the input's type; raises DataError when it does not fit the input."""
    where = f"sample {index}: input {tensor.name!r}"
    shape = tensor.shape
    if shape is not None and not _is_of(array.shape, shape):
        got, hint = shape_text(array.shape), ""
        if array.ndim == 4 and _is_of([array.shape[i] for i in (0, 3, 1, 2)], shape):
            hint = "; its channels are last: transpose it by (0, 3, 1, 2)"
        raise DataError(f"{where} is {got}, the model wants {shape_text(shape)}{hint}")
    if array.dtype.kind in "fc" and not np.isfinite(array).all():
        what = "NaN" if np.isnan(array).any() else "infinite values"
        raise DataError(f"{where} has {what}")
    if tensor.dtype is None or array.dtype == tensor.dtype:
        return np.ascontiguousarray(array).reshape(array.shape)
    return _converted(array, np.dtype(tensor.dtype), where)


def _is_of(shape: Sequence[int], wanted: Sequence[Any]) -> bool:
    return len(shape) == len(wanted) and all(
        not isinstance(d, int) or d == n for d, n in zip(wanted, shape, strict=True)
    )


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
