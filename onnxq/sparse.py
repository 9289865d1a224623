"""Sparse constants: the values that are not zero, and where they are.

onnx's full checker gives a sparse initializer the type sparse_tensor, which no standard operator
takes (onnx 1.23; onnxruntime does take it). The `sparse_value` of a Constant node is a dense tensor
for both: what passes make is written like that, what a file has stays as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.numpy_helper import from_array
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxq.errors import ModelError
from onnxq.weights import UNFIT, Fetch, Stored, Values, Weight, inline, without

SINCE = 11
"""The opset whose Constant has `sparse_value`."""


class StoredSparse(LazyValues):  # type: ignore[misc]
    """A sparse tensor; `load` gives it dense. is_node: it is that of a Constant node."""

    def __init__(
        self, tensor: onnx.SparseTensorProto, fetch: Fetch = Stored, *, is_node: bool = False
    ) -> None:
        """Point at values and indices; raises ModelError as `fetch` does."""
        self.name = tensor.values.name
        self.is_node = is_node
        self.shape = tuple(tensor.dims)
        self.numbers, self.indices = fetch(tensor.values), fetch(tensor.indices)
        self.dtype = self.numbers.dtype
        self.nbytes = int(self.numbers.nbytes + self.indices.nbytes)
        self._rest = without(tensor, "values", "indices")

    @classmethod
    def of(cls, values: NDArray[Any], places: NDArray[np.int64]) -> StoredSparse:
        """Dense values, of which those at some places of the flat array are not zero."""
        numbers = np.ascontiguousarray(values.reshape(-1)[places])
        tensor = onnx.SparseTensorProto(
            dims=values.shape,
            values=from_array(numbers, "values"),
            indices=from_array(places.astype(np.int64), "indices"),
        )
        return cls(tensor, is_node=True)

    def load(self) -> NDArray[Any]:
        """The dense values; raises ModelError when indices and values do not fit the shape."""
        out = np.zeros(self.shape, self.dtype)
        try:
            indices, values = self.indices.load(), self.numbers.load()
            if indices.ndim == 1:
                out.reshape(-1)[indices] = values
            else:
                out[tuple(indices.T)] = values
        except (ValueError, IndexError, TypeError) as e:
            raise ModelError(f"sparse tensor {self.name!r}: {UNFIT}") from e
        out.flags.writeable = False
        return out

    def to_proto(self, name: str) -> onnx.SparseTensorProto:
        """The tensor with all inside: onnx's checker does not read indices from a data file."""
        out = onnx.SparseTensorProto()
        out.CopyFrom(self._rest)
        indices = self.indices.tensor.name
        out.values.CopyFrom(inline(Weight(name, self.numbers)))
        out.indices.CopyFrom(inline(Weight(indices, self.indices)))
        return out


def parts(values: Values) -> tuple[Values, ...]:
    """What values are stored in: themselves, or numbers and indices."""
    return (values.numbers, values.indices) if isinstance(values, StoredSparse) else (values,)
