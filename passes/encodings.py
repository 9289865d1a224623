"""How integers that stand for a weight are written into the graph.

    storage     W = Mul(Sub(Cast(q), Cast(z)), s)       groups: Reshape (Slice, Transpose) behind it
    compute     W = DequantizeLinear(q, s, z)           for kernels that multiply with integers

Storage is computed once, when the model is loaded, by every runtime that folds constants. Groups
are laid out along an axis of their own; what is missing in the last one is added and cut off again.
A DequantizeLinear is computed at every run, unless the runtime fuses it with the operator.

float16 weights are unpacked in float32 and cast back: scales below 6e-5 would lose their digits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.model import Model
from onnxq.passes.layouts import Held
from onnxq.schemes import PerGroup, QParams, QuantScheme

Encoding = Literal["storage", "compute"]

# The first opset whose Cast and DequantizeLinear read the format (onnx Changelog.md).
CAST_SINCE = {
    "float8e4m3fn": 19, "float8e5m2": 19, "int4": 21, "uint4": 21, "int2": 25, "uint2": 25,
}  # fmt: skip
BLOCKS_SINCE = 21  # DequantizeLinear's block_size
AXIS_SINCE = 13  # DequantizeLinear's axis
STORAGE_SINCE = 6  # Cast's `to` as a number
GROUPS_SINCE = 10  # Slice with inputs


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A weight in integers: rows [channels, values], with scales of rows or of groups in them."""

    held: Held
    rows: NDArray[Any]
    params: QParams

    @property
    def has_groups(self) -> bool:
        """Whether scales belong to groups."""
        return self.params.group_size is not None

    @property
    def zero_points(self) -> NDArray[Any] | None:
        """Zero points as the scales lie, a scalar where they are all one; None where all are 0."""
        zero = np.asarray(self.params.zero_point)
        if str(zero.dtype).startswith("float") or not zero.astype(np.int32).any():
            return None
        wide = zero.astype(np.int32)
        return zero.reshape(-1)[0] if (wide == wide.flat[0]).all() else zero


def opset_for(format: str, encoding: Encoding, *, groups: bool, channels: bool = True) -> int:
    """The least opset whose operators the encoding needs."""
    if encoding == "storage":
        plain = GROUPS_SINCE if groups else STORAGE_SINCE
    else:
        plain = BLOCKS_SINCE if groups else AXIS_SINCE if channels else 10
    return max(plain, CAST_SINCE.get(format, 0))


def evened(scheme: QuantScheme, held: Held) -> QuantScheme:
    """The scheme with groups of even size, where the last one would be short.

    Storage lays groups out whole: a short one would be filled up. No group grows by it.
    """
    size = scheme.group_size
    if size is None or held.length % size == 0:
        return scheme
    groups = -(-held.length // size)
    return replace(scheme, granularity=PerGroup(-(-held.length // groups), 1))


def stored(model: Model, at: gs.Node | None, tensor: gs.Tensor, packed: Packed) -> gs.Tensor:
    """Write the weight as Cast, Sub, Mul in the graph of `at` (None: the main one)."""
    return _Unpacking(model, at, tensor, packed).write()


@dataclass(frozen=True, slots=True, eq=False)
class _Unpacking:
    model: Model
    at: gs.Node | None
    tensor: gs.Tensor
    packed: Packed

    def write(self) -> gs.Tensor:
        packed = self.packed
        if packed.has_groups:
            q, lay = self._in_groups()
        else:
            q, lay = packed.held.unrolled(packed.rows), self._beside
        wide = self._cast(self.model.constant(self._named(str(q.dtype)), q))
        if (zero := packed.zero_points) is not None:
            point = self.model.constant(self._named("zero"), np.asarray(lay(zero)))
            wide = self._emit("Sub", wide, self._cast(point), name="centred", shape=q.shape)
        scale = lay(np.asarray(packed.params.scale, np.float32))
        factor = self.model.constant(self._named("scale"), scale)
        wide = self._emit("Mul", wide, factor, name="unpacked", shape=q.shape)
        if packed.has_groups:
            wide = self._as_weight(wide, q.shape)
        if self.tensor.dtype != np.float32:
            kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(self.tensor.dtype))
            wide = self._emit("Cast", wide, name="narrow", dtype=self.tensor.dtype, to=kind)
        return wide

    def _beside(self, params: NDArray[Any]) -> NDArray[Any]:
        """Scales or zero points of rows, in the weight's axes; scalars as they are."""
        return self.packed.held.unrolled(params.reshape(-1, 1)) if params.ndim else params

    def _in_groups(self) -> tuple[NDArray[Any], Any]:
        """The integers as [before, groups, size, behind], and what lays scales beside them.

        before and behind: the weight's axes around the summed ones, if these are neighbours.
        """
        held, rows, size = self.packed.held, self.packed.rows, self.packed.params.group_size
        assert size is not None
        channels, length = rows.shape
        groups = -(-length // size)
        if groups * size != length:
            whole = np.zeros((channels, groups * size), rows.dtype)
            whole[:, :length] = rows
            rows = whole
        behind = self._behind()
        q = rows.reshape(-1, behind, groups, size).transpose(0, 2, 3, 1)

        def lay(params: NDArray[Any]) -> NDArray[Any]:
            if not params.ndim:
                return params
            return params.reshape(-1, behind, groups, 1).transpose(0, 2, 3, 1)

        assert prod(held.shape) == channels * length
        return np.ascontiguousarray(q), lay

    def _behind(self) -> int:
        """Channels on the axes behind the summed ones, if those are neighbours; else 1."""
        held = self.packed.held
        first, last = held.summed[0], held.summed[-1]
        return prod(held.shape[last + 1 :]) if last - first + 1 == len(held.summed) else 1

    def _as_weight(self, wide: gs.Tensor, shape: tuple[int, ...]) -> gs.Tensor:
        """Undo `_in_groups`."""
        held = self.packed.held
        before, groups, size, behind = shape
        if groups * size != held.length:
            wide = self._reshaped(wide, (before, groups * size, behind))
            window = (("start", 0), ("end", held.length), ("axis", 1))
            bounds = [self._numbers(name, [value]) for name, value in window]
            cut = (before, held.length, behind)
            wide = self._emit("Slice", wide, *bounds, name="cut", shape=cut)
        first, last = held.summed[0], held.summed[-1]
        if last - first + 1 == len(held.summed):
            return self._reshaped(wide, held.shape)
        wide = self._reshaped(wide, tuple(held.shape[a] for a in held.order))
        back = [int(i) for i in np.argsort(held.order)]
        return self._emit("Transpose", wide, name="turned", perm=back)

    def _reshaped(self, wide: gs.Tensor, shape: tuple[int, ...]) -> gs.Tensor:
        target = self._numbers("shape", list(shape))
        return self._emit("Reshape", wide, target, name="whole", shape=shape)

    def _numbers(self, name: str, values: list[int]) -> gs.Constant:
        return self.model.constant(self._named(name), np.array(values, np.int64))

    def _cast(self, integers: gs.Constant) -> gs.Tensor:
        to = onnx.TensorProto.FLOAT
        return self._emit("Cast", integers, name="cast", shape=integers.shape, to=to)

    def _named(self, what: str) -> str:
        return f"{self.tensor.name}_{what}"

    def _emit(
        self,
        op: str,
        *inputs: gs.Tensor,
        name: str,
        shape: tuple[int, ...] | None = None,
        dtype: Any = np.float32,
        **attributes: Any,
    ) -> gs.Tensor:
        return self.model.emit(
            op, *inputs, name=self._named(name), dtype=dtype,
            shape=self.packed.held.shape if shape is None else shape, at=self.at, **attributes,
        )  # fmt: skip


def dequantized(model: Model, at: gs.Node, tensor: gs.Tensor, packed: Packed) -> gs.Tensor:
    """Write a matrix as one DequantizeLinear, [values, channels]: the layout that kernels take."""
    params, zero = packed.params, packed.zero_points
    q = np.ascontiguousarray(packed.rows.T)
    inputs = [(str(q.dtype), q), ("scale", np.asarray(params.scale, np.float32).T)]
    if zero is not None:
        inputs.append(("zero", np.broadcast_to(zero, np.shape(params.scale)).T))
    attributes: dict[str, Any] = {}
    if packed.has_groups:
        attributes = {"axis": 0, "block_size": params.group_size}
    elif np.ndim(params.scale):
        attributes = {"axis": 1}
    constants = [
        model.constant(f"{tensor.name}_{name}", np.array(v, order="C")) for name, v in inputs
    ]
    return model.emit(
        "DequantizeLinear", *constants, name=f"{tensor.name}_unpacked", dtype=np.float32,
        shape=q.shape, at=at, **attributes,
    )  # fmt: skip
