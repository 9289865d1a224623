"""Replace calls of model-local functions by what they compute, so that other passes see inside.

y = f(x, W)    =>    y = Relu(Conv(x, W))        where  f(x, W) = Relu(Conv(x, W))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from onnxq.core import Note
from onnxq.graphs import op_type_of
from onnxq.model import Model


class InlineFunctions:
    """All functions, nested ones too; a pass without options."""

    name = "inline_functions"

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Inline in place; a note for each function, or why it stays."""
        calls = Counter(f"{node.domain}::{op_type_of(node)}" for node in model.nodes())
        gone = model.inline_functions()
        notes = [
            Note(
                self.name,
                name,
                f"inlined, {calls[name]} calls"
                if calls[name]
                else "inlined inside of another function",
            )
            for name in gone
        ]
        why = "stays a function: it has other versions of operators than the model"
        return notes + [Note(self.name, name, why, changed=False) for name in model.functions]

    def __repr__(self) -> str:
        return self.name


inline_functions = InlineFunctions()
