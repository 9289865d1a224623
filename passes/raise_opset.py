"""Raise the model's opset to what a target's operators need; never lower it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxq.core import Note
from onnxq.errors import ModelError
from onnxq.model import Model


@dataclass(frozen=True, slots=True)
class RaiseOpset:
    """Convert the model to a newer version of the default operator set, if it is older.

    A model that the version converter cannot take keeps its opset, with a note: later passes use
    what it allows.
    """

    version: int

    @property
    def name(self) -> str:
        """The pass's name."""
        return "raise_opset"

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Convert in place, or say why not."""
        before = model.opset
        if before >= self.version:
            return []
        try:
            model.raise_opset(self.version)
        except ModelError as e:
            return [Note(self.name, model.graph.name, str(e), changed=False)]
        return [Note(self.name, model.graph.name, f"opset {before} to {model.opset}")]
