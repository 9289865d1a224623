"""Raise the model's opset to what a target's operators need; never lower it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from onnxq.core import Note
from onnxq.errors import ModelError
from onnxq.model import Model
from onnxq.options import require_range


@dataclass(frozen=True, slots=True)
class RaiseOpset:
    """Convert the model to a newer version of the default operator set, if it is older.

    Where the version converter cannot, to the newest version that it can: later passes use what
    that allows, and a note says what is in the way.
    """

    version: int

    def __post_init__(self) -> None:
        require_range("version", self.version, 1, onnx.defs.onnx_opset_version())

    @property
    def name(self) -> str:
        """The pass's name."""
        return "raise_opset"

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Convert in place, or say why not."""
        before = model.opset
        if before >= self.version:
            return []
        notes: list[Note] = []
        for version in range(self.version, before, -1):
            try:
                model.raise_opset(version)
            except ModelError as e:
                notes = notes or [Note(self.name, model.graph.name, str(e), changed=False)]
            else:
                notes.append(Note(self.name, model.graph.name, f"opset {before} to {version}"))
                break
        return notes
