"""Choose the integers of weights so that their errors cancel in the layers' results.

    W    =>    W', float values on the grid of a format, which remember their integers

Rounding each value to nearest is the best for none but uncorrelated inputs; here each makes up for
the errors of those before it (`onnxq.numerics.reconstruction`: GPTQ, Frantar et al. 2022). What the
layers are multiplied with is observed in samples, in rounds: later layers see the errors of earlier
ones. A pass that quantizes weights afterwards, with the same options, takes the integers as they
are (`onnxq.packed`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from onnxq.core import Note
from onnxq.data import Samples
from onnxq.model import Model
from onnxq.options import require_range
from onnxq.passes.observing import Observing
from onnxq.passes.solving import Solver, reconstructed
from onnxq.passes.weight_plans import WeightPlan
from onnxq.schemes import Method
from onnxq.targets import Target

NAME = "reconstruct_weights"


@dataclass(frozen=True, slots=True)
class ReconstructWeights:
    """Weights that quantize_weights stores with the same options, where its results get closer.

    Each layer is judged by the squared error of its results on the last quarter of the samples:
    where reconstruction does not lower it, the weight stays as it was for quantize_weights.

    range: how scales are chosen, for groups when their turn comes; importance weighs each value by
    what its error costs when the values behind it make up for it. damping: how far correlations are
    believed, as a share of the mean square that is added. sweeps: how often each integer and scale
    is set anew, given all others. rounds: how often the samples are run, about; 1: all layers see
    what they see in the float model. memory_mb: of the products that are observed at once; layers
    that need more are left alone. All others: see quantize_weights.
    """

    samples: Samples = field(repr=False)
    format: str = "uint4"
    granularity: Literal["tensor", "channel", "group"] = "group"
    group_size: int = 32
    symmetric: bool = False
    levels: int | None = None
    range: Method = "importance"
    damping: float = 0.1
    sweeps: int = 1
    rounds: int = 1
    memory_mb: int = 1024
    encoding: Literal["auto", "compute", "storage"] = "auto"
    smallest: int = 512
    recurrent_group: int = 16
    wide_share: float = 0.0
    layers: tuple[str, ...] = ()
    target: Target | None = None
    progress: Callable[[int], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_range("damping", self.damping, 0)
        require_range("sweeps", self.sweeps, 0)
        _ = self.plan, self.observing

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    @property
    def plan(self) -> WeightPlan:
        """What decides about formats."""
        return WeightPlan(
            self.format, self.granularity, self.group_size, self.symmetric, self.levels,
            self.encoding, self.smallest, self.recurrent_group, self.wide_share, self.layers,
            self.target,
        )  # fmt: skip

    @property
    def observing(self) -> Observing:
        """What is run to see what weights are multiplied with."""
        return Observing(NAME, self.samples, self.rounds, self.memory_mb, self.progress)

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Put weights on their grids in place; a note for each, or why not.

        Raises DataError without samples, or with ones that do not fit.
        """
        if (why := self.observing.why_not()) is not None:
            return [Note(NAME, model.graph.name, why, changed=False)]
        model.separate_names()
        jobs, _ = self.plan.jobs(model, self.samples, NAME)
        solver = Solver(self.range, self.damping, self.sweeps)
        schemes = [(job.weight, job.scheme) for job in jobs]
        return reconstructed(model, self.observing, solver, schemes)
