"""Set weights to zero, and let the others make up for it.

    W    =>    W', of which a share is exactly 0.0

How many of each weight: an amount, the same for all; a number for all layers together, by what
weights cost or by what layers cost at the model's outputs; those below a threshold; or N of each M
inputs ("2:4"). Which ones, by a criterion:

magnitude  the least |w|; across layers, of all values as they are
wanda      the least |w| |x|, x what the weight is multiplied with (Sun et al. 2023,
           arXiv:2306.11695), within each row; across layers, squares as a share of the layer's
obs        those without which the layer's results change least, the others set anew by least
           squares (`onnxq.numerics.pruning`); across layers, the cost as a share of the results

A pruned weight is a plain float constant: passes behind keep its zeros, the file gets smaller by
compression, by sparse storage (sparsify_storage), or in a runtime with kernels for N:M.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from onnxq.core import Note
from onnxq.data import Samples
from onnxq.errors import DataError
from onnxq.layers import Layers
from onnxq.model import Model
from onnxq.numerics.pruning import DAMPING, effort
from onnxq.numerics.sparsity import Pattern
from onnxq.options import require_range
from onnxq.passes.masks import remember
from onnxq.passes.observing import UNREAL, Observing
from onnxq.passes.prunable import Prunable, find_prunable
from onnxq.passes.pruning import Criterion, Plan, Scope, pruned_model

NAME = "prune_weights"
AMOUNT = 0.5
TRIED = 1e10  # effort up to which each weight is pruned several times, to see what that costs


@dataclass(frozen=True, slots=True)
class PruneWeights:
    """Exact zeros in the weights of layers.

    Biases, tables, and kernels over at most 3 input channels (depthwise, or of images) stay.

    amount: the share that goes (0.5), of each weight (scope layer), of all together (global), or of
    all together where that costs least at the model's outputs (sensitivity). Scope auto is that
    with obs, where trying takes no minutes, else layer. threshold: in its
    place, what is smaller goes. nm: in its place, "2:4": 2 of each 4 inputs stay. criterion: auto
    is obs where there are real samples, else magnitude. With obs each layer is judged by the
    squared error of its results on the last quarter of the samples; where magnitude alone is
    better, that is done.

    damping: how far correlations are believed, as a share of the mean square that is added.
    memory_mb: of the products that are observed at once; layers that need more are pruned by
    magnitude. smallest: weights of fewer values stay dense, as do those of layers that an override
    PATTERN=dense names.
    """

    samples: Samples | None = field(default=None, repr=False)
    amount: float | None = None
    threshold: float | None = None
    nm: str = ""
    scope: Literal["auto", "layer", "global", "sensitivity"] = "auto"
    criterion: Literal["auto", "magnitude", "wanda", "obs"] = "auto"
    damping: float = DAMPING
    memory_mb: int = 1024
    smallest: int = 512
    layers: tuple[str, ...] = ()
    progress: Callable[[int], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.amount is not None and not 0 <= self.amount < 1:
            raise ValueError(f"amount is a share from 0 to below 1, not {self.amount!r}")
        if self.threshold is not None:
            require_range("threshold", self.threshold, 0)
        require_range("damping", self.damping, 0)
        require_range("memory_mb", self.memory_mb, 1)
        require_range("smallest", self.smallest, 1)
        asked = {"amount": self.amount, "threshold": self.threshold, "nm": self.nm or None}
        given = [name for name, value in asked.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say how many weights go: give one")
        if self.scope not in ("auto", "layer") and given not in ([], ["amount"]):
            raise ValueError(f"scope {self.scope!r} divides an amount: leave {given[0]} out")
        if self.threshold is not None and self.criterion == "wanda":
            raise ValueError("a threshold is for magnitudes: criterion is magnitude or obs")
        _ = self.pattern, Layers.parse(self.layers)

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    @property
    def pattern(self) -> Pattern | None:
        """N:M, if asked for."""
        return Pattern.parse(self.nm) if self.nm else None

    @staticmethod
    def wants(field: str, options: Mapping[str, Any]) -> bool:
        """Whether it has to be given `field`; samples that are there are used anyway."""
        if field != "samples":
            return False
        asked = options.get("criterion") in ("wanda", "obs")
        return asked or options.get("scope") == "sensitivity"

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Prune in place; a note for each weight, or why not.

        Raises DataError where samples are needed and there are none, or for ones that do not fit.
        """
        is_real = self.samples is not None and len(self.samples) > 0 and not self.samples.synthetic
        if not is_real and self.wants(
            "samples", {"criterion": self.criterion, "scope": self.scope}
        ):
            if self.samples is None or not len(self.samples):
                raise DataError(f"{NAME} looks at samples: give --data, or take magnitude")
            return [Note(NAME, model.graph.name, UNREAL, changed=False)]
        auto: Criterion = "obs" if is_real else "magnitude"
        criterion = auto if self.criterion == "auto" else self.criterion
        model.separate_names()
        found, notes = find_prunable(model, self.layers, self.smallest, NAME)
        amount = AMOUNT if self.amount is None else self.amount
        scope = self._scope(found, criterion)
        plan = Plan(NAME, criterion, amount, self.threshold, self.pattern, scope, self.damping)
        observing = None
        if is_real and self.samples is not None:
            observing = Observing(NAME, self.samples, 1, self.memory_mb, self.progress)
        notes += pruned_model(model, found, plan, observing)
        if any(note.changed for note in notes):
            model.sweep()
            remember(model, notes)
        return notes

    def _scope(self, found: Sequence[Prunable], criterion: Criterion) -> Scope:
        if self.scope != "auto":
            return self.scope
        is_share = self.threshold is None and not self.nm
        shapes = [weight.held for weight in found]
        is_quick = sum(effort(prod(h.shape) // h.length, h.length) for h in shapes) <= TRIED
        return "sensitivity" if is_share and criterion == "obs" and is_quick else "layer"
