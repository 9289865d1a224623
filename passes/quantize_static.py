"""Quantize weights and activations with fixed ranges, in Q/DQ form.

    y = Conv(x, W, b)    =>    y = DQ(Q(Conv(DQ(Q(x)), DQ(Wq), DQ(bq))))

Tensors are quantized, not nodes: one QuantizeLinear/DequantizeLinear pair a tensor, and the float
tensor keeps its name behind the pair, so that layers of the result can be compared with the
original's. Bias is int32 in the accumulator's scale, s_b = s_x s_W (Jacob et al., "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018, section 2.4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from onnxq.calibration import calibrate, load_calibration, save_calibration
from onnxq.core import Note
from onnxq.data import Samples
from onnxq.errors import DataError, RecipeError
from onnxq.fingerprint import fingerprint
from onnxq.layers import Layers
from onnxq.model import Model
from onnxq.options import require_range
from onnxq.passes.data_free import expected, unknown
from onnxq.passes.float_layers import spread_scales
from onnxq.passes.formats import (
    Activations,
    Granularity,
    Range,
    Weights,
    formats_of,
    opset_needed,
    require_formats,
    with_granularity,
)
from onnxq.passes.insertion import Editor
from onnxq.passes.ops import OPS
from onnxq.passes.placement import RULE, Placement, place
from onnxq.passes.range_mixing import notes as range_mixing_notes
from onnxq.passes.range_mixing import set_apart
from onnxq.passes.range_search import LADDER, START, search
from onnxq.passes.range_simulation import Ranges, Simulation
from onnxq.passes.ranges import activation_params, remembered_ranges
from onnxq.passes.sensitive import graph_rules, range_rules, slight_gains
from onnxq.passes.static_rounding import WeightMethod
from onnxq.passes.work import macs
from onnxq.schemes import QuantScheme
from onnxq.statistics import Histogram
from onnxq.targets import Target

Bias = Literal["auto", "int32", "float"]
RangesFrom = Literal["samples", "batchnorm"]


@dataclass(frozen=True, slots=True)
class QuantizeStatic:
    """Quantize what the target can run in integers, with ranges calibrated on samples.

    activations, weights: formats, of the target's own sign where it wants another (a8, a16: in any
    case); auto: what the target is fastest with. granularity: of weights; channels where the
    operator may have them, groups of group_size for those below 8 bits, where the target has them,
    with float biases. range: how activation ranges are chosen (minmax, percentile, entropy, mse,
    careful; output: by the error of the model's outputs, see `onnxq.passes.range_search`, which
    takes up to range_passes runs of the model). ranges_from: samples; or batchnorm, what
    BatchNormalizations know, without any (layers of which these say nothing stay float).
    weight_range: how scales of weights are, as in quantize_weights. bias: int32 or float, where the
    target takes either. layers: overrides for single layers, see `onnxq.layers`. calibration: a
    file; re-used when it is there, written when it is not, completed when the same samples are
    given.
    """

    target: Target
    samples: Samples
    activations: Activations = "auto"
    weights: Weights = "auto"
    granularity: Granularity = "auto"
    group_size: int = 32
    range: Range = "minmax"
    range_passes: int = 250
    weight_range: WeightMethod = "minmax"
    bias: Bias = "auto"
    ranges_from: RangesFrom = "samples"
    layers: tuple[str, ...] = ()
    calibration: Path | None = None
    progress: Callable[[int], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse, by name, what the target does not execute; nothing has been calibrated yet."""
        require_range("group_size", self.group_size, 1)
        require_range("range_passes", self.range_passes, 1)
        target = self.target
        require_formats(target, self.activations, self.weights)
        with_granularity(target, target.weights, self.granularity, self.group_size)
        if self.bias != "auto" and target.bias not in (self.bias, "either"):
            raise RecipeError(f"{target.name} wants biases as {target.bias}, not as {self.bias}")
        Layers.parse(self.layers)

    @staticmethod
    def wants(field: str, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, it has to be given `field`; see `onnxq.recipes.wants`."""
        return bool(options.get("ranges_from", "samples") == "samples")

    @property
    def name(self) -> str:
        """The pass's name."""
        return RULE

    @property
    def opset(self) -> int:
        """The least opset that has all formats asked for."""
        choices = Layers.parse(self.layers).all
        return opset_needed(self.target, self.activations, self.weights, choices)

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Place, calibrate, and insert; nothing is edited before calibration is done.

        Raises DataError for samples that do not fit and a calibration of another model.
        """
        if model.opset < 10:
            text = f"opset {model.opset} has no QuantizeLinear: opset 10 is needed"
            return [Note(RULE, model.graph.name, text, changed=False)]
        target = self.target
        if model.opset < 13:
            target = target.without_channels()
        model.separate_names()
        shapes = model.shapes_for(self._input_shapes(model))
        choices = Layers.parse(self.layers).choices(model)
        formats = formats_of(
            model, target, choices, activations=self.activations, weights=self.weights,
            granularity=self.granularity, group_size=self.group_size,
        )  # fmt: skip
        work = macs(model, shapes)
        floats = {} if target.floats is not None else graph_rules(model, work)
        floats = {k: v for k, v in floats.items() if k not in formats.asked} | dict(formats.floats)
        chosen = partial(
            place,
            model,
            target,
            shapes=shapes,
            formats=formats.activations,
            asked=formats.asked | formats.simulated,
        )
        placement = chosen(floats)
        if target.costs is not None and target.floats is None and not formats.asked:
            floats |= slight_gains(placement, work)
            placement = chosen(floats)
        if self.ranges_from == "batchnorm":
            model.infer_shapes()
            held = expected(model)
            wanted = {t.name for n in model.nodes() for t in (*n.inputs, *n.outputs)}
            held |= remembered_ranges(model, placement, wanted)
            while more := unknown(placement, held):
                floats |= more
                placement = chosen(floats)
            statistics: Mapping[str, Histogram] = held
        else:
            statistics = self._statistics(model, placement)
        declined: list[Note] = []
        while more := range_rules(placement, statistics, strict=target.floats is not None):
            declined += [
                Note(RULE, placement.nodes[key].name, text, changed=False)
                for key, text in more.items()
                if OPS[placement.nodes[key].op].role != "linear"  # placing tells of those
            ]
            floats |= more
            placement = chosen(floats)
            if self.ranges_from == "samples":
                statistics = self._completed(model, placement, statistics)
        if apart := set_apart(placement, statistics, target):
            placement = chosen(floats, apart=apart)
        mixing = range_mixing_notes(placement, statistics, target, apart)
        ranges, searched = self._ranges(model, placement, statistics, formats.weights)
        model.unquantized.clear()  # or the copy would keep what was there before
        model.unquantized.append(model.copy())
        notes = Editor(
            model, target, placement, ranges, formats.weights,
            weight_range=self.weight_range,
            float_bias="float" in (self.bias, target.bias),
        ).edit()  # fmt: skip
        model.sweep()
        if target.requantizes and model.opset >= 13:
            spread_scales(model)
        return [*notes, *searched, *mixing, *declined, *placement.declined]

    def _ranges(
        self,
        model: Model,
        placement: Placement,
        statistics: Mapping[str, Histogram],
        schemes: Mapping[int, QuantScheme],
    ) -> tuple[Ranges, list[Note]]:
        """The parameters of all tensors, and a note where they were searched for."""
        by = partial(activation_params, model, self.target, placement, statistics)
        if self.range != "output":
            return by(self.range), []
        if not placement.nodes:
            return {}, []
        if self.samples.synthetic or not len(self.samples):
            text = "ranges: careful, since there are no real samples to measure the outputs on"
            return by("careful"), [Note(RULE, model.graph.name, text, changed=False)]
        candidates = [by(method) for method in LADDER]
        simulation = Simulation.of(
            model, self.target, placement, candidates[START], schemes, self.weight_range
        )
        found = search(model, simulation, candidates, self.samples, self.range_passes)
        return found.ranges, [Note(RULE, model.graph.name, found.text, changed=found.changed > 0)]

    def _input_shapes(self, model: Model) -> dict[str, tuple[int, ...]]:
        """Of the first sample; without any, free sizes are 1."""
        first = next(iter(self.samples), None)
        if first is not None:
            return {name: np.shape(values) for name, values in first.items()}
        return {
            t.name: tuple(d if isinstance(d, int) else 1 for d in t.shape or ())
            for t in model.graph.inputs
        }

    def _statistics(self, model: Model, placement: Placement) -> Mapping[str, Histogram]:
        wanted = {name for sources in placement.sources.values() for name in sources}
        # Range rules may take a Concat out: then its result has a range of its own.
        joins = (node for node in placement.nodes.values() if node.op == "Concat")
        wanted |= {placement.result(node).name for node in joins}
        known = remembered_ranges(model, placement, wanted)
        return {**self._observed(model, wanted - known.keys()), **known}

    def _observed(self, model: Model, wanted: set[str]) -> Mapping[str, Histogram]:
        if self.calibration is not None and self.calibration.exists():
            found, meta = load_calibration(self.calibration)
            missing = sorted(wanted - found.keys())
            is_same = meta.get("model") == fingerprint(model)
            if is_same and missing and meta.get("of") == self.samples.fingerprint():
                return self._calibrated(model, set(missing), cast(Mapping[str, Histogram], found))
            if missing or not is_same:
                what = f"has no statistics of {missing[0]!r}" if missing else "is of other weights"
                raise self._misfit(what)
            return cast(Mapping[str, Histogram], found)
        if not wanted:
            return {}
        return self._calibrated(model, wanted, {})

    def _completed(
        self, model: Model, placement: Placement, known: Mapping[str, Histogram]
    ) -> Mapping[str, Histogram]:
        """Statistics of tensors that were another's copy while their producer was quantized."""
        wanted = {name for sources in placement.sources.values() for name in sources}
        kept = remembered_ranges(model, placement, wanted)
        known = {name: seen for name, seen in known.items() if name not in kept}
        missing = wanted - known.keys() - kept.keys()
        if missing and self.calibration is not None and self.calibration.exists():
            _, meta = load_calibration(self.calibration)
            if meta.get("of") != self.samples.fingerprint():
                raise self._misfit(f"has no statistics of {min(missing)!r}")
        return {**(self._calibrated(model, missing, known) if missing else known), **kept}

    def _misfit(self, what: str) -> DataError:
        return DataError(
            f"{self.calibration}: {what}: it was made from another model or target, or "
            "with other passes before; delete it, or give another --calibration"
        )

    def _calibrated(
        self, model: Model, wanted: set[str], known: Mapping[str, Histogram]
    ) -> Mapping[str, Histogram]:
        made = calibrate(
            model, dict.fromkeys(sorted(wanted), Histogram), self.samples, progress=self.progress
        )
        together = {**known, **cast(Mapping[str, Histogram], made)}
        if self.calibration is not None:
            meta = {
                "samples": len(self.samples),
                "of": self.samples.fingerprint(),
                "model": fingerprint(model),
            }
            save_calibration(self.calibration, together, meta=meta)
        return together
