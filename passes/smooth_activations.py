"""Move outliers of activations into weights, where they cost less.

    y = x W    =>    y = (x / s) (s W)        s_j = max|x_j|^a / max|w_j|^(1 - a)

(Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", 2023.) An activation has one scale for all channels: a channel a hundred times as large as
the others leaves them a few integers. A weight's scales are by output channel, so that large input
channels cost little there. The division goes into what makes x (`onnxq.passes.rescaling`): no node
is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, cast

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.calibration import calibrate
from onnxq.core import Note, Skip
from onnxq.data import Samples
from onnxq.excerpts import Excerpt, excerpts
from onnxq.layers import Layers
from onnxq.model import Model
from onnxq.numerics.migration import search, smoothing
from onnxq.options import require_range
from onnxq.passes.formats import formats_of, require_formats
from onnxq.passes.rescaling import Factor
from onnxq.passes.sites import Array, Site, Trial, divided, find_sites, told
from onnxq.schemes import Method as WeightMethod
from onnxq.schemes import PerChannel, QuantScheme
from onnxq.statistics import ChannelExtremes, Extremes, Histogram, Method
from onnxq.targets import Target

NAME = "smooth_activations"
ALPHAS = (0.4, 0.6, 0.8, 0.95)
RUNS = 32  # samples at most that extremes are taken from, spread over all
GAIN = 0.9  # of the error that may be left at most, or the layer stays as it was
GAIN_OF_NODE = 0.5  # the same where a node is added


@dataclass(frozen=True, slots=True)
class SmoothActivations:
    """Before quantize_static, with its options: they say what the layers will be rounded to.

    For each tensor that layers read, a is searched by the error of their results on excerpts of
    three quarters of the samples; the rest judges whether the factor stays. alpha: no search.
    insert: where nothing takes the division in, a Mul is added if it brings 3 dB or more.
    """

    target: Target
    samples: Samples
    activations: Literal["auto", "a8", "a16", "int8", "uint8", "int16", "uint16"] = "auto"
    weights: Literal["auto", "int8", "uint8", "int16", "int4", "uint4", "int2"] = "auto"
    granularity: Literal["auto", "tensor", "channel", "group"] = "auto"
    group_size: int = 32
    range: Method = "minmax"
    weight_range: WeightMethod = "minmax"
    alpha: float | None = None
    insert: bool = False
    layers: tuple[str, ...] = ()
    progress: Callable[[int], None] | None = field(default=None, repr=False, compare=False)

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
        model.separate_names()
        formats = formats_of(
            model, self.target, Layers.parse(self.layers).choices(model),
            activations=self.activations, weights=self.weights,
            granularity=self.granularity, group_size=self.group_size,
        )  # fmt: skip

        def is_quantized(node: gs.Node) -> bool:
            return id(node) in formats.weights and id(node) not in formats.floats

        def takes(node: gs.Node) -> bool:  # no channel of a weight may widen another's range
            scheme = formats.weights.get(id(node))
            return scheme is None or isinstance(scheme.granularity, PerChannel)

        notes, sites = list[Note](), list[Site]()
        for site in find_sites(model, is_quantized):
            try:
                site.division(model, np.arange(2.0, site.channels + 2), takes)
            except Skip as reason:
                if self.insert and site.is_multiplicable:
                    sites.append(site)
                else:
                    notes.append(Note(NAME, site.name, str(reason), changed=False))
            else:
                sites.append(site)
        if sites:
            work = _Work(self, model, formats.weights, formats.activations)
            notes += work.run(sites, takes)
            model.sweep()
        return notes


class _Work:
    """One run of the pass over one model."""

    def __init__(
        self,
        options: SmoothActivations,
        model: Model,
        schemes: Mapping[int, QuantScheme],
        formats: Mapping[int, str],
    ) -> None:
        self.options, self.model, self.schemes, self.formats = options, model, schemes, formats

    def run(self, sites: Sequence[Site], takes: Callable[[gs.Node], bool]) -> list[Note]:
        chosen, judged = divided(self.options.samples)
        axes = {site.tensor.name: site.axis for site in sites}
        wanted = {name: Extremes(axis) for name, axis in axes.items()}
        spread = islice(chosen, 0, None, -(-len(chosen) // RUNS))
        seen = calibrate(self.model, wanted, spread, progress=self.options.progress)
        near, apart = (excerpts(self.model, axes, part) for part in (chosen, judged))
        notes = []
        for site in sites:
            name = site.tensor.name
            try:
                text = self._smoothed(
                    site, cast(ChannelExtremes, seen[name]), near[name], apart[name], takes
                )
            except Skip as reason:
                notes.append(Note(NAME, site.name, str(reason), changed=False))
            else:
                notes.append(Note(NAME, site.name, text))
        return notes

    def _smoothed(
        self,
        site: Site,
        seen: ChannelExtremes,
        near: Excerpt,
        apart: Excerpt,
        takes: Callable[[gs.Node], bool],
    ) -> str:
        """Search a, judge, and edit; raises Skip where it is not worth it."""
        if seen.has_nonfinite or not near or not apart:
            raise Skip(f"{site.tensor.name} has values that are not finite")
        if seen.lo.size != site.channels:
            raise Skip(f"{site.tensor.name} has another number of channels")
        options, maxima = self.options, site.weight_maxima()

        def factor_of(a: float) -> Factor:
            return smoothing(seen.absmax, maxima, a)

        trial = self._trial(site, near)

        def error(a: float) -> float:
            return trial.error(factor_of(a), self._rounding(site, seen, near, factor_of(a)))

        before, floor = trial.error(None, self._rounding(site, seen, near, None)), trial.error(None)
        if options.alpha is None and GAIN * before < floor:
            raise Skip(f"{told(before)}, {told(floor)} with exact inputs: they are not what costs")
        a = search(error, ALPHAS)[0] if options.alpha is None else options.alpha
        factor, trial = factor_of(a), self._trial(site, apart)
        before = trial.error(None, self._rounding(site, seen, near, None))
        after = trial.error(factor, self._rounding(site, seen, near, factor))
        text = f"{told(before)} -> {told(after)} on held-out samples"
        if not after < GAIN * before:
            raise Skip(f"alpha {a:g}: {text}: left as it was")
        try:
            site.division(self.model, factor, takes).apply()
        except Skip as reason:
            if not after < GAIN_OF_NODE * before:
                raise Skip(f"alpha {a:g}: {text}: not worth a Mul; {reason}") from reason
            site.insert(self.model, factor)
            text = f"{text}, by a Mul: {reason}"
        site.multiply(self.model, factor)
        return f"alpha {a:g}: {text}"

    def _trial(self, site: Site, excerpt: Excerpt) -> Trial:
        return Trial(site, excerpt, self.schemes, self.options.weight_range, self.model.opset)

    def _rounding(
        self, site: Site, seen: ChannelExtremes, near: Excerpt, factor: Factor | None
    ) -> Callable[[Array], Array]:
        """How x / s will be rounded: with the range that quantize_static will find, about."""
        s = np.ones(site.channels) if factor is None else factor
        axis = site.axis
        values = [
            np.moveaxis(x, axis if x.ndim > 2 else -1, -1).reshape(-1, site.channels) / s
            for x in near
        ]
        histogram = replace(
            Histogram.of(np.concatenate(values).astype(np.float32)),
            lo=float((seen.lo / s).min()), hi=float((seen.hi / s).max()),
        )  # fmt: skip
        scheme = replace(self.options.target.activations, format=self.formats[id(site.layers[0])])
        lo, hi = histogram.range(
            self.options.range, bits=scheme.numbers.bits, symmetric=scheme.symmetric
        )
        params = scheme.params(lo, hi)
        return lambda x: params.dequantize(params.quantize(x))
