"""Store equal initializers once: the same type, shape and bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Note
from onnxq.model import Model, readers
from onnxq.weights import bytes_in, bytes_of

SMALLEST = 16  # bytes: sharing single numbers gains nothing and makes graphs hard to read
EXCERPTS, EXCERPT = 16, 64  # bytes that tell most weights apart: how many pieces, of how many
CHUNK = 1 << 20  # bytes hashed at a time


class ShareInitializers:
    """Initializers of the main graph and of bodies; what bodies share moves out; no options."""

    name = "share_initializers"

    def __repr__(self) -> str:
        return self.name

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Share in place; a note for each initializer that went.

        Looks closer and closer at what may have an equal: shapes, some of the bytes, a hash of all.
        """
        outputs = {id(t) for graph in model.graphs() for t in graph.outputs}
        kept: dict[tuple[Any, ...], tuple[gs.Constant, gs.Graph]] = {}
        notes = []
        alike = _alike([t for g in model.graphs() for t in _constants(g) if id(t) not in outputs])
        for graph in model.graphs():
            for tensor in _constants(graph):
                if id(tensor) not in alike:
                    continue
                digest = (*_kind(tensor), _digest(tensor))
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


def _alike(tensors: Sequence[gs.Constant]) -> set[int]:
    """Ids of those that have the type, the shape and some of the bytes of another one."""
    for key in (_kind, _excerpt):
        groups: dict[Any, dict[int, gs.Constant]] = {}
        for tensor in tensors:
            if np.dtype(tensor.dtype).kind not in "OUS" and bytes_in(tensor) >= SMALLEST:
                groups.setdefault(key(tensor), {})[id(tensor)] = tensor
        tensors = [t for group in groups.values() if len(group) > 1 for t in group.values()]
    return {id(t) for t in tensors}


def _excerpt(tensor: gs.Constant) -> Any:
    """The type, the shape, and a few of the bytes here and there."""
    size, read = bytes_in(tensor), bytes_of(tensor._values)
    places = {size * i // EXCERPTS for i in range(EXCERPTS)}
    parts = (bytes(read(at, min(EXCERPT, size - at))) for at in sorted(places))
    return (*_kind(tensor), b"".join(parts))


def _digest(tensor: gs.Constant) -> bytes:
    size, read = bytes_in(tensor), bytes_of(tensor._values)
    digest = hashlib.sha256()
    for at in range(0, size, CHUNK):
        digest.update(read(at, min(CHUNK, size - at)))
    return digest.digest()


share_initializers = ShareInitializers()
