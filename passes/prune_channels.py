"""Remove whole output channels, neurons, attention heads and hidden units.

    y = W f(V x + b) + c        =>        y = W' f(V[kept] x + b[kept]) + c'

What goes together is found in `removal`. Which units go first, and what else layers have to weigh
to make up for them, is found in samples (`unit_curves`); how many in each place, by what it costs
the model's outputs (`unit_budget`); at last all layers behind are fitted to what they gave before
(`unit_repair`). Inputs and outputs stay as they are. What cannot be pruned has a note that says
why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from onnxq.core import Note
from onnxq.data import Samples
from onnxq.errors import RecipeError
from onnxq.layers import Layers
from onnxq.model import Model
from onnxq.options import require_range
from onnxq.passes.removal import structure
from onnxq.passes.unit_plans import Aims, Pruning
from onnxq.targets import Target

NAME = "prune_channels"
SHARE = 0.3  # of the multiply-accumulates
Criterion = Literal["auto", "norm", "activation", "reconstruction"]


@dataclass(frozen=True, slots=True)
class PruneChannels:
    """Remove channels until a share of the work, the size or the time is saved.

    One of: amount, the same share of the units of every group; macs, a share of the
    multiply-accumulates; size, of the bytes of all weights; latency, of the time that onnxruntime
    takes, measured. All are shares that go, from 0 to below 1; none: macs 0.3. For the last three
    each group loses what costs the model's outputs least for what it saves; counts are steps, so
    that more may go than was asked for. Times differ from run to run, and with them what latency
    removes.

    criterion: which units go first: "norm", those of the smallest weights; "activation", those
    whose values vary least, times the weights that read them; "reconstruction", those for which
    the others make up best; "auto" is that with samples of real data, and norm without.
    compensation: layers behind make up for what goes (with samples). multiple: of how many channels
    a group keeps; none: what the target's kernels like, where that costs little. least: groups with
    a smaller share of the work stay. memory_mb: of what is observed at once. layers: overrides; a
    layer that is to be dense keeps all that it makes.
    """

    amount: float | None = None
    macs: float | None = None
    size: float | None = None
    latency: float | None = None
    criterion: Criterion = "auto"
    compensation: bool = True
    multiple: int | None = None
    least: float = 0.002
    memory_mb: int = 1024
    layers: tuple[str, ...] = ()
    samples: Samples | None = field(default=None, repr=False)
    target: Target | None = None
    progress: Callable[[int], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if sum(value is not None for value in self._wishes) > 1:
            raise RecipeError(f"{NAME} takes one of amount, macs, size and latency")
        if self.criterion not in get_args(Criterion):
            listed = ", ".join(get_args(Criterion))
            raise RecipeError(f"{NAME}: unknown criterion {self.criterion!r}: one of {listed}")
        if not all(value is None or 0 <= value < 1 for value in self._wishes):
            raise RecipeError(f"{NAME}: what is saved is a share from 0 to below 1")
        if self.multiple is not None and self.multiple < 1:
            raise RecipeError(f"multiple is a number of channels from 1 on, not {self.multiple}")
        require_range("least", self.least, 0, 1)
        require_range("memory_mb", self.memory_mb, 1)
        Layers.parse(self.layers)

    @property
    def _wishes(self) -> tuple[float | None, ...]:
        return self.amount, self.macs, self.size, self.latency

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    @staticmethod
    def wants(field: str, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, it has to be given `field`; see `onnxq.recipes.wants`."""
        if field != "samples":
            return False
        return (
            options.get("criterion") in ("activation", "reconstruction")
            or options.get("latency") is not None
        )

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Prune in place; a note for each layer that lost channels, or why it kept them.

        Raises DataError for samples that do not fit, or where there are none for a criterion.
        """
        model.separate_names()
        dense = Layers.parse(self.layers).dense(model)
        found = structure(model, NAME, dense)
        if not found.groups:
            return list(found.held)
        names = frozenset(node.name for node in model.nodes() if id(node) in dense)
        costs = None if self.target is None else self.target.costs
        is_open = all(value is None for value in self._wishes)
        aims = Aims(
            self.amount, SHARE if is_open else self.macs, self.size, self.latency, self.multiple,
            self.least, 1 if costs is None else costs.block,
        )  # fmt: skip
        pruning = Pruning(
            NAME, model, found, aims, names, self.criterion, self.compensation, self.samples,
            self.memory_mb << 20, self.progress,
        )  # fmt: skip
        return [*pruning.run(), *found.held]
