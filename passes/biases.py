"""Where a layer's bias lies, in floats or in integers, and adding to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Skip
from onnxq.model import Model, producer, readers, values_of

Values = NDArray[np.float64]
LIMIT = 2**30  # of an integer: a bit is kept for the sum that it is added to


@dataclass(frozen=True, slots=True)
class Home:
    """A place for a bias. add: adds a value a channel; raises Skip, before any edit."""

    add: Callable[[Values], None]


def home_of(model: Model, node: gs.Node, channels: int, *, floats: bool) -> Home:
    """Where the layer has its bias, or can have one. floats: a new one is not of integers.

    Raises Skip where there is no such place.
    """
    if node.op == "MatMul":
        add, index = added_row(model, node)
        if add.inputs[index].shape not in ((), (1,), (channels,)):
            raise Skip("what is added behind the MatMul is not one value a channel")
        return Home(partial(_add_floats, model, add, index, channels, 1.0))
    beta = float(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else 1.0
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if bias is None:
        return Home(partial(_make, model, node, floats=floats))
    if not beta:
        raise Skip("its bias is multiplied by 0")
    if np.prod(bias.shape or (1,)) not in (1, channels):
        raise Skip("its bias is not one value a channel")
    if values_of(bias) is not None:
        return Home(partial(_add_floats, model, node, 2, channels, beta))
    source = producer(bias)
    if source is None or source.op != "DequantizeLinear" or values_of(source.inputs[0]) is None:
        raise Skip("its bias is not constant")
    return Home(partial(_add_integers, model, node, channels, beta))


def added_row(model: Model, node: gs.Node) -> tuple[gs.Node, int]:
    """The Add of a constant behind a MatMul, and which input that is; raises Skip without."""
    found = list(readers(node.outputs[0]))
    if len(found) == 1 and found[0][0].op == "Add" and not model.is_output(node.outputs[0]):
        add, index = found[0]
        values = values_of(add.inputs[1 - index])
        if values is not None and values.dtype.kind == "f" and values.ndim <= 1:
            return add, 1 - index
    raise Skip("a MatMul has no bias, and no row is added behind it")


def _add_floats(
    model: Model, node: gs.Node, index: int, channels: int, beta: float, more: Values
) -> None:
    tensor = node.inputs[index]
    values = np.asarray(values_of(tensor))
    row = np.broadcast_to(values.reshape(-1).astype(np.float64), (channels,))
    made = (row + more / beta).astype(values.dtype)
    node.inputs[index] = model.constant(f"{tensor.name}_corrected", made)


def _add_integers(model: Model, node: gs.Node, channels: int, beta: float, more: Values) -> None:
    """In the scale that the bias has: that of the accumulator."""
    source = producer(node.inputs[2])
    assert source is not None
    q, scale = (np.asarray(values_of(t)) for t in source.inputs[:2])
    steps = np.rint(more / beta / scale.astype(np.float64))
    total = np.broadcast_to(q.reshape(-1), (channels,)) + steps
    name = node.inputs[2].name
    node.inputs[2] = _dequantized(model, node, name, total, source.inputs[1:], source.attrs)


def _make(model: Model, node: gs.Node, more: Values, *, floats: bool) -> None:
    """A bias for a layer without one."""
    scale, name = None if floats else _accumulator_scale(node), f"{node.name}_bias"
    if scale is None:
        made: gs.Tensor = model.constant(name, more.astype(node.outputs[0].dtype))
    else:
        own = model.constant(f"{name}_scale", scale)
        zero = model.constant(f"{name}_zero_point", np.zeros(scale.shape, np.int32))
        steps = np.rint(more / scale.astype(np.float64))
        made = _dequantized(
            model, node, name, steps, (own, zero), {"axis": 0} if scale.ndim else {}
        )
    node.attrs.pop("beta", None)
    if len(node.inputs) < 3:
        node.inputs.append(made)
    node.inputs[2] = made


def _dequantized(
    model: Model,
    node: gs.Node,
    name: str,
    integers: NDArray[Any],
    params: Sequence[gs.Tensor],
    attrs: Mapping[str, Any],
) -> gs.Tensor:
    if (np.abs(integers) > LIMIT).any():
        raise Skip("its corrected bias would not fit in 32 bits")
    q = model.constant(f"{name}_corrected_q", integers.astype(np.int32))
    return model.emit(
        "DequantizeLinear", q, *params, name=f"{name}_corrected", dtype=np.dtype(np.float32),
        shape=[len(integers)], at=node, **attrs,
    )  # fmt: skip


def _accumulator_scale(node: gs.Node) -> NDArray[np.float32] | None:
    """s_x s_W, where the layer computes in integers and has one for a channel; else None."""
    scales = []
    for tensor in node.inputs[:2]:
        source = producer(tensor)
        if source is None or source.op != "DequantizeLinear" or "block_size" in source.attrs:
            return None
        scales.append(np.asarray(values_of(source.inputs[1])))
    if scales[0].size != 1 or node.attrs.get("alpha", 1.0) != 1.0:
        return None
    repeats = node.attrs.get("group", 1) if node.op == "ConvTranspose" else 1
    own = np.tile(scales[1], repeats) if scales[1].ndim else scales[1]
    return np.asarray(scales[0].reshape(()) * own, np.float32)
