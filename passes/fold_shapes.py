"""Compute sizes when they are known, and write the others as simply as they can be written.

    y = Reshape(x, Concat(Gather(Shape(x), 0), 50, 96))    =>    y = Reshape(x, [0, 50, 96])

Integers computed from shapes are followed element by element (sizes.py). Those that are numbers
become initializers; a Reshape's target becomes one when a 0 (as it was) and a -1 (what is left) can
stand for its free axes; a Reshape or Expand to the shape that its input has goes, and so does one
of two computations of the same sizes. What remains of Shape, Gather, Unsqueeze and Concat is one
Shape where the opset has its `start` and `end` (15), else a Gather of a Shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Note
from onnxq.model import Model, readers, values_of
from onnxq.passes.size_algebra import Known, is_static, target_of
from onnxq.passes.sizes import Sizes, array_of, shape_nodes_behind
from onnxq.passes.value_rules import VALUES

NAME = "fold_shapes"
SHAPE_HAS_ENDS = 15  # the opset from which Shape has start and end


class FoldShapes:
    """All graphs, bodies included; a pass without options."""

    name = NAME

    def __repr__(self) -> str:
        return NAME

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Fold in place; a note for each node that changed."""
        notes = []
        sizes = Sizes(model)
        for graph in model.graphs():
            first: dict[tuple[object, ...], gs.Tensor] = {}
            for node in list(graph.nodes):
                if not node.outputs or not node.inputs or node.domain:
                    continue
                text = _rewrite(model, sizes, node, first)
                if text is not None:
                    notes.append(Note(NAME, node.name, text))
            _write_down(model, sizes, graph)
        if notes:
            model.sweep()
        return notes


def _rewrite(
    model: Model, sizes: Sizes, node: gs.Node, first: dict[tuple[object, ...], gs.Tensor]
) -> str | None:
    if node.op == "Reshape":
        return _same_shape(model, sizes, node) or _constant_target(model, sizes, node)
    if node.op in ("Expand", "Tile"):
        return _same_shape(model, sizes, node)
    if node.op not in VALUES or model.is_output(node.outputs[0]):
        return None
    known, out = sizes.values(node.outputs[0]), node.outputs[0]
    if known is None or None in known or out.dtype is None or out.shape is None:
        return None
    if is_static(known):
        constant = gs.Constant(out.name, array_of(known, out))
        for reader, i in list(readers(out)):
            reader.inputs[i] = constant
        out.inputs.clear()
        return f"{node.op} of known sizes"
    key = (str(np.dtype(out.dtype)), len(out.shape), *known)
    if (twin := first.setdefault(key, out)) is not out:
        model.replace(out, twin)
        return f"the same sizes as {twin.name}"
    made = _as_shape(model, sizes, node, known)
    if made is None:
        return None
    first[key] = made
    return f"{node.op} of sizes is one {made.inputs[0].op}"


def _same_shape(model: Model, sizes: Sizes, node: gs.Node) -> str | None:
    """Drop what returns its input, unless both have names to keep."""
    source, result = node.inputs[0], node.outputs[0]
    shape = sizes.shape(result)
    if shape is None or shape != sizes.shape(source):
        return None
    if model.is_output(result):
        maker = source.inputs[0] if source.inputs else None
        if maker is None or model.is_output(source):
            return None
        if model.graph_of(maker) is not model.graph_of(node):
            return None
    model.replace(result, source)
    return f"{node.op} to the shape it had"


def _constant_target(model: Model, sizes: Sizes, node: gs.Node) -> str | None:
    if len(node.inputs) < 2:
        return None
    wanted = sizes.values(node.inputs[1])
    source, result = sizes.shape(node.inputs[0]), sizes.shape(node.outputs[0])
    if values_of(node.inputs[1]) is not None or wanted is None or source is None or result is None:
        return None
    if 0 in wanted or wanted.count(-1) > 1 or len(wanted) != len(result):
        return None
    # An element that nothing is known of may be -1 at runtime; then it is the rest.
    resting = [None if w == -1 else r for w, r in zip(wanted, result, strict=True)]
    target = target_of(source, resting) or target_of(source, result)
    if target is None:
        return None
    node.attrs.pop("allowzero", None)  # there is no zero that it would make a difference to
    node.inputs[1] = model.constant(f"{node.outputs[0].name}_shape", np.array(target, np.int64))
    return f"Reshape to {target}"


def _as_shape(model: Model, sizes: Sizes, node: gs.Node, known: Known) -> gs.Tensor | None:
    """The result of one operator over a tensor whose sizes these are."""
    out = node.outputs[0]
    if node.op == "Shape" or len(out.shape) != 1 or np.dtype(out.dtype) != np.int64:
        return None
    if node.op == "Gather" and node.inputs[0].inputs and node.inputs[0].inputs[0].op == "Shape":
        return None
    for shape_of in shape_nodes_behind(out):
        source = shape_of.inputs[0]
        dims = sizes.shape(source)
        if dims is None or any(k not in dims for k in known):
            continue
        places = [dims.index(k) for k in known if k is not None]
        start = places[0]
        if model.opset >= SHAPE_HAS_ENDS and places == list(range(start, start + len(places))):
            made = model.emit(
                "Shape", source, name=out.name, like=out, at=node, start=start, end=places[-1] + 1
            )
        elif "start" not in shape_of.attrs and "end" not in shape_of.attrs:
            indices = model.constant(f"{out.name}_axes", np.array(places, np.int64))
            made = model.emit("Gather", shape_of.outputs[0], indices, name=out.name, like=out,
                              at=node, axis=0)  # fmt: skip
        else:
            continue
        model.replace(out, made)
        return made
    return None


def _write_down(model: Model, sizes: Sizes, graph: gs.Graph) -> None:
    """Tell later passes the numbers that were found; what is documented outside stays."""
    for node in graph.nodes:
        for tensor in node.outputs[:1]:
            shape = sizes.shape(tensor) if tensor.name else None
            if shape is None or model.is_output(tensor):
                continue
            old = tensor.shape if tensor.shape is not None else [None] * len(shape)
            tensor.shape = [n if isinstance(n, int) else o for n, o in zip(shape, old, strict=True)]


fold_shapes = FoldShapes()
