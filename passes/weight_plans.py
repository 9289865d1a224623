"""Which weights are stored in few bits, in which formats, and how they are written.

What `quantize_weights` does, decided before anything is edited; passes that choose its integers
beforehand are told the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Note, Skip
from onnxq.data import Samples
from onnxq.layers import Choice, Layers
from onnxq.model import Model
from onnxq.options import require_range
from onnxq.passes.encodings import Encoding, evened
from onnxq.passes.layouts import Held
from onnxq.passes.weight_kernels import why_no_gain, why_no_kernel
from onnxq.passes.weight_storage import Found, find_weights, linear_bits, why_too_old
from onnxq.passes.work import RECURRENT
from onnxq.schemes import (
    FORMATS,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantScheme,
)
from onnxq.targets import Target

WIDER = {"int8": "int16", "uint8": "uint16"}
Sharing = Literal["tensor", "channel", "group"]
Asked = Literal["auto", "compute", "storage"]


@dataclass(frozen=True, slots=True)
class Job:
    """How one weight is to be stored; remark: for the note."""

    weight: Found
    scheme: QuantScheme
    encoding: Encoding
    remark: str = ""


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """The options of quantize_weights that decide about formats, see there.

    Raises ValueError for formats that the target cannot run.
    """

    format: str
    granularity: Sharing
    group_size: int
    symmetric: bool
    levels: int | None
    encoding: Asked
    smallest: int
    recurrent_group: int
    wide_share: float
    layers: tuple[str, ...]
    target: Target | None

    def __post_init__(self) -> None:
        require_range("group_size", self.group_size, 1)
        require_range("smallest", self.smallest, 1)
        require_range("recurrent_group", self.recurrent_group, 0)
        require_range("wide_share", self.wide_share, 0, 1)
        for format in (self.format, *sorted(self.named)):
            allowed = self.target.stored_formats if self.target is not None else ()
            if format not in FORMATS or format == "int32" or (allowed and format not in allowed):
                runs = "ONNX Runtime" if self.target is None else self.target.name
                listed = ", ".join(allowed or (f for f in FORMATS if f != "int32"))
                raise ValueError(
                    f"format {format!r}: {runs} cannot run weights in it: use one of {listed}"
                )
            self._scheme(format)

    @property
    def named(self) -> set[str]:
        """The formats that overrides ask for."""
        return {c.weights for c in Layers.parse(self.layers).all if c.weights}

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

    def jobs(
        self, model: Model, samples: Samples | None, rule: str
    ) -> tuple[list[Job], list[Note]]:
        """What is to be stored, and how; and notes under `rule` for what is not.

        samples: the first one's shapes tell how large layers are.
        """
        found, notes = find_weights(model, self.layers, self.smallest, rule=rule)
        shapes, jobs = _shapes(model, samples), []
        for weight in found:
            try:
                jobs.append(self._planned(model, weight, shapes))
            except Skip as reason:
                notes.append(Note(rule, weight.node.name, str(reason), changed=False))
        return self._widened(jobs), notes

    def _planned(self, model: Model, weight: Found, shapes: dict[str, list[int]]) -> Job:
        """Choose the encoding; raises Skip when there is none."""
        asked, node, held = self.encoding, weight.node, weight.held
        scheme = self.scheme(node, held, weight.choice)
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
                why = why_no_gain(model, node, held, scheme, self.target, shapes)
            if why is None:
                return Job(weight, scheme, "compute")
        if not folds:
            raise Skip(f"{why}, and weights are not unpacked at load")
        if (old := why_too_old(model, scheme, "storage")) is not None:
            raise Skip(old)
        remark = f" ({why})" if asked == "compute" else ""
        return Job(weight, evened(scheme, held), "storage", remark)

    def _widened(self, jobs: list[Job]) -> list[Job]:
        """The jobs, those of the smallest weights with 16 bits, while they are few bytes."""
        wide = WIDER.get(self.format)
        allowed = self.target.stored_formats if self.target is not None else ()
        if wide is None or self.levels is not None or (allowed and wide not in allowed):
            return jobs
        sizes = {id(job.weight.tensor): job.weight.size for job in jobs}
        left = self.wide_share * sum(sizes.values())
        small = set()
        for key, size in sorted(sizes.items(), key=lambda item: item[1]):  # stable: graph order
            left -= size
            if left < 0:
                break
            small.add(key)

        def may_widen(job: Job) -> bool:
            weight = job.weight
            if id(weight.tensor) not in small or weight.choice is not None:
                return False
            if (job.encoding, job.scheme.format) != ("storage", self.format):
                return False
            return weight.is_worth(linear_bits(weight.held, replace(job.scheme, format=wide)))

        return [
            replace(job, scheme=replace(job.scheme, format=wide)) if may_widen(job) else job
            for job in jobs
        ]


def _shapes(model: Model, samples: Samples | None) -> dict[str, list[int]]:
    """Shapes of tensors in the first sample, if there is a real one."""
    first = None if samples is None or samples.synthetic else next(iter(samples), None)
    if first is None:
        return {}
    return model.shapes_for({name: np.shape(values) for name, values in first.items()})
