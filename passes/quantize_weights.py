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
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Note, Skip
from onnxq.data import Samples
from onnxq.layers import Choice, Layers
from onnxq.model import Model, readers, values_of
from onnxq.packed import remembered
from onnxq.passes.encodings import (
    STORAGE_SINCE,
    Encoding,
    Packed,
    dequantized,
    evened,
    opset_for,
    stored,
)
from onnxq.passes.importance import Importance, observed
from onnxq.passes.layouts import WEIGHTS, Held, held_by
from onnxq.passes.ops import is_constant
from onnxq.passes.sensitive import OUTPUT_SHARE, output_convolutions
from onnxq.passes.weight_kernels import why_no_gain, why_no_kernel
from onnxq.passes.work import RECURRENT
from onnxq.schemes import (
    FORMATS,
    FloatFormat,
    Granularity,
    Method,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantScheme,
    balance,
    quantize_weight,
)
from onnxq.targets import Target
from onnxq.weights import data_type_of, stored_size

NAME = "quantize_weights"
WIDER = {"int8": "int16", "uint8": "uint16"}
CONVOLUTIONS = ("Conv", "ConvTranspose")
OVERHEAD = 256  # bytes of the nodes and names that unpack a weight, about
# Operators that a weight may go through; they read it unpacked, or it would be stored twice.
MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity")


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

    def __post_init__(self) -> None:
        named = {c.weights for c in Layers.parse(self.layers).all if c.weights}
        for format in (self.format, *sorted(named)):
            allowed = self.target.stored_formats if self.target is not None else ()
            if format not in FORMATS or format == "int32" or (allowed and format not in allowed):
                runs = "ONNX Runtime" if self.target is None else self.target.name
                listed = ", ".join(allowed or (f for f in FORMATS if f != "int32"))
                raise ValueError(
                    f"format {format!r}: {runs} cannot run weights in it: use one of {listed}"
                )
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
    """One weight of one node: how it is to be stored; remark: for the note."""

    node: gs.Node
    held: Held
    scheme: QuantScheme
    encoding: Encoding
    remark: str = ""

    @property
    def tensor(self) -> gs.Tensor:
        tensor: gs.Tensor = self.node.inputs[self.held.index]
        return tensor


class _Work:
    """One run of the pass over one model."""

    def __init__(self, options: QuantizeWeights, model: Model) -> None:
        self.options, self.model, self.target = options, model, options.target
        self.notes: list[Note] = []
        self.unpacked: dict[tuple[int, tuple[int, ...], str], gs.Tensor] = {}
        self.choices = Layers.parse(options.layers).choices(model)
        self.shapes = _shapes(model, options.samples)

    def run(self) -> list[Note]:
        jobs = self._jobs()
        importance: Importance = {}
        if self.options.range == "importance" and jobs:
            held = [(job.node, job.held) for job in jobs]
            importance = observed(self.model, held, self.options.samples, self.options.progress)
        for number, job in enumerate(jobs):
            try:
                self._store(job, number, importance)
            except Skip as reason:
                self._declined(job.node, str(reason))
        if any(note.changed for note in self.notes):
            self.model.sweep()
        return self.notes

    def _declined(self, node: gs.Node, why: str) -> None:
        self.notes.append(Note(NAME, node.name, why, changed=False))

    def _widened(self, jobs: list[_Job]) -> list[_Job]:
        """The jobs, those of the smallest weights with 16 bits, while they are few bytes."""
        wide = WIDER.get(self.options.format)
        allowed = self.target.stored_formats if self.target is not None else ()
        if wide is None or self.options.levels is not None or (allowed and wide not in allowed):
            return jobs
        sizes = {id(job.tensor): prod(job.held.shape) for job in jobs}
        left = self.options.wide_share * sum(sizes.values())
        small = set()
        for key, size in sorted(sizes.items(), key=lambda item: item[1]):  # stable: graph order
            left -= size
            if left < 0:
                break
            small.add(key)
        return [
            replace(job, scheme=replace(job.scheme, format=wide))
            if id(job.tensor) in small
            and (job.encoding, job.scheme.format) == ("storage", self.options.format)
            and id(job.node) not in self.choices
            and _saves(job.tensor, job.held, replace(job.scheme, format=wide))
            else job
            for job in jobs
        ]

    def _jobs(self) -> list[_Job]:
        """What is to be stored, and how; decided before anything is edited."""
        spared = _output_layers(self.model)
        jobs = []
        for node in self.model.nodes(*WEIGHTS):
            choice = self.choices.get(id(node))
            why = "a small output layer: its result shows each step" if id(node) in spared else None
            if choice is not None:
                why = choice.reason if choice.is_float else None
            if why is not None:
                self._declined(node, why)
                continue
            for held in held_by(node):
                tensor = node.inputs[held.index]
                if not is_constant(tensor) or tensor.dtype not in (np.float32, np.float16):
                    continue
                if len(held.shape) < 2 or prod(held.shape) < self.options.smallest:
                    continue
                scheme = self.options.scheme(node, held, choice)
                try:
                    jobs.append(self._planned(node, held, scheme))
                except Skip as reason:
                    self._declined(node, str(reason))
        return self._widened(jobs)

    def _planned(self, node: gs.Node, held: Held, scheme: QuantScheme) -> _Job:
        """Choose the encoding; raises Skip when there is none."""
        model, asked = self.model, self.options.encoding
        if not _saves(node.inputs[held.index], held, scheme):
            raise Skip(f"{_bits(held, scheme):.1f} bits a weight, scales included, save nothing")
        folds = self.target is None or self.target.stored_weights
        why = None
        if asked != "storage" or not folds:
            why = why_no_kernel(node, held, scheme, self.target) or self._too_old(scheme, "compute")
            if why is None and asked == "auto" and folds and self.target is not None:
                why = why_no_gain(model, node, held, scheme, self.target, self.shapes)
            if why is None:
                return _Job(node, held, scheme, "compute")
        if not folds:
            raise Skip(f"{why}, and weights are not unpacked at load")
        if (old := self._too_old(scheme, "storage")) is not None:
            raise Skip(old)
        remark = f" ({why})" if asked == "compute" else ""
        return _Job(node, held, evened(scheme, held), "storage", remark)

    def _too_old(self, scheme: QuantScheme, encoding: Encoding) -> str | None:
        needed = opset_for(
            scheme.format, encoding,
            groups=scheme.group_size is not None,
            channels=not isinstance(scheme.granularity, PerTensor),
        )  # fmt: skip
        if self.model.opset >= needed:
            return None
        what = scheme.format if self.model.opset >= STORAGE_SINCE else "Cast"
        return f"opset {self.model.opset} has no {what} as needed: opset {needed} has"

    def _store(self, job: _Job, number: int, importance: Importance) -> None:
        model, node, held, tensor = self.model, job.node, job.held, job.tensor
        key = id(tensor), held.key, job.scheme.format
        method = self.options.range
        if job.encoding == "compute" or key not in self.unpacked:
            packed, method = self._packed(job, number, importance)
            if job.encoding == "compute":
                node.inputs[held.index] = dequantized(model, node, tensor, packed)
                if node.op == "Gemm":
                    node.attrs.pop("transB", None)
            else:
                # What several graphs read is unpacked once, in the main one; bodies capture it.
                users = {id(model.graph_of(user)) for user in tensor.outputs}
                at = node if len(users) == 1 else None
                self.unpacked[key] = stored(model, at, tensor, packed)
        if job.encoding == "storage":
            node.inputs[held.index] = self.unpacked[key]
            for reader, index in list(readers(tensor)):
                if reader.op in MOVES and index == 0:
                    reader.inputs[0] = self.unpacked[key]
        ranges = "" if method == self.options.range else f", {method}: its input was not observed"
        text = f"{_told(job)}, {job.encoding}{job.remark}{ranges}"
        self.notes.append(Note(NAME, node.name, text))

    def _packed(self, job: _Job, number: int, importance: Importance) -> tuple[Packed, Method]:
        values = np.asarray(values_of(job.tensor))
        if not np.isfinite(values).all():
            raise Skip("its weight has NaN or infinite values")
        weights, method = importance.get((id(job.node), job.held.index)), self.options.range
        if method == "importance" and weights is None:
            method = "mse"
        is_balanced = (
            self.options.rounding == "balanced"
            and job.node.op in CONVOLUTIONS
            and not isinstance(job.scheme.numbers, FloatFormat)
        )
        grid = remembered(job.tensor)
        if grid is not None and (known := grid.map(job.held.rows).fitted(job.scheme)):
            return Packed(job.held, *known), method
        rows = job.held.rows(values.astype(np.float32))
        integers, params = quantize_weight(
            rows, job.scheme, None, method,
            importance=None if weights is None else job.held.importance(weights),
            rounding="even" if self.options.rounding == "balanced" else self.options.rounding,
            seed=self.options.seed + number,
        )  # fmt: skip
        if is_balanced:
            shape = rows.shape if params.group_size is not None else (len(rows), -1, job.held.taps)
            exact, near = rows.reshape(shape), integers.reshape(shape)
            integers = balance(exact, near, job.scheme, params, 0).reshape(rows.shape)
        return Packed(job.held, integers, params), method


def _saves(tensor: gs.Tensor, held: Held, scheme: QuantScheme) -> bool:
    """Whether the file gets smaller."""
    count = prod(held.shape)
    return bool(
        count * _bits(held, scheme) / 8 + OVERHEAD < count * np.dtype(tensor.dtype).itemsize
    )


def _bits(held: Held, scheme: QuantScheme) -> float:
    """Bits a weight, with scales (32 bits) and zero points."""
    channels = prod(held.shape) // held.length
    size = scheme.group_size
    scales = channels * -(-held.length // size) if size is not None else channels
    scales = 1 if isinstance(scheme.granularity, PerTensor) else scales
    kind = data_type_of(scheme.numbers.dtype)
    total = 8 * stored_size(kind, held.shape) + 32 * scales
    total += 0 if scheme.symmetric else 8 * stored_size(kind, (scales,))
    return float(total / prod(held.shape))


def _told(job: _Job) -> str:
    granularity = job.scheme.granularity
    shared = (
        f"in groups of {granularity.size}"
        if isinstance(granularity, PerGroup)
        else "per channel"
        if isinstance(granularity, PerChannel)
        else "per tensor"
    )
    return f"weights as {job.scheme.format} {shared}, {_bits(job.held, job.scheme):.1f} bits each"


def _shapes(model: Model, samples: Samples | None) -> dict[str, list[int]]:
    """Shapes of tensors in the first sample, if there is a real one."""
    first = None if samples is None or samples.synthetic else next(iter(samples), None)
    if first is None:
        return {}
    return model.shapes_for({name: np.shape(values) for name, values in first.items()})


def _output_layers(model: Model) -> set[int]:
    """Ids of convolutions that write an output, if their weights are a small share of all."""
    last = output_convolutions(model)
    total = sum(prod(t.shape) for t in model.graph.tensors().values() if isinstance(t, gs.Constant))
    small = sum(prod(node.inputs[1].shape or ()) for node in last) <= OUTPUT_SHARE * total
    return {id(node) for node in last} if small else set()
