"""Merge operators that only give the same values another shape.

    y = Reshape(Unsqueeze(x))        =>    y = Reshape(x)
    y = Squeeze(Unsqueeze(x))        =>    y = x
    y = Transpose(x), only axes of size 1 pass others    =>    y = Reshape(x)

Reshape, Squeeze, Unsqueeze and Flatten, for floating axes where one 0 and one -1 can say it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Note, Skip
from onnxq.model import Model, producer
from onnxq.passes.size_algebra import target_of
from onnxq.passes.sizes import Sizes

NAME = "merge_reshapes"
RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
HAS_TARGET_INPUT = 5  # the opset from which Reshape's target is an input


class MergeReshapes:
    """All graphs, bodies included; a pass without options."""

    name = NAME

    def __repr__(self) -> str:
        return NAME

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Merge in place; a note for each node that went or was declined."""
        notes = []
        sizes = Sizes(model)
        for node in model.nodes(*RESHAPES, "Transpose"):
            if not node.outputs or node.domain or model.opset < HAS_TARGET_INPUT:
                continue
            try:
                text = (
                    _transpose(model, sizes, node)
                    if node.op == "Transpose"
                    else _merge(model, sizes, node)
                )
            except Skip as reason:
                notes.append(Note(NAME, node.name, str(reason), changed=False))
            else:
                if text is not None:
                    notes.append(Note(NAME, node.name, text))
        if any(note.changed for note in notes):
            model.sweep()
        return notes


def _merge(model: Model, sizes: Sizes, node: gs.Node) -> str | None:
    middle, out = node.inputs[0], node.outputs[0]
    before = producer(middle)
    if before is None or before.op not in RESHAPES or before.domain:
        return None
    if model.graph_of(before) is not model.graph_of(node):
        return None
    source, result = sizes.shape(before.inputs[0]), sizes.shape(out)
    if source is None or result is None:
        return None
    maker = producer(before.inputs[0])
    if source == result and not (
        model.is_output(out)
        and (
            maker is None
            or model.is_output(before.inputs[0])
            or model.graph_of(maker) is not model.graph_of(node)
        )
    ):
        model.replace(out, before.inputs[0])
        return f"undoes {before.name}"
    if model.is_output(middle) or any(r.op not in RESHAPES for r in middle.outputs):
        raise Skip(f"{middle.name} is also used elsewhere")
    target = target_of(source, result)
    if target is None:
        why = "a size of zero" if 0 in result else "more free axes than one -1 can say"
        raise Skip(f"its shape has {why}")
    _become_reshape(model, node, before.inputs[0], target)
    return f"with {before.name}"


def _transpose(model: Model, sizes: Sizes, node: gs.Node) -> str | None:
    """A Transpose that leaves the order of the values as it is."""
    shape, result = sizes.shape(node.inputs[0]), sizes.shape(node.outputs[0])
    if shape is None or result is None or not shape or 1 not in shape:
        return None
    perm = node.attrs.get("perm", list(range(len(shape)))[::-1])
    order = [a for a in perm if shape[a] != 1]
    if order != sorted(order) or (target := target_of(shape, result)) is None:
        return None
    _become_reshape(model, node, node.inputs[0], target)
    return "moves only axes of size 1"


def _become_reshape(model: Model, node: gs.Node, source: gs.Tensor, target: list[int]) -> None:
    name = f"{node.outputs[0].name}_shape"
    node.op = "Reshape"
    node.attrs.clear()
    node.inputs = [source, model.constant(name, np.array(target, np.int64))]


merge_reshapes = MergeReshapes()
