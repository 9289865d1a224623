"""Compute in float32 what a model computes in float16 or bfloat16; its interface stays.

    y16 = Conv(x16, W16)    =>    y16 = Cast(Conv(Cast(x16), W32))

Runtimes without 16-bit arithmetic put these Casts around every single operator, and their integer
kernels do not see layers of 16-bit floats. Values are those of the original, rounded less often.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.core import Note
from onnxq.graphs import DEFAULT_DOMAIN
from onnxq.model import Model, readers, values_of
from onnxq.passes.halves import FLOAT32, HALVES, is_half, retype, tensors_of

NAME = "convert_float32"
# Types of elements inside sequences and optionals are in the interface, or in no Variable.
HOLDERS = ("Sequence", "Optional", "SplitToSequence", "ConcatFromSequence")


class ConvertFloat32:
    """The whole model, bodies too, or nothing; a pass without options."""

    name = NAME

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Convert in place, or say which node needs 16 bits."""
        halves = [t for t in tensors_of(model) if is_half(t) and not _is_edge(model, t)]
        if not halves:
            return []
        for node in model.nodes():
            holds = node.domain not in DEFAULT_DOMAIN and any(
                is_half(t) for t in (*node.inputs, *node.outputs)
            )
            if holds or node.op.startswith(HOLDERS):
                why = f"{node.op} may need 16-bit floats: all is left as it is"
                return [Note(NAME, node.name, why, changed=False)]
        for tensor in model.graph.outputs:
            if is_half(tensor) and not tensor.inputs:
                why = f"{tensor.name} is an output that no node makes: all is left as it is"
                return [Note(NAME, model.graph.name, why, changed=False)]
        kept = {id(t): t.dtype for t in (*model.graph.inputs, *model.graph.outputs)}
        known = set(map(id, halves))
        casts = [_after(model, t) for t in model.graph.inputs if id(t) in known]
        casts += [_before(model, t) for t in model.graph.outputs if id(t) in known]
        for tensor in halves:
            if isinstance(tensor, gs.Constant):
                tensor.values = np.asarray(values_of(tensor)).astype(FLOAT32)
            elif id(tensor) not in kept:
                tensor.dtype = FLOAT32
        interface = (*model.graph.inputs, *model.graph.outputs)
        edges = [t for t in interface if is_half(t) and id(t) not in known]
        made = {*map(id, casts), *(id(n) for t in edges for n in (*t.inputs, *t.outputs))}
        for node in model.nodes():
            if id(node) not in made:
                retype(node, frozenset(HALVES.values()), FLOAT32)
        return [Note(NAME, model.graph.name, f"{len(halves)} tensors to float32")]

    def __repr__(self) -> str:
        return self.name


def _is_edge(model: Model, tensor: gs.Tensor) -> bool:
    """Whether the tensor is an input or output with nothing but a Cast to or from float32 at it."""
    main = model.graph
    if any(tensor is t for t in main.inputs) and not model.is_output(tensor):
        return all(_casts(node, node.outputs) for node in tensor.outputs)
    if any(tensor is t for t in main.outputs) and not tensor.outputs and tensor.inputs:
        return _casts(tensor.inputs[0], tensor.inputs[0].inputs)
    return False


def _casts(node: gs.Node, other: Sequence[gs.Tensor]) -> bool:
    return bool(node.op == "Cast" and other[0].dtype == FLOAT32)


def _after(model: Model, tensor: gs.Tensor) -> gs.Node:
    """Cast behind an input, for all that read it."""
    uses = list(readers(tensor))
    wide = model.emit(
        "Cast", tensor, name=f"{tensor.name}_float32", like=tensor, dtype=FLOAT32,
        to=onnx.TensorProto.FLOAT,
    )  # fmt: skip
    for node, i in uses:
        node.inputs[i] = wide
    for graph in model.graphs()[1:]:  # a body may hand out what it captures
        graph.outputs[:] = [wide if t is tensor else t for t in graph.outputs]
    return wide.inputs[0]


def _before(model: Model, tensor: gs.Tensor) -> gs.Node:
    """Cast in front of an output, which keeps its name; readers inside take what is before it."""
    maker, uses = tensor.inputs[0], list(readers(tensor))
    index = next(i for i, t in enumerate(maker.outputs) if t is tensor)
    wide = gs.Variable(model.unique(f"{tensor.name}_float32"), FLOAT32, tensor.shape)
    maker.outputs[index] = wide
    for node, i in uses:
        node.inputs[i] = wide
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    narrow = model.emit("Cast", wide, name=tensor.name, like=tensor, to=kind)
    node = narrow.inputs[0]
    node.outputs[0] = tensor
    return node


convert_float32 = ConvertFloat32()
