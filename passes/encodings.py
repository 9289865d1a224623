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
from onnxq.weights import Stored

Encoding = Literal["storage", "compute"]

# The first opset whose Cast and DequantizeLinear read the format (onnx Changelog.md).
CAST_SINCE = {
    "float8e4m3fn": 19, "float8e5m2": 19, "int4": 21, "uint4": 21, "int2": 25, "uint2": 25,
}  # fmt: skip
BLOCKS_SINCE = 21  # DequantizeLinear's block_size
AXIS_SINCE = 13  # DequantizeLinear's axis
STORAGE_SINCE = 7  # Mul broadcasts; Cast's `to` is a number since 6
GROUPS_SINCE = 10  # Slice with inputs


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A weight in integers, with scales of rows [channels, values] or of groups in them.

    numbers: the integers as rows; or stored, as they lie in the weight (of its shape).
    """

    held: Held
    numbers: NDArray[Any] | Stored
    params: QParams

    @property
    def rows(self) -> NDArray[Any]:
        """The integers as rows."""
        if isinstance(self.numbers, Stored):
            return self.held.rows(self.numbers.load())
        return self.numbers

    def lying(self, shape: tuple[int, ...]) -> NDArray[Any] | Stored:
        """The integers as they lie in the weight, in another shape."""
        if isinstance(self.numbers, Stored):
            return self.numbers.reshaped(shape)
        return np.ascontiguousarray(self.held.unrolled(self.numbers)).reshape(shape)

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


def stored(on: Emitter, packed: Packed) -> gs.Tensor:
    """Write a weight as Cast, Sub, Mul."""
    return _Unpacking(on, packed).write()


@dataclass(frozen=True, slots=True, eq=False)
class Emitter:
    """Adds the nodes that unpack one weight, named after it, to the graph of `at` (None: main)."""

    model: Model
    at: gs.Node | None
    tensor: gs.Tensor

    def constant(self, name: str, values: NDArray[Any] | Stored) -> gs.Constant:
        """A constant named after the weight."""
        return self.model.constant(self._named(name), values)

    def emit(
        self,
        op: str,
        *inputs: gs.Tensor,
        name: str,
        shape: tuple[int, ...],
        dtype: Any = np.float32,
        **attributes: Any,
    ) -> gs.Tensor:
        """A node; returns its output, of that shape."""
        return self.model.emit(
            op, *inputs, name=self._named(name), dtype=dtype, shape=shape, at=self.at, **attributes
        )

    def cast(self, tensor: gs.Tensor, dtype: Any, name: str = "cast") -> gs.Tensor:
        """A Cast."""
        to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.emit("Cast", tensor, name=name, shape=tensor.shape, dtype=dtype, to=to)

    def reshaped(self, tensor: gs.Tensor, shape: tuple[int, ...]) -> gs.Tensor:
        """A Reshape."""
        target = self._numbers("shape", list(shape))
        return self.emit("Reshape", tensor, target, name="whole", shape=shape, dtype=tensor.dtype)

    def cut(self, tensor: gs.Tensor, axis: int, length: int) -> gs.Tensor:
        """A Slice that keeps the first values along an axis."""
        window = (("start", 0), ("end", length), ("axis", axis))
        bounds = [self._numbers(name, [value]) for name, value in window]
        shape = (*tensor.shape[:axis], length, *tensor.shape[axis + 1 :])
        return self.emit("Slice", tensor, *bounds, name="cut", shape=shape, dtype=tensor.dtype)

    def as_weight(self, wide: gs.Tensor, held: Held) -> gs.Tensor:
        """Values with the summed axes last, [channels, values] or so, in the weight's own order."""
        order = tuple(held.shape[a] for a in held.order)
        if tuple(wide.shape) != order:
            wide = self.reshaped(wide, order)
        if held.order == tuple(range(len(held.shape))):
            return wide
        back = [int(i) for i in np.argsort(held.order)]
        return self.emit("Transpose", wide, name="turned", shape=held.shape, perm=back)

    def narrowed(self, wide: gs.Tensor) -> gs.Tensor:
        """In the weight's own type, where that is float16."""
        own = self.tensor.dtype
        return wide if own == np.float32 else self.cast(wide, own, name="narrow")

    def _numbers(self, name: str, values: list[int]) -> gs.Constant:
        return self.constant(name, np.array(values, np.int64))

    def _named(self, what: str) -> str:
        return f"{self.tensor.name}_{what}"


@dataclass(frozen=True, slots=True, eq=False)
class _Unpacking:
    on: Emitter
    packed: Packed

    def write(self) -> gs.Tensor:
        packed, on = self.packed, self.on
        if packed.has_groups:
            q, lay = self._in_groups()
        else:
            q, lay = packed.lying(packed.held.shape), self._beside
        wide = on.cast(on.constant(str(q.dtype), q), np.float32)
        if (zero := packed.zero_points) is not None:
            point = on.cast(on.constant("zero", np.asarray(lay(zero))), np.float32)
            wide = on.emit("Sub", wide, point, name="centred", shape=q.shape)
        factor = on.constant("scale", lay(np.asarray(packed.params.scale, np.float32)))
        wide = on.emit("Mul", wide, factor, name="unpacked", shape=q.shape)
        if packed.has_groups:
            wide = self._as_weight(wide, q.shape)
        return on.narrowed(wide)

    def _beside(self, params: NDArray[Any]) -> NDArray[Any]:
        """Scales or zero points of rows, in the weight's axes; scalars as they are."""
        return self.packed.held.unrolled(params.reshape(-1, 1)) if params.ndim else params

    def _in_groups(self) -> tuple[NDArray[Any] | Stored, Any]:
        """The integers as [before, groups, size, behind], and what lays scales beside them.

        before and behind: the weight's axes around the summed ones, if these are neighbours.
        """
        held, size = self.packed.held, self.packed.params.group_size
        assert size is not None
        groups, behind = -(-held.length // size), self._behind()

        def lay(params: NDArray[Any]) -> NDArray[Any]:
            if not params.ndim:
                return params
            return params.reshape(-1, behind, groups, 1).transpose(0, 2, 3, 1)

        before = prod(held.shape) // held.length // behind
        if groups * size == held.length and self._are_neighbours:
            return self.packed.lying((before, groups, size, behind)), lay
        rows = self.packed.rows
        whole = np.zeros((len(rows), groups * size), rows.dtype)
        whole[:, : held.length] = rows
        q = whole.reshape(before, behind, groups, size).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(q), lay

    @property
    def _are_neighbours(self) -> bool:
        """Whether the summed axes lie beside each other."""
        summed = self.packed.held.summed
        return summed[-1] - summed[0] + 1 == len(summed)

    def _behind(self) -> int:
        """Channels on the axes behind the summed ones, if those are neighbours; else 1."""
        held = self.packed.held
        return prod(held.shape[held.summed[-1] + 1 :]) if self._are_neighbours else 1

    def _as_weight(self, wide: gs.Tensor, shape: tuple[int, ...]) -> gs.Tensor:
        """Undo `_in_groups`."""
        held, on = self.packed.held, self.on
        before, groups, size, behind = shape
        if groups * size != held.length:
            wide = on.reshaped(wide, (before, groups * size, behind))
            wide = on.cut(wide, 1, held.length)
        if self._are_neighbours:
            return on.reshaped(wide, held.shape)
        return on.as_weight(wide, held)


def dequantized(model: Model, at: gs.Node, tensor: gs.Tensor, packed: Packed) -> gs.Tensor:
    """Write a matrix as one DequantizeLinear, [values, channels]: the layout that kernels take."""
    params, zero = packed.params, packed.zero_points
    is_lying = packed.held.summed == (0,)
    shape = packed.held.shape
    q = packed.lying(shape) if is_lying else np.ascontiguousarray(packed.rows.T)
    inputs = [("scale", np.asarray(params.scale, np.float32).T)]
    if zero is not None:
        inputs.append(("zero", np.broadcast_to(zero, np.shape(params.scale)).T))
    attributes: dict[str, Any] = {}
    if packed.has_groups:
        attributes = {"axis": 0, "block_size": params.group_size}
    elif np.ndim(params.scale):
        attributes = {"axis": 1}
    constants = [model.constant(f"{tensor.name}_{q.dtype}", q)]
    constants += [
        model.constant(f"{tensor.name}_{name}", np.array(v, order="C")) for name, v in inputs
    ]
    return model.emit(
        "DequantizeLinear", *constants, name=f"{tensor.name}_unpacked", dtype=np.float32,
        shape=q.shape, at=at, **attributes,
    )  # fmt: skip
