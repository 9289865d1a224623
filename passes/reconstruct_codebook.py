"""Choose indices into codebooks so that the weights' errors cancel in the layers' results.

    W    =>    W', float values of a codebook, which remember their indices

As reconstruct_weights, for the quantize_codebook that follows: codebook and scales are fitted as it
does it, then values are rounded to entries one after the other, each making up for the errors of
those before it (`onnxq.numerics.reconstruction`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from onnxq.codebooks import Kind
from onnxq.core import Note
from onnxq.data import Samples
from onnxq.model import Model
from onnxq.options import require_range
from onnxq.passes.codebook_plans import CodebookPlan
from onnxq.passes.observing import Observing
from onnxq.passes.solving import Solver, reconstructed
from onnxq.targets import Target

NAME = "reconstruct_codebook"


@dataclass(frozen=True, slots=True)
class ReconstructCodebook:
    """Weights that quantize_codebook stores with the same options, where its results get closer.

    Those that it stores in a linear format, too; vectors are left to it. Squared errors are weighed
    by importance, as they are seen here. damping, sweeps, rounds, memory_mb: see
    reconstruct_weights. All others: see quantize_codebook.
    """

    samples: Samples = field(repr=False)
    codebook: Kind = "kmeans"
    bits: int | None = None
    granularity: Literal["tensor", "channel", "group"] = "group"
    group_size: int = 64
    dim: int | None = None
    damping: float = 0.1
    sweeps: int = 3
    rounds: int = 1
    memory_mb: int = 1024
    smallest: int = 512
    state: Literal["int8", "codebook"] = "int8"
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
    def plan(self) -> CodebookPlan:
        """What decides about formats."""
        return CodebookPlan(
            self.codebook, self.bits, self.granularity, self.group_size, self.dim, self.smallest,
            self.state, self.layers, self.target,
        )  # fmt: skip

    @property
    def observing(self) -> Observing:
        """What is run to see what weights are multiplied with."""
        return Observing(NAME, self.samples, self.rounds, self.memory_mb, self.progress)

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Put weights on their codebooks in place; a note for each, or why not.

        Raises DataError without samples, or with ones that do not fit.
        """
        if (why := self.observing.why_not()) is not None:
            return [Note(NAME, model.graph.name, why, changed=False)]
        model.separate_names()
        jobs, _ = self.plan.jobs(model, NAME)
        solver = Solver("importance", self.damping, self.sweeps)
        schemes = [(job.weight, job.scheme) for job in jobs]
        return reconstructed(model, self.observing, solver, schemes)
