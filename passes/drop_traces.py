"""Drop what PyTorch's exporter noted at each node of the Python source that it comes from.

Stack traces with paths of the machine that exported, scopes, class names: no runtime reads them,
and in small models they take more bytes than the weights. Other metadata stays.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxq.core import Note
from onnxq.model import Model

PREFIXES = ("pkg.torch.", "pkg.onnxscript.")  # torch.onnx, `_metadata` of its dynamo exporter
SCOPE = "namespace"  # written beside those, and read by viewers that fold a graph


class DropTraces:
    """Bodies included; a pass without options."""

    name = "drop_traces"

    def __repr__(self) -> str:
        return self.name

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Drop in place; one note for all nodes."""
        count = 0
        for node in model.nodes():
            proto = node.__dict__.get("origin")
            if proto is None or not any(p.key.startswith(PREFIXES) for p in proto.metadata_props):
                continue
            kept = [
                p for p in proto.metadata_props if not p.key.startswith(PREFIXES) and p.key != SCOPE
            ]
            del proto.metadata_props[:]
            proto.metadata_props.extend(kept)
            count += 1
        text = f"{count} nodes told where in the Python source they come from"
        return [Note(self.name, model.graph.name, text)] if count else []


drop_traces = DropTraces()
