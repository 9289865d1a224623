"""Store weights as indices into a codebook: few bits whose values lie where the weights do.

    y = Layer(x, W)    =>    y = Layer(x, Mul(Gather(codebook, Cast(indices)), s))

It is computed once, when the model is loaded: the file is small and the speed that of floats. How
the codebook is chosen: `onnxq.codebooks`; how it is written: `onnxq.passes.codebook_encoding`.

Layers can have a linear format instead (`onnxq.passes.encodings`): where an override asks for one;
where int8 takes no more bits than indices, scales and codebook together; and for what multiplies
the state of LSTM, GRU and RNN, whose errors add up from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

from onnxq.codebooks import CodebookScheme, Kind
from onnxq.core import Note, Skip
from onnxq.data import Samples
from onnxq.model import Model
from onnxq.options import require_range
from onnxq.parallel import Crew
from onnxq.passes.codebook_encoding import Coded, coded
from onnxq.passes.codebook_plans import CodebookJob, CodebookPlan
from onnxq.passes.coding import CodeSource
from onnxq.passes.encodings import Emitter, Packed, stored
from onnxq.passes.importance import Importance, observed
from onnxq.passes.streamed import Making, Source, each_made
from onnxq.passes.weight_storage import Found, Unpacked
from onnxq.targets import Target

NAME = "quantize_codebook"
WEIGHED = "importance"


@dataclass(frozen=True, slots=True)
class QuantizeCodebook:
    """Weights of at least `smallest` elements that are still floats, in bodies too.

    codebook: how its values are chosen (`onnxq.codebooks`). bits: of an index, 1 to 8; default 4,
    for vectors 8. granularity: one scale a tensor, channel or group of `group_size`. dim:
    neighbouring values that share an index, of vectors alone (default 4). range: importance weighs
    errors by the mean squares of what the weight is multiplied with, seen in samples. seed: of
    vectors. state: what multiplies the state of LSTM, GRU and RNN. layers: overrides for single
    layers, "PATTERN=FORMAT" with a linear format or float, the last match wins.
    """

    codebook: Kind = "kmeans"
    bits: int | None = None
    granularity: Literal["tensor", "channel", "group"] = "group"
    group_size: int = 64
    dim: int | None = None
    range: Literal["mse", "importance"] = "mse"
    seed: int = 0
    smallest: int = 512
    state: Literal["int8", "codebook"] = "int8"
    layers: tuple[str, ...] = ()
    target: Target | None = None
    samples: Samples | None = field(default=None, repr=False)
    progress: Callable[[int], None] | None = field(default=None, repr=False, compare=False)
    crew: Crew | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_range("seed", self.seed, 0)
        _ = self.plan

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    @staticmethod
    def wants(field: str, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, it has to be given `field`; see `onnxq.recipes.wants`."""
        return field != "samples" or options.get("range") == WEIGHED

    @property
    def plan(self) -> CodebookPlan:
        """What decides about formats."""
        return CodebookPlan(
            self.codebook, self.bits, self.granularity, self.group_size, self.dim, self.smallest,
            self.state, self.layers, self.target,
        )  # fmt: skip

    @property
    def opset(self) -> int:
        """The opset that a model should have, see `CodebookPlan`."""
        return self.plan.opset

    @property
    def unfit(self) -> str | None:
        """Why the target can do nothing with what the pass writes; None: it can."""
        return self.plan.unfit

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Store weights in few bits in place; a note for each, or why not.

        Raises DataError for range "importance" without samples, or with ones that do not fit.
        """
        return _Work(self, model).run()


class _Work:
    """One run of the pass over one model."""

    def __init__(self, options: QuantizeCodebook, model: Model) -> None:
        self.options, self.model = options, model
        self.notes: list[Note] = []
        self.unpacked = Unpacked(model)

    def run(self) -> list[Note]:
        jobs, spared = self.options.plan.jobs(self.model, NAME)
        self.notes += spared
        importance: Importance = {}
        if self.options.range == WEIGHED and jobs:
            held = [(job.weight.node, job.weight.held) for job in jobs]
            importance = observed(self.model, held, self.options.samples, self.options.progress)
        sources: list[Making[Packed | Coded]] = [
            self._source(job, number, importance) for number, job in enumerate(jobs)
        ]
        keys = [(id(j.weight.tensor), j.weight.held.key, j.form) for j in jobs]
        crew, scratch = self.options.crew or Crew(), self.model.scratch
        with closing(each_made(crew, scratch, keys, sources)) as made:
            for job, result in zip(jobs, made, strict=True):
                try:
                    self._store(job, result.result(), importance)
                except Skip as reason:
                    self._declined(job.weight, str(reason))
        if any(note.changed for note in self.notes):
            self.model.sweep()
        return self.notes

    def _declined(self, weight: Found, why: str) -> None:
        self.notes.append(Note(NAME, weight.node.name, why, changed=False))

    def _source(self, job: CodebookJob, number: int, importance: Importance) -> Source | CodeSource:
        weight, scheme, held = job.weight, job.scheme, job.weight.held
        squares = importance.get((id(weight.node), held.index))
        if isinstance(scheme, CodebookScheme):
            seed = self.options.seed + number
            return CodeSource(weight.tensor, held, scheme, job.storage, seed, squares)
        method: Literal["mse", "importance"] = "mse" if squares is None else "importance"
        return Source(weight.tensor, held, scheme, method, squares=squares)

    def _store(self, job: CodebookJob, made: Packed | Coded, importance: Importance) -> None:
        def write(on: Emitter) -> Any:
            return coded(on, made) if isinstance(made, Coded) else stored(on, made)

        weight = job.weight
        self.unpacked.use(weight, job.form, write)
        is_seen = (id(weight.node), weight.held.index) in importance
        unseen = self.options.range == WEIGHED and not is_seen
        text = f"{job.text}{', mse: its input was not observed' if unseen else ''}"
        self.notes.append(Note(NAME, weight.node.name, text))
