"""Writing a model anew without some of its units: constants, attributes, sizes that are asked for.

What computes with sizes at run time keeps the numbers that it had: a Shape of a tensor that shrank
gets the difference added, and so does the target of a Reshape that is computed; where a constant
target can say the same (0 for as it was, -1 for what is left) there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.model import Model, readers, values_of
from onnxq.passes.ops import is_constant
from onnxq.passes.sizes import Sizes
from onnxq.passes.unit_labels import Block, Shuffle
from onnxq.passes.unit_moves import smaller_target

Masks = dict[int, NDArray[np.bool_]]  # what stays along an axis


@dataclass(frozen=True, slots=True, eq=False)
class Editor:
    """A model, what stays of its tensors, and the sizes that they had."""

    model: Model
    sizes: Sizes
    keep: NDArray[np.bool_]
    tensors: Mapping[int, tuple[gs.Tensor, Block]]
    made: dict[tuple[object, ...], gs.Constant] = field(default_factory=dict)

    def stays(self, units: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether units stay; -1 does."""
        return np.append(self.keep, True)[units]

    def masks(self, block: Block) -> Masks:
        """What stays along each axis, of those that shrink."""
        kept = self.stays(block.labels)
        found = {}
        for at, axis in enumerate(block.axes):
            mask = np.asarray(kept.any(tuple(i for i in range(kept.ndim) if i != at)))
            if not mask.all():
                found[axis] = mask
        return found

    def of(self, tensor: gs.Tensor) -> Masks:
        """What stays of a tensor."""
        entry = self.tensors.get(id(tensor))
        return {} if entry is None else self.masks(entry[1])

    def counts(self, tensor: gs.Tensor) -> dict[int, int]:
        """New sizes of the axes that shrink."""
        return {axis: int(mask.sum()) for axis, mask in self.of(tensor).items()}

    def cut(self, node: gs.Node, index: int, masks: Masks) -> None:
        """Give the node a constant of its own without what goes; one for all with the same cut."""
        tensor = node.inputs[index]
        shape = np.shape(values_of(tensor))  # type: ignore[arg-type]
        used = {a: m for a, m in sorted(masks.items()) if a >= 0 and shape[a] == m.size}
        if not used:
            return
        key = (id(tensor), *((a, m.tobytes()) for a, m in used.items()))
        if key not in self.made:
            values = np.asarray(values_of(tensor))
            for axis, mask in used.items():
                values = values.compress(mask, axis)
            self.made[key] = self.model.constant(
                f"{tensor.name}_kept", np.ascontiguousarray(values)
            )
        node.inputs[index] = self.made[key]

    def set_numbers(self, node: gs.Node, index: int, attribute: str, new: dict[int, int]) -> None:
        """Other integers at some places of an attribute, or of an input."""
        if attribute in node.attrs:
            node.attrs[attribute] = [
                new.get(i, int(v)) for i, v in enumerate(node.attrs[attribute])
            ]
            return
        tensor = node.inputs[index]
        if is_constant(tensor):
            values = np.array(values_of(tensor))
            for i, number in new.items():
                values[i] = number
            if not np.array_equal(values, np.asarray(values_of(tensor))):
                node.inputs[index] = self.model.constant(f"{tensor.name}_kept", values)
            return
        known = self.sizes.values(tensor) or []
        delta = np.zeros(len(known), np.int64)
        for i, number in new.items():
            delta[i] = number - int(known[i])  # type: ignore[arg-type]
        node.inputs[index] = self.added(node, tensor, delta)

    def added(self, node: gs.Node, tensor: gs.Tensor, delta: NDArray[np.int64]) -> gs.Tensor:
        """Integers with others added."""
        if not delta.any():
            return tensor
        more = self.model.constant(f"{tensor.name}_less", delta.astype(tensor.dtype))
        return self.model.emit(
            "Add", tensor, more, name=f"{tensor.name}_kept", like=tensor, at=node
        )


def _reshape(edit: Editor, node: gs.Node) -> None:
    new, target = edit.counts(node.outputs[0]), None
    was = edit.sizes.shape(node.inputs[0]) or []
    into = edit.counts(node.inputs[0])
    asked: Sequence[Any] | None = node.attrs.get("shape")
    if asked is None:
        asked = edit.sizes.values(node.inputs[1]) or []
    copies = not node.attrs.get("allowzero", 0)
    changed = {}
    for i, number in enumerate(asked):
        source = into.get(i, was[i] if i < len(was) else None)
        if number == 0 and copies:  # as the input has it, there
            if i in new and new[i] != source:
                changed[i] = new[i]
            elif i not in new and i in into:
                changed[i] = int(was[i])
        elif i in new and number != -1:
            changed[i] = new[i]
    if not changed:
        return
    if "shape" not in node.attrs and not is_constant(node.inputs[1]):
        out = list(edit.sizes.shape(node.outputs[0]) or [])
        now = [into[i] if i in into and isinstance(d, int) else d for i, d in enumerate(was)]
        target = smaller_target(now, out, new)
    if target is None:
        edit.set_numbers(node, 1, "shape", changed)
        return
    node.attrs.pop("allowzero", None)
    node.inputs[1] = edit.model.constant(
        f"{node.outputs[0].name}_shape", np.array(target, np.int64)
    )


def _split(edit: Editor, node: gs.Node) -> None:
    rank = len(edit.sizes.shape(node.inputs[0]) or ())
    axis = node.attrs.get("axis", 0) % rank
    if axis not in edit.of(node.inputs[0]):
        return
    parts = []
    for tensor in node.outputs:
        shape = edit.sizes.shape(tensor) or []
        parts.append(edit.counts(tensor).get(axis, shape[axis]))
    if edit.model.opset < 13:
        node.attrs["split"] = parts
        return
    node.attrs.pop("num_outputs", None)
    made = edit.model.constant(f"{node.name}_split", np.array(parts, np.int64))
    if len(node.inputs) > 1:
        node.inputs[1] = made
    else:
        node.inputs.append(made)


def _slice(edit: Editor, node: gs.Node) -> None:
    masks = edit.of(node.inputs[0])
    rank = len(edit.sizes.shape(node.inputs[0]) or ())
    is_old = "starts" in node.attrs

    def numbers(index: int, name: str) -> list[int]:
        if is_old:
            return [int(v) for v in node.attrs.get(name, ())]
        if len(node.inputs) <= index or not node.inputs[index].name:
            return []
        values = values_of(node.inputs[index])
        return [] if values is None else [int(v) for v in values]

    starts, ends = numbers(1, "starts"), numbers(2, "ends")
    axes = [a % rank for a in numbers(3, "axes")] or list(range(len(starts)))
    for name, index, found in (("starts", 1, starts), ("ends", 2, ends)):
        new = {}
        for i, axis in enumerate(axes):
            if axis in masks:
                first, last, _ = slice(starts[i], ends[i]).indices(masks[axis].size)
                new[i] = int(masks[axis][: first if name == "starts" else last].sum())
        if new and found:
            edit.set_numbers(node, index, name, new)


def _gather(edit: Editor, node: gs.Node) -> None:
    rank = len(edit.sizes.shape(node.inputs[0]) or ())
    axis = node.attrs.get("axis", 0) % rank
    mask = edit.of(node.inputs[0]).get(axis)
    if mask is None:
        return
    index = np.asarray(values_of(node.inputs[1]))
    index = np.where(index < 0, index + mask.size, index)
    found = (np.cumsum(mask) - 1)[index[mask[index]]]
    name = f"{node.inputs[1].name}_kept"
    node.inputs[1] = edit.model.constant(name, found.astype(index.dtype))


def _pad(edit: Editor, node: gs.Node) -> None:
    rank = len(edit.sizes.shape(node.inputs[0]) or ())
    pads = node.attrs.get("pads")
    if pads is None:
        pads = np.asarray(values_of(node.inputs[1]))
    new = {}
    for axis, mask in edit.of(node.outputs[0]).items():
        front, back = int(pads[axis]), int(pads[axis + rank])
        new[axis] = int(mask[:front].sum())
        new[axis + rank] = int(mask[mask.size - back :].sum())
    edit.set_numbers(node, 1, "pads", new)


def _resize(edit: Editor, node: gs.Node) -> None:
    if len(node.inputs) < 4 or not node.inputs[3].name:
        return
    rank = len(edit.sizes.shape(node.inputs[0]) or ())
    axes = [a % rank for a in node.attrs.get("axes", range(rank))]
    new = {axes.index(a): n for a, n in edit.counts(node.outputs[0]).items() if a in axes}
    edit.set_numbers(node, 3, "", new)


def _expand(edit: Editor, node: gs.Node) -> None:
    asked = edit.sizes.values(node.inputs[1]) or []
    more = len(edit.sizes.shape(node.outputs[0]) or ()) - len(asked)
    new = {a - more: n for a, n in edit.counts(node.outputs[0]).items() if a >= more}
    edit.set_numbers(node, 1, "", {i: n for i, n in new.items() if asked[i] != 1})


def _fill(edit: Editor, node: gs.Node) -> None:
    edit.set_numbers(node, 0, "", edit.counts(node.outputs[0]))


def _shape(edit: Editor, node: gs.Node) -> None:
    """Those who read sizes get the ones that were; who reads others of the sizes is left alone."""
    was, out = edit.sizes.shape(node.inputs[0]) or [], node.outputs[0]
    start = slice(node.attrs.get("start", 0), node.attrs.get("end")).indices(len(was))[0]
    delta = np.zeros(len(edit.sizes.values(out) or was), np.int64)
    for axis, mask in edit.of(node.inputs[0]).items():
        if 0 <= axis - start < delta.size:
            delta[axis - start] = mask.size - int(mask.sum())
    users = [(n, i) for n, i in readers(out) if not _is_aside(n, delta)]
    if delta.any() and users:
        made = edit.added(node, out, delta)
        for user, i in users:
            user.inputs[i] = made


def _is_aside(node: gs.Node, delta: NDArray[np.int64]) -> bool:
    """Whether a Gather takes none of the sizes that changed."""
    index = values_of(node.inputs[1]) if node.op == "Gather" else None
    return index is not None and not delta[index].any()


def reorder(edit: Editor, shuffle: Shuffle) -> None:
    """A channel shuffle of what stays is a Gather."""
    mask = edit.of(shuffle.data).get(shuffle.axis)
    if mask is None:
        return
    order = (np.cumsum(mask) - 1)[shuffle.order[mask[shuffle.order]]]
    index = edit.model.constant(f"{shuffle.node.name}_order", order.astype(np.int64))
    shuffle.node.op = "Gather"
    shuffle.node.attrs.clear()
    shuffle.node.attrs["axis"] = shuffle.axis
    shuffle.node.inputs = [shuffle.data, index]


EDITS: dict[str, Callable[[Editor, gs.Node], None]] = {
    "Reshape": _reshape,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
    "Resize": _resize,
    "Expand": _expand,
    "ConstantOfShape": _fill,
    "Shape": _shape,
}
