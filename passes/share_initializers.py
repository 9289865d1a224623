"""Store equal initializers once: the same type, shape and bytes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Note
from onnxq.model import Model, readers, values_of

SMALLEST = 16  # bytes: sharing single numbers gains nothing and makes graphs hard to read


class ShareInitializers:
    """Initializers of the main graph and of bodies; what bodies share moves out; no options."""

    name = "share_initializers"

    def __repr__(self) -> str:
        return self.name

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Share in place; a note for each initializer that went. Hashes first, holds no copies."""
        outputs = {id(t) for graph in model.graphs() for t in graph.outputs}
        kept: dict[tuple[str, tuple[int, ...], bytes], tuple[gs.Constant, gs.Graph]] = {}
        notes = []
        alike = Counter(_kind(t) for g in model.graphs() for t in _constants(g))
        for graph in model.graphs():
            for tensor in _constants(graph):
                if id(tensor) in outputs or alike[_kind(tensor)] < 2:
                    continue  # read only what may have an equal
                digest = _digest(tensor)
                if digest is None:
                    continue
                first, home = kept.setdefault(digest, (tensor, graph))
                if first is not tensor and tensor.outputs:
                    if home is not graph and home is not model.graph:
                        # It moves to the main graph: a name that nothing inside hides.
                        first.name = model.unique(f"{first.name}_shared")
                        kept[digest] = first, model.graph
                    for node, i in list(readers(tensor)):
                        node.inputs[i] = first
                    notes.append(Note(self.name, tensor.name, f"the same as {first.name}"))
        if notes:
            model.sweep()
        return notes


def _constants(graph: gs.Graph) -> list[gs.Constant]:
    return [t for t in graph.tensors().values() if isinstance(t, gs.Constant)]


def _kind(tensor: gs.Constant) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype), tuple(tensor.shape)


def _digest(tensor: gs.Constant) -> tuple[str, tuple[int, ...], bytes] | None:
    values = values_of(tensor)
    if values is None or values.dtype.kind == "O" or values.nbytes < SMALLEST:
        return None
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return str(values.dtype), tuple(values.shape), hashlib.sha256(data.data).digest()


share_initializers = ShareInitializers()
