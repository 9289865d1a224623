"""Biases that bring results of quantized layers back to what they were, by samples.

The half of correct_bias for a model behind quantize_static.

A correction c of a channel minimizes the squared error E (clamp(y + c) - clamp(y0))^2 of its
results y behind the clamp that reads them, if one does: c falls by the mean error where the clamp
lets y through (Newton's method). Without one that is the difference of the means (Nagel et al.,
"Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, appendix D;
Finkelstein et al., "Fighting Quantization Bias With Bias", 2019).

Each correction moves the inputs, and so the errors, of all layers behind it. Taking one layer after
the other wants as many runs of all samples as the model is deep, and correcting all at once
overshoots by more than it corrects. Here all corrections go a step after each sample, smaller from
sample to sample: the t-th by 1 / (t + 2) of the error (Robbins and Monro, "A Stochastic
Approximation Method", 1951). That is one run of each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq import runtime
from onnxq.core import Note, Skip
from onnxq.data import Feed, Samples
from onnxq.model import Model
from onnxq.numerics.metrics import ErrorSums
from onnxq.passes.biases import Home, home_of
from onnxq.passes.grams import db
from onnxq.passes.linear import LINEAR
from onnxq.passes.paired import EXACT, Layer, Means, correction, paired, powers, slopes
from onnxq.sampling import divided

NAME = "correct_bias"
FITTED, JUDGING = 24, 10  # samples at most, spread over those there are
PASSING = 0.02  # the least share of a channel's results that a clamp lets through, to correct it
GAIN_DB = 0.5  # of the model's results, for less biases stay as they were
LIMIT_DB = 200.0  # either way, of an output: one without errors or signal leaves the others a say


def corrected(
    model: Model, samples: Samples, progress: Callable[[int], None] | None, *, floats: bool
) -> list[Note]:
    """Correct biases in place; a note for each layer, and one for the model.

    floats: new biases are floats, in integer layers too. Raises DataError for samples that do not
    run.
    """
    if samples.synthetic or not len(samples):
        text = "synthetic samples do not tell by what results are moved: give --data"
        return [Note(NAME, model.graph.name, text, changed=False)]
    if not any(node.op == "DequantizeLinear" for node in model.graph.nodes):
        return [Note(NAME, model.graph.name, "nothing is quantized", changed=False)]
    if not _floats(model):
        text = "no output is float: none tells whether corrected biases help"
        return [Note(NAME, model.graph.name, text, changed=False)]
    work = _Work(model, samples, progress)
    for node, exact in _pairs(model):
        try:
            layer = Layer.of(model, node, model.unquantized[0], exact)
            work.add(layer, home_of(model, node, layer.channels, floats=floats))
        except Skip as reason:
            work.notes.append(Note(NAME, node.name, str(reason), changed=False))
    if work.layers:
        try:
            work.run()
        except Skip as reason:
            work.notes.append(Note(NAME, model.graph.name, str(reason), changed=False))
    return work.notes


def _pairs(model: Model) -> Iterator[tuple[gs.Node, gs.Node]]:
    """Layers with constant weights, and what they were; those in bodies are left alone."""
    earlier = {node.name: node for node in model.unquantized[0].graph.nodes}
    for node in model.graph.nodes:
        exact = earlier.get(node.name)
        if node.op not in LINEAR or node.domain or exact is None or exact.op != node.op:
            continue
        if isinstance(exact.inputs[1], gs.Constant):
            yield node, exact


@dataclass(frozen=True, slots=True)
class _Verdict:
    """Squared errors and squares of each layer's results, and the outputs' distance in dB."""

    layers: list[tuple[float, float]]
    sqnr_db: float

    def of(self, index: int) -> str:
        """A layer's distance in dB."""
        error, signal = self.layers[index]
        return db(signal, error)


class _Work:
    """One run over one model."""

    def __init__(
        self, model: Model, samples: Samples, progress: Callable[[int], None] | None
    ) -> None:
        self.model, self.samples, self.progress = model, samples, progress
        self.layers: list[Layer] = []
        self.homes: list[Home] = []
        self.notes: list[Note] = []

    def add(self, layer: Layer, home: Home) -> None:
        """One more layer to correct."""
        self.layers.append(layer)
        self.homes.append(home)

    def run(self) -> None:
        """Fit, judge, edit."""
        fitted, judging = divided(self.samples)
        found = self._fitted(list(_spread(fitted, FITTED)))
        judge = _Judge(self.model, self.layers, list(_spread(judging, JUDGING)))
        none = [np.zeros_like(c) for c in found]
        before, after = judge(none), judge(found)
        helped = [a[0] < b[0] for a, b in zip(after.layers, before.layers, strict=True)]
        if not all(helped) and any(helped):
            some = [c if h else z for c, h, z in zip(found, helped, none, strict=True)]
            verdict = judge(some)
            if verdict.sqnr_db > after.sqnr_db:
                found, after = some, verdict
        text = f"results {before.sqnr_db:.1f} -> {after.sqnr_db:.1f} dB on held-out samples"
        if not after.sqnr_db >= before.sqnr_db + GAIN_DB:
            text += ": biases left as they were"
            self.notes.append(Note(NAME, self.model.graph.name, text, changed=False))
            return
        for i, (layer, home, c) in enumerate(zip(self.layers, self.homes, found, strict=True)):
            if not c.any():
                continue
            own = f"bias corrected: {before.of(i)} -> {after.of(i)} on held-out samples"
            try:
                home.add(c)
            except Skip as reason:
                self.notes.append(Note(NAME, layer.node.name, str(reason), changed=False))
            else:
                self.notes.append(Note(NAME, layer.node.name, own))
        self.notes.append(Note(NAME, self.model.graph.name, text))
        self.model.sweep()

    def _fitted(self, feeds: Sequence[Feed]) -> list[Means]:
        """The corrections: [channels] for each layer."""
        proto, keys = paired(
            self.model, self.layers, _shapes(self.model, feeds[0]), slopes, outputs=False
        )
        session, names = runtime.session(proto), [name for own in keys for name in own]
        found = [np.zeros(layer.channels) for layer in self.layers]
        for t, feed in enumerate(feeds):
            values = _run(session, names, feed, self.layers, found, t)
            for c, own in zip(found, keys, strict=True):
                error, *passing = (values[name].astype(np.float64) for name in own)
                share = passing[0] if passing else np.ones_like(error)
                step = np.where(share > PASSING, error / np.maximum(share, PASSING), 0)
                c -= np.where(np.isfinite(step), step, 0) / (t + 2)
            if self.progress is not None:
                self.progress(t + 1)
        return found


class _Judge:
    """Tells how far results are from exact ones with given corrections."""

    def __init__(self, model: Model, layers: Sequence[Layer], feeds: Sequence[Feed]) -> None:
        proto, self.keys = paired(model, layers, _shapes(model, feeds[0]), powers, outputs=True)
        self.session, self.layers, self.feeds = runtime.session(proto), layers, feeds
        self.outputs = _floats(model)

    def __call__(self, found: Sequence[Means]) -> _Verdict:
        names = [name for own in self.keys for name in own]
        names += [name for out in self.outputs for name in (out, EXACT + out)]
        powers = np.zeros((len(self.layers), 2))
        sums = dict.fromkeys(self.outputs, ErrorSums())
        for index, feed in enumerate(self.feeds):
            values = _run(self.session, names, feed, self.layers, found, index)
            powers += [[float(values[name].sum()) for name in own] for own in self.keys]
            for name in self.outputs:
                new = ErrorSums.of(values[EXACT + name], values[name])
                sums[name] = sums[name].merge(new)
        distances = [np.clip(s.sqnr_db, -LIMIT_DB, LIMIT_DB) for s in sums.values()]
        return _Verdict(
            [(float(error), float(signal)) for error, signal in powers], float(np.mean(distances))
        )


def _floats(model: Model) -> list[str]:
    """Outputs whose errors can be measured."""
    return [t.name for t in model.graph.outputs if t.dtype in (np.float16, np.float32, np.float64)]


def _run(
    session: Any,
    names: Sequence[str],
    feed: Feed,
    layers: Sequence[Layer],
    found: Sequence[Means],
    index: int,
) -> Mapping[str, NDArray[Any]]:
    given = {correction(i): layer.shaped(found[i]) for i, layer in enumerate(layers)}
    with runtime.blames_sample(index):
        results = session.run(list(names), runtime.fitted(session, {**feed, **given}))
    return dict(zip(names, results, strict=True))


def _shapes(model: Model, feed: Feed) -> Mapping[str, Sequence[int]]:
    return model.unquantized[0].shapes_for({name: np.shape(x) for name, x in feed.items()})


def _spread(samples: Samples, most: int) -> Iterator[Feed]:
    """At most so many of them, at equal distances."""
    count = min(most, len(samples))
    picked = {i * len(samples) // count for i in range(count)}
    return (feed for i, feed in enumerate(samples) if i in picked)
