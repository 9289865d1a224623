"""A model from whatever a caller has: a path, a proto, a Model; its name and size."""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from onnxq import runtime
from onnxq.model import Model

PathLike = str | os.PathLike[str]
ModelLike = PathLike | Model | onnx.ModelProto


def load(model: ModelLike) -> Model:
    """Load a model from a file, or wrap one that is in memory.

    Raises ModelError when it is not a model that can be read.
    """
    if isinstance(model, Model):
        return model
    return Model.from_proto(model) if isinstance(model, onnx.ModelProto) else Model.load(model)


def name_of(model: ModelLike) -> str:
    """The path, if it has one."""
    return os.fspath(model) if isinstance(model, str | os.PathLike) else "model in memory"


def size_of(model: ModelLike, loaded: Model) -> int:
    """Bytes of the model in files, those with its weights included."""
    if isinstance(model, str | os.PathLike):
        files = (Path(model), *loaded.data_files())
        return sum(file.stat().st_size for file in files)
    if isinstance(model, Model):
        total = sum(model.weight_sizes())
        return total if total > runtime.LARGE else model.to_proto().ByteSize()
    return int(model.ByteSize())
