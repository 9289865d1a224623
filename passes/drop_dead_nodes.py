"""Drop nodes whose results nobody reads, and initializers that no node reads."""

from __future__ import annotations

from collections.abc import Sequence

from onnxq.core import Note
from onnxq.model import Model


class DropDeadNodes:
    """Graph inputs, outputs and operators with effects stay; a pass without options."""

    name = "drop_dead_nodes"

    def __repr__(self) -> str:
        return self.name

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Drop in place; a note for each node."""
        before = {id(node): node for node in model.nodes()}
        model.sweep()
        for node in model.nodes():
            before.pop(id(node), None)
        return [Note(self.name, node.name, f"nobody reads {node.op}") for node in before.values()]


drop_dead_nodes = DropDeadNodes()
