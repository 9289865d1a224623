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
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Note, Skip
from onnxq.data import Samples
from onnxq.layers import Choice, Layers
from onnxq.model import Model
from onnxq.options import require_range
from onnxq.parallel import Crew
from onnxq.passes.encodings import Encoding, Packed, dequantized, evened, opset_for, stored
from onnxq.passes.importance import Importance, observed
from onnxq.passes.layouts import Held
from onnxq.passes.streamed import Source, each_made
from onnxq.passes.weight_kernels import why_no_gain, why_no_kernel
from onnxq.passes.weight_storage import (
    Found,
    Unpacked,
    find_weights,
    linear_bits,
    require_formats,
    stored_formats,
    told,
    why_too_old,
)
from onnxq.passes.work import RECURRENT
from onnxq.schemes import (
    FORMATS,
    Granularity,
    Method,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantScheme,
)
from onnxq.targets import Target

NAME = "quantize_weights"
WIDER = {"int8": "int16", "uint8": "uint16"}
CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True, slots=True)
class QuantizeWeights:
    """Weights of at least `smallest` elements that are still floats, in bodies too.

    format: an integer format or a float8. granularity: one scale a tensor, channel or group of
    `group_size`. symmetric: no zero points. levels: use only so many integers. range: how scales
    are chosen; importance weighs errors by the mean squares of what the weight is multiplied with,
    seen in samples. rounding: half to even; stochastic by `seed`; balanced in convolutions, so
    that errors cancel (`numerics.balancing`). encoding: compute takes a kernel for integer weights
    wherever the target has one, auto where it is also faster, storage never. recurrent_group: in
    LSTM, GRU and RNN, whose errors add up from step to step, so many values share a scale instead
    of a channel's (0: a channel's). wide_share: the smallest weights, together so large a part of
    all, get 16 bits in place of 8: layers of few weights show each step. layers: overrides for
    single layers, "PATTERN=FORMAT", the last match wins.
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
        require_range("group_size", self.group_size, 1)
        require_range("seed", self.seed, 0)
        require_range("smallest", self.smallest, 1)
        require_range("recurrent_group", self.recurrent_group, 0)
        require_range("wide_share", self.wide_share, 0, 1)
        named = {c.weights for c in Layers.parse(self.layers).all if c.weights}
        formats = self.format, *sorted(named)
        require_formats(formats, self.target)
        for format in formats:
            self._scheme(format)

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
        named = {c.weights for c in Layers.parse(self.layers).all if c.weights}
        groups = self.granularity == "group"
        computes = self.target is not None and self.target.weight_kernels is not None
        encoding: Encoding = "compute" if computes and self.encoding != "storage" else "storage"
        return max(opset_for(f, encoding, groups=groups) for f in {self.format, *named})

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

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Store weights in few bits in place; a note for each, or why not.

        Raises DataError for range "importance" without samples, or with ones that do not fit.
        """
        return _Work(self, model).run()

    def _scheme(self, format: str) -> QuantScheme:
        """How a format is used; groups and zero points are for the one asked for, and narrow ones.

        A float8 has no zero point; 8 bits that a layer has instead do without.
        """
        own, numbers = format == self.format, FORMATS.get(format)
        wide = not own and numbers is not None and numbers.bits >= 8
        shared: dict[str, Granularity] = {
            "tensor": PerTensor(),
            "channel": PerChannel(0),
            "group": PerChannel(0) if wide else PerGroup(self.group_size, 1),
        }
        return QuantScheme(
            format,
            shared[self.granularity],
            symmetric=self.symmetric or wide,
            levels=self.levels if own else None,
        )

    def scheme(self, node: gs.Node, held: Held, choice: Choice | None) -> QuantScheme:
        """How a weight is quantized: groups that would be longer than a channel are channels.

        What multiplies a recurrent state has at least 8 bits unless a layer's format is asked for:
        its errors add up from step to step.
        """
        format = choice.weights if choice is not None and choice.weights else None
        narrow = FORMATS[self.format].bits < 8
        if format is None and narrow and node.op in RECURRENT and held.index == 2:
            format = "int8"
        scheme = self._scheme(format or self.format)
        by_channel = isinstance(scheme.granularity, PerChannel)
        if node.op in RECURRENT and by_channel and self.recurrent_group:
            scheme = replace(scheme, granularity=PerGroup(self.recurrent_group, 1))
        if scheme.group_size is not None and held.length <= scheme.group_size:
            return replace(scheme, granularity=PerChannel(0))
        return scheme


@dataclass(frozen=True, slots=True)
class _Job:
    """How one weight is to be stored; remark: for the note."""

    weight: Found
    scheme: QuantScheme
    encoding: Encoding
    remark: str = ""


class _Work:
    """One run of the pass over one model."""

    def __init__(self, options: QuantizeWeights, model: Model) -> None:
        self.options, self.model, self.target = options, model, options.target
        self.notes: list[Note] = []
        self.unpacked = Unpacked(model)
        self.shapes = _shapes(model, options.samples)

    def run(self) -> list[Note]:
        jobs = self._jobs()
        importance: Importance = {}
        if self.options.range == "importance" and jobs:
            held = [(job.weight.node, job.weight.held) for job in jobs]
            importance = observed(self.model, held, self.options.samples, self.options.progress)
        self._store_all(jobs, importance)
        if any(note.changed for note in self.notes):
            self.model.sweep()
        return self.notes

    def _declined(self, node: gs.Node, why: str) -> None:
        self.notes.append(Note(NAME, node.name, why, changed=False))

    def _widened(self, jobs: list[_Job]) -> list[_Job]:
        """The jobs, those of the smallest weights with 16 bits, while they are few bytes."""
        wide = WIDER.get(self.options.format)
        allowed = stored_formats(self.target)
        if wide is None or self.options.levels is not None or (allowed and wide not in allowed):
            return jobs
        sizes = {id(job.weight.tensor): job.weight.size for job in jobs}
        left = self.options.wide_share * sum(sizes.values())
        small = set()
        for key, size in sorted(sizes.items(), key=lambda item: item[1]):  # stable: graph order
            left -= size
            if left < 0:
                break
            small.add(key)

        def may_widen(job: _Job) -> bool:
            weight = job.weight
            if id(weight.tensor) not in small or weight.choice is not None:
                return False
            if (job.encoding, job.scheme.format) != ("storage", self.options.format):
                return False
            return weight.is_worth(linear_bits(weight.held, replace(job.scheme, format=wide)))

        return [
            replace(job, scheme=replace(job.scheme, format=wide)) if may_widen(job) else job
            for job in jobs
        ]

    def _jobs(self) -> list[_Job]:
        """What is to be stored, and how; decided before anything is edited."""
        found, notes = find_weights(
            self.model, self.options.layers, self.options.smallest, rule=NAME
        )
        self.notes += notes
        jobs = []
        for weight in found:
            scheme = self.options.scheme(weight.node, weight.held, weight.choice)
            try:
                jobs.append(self._planned(weight, scheme))
            except Skip as reason:
                self._declined(weight.node, str(reason))
        return self._widened(jobs)

    def _planned(self, weight: Found, scheme: QuantScheme) -> _Job:
        """Choose the encoding; raises Skip when there is none."""
        model, asked, node, held = self.model, self.options.encoding, weight.node, weight.held
        bits = linear_bits(held, scheme)
        if not weight.is_worth(bits):
            raise Skip(f"{bits:.1f} bits a weight, scales included, save nothing")
        folds = self.target is None or self.target.stored_weights
        why = None
        if asked != "storage" or not folds:
            why = why_no_kernel(node, held, scheme, self.target) or why_too_old(
                model, scheme, "compute"
            )
            if why is None and asked == "auto" and folds and self.target is not None:
                why = why_no_gain(model, node, held, scheme, self.target, self.shapes)
            if why is None:
                return _Job(weight, scheme, "compute")
        if not folds:
            raise Skip(f"{why}, and weights are not unpacked at load")
        if (old := why_too_old(model, scheme, "storage")) is not None:
            raise Skip(old)
        remark = f" ({why})" if asked == "compute" else ""
        return _Job(weight, evened(scheme, held), "storage", remark)

    def _store_all(self, jobs: list[_Job], importance: Importance) -> None:
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

    def _key(self, job: _Job, number: int) -> object:
        """The same for jobs that share what they store."""
        if job.encoding == "compute":
            return number
        return id(job.weight.tensor), job.weight.held.key, job.scheme.format

    def _source(self, job: _Job, number: int, importance: Importance) -> Source:
        options, node, held = self.options, job.weight.node, job.weight.held
        squares, method = importance.get((id(node), held.index)), options.range
        if method == "importance" and squares is None:
            method = "mse"
        rounding = options.rounding
        if rounding == "balanced" and node.op not in CONVOLUTIONS:
            rounding = "even"
        return Source(
            job.weight.tensor, held, job.scheme, method, rounding, options.seed + number, squares
        )

    def _store(self, job: _Job, packed: Packed, method: Method) -> None:
        weight = job.weight
        if job.encoding == "storage":
            self.unpacked.use(weight, job.scheme.format, lambda on: stored(on, packed))
        else:
            node, tensor = weight.node, weight.tensor
            node.inputs[weight.held.index] = dequantized(self.model, node, tensor, packed)
            if node.op == "Gemm":
                node.attrs.pop("transB", None)
        ranges = "" if method == self.options.range else f", {method}: its input was not observed"
        text = f"{told(weight.held, job.scheme)}, {job.encoding}{job.remark}{ranges}"
        self.notes.append(Note(NAME, weight.node.name, text))


def _shapes(model: Model, samples: Samples | None) -> dict[str, list[int]]:
    """Shapes of tensors in the first sample, if there is a real one."""
    first = None if samples is None or samples.synthetic else next(iter(samples), None)
    if first is None:
        return {}
    return model.shapes_for({name: np.shape(values) for name, values in first.items()})
