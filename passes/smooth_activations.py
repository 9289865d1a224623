"""Move outliers of activations into weights, where they cost less.

    y = x W    =>    y = (x / s) (s W)        s_j = max|x_j|^a / max|w_j|^(1 - a)

(Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", 2023.) An activation has one scale for all channels: a channel a hundred times as large as
the others leaves them a few integers. A weight's scales are by output channel, so that large input
channels cost little there. The division goes into what makes x (`onnxq.passes.rescaling`): no node
is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Note, Skip
from onnxq.data import Samples
from onnxq.excerpts import Excerpt
from onnxq.layers import Layers
from onnxq.model import Model
from onnxq.numerics.migration import rounding_noise, search, smoothing
from onnxq.options import require_range
from onnxq.passes.formats import (
    Activations,
    Formats,
    Granularity,
    Range,
    Weights,
    formats_of,
    require_formats,
)
from onnxq.passes.rescaling import Factor
from onnxq.passes.sites import UNREAL, Array, Site, Trial, excerpts_of, find_sites, told
from onnxq.passes.static_rounding import WeightMethod
from onnxq.schemes import PerTensor
from onnxq.statistics import Histogram
from onnxq.targets import Target

NAME = "smooth_activations"
ALPHAS = (0.4, 0.6, 0.8, 0.95)
ENOUGH = 10**-3.5  # relative squared error of results (35 dB) below which nothing is tried
GAIN = 0.5  # of the error that may be left at most, or the layer stays as it was


@dataclass(frozen=True, slots=True)
class SmoothActivations:
    """Before quantize_static, with its options: they say what the layers will be rounded to.

    For each tensor that layers read, a is searched by the error of their results on excerpts of
    three quarters of the samples; the rest judges whether the factor stays: it has to bring 3 dB.
    range: output, which is found behind it, counts as careful. alpha: no search. insert: where
    nothing takes the division in, a Mul is added.
    """

    target: Target
    samples: Samples
    activations: Activations = "auto"
    weights: Weights = "auto"
    granularity: Granularity = "auto"
    group_size: int = 32
    range: Range = "minmax"
    weight_range: WeightMethod = "minmax"
    alpha: float | None = None
    insert: bool = False
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_range("group_size", self.group_size, 1)
        if self.alpha is not None:
            require_range("alpha", self.alpha, 0, 1)
        require_formats(self.target, self.activations, self.weights)
        Layers.parse(self.layers)

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Rescale where it helps; a note for each tensor, with both errors.

        Raises DataError for samples that do not fit.
        """
        if self.samples.synthetic:
            return [Note(NAME, model.graph.name, UNREAL, changed=False)]
        model.separate_names()
        formats = formats_of(
            model, self.target, Layers.parse(self.layers).choices(model),
            activations=self.activations, weights=self.weights,
            granularity=self.granularity, group_size=self.group_size,
        )  # fmt: skip

        def is_quantized(node: gs.Node) -> bool:
            return id(node) in formats.weights and id(node) not in formats.floats

        sites, unfit = find_sites(model, is_quantized)
        work = _Work(self, model, formats)
        notes = [Note(NAME, node.name, why, changed=False) for node, why in unfit]
        notes += work.run(sites)
        if any(note.changed for note in notes):
            model.sweep()
        return notes


@dataclass(frozen=True, slots=True)
class _Work:
    """One run of the pass over one model."""

    options: SmoothActivations
    model: Model
    formats: Formats

    def run(self, sites: Sequence[Site]) -> list[Note]:
        """A note for each tensor."""
        texts = {site.name: self._obstacle(site) for site in sites}
        possible = [s for s in sites if self.options.insert or not texts[s.name]]
        if possible:
            near, apart = excerpts_of(self.model, possible, self.options.samples)
        changed = set[str]()
        for site in possible:
            place = site.place
            try:
                if place not in near or place not in apart:
                    raise Skip(f"{site.tensor.name} has no values, or some that are not finite")
                texts[site.name] = self._smoothed(site, near[place], apart[place])
                changed.add(site.name)
            except Skip as reason:
                texts[site.name] = str(reason)
        return [Note(NAME, name, text, changed=name in changed) for name, text in texts.items()]

    def _takes(self, node: gs.Node) -> bool:  # no channel of a weight may widen another's range
        scheme = self.formats.weights.get(id(node))
        return scheme is None or not isinstance(scheme.granularity, PerTensor)

    def _obstacle(self, site: Site) -> str:
        """What takes no factor; empty: what makes the tensor does."""
        try:
            site.division(self.model, np.arange(2.0, site.channels + 2), self._takes)
        except Skip as reason:
            return str(reason)
        return ""

    def _smoothed(self, site: Site, near: Excerpt, apart: Excerpt) -> str:
        """Find a, judge, and edit; raises Skip where it is not worth it."""
        weights = site.weights()
        maxima, energy = np.abs(weights).max(1), np.square(weights).sum(1)
        none = np.ones(site.channels)

        def factor_of(a: float) -> Factor:
            return smoothing(np.maximum(near.hi, -near.lo), maxima, a)

        def error(trial: Trial, factor: Factor) -> float:
            return trial.error(factor, self._rounding(site, (near, apart), factor))

        a = self.options.alpha
        if a is None:
            noise = [
                rounding_noise(near.lo, near.hi, energy, factor)
                for factor in (none, *map(factor_of, ALPHAS))
            ]
            if not min(noise) < GAIN * noise[0]:
                raise Skip(f"{site.tensor.name} has no channels that are much larger than others")
            trial = self._trial(site, near)
            before = error(trial, none)
            if before < ENOUGH:
                raise Skip(f"{told(before)}: close enough as it is")
            floor = trial.error(none)
            if GAIN * before < floor:
                why = f"{told(before)}, {told(floor)} with exact inputs"
                raise Skip(f"{site.tensor.name} is not what costs: {why}")
            a, after = search(lambda a: error(trial, factor_of(a)), ALPHAS)
            if not after < GAIN * before:
                raise Skip(f"alpha {a:g}: {told(before)} -> {told(after)}: left as it was")
        factor, trial = factor_of(a), self._trial(site, apart)
        before, after = error(trial, none), error(trial, factor)
        text = f"alpha {a:g}: {told(before)} -> {told(after)} on held-out samples"
        if not after < GAIN * before:
            raise Skip(f"{text}: left as it was")
        try:
            site.division(self.model, factor, self._takes).apply()
        except Skip as reason:
            if not self.options.insert:
                raise
            site.insert(self.model, factor)
            text = f"{text}, by a Mul: {reason}"
        site.multiply(self.model, factor)
        return text

    def _trial(self, site: Site, excerpt: Excerpt) -> Trial:
        method = self.options.weight_range
        return Trial(site, excerpt, self.formats.weights, method, self.model.opset)

    def _rounding(
        self, site: Site, seen: Sequence[Excerpt], factor: Factor
    ) -> Callable[[Array], Array]:
        """How x / s will be rounded: with the range that quantize_static will find, about.

        From what is held out, too: that pass sees all samples.
        """
        values = [x.reshape(-1) for excerpt in seen for x in excerpt.divided(factor)]
        histogram = replace(
            Histogram.of(np.concatenate(values)),
            lo=min(float((excerpt.lo / factor).min()) for excerpt in seen),
            hi=max(float((excerpt.hi / factor).max()) for excerpt in seen),
        )
        format = self.formats.activations[id(site.layers[0])]
        scheme = replace(self.options.target.activations, format=format)
        bits, symmetric = scheme.numbers.bits, scheme.symmetric
        method = "careful" if self.options.range == "output" else self.options.range
        params = scheme.params(*histogram.range(method, bits=bits, symmetric=symmetric))
        return lambda x: params.dequantize(params.quantize(x))
