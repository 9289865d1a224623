"""Store weights of layers that compute in floats in few bits.

    y = Layer(x, W)    =>    y = Layer(x, Mul(Cast(Wq), s))              encoding: storage
    y = MatMul(x, W)   =>    y = MatMul(x, DequantizeLinear(Wq, s))      encoding: compute

Storage is computed once, when the model is loaded: the file is small and the speed that of floats.
Compute is for kernels that multiply with integers, where the target has them and they are faster;
elsewhere a DequantizeLinear would be computed at every run. See `onnxq.passes.encodings`.

A scale belongs to a tensor, to a channel (all the products that are summed into one value), or to a
group of values within a channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

import onnx_graphsurgeon as gs

from onnxq.core import Note, Skip
from onnxq.data import Samples
from onnxq.model import Model
from onnxq.options import require_range
from onnxq.parallel import Crew
from onnxq.passes.encodings import Encoding, Packed, dequantized, opset_for, stored
from onnxq.passes.importance import Importance, observed
from onnxq.passes.streamed import Source, each_made
from onnxq.passes.weight_plans import Job, WeightPlan
from onnxq.passes.weight_storage import Unpacked, told
from onnxq.schemes import Method
from onnxq.targets import Target

NAME = "quantize_weights"
CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True, slots=True)
class QuantizeWeights:
    """Weights of at least `smallest` elements that are still floats, in bodies too.

    format: an integer format or a float8. granularity: one scale a tensor, channel or group of
    `group_size`. symmetric: no zero points. levels: use only so many integers. range: how scales
    are chosen; importance weighs errors by the mean squares of what the weight is multiplied with,
    seen in samples (mse where rounding is balanced). rounding: half to even; stochastic by `seed`;
    balanced in convolutions, so that errors cancel (`numerics.balancing`). encoding: compute takes
    a kernel for integer weights wherever the target has one, auto where it is also faster, storage
    never. recurrent_group: in LSTM, GRU and RNN, whose errors add up from step to step, so many
    values share a scale instead of a channel's (0: a channel's). wide_share: the smallest weights,
    together so large a part of all, get 16 bits in place of 8: layers of few weights show each
    step. layers: overrides for single layers, "PATTERN=FORMAT", the last match wins.
    """

    format: str = "int8"
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: int = 32
    symmetric: bool = True
    levels: int | None = None
    range: Method = "minmax"
    rounding: Literal["even", "stochastic", "balanced"] = "even"
    seed: int = 0
    encoding: Literal["auto", "compute", "storage"] = "auto"
    smallest: int = 512
    recurrent_group: int = 16
    wide_share: float = 0.0
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
        return field != "samples" or options.get("range") == "importance"

    @property
    def opset(self) -> int:
        """The opset that a model should have, for the formats and for groups in kernels."""
        groups = self.granularity == "group"
        computes = self.target is not None and self.target.weight_kernels is not None
        encoding: Encoding = "compute" if computes and self.encoding != "storage" else "storage"
        return max(opset_for(f, encoding, groups=groups) for f in {self.format, *self.plan.named})

    @property
    def unfit(self) -> str | None:
        """Why the target can do nothing with what the pass writes; None: it can."""
        if self.target is None or self.target.stored_weights:
            return None
        kernels = self.target.weight_kernels
        if kernels is not None and self.format in kernels.formats:
            return None
        has = ", ".join(kernels.formats) if kernels is not None else "none"
        return (
            f"{self.target.name} neither unpacks {self.format} weights at load nor multiplies "
            f"floats with them (kernels: {has}): use a recipe that quantizes activations, too"
        )

    @property
    def plan(self) -> WeightPlan:
        """What decides about formats."""
        return WeightPlan(
            self.format, self.granularity, self.group_size, self.symmetric, self.levels,
            self.encoding, self.smallest, self.recurrent_group, self.wide_share, self.layers,
            self.target,
        )  # fmt: skip

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Store weights in few bits in place; a note for each, or why not.

        Raises DataError for range "importance" without samples, or with ones that do not fit.
        """
        return _Work(self, model).run()


class _Work:
    """One run of the pass over one model."""

    def __init__(self, options: QuantizeWeights, model: Model) -> None:
        self.options, self.model = options, model
        self.notes: list[Note] = []
        self.unpacked = Unpacked(model)

    def run(self) -> list[Note]:
        jobs, spared = self.options.plan.jobs(self.model, self.options.samples, NAME)
        self.notes += spared
        importance: Importance = {}
        weighed = [(j.weight.node, j.weight.held) for j in jobs if self._is_weighed(j)]
        if weighed:
            importance = observed(self.model, weighed, self.options.samples, self.options.progress)
        self._store_all(jobs, importance)
        if any(note.changed for note in self.notes):
            self.model.sweep()
        return self.notes

    def _declined(self, node: gs.Node, why: str) -> None:
        self.notes.append(Note(NAME, node.name, why, changed=False))

    def _store_all(self, jobs: list[Job], importance: Importance) -> None:
        """Quantize on all threads; edit the model here, in the order of the jobs."""
        keys = [self._key(job, number) for number, job in enumerate(jobs)]
        sources = [self._source(job, number, importance) for number, job in enumerate(jobs)]
        crew, scratch = self.options.crew or Crew(), self.model.scratch
        with closing(each_made(crew, scratch, keys, sources)) as made:
            for job, source, packed in zip(jobs, sources, made, strict=True):
                try:
                    self._store(job, packed.result(), source.method)
                except Skip as reason:
                    self._declined(job.weight.node, str(reason))

    def _key(self, job: Job, number: int) -> object:
        """The same for jobs that share what they store."""
        if job.encoding == "compute":
            return number
        return id(job.weight.tensor), job.weight.held.key, job.scheme.format

    def _is_balanced(self, job: Job) -> bool:
        return self.options.rounding == "balanced" and job.weight.node.op in CONVOLUTIONS

    def _is_weighed(self, job: Job) -> bool:
        """Where errors are to cancel, each counts as much."""
        return self.options.range == "importance" and not self._is_balanced(job)

    def _source(self, job: Job, number: int, importance: Importance) -> Source:
        options, node, held = self.options, job.weight.node, job.weight.held
        squares, method = importance.get((id(node), held.index)), options.range
        if method == "importance" and squares is None:
            method = "mse"
        rounding = options.rounding
        if rounding == "balanced" and not self._is_balanced(job):
            rounding = "even"
        if rounding == "balanced" and method == "importance":
            method = "mse"
        return Source(
            job.weight.tensor, held, job.scheme, method, rounding, options.seed + number, squares
        )

    def _store(self, job: Job, packed: Packed, method: Method) -> None:
        weight = job.weight
        if job.encoding == "storage":
            self.unpacked.use(weight, job.scheme.format, lambda on: stored(on, packed))
        else:
            node, tensor = weight.node, weight.tensor
            node.inputs[weight.held.index] = dequantized(self.model, node, tensor, packed)
            if node.op == "Gemm":
                node.attrs.pop("transB", None)
        is_blind = self._is_weighed(job) and method != "importance"
        ranges = f", {method}: its input was not observed" if is_blind else ""
        text = f"{told(weight.held, job.scheme)}, {job.encoding}{job.remark}{ranges}"
        self.notes.append(Note(NAME, weight.node.name, text))
