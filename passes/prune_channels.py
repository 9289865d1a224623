"""Remove whole output channels, neurons, attention heads and hidden units.

    y = W f(V x + b) + c        =>        y = W[:, kept] f(V[kept] x + b[kept]) + c

What goes together is found in `removal`; which of it goes is decided in `unit_choice`. Inputs and
outputs stay as they are. What cannot be pruned has a note that says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxq.core import Note
from onnxq.errors import RecipeError
from onnxq.layers import Layers
from onnxq.model import Model
from onnxq.passes.removal import remove, structure
from onnxq.passes.unit_choice import choose, norms

NAME = "prune_channels"
CRITERIA = ("norm",)


@dataclass(frozen=True, slots=True)
class PruneChannels:
    """Remove the same share of every group of channels that go together.

    amount: share of the units of a group, 0 to less than 1. criterion: "norm", the root mean square
    of the weights that make a unit. multiple: of how many units a group keeps; a runtime's kernels
    may like 8 or 16. layers: overrides; a layer that is to be dense keeps all that it makes.
    """

    amount: float = 0.3
    criterion: str = "norm"
    multiple: int = 1
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.amount < 1:
            raise RecipeError(
                f"amount is a share of the channels from 0 to below 1, not {self.amount}"
            )
        if self.criterion not in CRITERIA:
            raise RecipeError(f"unknown criterion {self.criterion!r}: one of {', '.join(CRITERIA)}")
        if self.multiple < 1:
            raise RecipeError(f"multiple is a number of channels from 1 on, not {self.multiple}")

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Prune in place; a note for each layer that lost channels, or why it kept them."""
        dense = Layers.parse(self.layers).dense(model)
        found = structure(model, NAME, dense)
        keep = choose(found, norms(found), self.amount, self.multiple)
        return [*remove(model, found, keep, NAME), *found.held]
