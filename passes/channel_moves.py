"""Where channels go when data is moved: Reshape, Transpose, Slice, DepthToSpace and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.model import values_of
from onnxq.passes.ops import pads_zero

Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Channels:
    """The labels of a tensor's channels, along an axis (not negative)."""

    axis: int
    labels: Labels


@dataclass(frozen=True, slots=True)
class Moved:
    """The channels of each output; joined: labels that become one."""

    outputs: Sequence[Channels | None]
    joined: Sequence[Labels] = ()


Move = Callable[[gs.Node, Channels], Moved | None]


def sizes(tensor: gs.Tensor) -> list[int | None]:
    """The tensor's shape; None for what is not known."""
    return [d if isinstance(d, int) and d >= 0 else None for d in tensor.shape or ()]


def aligned(channels: Channels, tensor: gs.Tensor, rank: int) -> Channels:
    """The channels as a result of more axes has them."""
    return Channels(channels.axis + rank - len(tensor.shape or ()), channels.labels)


def _whole(tensor: gs.Tensor, start: int) -> int | None:
    """The number of values from an axis on."""
    found = sizes(tensor)[start:]
    return None if any(d is None for d in found) else prod(d for d in found if d is not None)


def _reshaped(node: gs.Node, channels: Channels) -> Moved | None:
    """Index f of axis b, R values inside each: channel f R / S, with S values inside a channel."""
    source, out = node.inputs[0], node.outputs[0]
    if source.shape is None or out.shape is None:
        return None
    total, inside = _whole(source, channels.axis), _whole(source, channels.axis + 1)
    if total is None or not total or inside is None:
        return None
    for axis in range(len(out.shape)):
        rest, size = _whole(out, axis + 1), sizes(out)[axis]
        if rest is None:
            continue
        # A first axis of unknown size is all that is left: the batch.
        if _whole(out, axis) == total and size and inside % rest == 0:
            return Moved([Channels(axis, np.repeat(channels.labels, inside // rest))])
    return None


def _transposed(node: gs.Node, channels: Channels) -> Moved | None:
    if node.inputs[0].shape is None:
        return None
    rank = len(node.inputs[0].shape)
    order = list(node.attrs.get("perm", range(rank)[::-1]))
    return Moved([Channels(order.index(channels.axis), channels.labels)])


def _kept(node: gs.Node, channels: Channels) -> Moved | None:
    """Resize, Pad and the like, that do not touch the channels."""
    source, out = node.inputs[0], node.outputs[0]
    if node.op == "Pad" and not pads_zero(node):
        return None
    if node.op == "Resize" and "crop" in node.attrs.get("coordinate_transformation_mode", ""):
        return None
    if source.shape is None or out.shape is None:
        return None
    if node.op == "Pad" and _pads_at(node, channels.axis, len(source.shape)):
        return None
    size = sizes(out)[channels.axis]
    is_same = size == channels.labels.size == sizes(source)[channels.axis]
    return Moved([channels]) if is_same else None


def _pads_at(node: gs.Node, axis: int, rank: int) -> bool:
    pads = node.attrs.get("pads")
    if pads is None and len(node.inputs) > 1:
        pads = values_of(node.inputs[1])
    if pads is None or len(pads) != 2 * rank or (len(node.inputs) > 3 and node.inputs[3].name):
        return True
    return bool(pads[axis] or pads[axis + rank])


def _numbers(node: gs.Node, index: int, attribute: str) -> list[int] | None:
    """Integers of a constant input, or of the attribute that older opsets have."""
    if attribute in node.attrs:
        return [int(v) for v in np.atleast_1d(node.attrs[attribute])]
    if len(node.inputs) <= index or not node.inputs[index].name:
        return []
    values = values_of(node.inputs[index])
    return None if values is None else [int(v) for v in values.reshape(-1)]


def _sliced(node: gs.Node, channels: Channels) -> Moved | None:
    starts, ends = _numbers(node, 1, "starts"), _numbers(node, 2, "ends")
    axes, steps = _numbers(node, 3, "axes"), _numbers(node, 4, "steps")
    if node.inputs[0].shape is None or starts is None or ends is None or axes is None:
        return None
    rank = len(node.inputs[0].shape)
    axes = [a % rank for a in axes] or list(range(len(starts)))
    if channels.axis not in axes:
        return Moved([channels])
    if steps is None:
        return None
    at = axes.index(channels.axis)
    step = (steps or [1] * len(starts))[at]
    size = channels.labels.size
    first, last = max(starts[at], -size), ends[at]
    if step <= 0:
        return None
    return Moved([Channels(channels.axis, channels.labels[first : max(last, -size) : step])])


def _split(node: gs.Node, channels: Channels) -> Moved | None:
    if node.inputs[0].shape is None:
        return None
    rank = len(node.inputs[0].shape)
    if node.attrs.get("axis", 0) % rank != channels.axis:
        return Moved([channels] * len(node.outputs))
    found = [sizes(t)[channels.axis] if t.shape else None for t in node.outputs]
    ends = np.cumsum([d or 0 for d in found])
    if any(d is None for d in found) or ends[-1] != channels.labels.size:
        return None
    parts = np.split(channels.labels, ends[:-1])
    return Moved([Channels(channels.axis, part) for part in parts])


def _gathered(node: gs.Node, channels: Channels) -> Moved | None:
    if node.inputs[0].shape is None:
        return None
    rank, index = len(node.inputs[0].shape), values_of(node.inputs[1])
    if node.attrs.get("axis", 0) % rank != channels.axis or index is None or index.ndim != 1:
        return None
    return Moved([Channels(channels.axis, channels.labels[index])])


def _reduced(node: gs.Node, channels: Channels) -> Moved | None:
    """Means, sums and maxima over other axes."""
    axes = _numbers(node, 1, "axes")
    if node.inputs[0].shape is None or not axes:
        return None
    rank = len(node.inputs[0].shape)
    gone = {a % rank for a in axes}
    if channels.axis in gone:
        return None
    keeps = node.attrs.get("keepdims", 1)
    axis = channels.axis if keeps else channels.axis - sum(a < channels.axis for a in gone)
    return Moved([Channels(axis, channels.labels)])


def _to_space(node: gs.Node, channels: Channels) -> Moved | None:
    """Each new channel is made of block^2 old ones."""
    block = int(node.attrs["blocksize"]) ** 2
    if channels.axis != 1 or channels.labels.size % block:
        return None
    is_crd = node.attrs.get("mode", "DCR") == "CRD"
    parts = channels.labels.reshape((-1, block) if is_crd else (block, -1))
    rows = parts if is_crd else parts.T
    return Moved([Channels(1, rows[:, 0])], joined=tuple(rows))


def _to_depth(node: gs.Node, channels: Channels) -> Moved | None:
    block = int(node.attrs["blocksize"]) ** 2
    return Moved([Channels(1, np.tile(channels.labels, block))]) if channels.axis == 1 else None


MOVED: dict[str, Move] = {
    "Reshape": _reshaped,
    "Flatten": _reshaped,
    "Squeeze": _reshaped,
    "Unsqueeze": _reshaped,
    "Transpose": _transposed,
    "Resize": _kept,
    "Upsample": _kept,
    "Pad": _kept,
    "Slice": _sliced,
    "Split": _split,
    "Gather": _gathered,
    "DepthToSpace": _to_space,
    "SpaceToDepth": _to_depth,
} | dict.fromkeys(
    ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2"), _reduced
)
