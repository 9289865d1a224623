"""Compute in 16-bit floats what a model computes in float32, or store its constants in them.

    y = Conv(x, W)    =>    y = Cast(Conv(Cast(x), W16))        encoding: compute
    y = Conv(x, W)    =>    y = Conv(x, Cast(W16))              encoding: storage

Compute is for runtimes whose arithmetic in 16 bits is fast. Nodes that float16 cannot represent,
and those that have no form in it, stay float32; Casts stand between, as few as there can be
(`half_regions`). Storage is for the others: the Casts are computed when the model is loaded, so it
is half the size and as fast and as accurate in its activations as it was (`half_storage`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from onnxq.core import Note
from onnxq.data import Samples
from onnxq.layers import Layers
from onnxq.model import Model
from onnxq.passes.half_regions import Division, Regions
from onnxq.passes.half_rules import kept_nodes
from onnxq.passes.half_storage import HalfConstants, store
from onnxq.passes.halves import HALF_TYPES, Half
from onnxq.targets import Target
from onnxq.targets.halves import HalfRule

NAME = "convert_float16"
CAST_SINCE = {"float16": 6, "bfloat16": 13}  # onnx Changelog.md: Cast
COMPUTED_SINCE = {"float16": 6, "bfloat16": 22}  # Conv, poolings and others take it from there on


@dataclass(frozen=True, slots=True)
class ConvertFloat16:
    """The main graph and bodies; integers, float64 and 16-bit floats of the model are left.

    format: float16, or bfloat16, which has float32's range and 8 significant bits. encoding: auto
    is what the target says. interface: float32 inputs and outputs are kept, or become 16 bits, too.
    smallest: elements from which weights of float32 operators are stored in 16 bits; first_share:
    those of the first convolutions stay float32 while they are at most so large a part of all (few
    values, and all layers build on their errors). layers: "PATTERN=float" keeps layers as
    they are. Samples, where there are some, show which activations do not fit; without, nodes are
    kept whose results often do not (Exp, squares that are summed).
    """

    format: Half = "float16"
    encoding: Literal["auto", "compute", "storage"] = "auto"
    interface: Literal["kept", "half"] = "kept"
    smallest: int = 256
    first_share: float = 0.03
    layers: tuple[str, ...] = ()
    target: Target | None = None
    samples: Samples | None = field(default=None, repr=False)
    progress: Callable[[int], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.interface == "half" and self.format == "bfloat16":
            raise ValueError("inputs in bfloat16 cannot be fed by numpy: use interface = kept")
        Layers.parse(self.layers)

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    @staticmethod
    def wants(field: str, options: Mapping[str, Any]) -> bool:
        """Whether it has to be given `field`: no; samples that are there are looked at."""
        return False

    @property
    def opset(self) -> int:
        """The opset that a model should have."""
        return (COMPUTED_SINCE if self.computes else CAST_SINCE)[self.format]

    @property
    def facts(self) -> HalfRule:
        """How the target takes the format."""
        found = None if self.target is None else self.target.halves.get(self.format)
        return found or HalfRule()

    @property
    def computes(self) -> bool:
        """Whether operators are to compute in 16 bits."""
        asked = self.facts.encoding if self.encoding == "auto" else self.encoding
        return asked == "compute"

    @property
    def stores(self) -> bool:
        """Whether constants of float32 operators may be stored in 16 bits."""
        return self.target is None or self.target.stored_weights

    @property
    def unfit(self) -> str | None:
        """Why the target can do nothing with what the pass writes; None: it can."""
        if self.target is None or self.stores or self.format in self.target.halves:
            return None
        return f"{self.target.name} has no {self.format}: use a recipe that quantizes"

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Convert in place; notes on what was, and on each node that was not, with the reason.

        Raises DataError for samples that do not fit the model.
        """
        if model.opset < (since := CAST_SINCE[self.format]):
            text = f"opset {model.opset} has no Cast to {self.format}: opset {since} has"
            return [Note(NAME, model.graph.name, text, changed=False)]
        half, asked = HALF_TYPES[self.format], Layers.parse(self.layers).choices(model)
        floats = {key: choice.reason for key, choice in asked.items() if choice.is_float}
        constants, notes = HalfConstants(model, half), list[Note]()
        if self.computes or self.interface == "half":
            kept = None
            if self.computes:
                kept = kept_nodes(model, half, self.facts, floats, self.samples, self.progress)
            regions = Regions(model, constants, kept, interface=self.interface == "half")
            notes += _told(regions.write(), kept, model, half.name)
        if self.stores:
            notes += store(constants, NAME, self.smallest, self.first_share, floats)
        if any(note.changed for note in notes):
            model.sweep()
        return notes


def _told(
    division: Division, kept: Mapping[int, str] | None, model: Model, name: str
) -> list[Note]:
    """What was divided how, and each node that stays float32 with the reason."""
    if kept is None:
        text = f"inputs and outputs in {name}: {division.casts} Casts"
        return [Note(NAME, model.graph.name, text, changed=division.casts > 0)]
    text = (
        f"{division.half} nodes compute in {name}, {division.single} in float32, "
        f"{division.casts} Casts between"
    )
    notes = [Note(NAME, model.graph.name, text, changed=division.half > 0)]
    notes += [Note(NAME, node, f"computes in {name}") for node in division.layers]
    return notes + [
        Note(NAME, node.name, f"{node.op} stays float32: {kept[id(node)]}", changed=False)
        for node in model.nodes()
        if id(node) in kept
    ]
