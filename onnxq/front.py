"""What a graph does with an input first: shifts and scales it, moves axes, then the first layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import readers, values_of

MOVES = frozenset(["Cast", "Identity", "Dropout"])
LAST_TO_FIRST = [0, 3, 1, 2]  # the Transpose of an image from NHWC to NCHW


@dataclass(frozen=True, slots=True)
class Front:
    """The input x reaches `layer` as scale * x + offset (means over the channels).

    is_affine: whether there is any such operator; channels_last: whether the axes of an image are
    moved on the way; layer: what reads it then, None when there are several.
    """

    scale: float = 1.0
    offset: float = 0.0
    is_affine: bool = False
    channels_last: bool = False
    layer: gs.Node | None = None

    @property
    def centre(self) -> float:
        """The value of x that is made 0."""
        return 0.0 - self.offset / self.scale

    @property
    def unit(self) -> float:
        """The step of x that is made a step of 1."""
        return 1 / abs(self.scale)

    @property
    def channels(self) -> int | None:
        """The channels that a Conv here takes; None when it is none or not known."""
        weight = None if self.layer is None else weight_of(self.layer)
        if self.layer is None or weight is None:
            return None
        return int(weight.shape[1]) * int(self.layer.attrs.get("group", 1))


def front(tensor: gs.Tensor) -> Front:
    """Follow an input as long as one node reads it and shifts, scales, casts or moves axes only."""
    found, now = Front(), tensor
    while True:
        reading = [(n, i) for n, i in readers(now) if n.op not in ("Shape", "Size")]
        if len(reading) != 1:
            return found
        node, index = reading[0]
        step = _step(found, node, index)
        if step is None:
            return replace(found, layer=node)
        found, now = step, node.outputs[0]


def _step(found: Front, node: gs.Node, index: int) -> Front | None:
    """What is known after a node that shifts, scales or moves; None for any other."""
    if node.op in MOVES:
        return found
    if node.op == "Transpose":
        is_image = list(node.attrs.get("perm", ())) == LAST_TO_FIRST
        return replace(found, channels_last=True) if is_image else None
    if node.op == "BatchNormalization":
        stats = [values_of(t) for t in node.inputs[3:5]]
        if any(s is None for s in stats):
            return None
        mean, var = (float(np.mean(s, dtype=np.float64)) for s in stats if s is not None)
        return _affine(found, 1 / np.sqrt(var + 1e-5), -mean / np.sqrt(var + 1e-5))
    if node.op not in ("Sub", "Add", "Mul", "Div"):
        return None
    values = values_of(node.inputs[1 - index])
    if values is None or values.dtype.kind != "f" or not values.size:
        return None
    c = float(np.mean(values, dtype=np.float64))
    if node.op == "Add":
        return _affine(found, 1.0, c)
    if node.op == "Sub":
        return _affine(found, 1.0, -c) if index == 0 else _affine(found, -1.0, c)
    if c == 0 or (node.op == "Div" and index == 1):
        return None
    return _affine(found, c if node.op == "Mul" else 1 / c, 0.0)


def _affine(found: Front, scale: float, offset: float) -> Front:
    return replace(
        found,
        scale=found.scale * scale,
        offset=found.offset * scale + offset,
        is_affine=True,
    )


def weight_of(node: gs.Node) -> gs.Tensor | None:
    """The weight of a Conv when its shape is known: output channels, channels per group, kernel."""
    if node.op != "Conv" or len(node.inputs) < 2:
        return None
    weight = node.inputs[1]
    known = weight.shape is not None and all(isinstance(d, int) for d in weight.shape)
    return weight if known and len(weight.shape) > 1 else None
