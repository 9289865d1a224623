"""Protect the weights that matter most before they are stored in few bits.

    y = x W    =>    y = (x / s) (s W)        s_j = mean|x_j|^a

(Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
Acceleration", 2023.) Weights that are multiplied with large activations are made larger within
their group: rounding then costs them less, and the others hardly more. The division goes into what
makes x (`onnxq.passes.rescaling`). After that, ranges of groups are narrowed where the results gain
by it (`onnxq.numerics.shrinking`): such a weight keeps the integers that were found, and
quantize_weights takes them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Note, Skip
from onnxq.data import Samples
from onnxq.excerpts import Excerpt
from onnxq.model import Model
from onnxq.numerics.migration import salience, search
from onnxq.numerics.shrinking import Affine, grams, shrunk
from onnxq.packed import Grid, Recovered
from onnxq.passes.layouts import Held
from onnxq.passes.linear import constant
from onnxq.passes.rescaling import Factor
from onnxq.passes.sites import UNREAL, Array, Site, Trial, excerpts_of, find_sites, told
from onnxq.passes.weight_plans import WeightPlan
from onnxq.passes.weight_storage import Found, find_weights
from onnxq.schemes import (
    Method,
    PerTensor,
    QParams,
    QuantScheme,
    integers,
    quantize_weight,
)
from onnxq.targets import Target
from onnxq.weights import Weight

NAME = "scale_salient"
POWERS = (0.15, 0.3, 0.45, 0.6, 0.8)
GAIN = 0.85  # of the error that may be left at most, or the layer stays as it was


@dataclass(frozen=True, slots=True)
class ScaleSalient:
    """Before quantize_weights, with its options: they say what the weights will be rounded to.

    a is searched by the error of the layers' results on excerpts of three quarters of the samples;
    the rest judges whether the factor, and then whether the narrower ranges stay. clip: search
    ranges, too.
    """

    samples: Samples = field(repr=False)
    format: str = "int8"
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: int = 32
    symmetric: bool = True
    levels: int | None = None
    range: Method = "minmax"
    smallest: int = 512
    layers: tuple[str, ...] = ()
    clip: bool = True
    target: Target | None = None

    def __post_init__(self) -> None:
        _ = self.plan

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    @property
    def plan(self) -> WeightPlan:
        """What decides about formats. Raises ValueError for those that the target cannot run."""
        return WeightPlan(
            self.format, self.granularity, self.group_size, self.symmetric, self.levels,
            "storage", self.smallest, 0, 0.0, self.layers, self.target,
        )  # fmt: skip

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Rescale and narrow where it helps; notes with both errors.

        Raises DataError for samples that do not fit.
        """
        if self.samples.synthetic:
            return [Note(NAME, model.graph.name, UNREAL, changed=False)]
        model.separate_names()
        found, _ = find_weights(model, self.layers, self.smallest, rule=NAME)
        weights = {id(weight.node): weight for weight in found if weight.held.index == 1}
        sites, unfit = find_sites(model, lambda node: id(node) in weights)
        notes = [Note(NAME, node.name, why, changed=False) for node, why in unfit]
        if sites:
            notes += _Work(self, model, weights).run(sites)
        if any(note.changed for note in notes):
            model.sweep()
        return notes


class _Work:
    """One run of the pass over one model."""

    def __init__(self, options: ScaleSalient, model: Model, weights: Mapping[int, Found]) -> None:
        self.options, self.model, self.weights = options, model, weights
        plan = options.plan
        self.schemes: dict[int, QuantScheme] = {
            key: plan.scheme(w.node, w.held, w.choice) for key, w in weights.items()
        }
        self.notes: list[Note] = []

    def run(self, sites: Sequence[Site]) -> list[Note]:
        near, apart = excerpts_of(self.model, sites, self.options.samples)
        usable = [s for s in sites if s.place in near and s.place in apart]
        for site in sites:
            if site not in usable:
                why = f"{site.tensor.name} has no values, or some that are not finite"
                self._tell(site.layers[0], why, changed=False)
        parts = [(near[s.place], apart[s.place]) for s in usable]
        factors = [self._factor(site, *p) for site, p in zip(usable, parts, strict=True)]
        if self.options.clip:  # a layer may be the producer of another's input: integers come last
            for site, factor, p in zip(usable, factors, parts, strict=True):
                self._narrow(site, factor, *p)
        return self.notes

    def _tell(self, node: gs.Node, text: str, *, changed: bool = True) -> None:
        self.notes.append(Note(NAME, node.name, text, changed=changed))

    def _factor(self, site: Site, near: Excerpt, apart: Excerpt) -> Factor:
        """The factor that the site's tensor was divided by: ones where it is as it was."""
        try:
            text, factor = self._scaled(site, near, apart)
        except Skip as reason:
            self._tell(site.layers[0], str(reason), changed=False)
            return np.ones(site.channels)
        self._tell(site.layers[0], text)
        return factor

    def _scaled(self, site: Site, near: Excerpt, apart: Excerpt) -> tuple[str, Factor]:
        """Search a, judge, and edit; raises Skip where it is not worth it."""
        site.division(self.model, np.arange(2.0, site.channels + 2))
        means = np.mean([_mean_magnitudes(x) for x in near.parts], 0)
        trial = self._trial(site, near)
        a, _ = search(lambda a: trial.error(salience(means, a)), POWERS)
        factor, trial = salience(means, a), self._trial(site, apart)
        before, after = trial.error(np.ones(site.channels)), trial.error(factor)
        text = f"power {a:g}: {told(before)} -> {told(after)} on held-out samples"
        if not after < GAIN * before:
            raise Skip(f"{text}: left as it was")
        site.division(self.model, factor).apply()
        site.multiply(self.model, factor)
        return text, factor

    def _trial(self, site: Site, excerpt: Excerpt) -> Trial:
        return Trial(site, excerpt, self.schemes, self.options.range, self.model.opset)

    def _narrow(self, site: Site, factor: Factor, near: Excerpt, apart: Excerpt) -> None:
        """Search ranges for each layer of the site, judge, and give it its integers."""
        for node in site.layers:
            weight = self.weights[id(node)]
            scheme, held = self.schemes[id(node)], weight.held
            size = scheme.group_size or held.length
            if why := _kept_ranges(node, scheme, held.length % size):
                self._tell(node, why, changed=False)
                continue
            x, y = (np.concatenate(part.divided(factor)) for part in (near, apart))
            rows = np.ascontiguousarray(held.rows(constant(node, 1)), np.float32)
            start = quantize_weight(rows, scheme, method=self.options.range)[1]
            found = _narrowed(rows, scheme, start, grams(x, size))
            exact = y @ rows.T
            before, after = (
                float(np.square(y @ p.dequantize(integers(rows, scheme, p)).T - exact).sum())
                for p in (start, found)
            )
            energy = float(np.square(exact).sum()) or 1.0
            text = f"ranges: {told(before / energy)} -> {told(after / energy)} on held-out samples"
            if not after < before:
                self._tell(node, f"{text}: left as they were", changed=False)
                continue
            node.inputs[1] = self._kept(node, held, rows, scheme, found)
            self._tell(node, text)

    def _kept(
        self, node: gs.Node, held: Held, rows: Array, scheme: QuantScheme, params: QParams
    ) -> gs.Constant:
        """A weight that remembers its integers."""
        numbers = integers(rows, scheme, params)

        def grid() -> Grid:
            scale, zero = params.scale, params.zero_point
            if scheme.group_size is None:
                scale, zero = scale[:, None], zero[:, None]
            times = rows.shape[1] // scale.shape[1]
            spread = Grid(numbers, np.repeat(scale, times, 1), np.repeat(zero, times, 1))
            return spread.map(held.unrolled)

        name = self.model.unique(f"{node.inputs[1].name}_narrowed")
        return Weight(name, Recovered(grid, held.shape, np.float32))


def _mean_magnitudes(x: Array) -> NDArray[np.float64]:
    """By channel."""
    others = tuple(a for a in range(x.ndim) if a != 1)
    return np.asarray(np.abs(x).mean(others, dtype=np.float64))


def _kept_ranges(node: gs.Node, scheme: QuantScheme, rest: int) -> str:
    """Why ranges of a layer are not narrowed; empty: they may be."""
    if node.op not in ("MatMul", "Gemm"):
        return f"ranges of a {node.op} are left as they are"
    if isinstance(scheme.granularity, PerTensor):
        return "one range for all channels is left as it is"
    return "ranges are left as they are: the last group is smaller" if rest else ""


def _narrowed(rows: NDArray[Any], scheme: QuantScheme, start: QParams, gram: Array) -> QParams:
    """Parameters of least error in the results, at least as good as those given."""
    by_group = scheme.group_size is not None
    shape = (len(rows), len(gram))

    def of(affine: Affine) -> QParams:
        to = shape if by_group else (-1,)
        return replace(start, scale=affine[0].reshape(to), zero_point=affine[1].reshape(to))

    def covering(low: Array, high: Array) -> Affine:
        ends = (low, high) if by_group else (low.reshape(-1), high.reshape(-1))
        params = scheme.params(*ends, start.axis)
        return params.scale.reshape(shape), params.zero_point.reshape(shape)

    def rounded(affine: Affine) -> Array:
        params = of(affine)
        return params.dequantize(integers(rows, scheme, params))

    first = start.scale.reshape(shape), start.zero_point.reshape(shape)
    return of(shrunk(rows, gram, first, covering, rounded))
