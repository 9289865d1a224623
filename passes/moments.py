"""What is known of activations without running a model: distributions of each channel.

A BatchNormalization's result has mean beta and deviation |gamma| in training, and its input the
mean and variance that it holds (Nagel et al., "Data-Free Quantization Through Weight Equalization
and Bias Correction", 2019, section 4.2.1); the values between are taken for normal. Folding leaves
them in `Model.moments`. From there distributions go on through activation functions, pooling, sums
and data movement, as points of given probability. Behind a layer that no BatchNormalization
follows, they are the layer's of independent inputs: `trust` counts down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Skip
from onnxq.graphs import sort
from onnxq.model import Model, producer, values_of
from onnxq.numerics import histograms
from onnxq.passes.activations import EVALUATE
from onnxq.passes.channel_moves import MOVED, Channels, sizes
from onnxq.passes.channels import bias_row, channel_axis, matrices
from onnxq.passes.linear import LINEAR, constant, outputs_of
from onnxq.statistics import Histogram

Values = NDArray[np.float64]

SIGMAS = 8.0  # where values end, in deviations; 6 in the paper, which cut LeakyRelu nets off
POINTS = 129
GRID = np.linspace(-SIGMAS, SIGMAS, POINTS)
MASS = np.exp(-(GRID**2) / 2) / np.exp(-(GRID**2) / 2).sum()
BELOW = np.cumsum(MASS) - MASS / 2
COUNTS = np.rint(MASS * 8192).astype(np.int64)  # of a channel's values in a histogram
# Trust: from a BatchNormalization; one layer behind; a guess.
KNOWN, DERIVED, GUESSED = 2, 1, 0
POOLS = frozenset(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"))


@dataclass(frozen=True, slots=True)
class Moments:
    """Distributions of a tensor's channels along an axis; axis None: one for all.

    points: [channels, POINTS], of probability MASS. lo, hi: [channels], the ends.
    """

    axis: int | None
    points: Values
    lo: Values
    hi: Values
    trust: int

    @classmethod
    def normal(cls, axis: int | None, mean: Values, deviation: Values, trust: int) -> Moments:
        """Normal distributions, cut off at SIGMAS deviations."""
        points = mean[:, None] + deviation[:, None] * GRID
        return cls(axis, points, mean - SIGMAS * deviation, mean + SIGMAS * deviation, trust)

    @property
    def mean(self) -> Values:
        """Of each channel."""
        return np.asarray(self.points @ MASS)

    @property
    def variance(self) -> Values:
        """Of each channel."""
        return np.asarray(np.square(self.points - self.mean[:, None]) @ MASS)

    def histogram(self) -> Histogram:
        """Of all channels, each with as many values."""
        counts = histograms.count(
            np.repeat(histograms.halves_of(self.points), np.tile(COUNTS, len(self.points)))
        )[0]
        return Histogram(float(self.lo.min()), float(self.hi.max()), 1, False, *counts)

    def spread(self, axis: int, channels: int) -> Moments:
        """One distribution for each of so many channels along an axis."""
        if self.axis == axis and len(self.points) == channels:
            return self
        one = self.pooled()
        return Moments(
            axis,
            np.repeat(one.points, channels, 0),
            np.repeat(one.lo, channels),
            np.repeat(one.hi, channels),
            self.trust,
        )

    def pooled(self) -> Moments:
        """One distribution for all channels."""
        if len(self.points) == 1:
            return replace(self, axis=None)
        flat, mass = self.points.reshape(-1), np.tile(MASS, len(self.points))
        order = np.argsort(flat, kind="stable")
        below = (np.cumsum(mass[order]) - mass[order] / 2) / len(self.points)
        every = np.interp(BELOW, below, flat[order])
        return Moments(None, every[None], self.lo.min(keepdims=True), self.hi.max(keepdims=True),
                       self.trust)  # fmt: skip

    def taken(self, axis: int, index: NDArray[np.int64]) -> Moments:
        """Channels by index, along another axis."""
        return Moments(axis, self.points[index], self.lo[index], self.hi[index], self.trust)


GUESS = Moments.normal(None, np.zeros(1), np.ones(1), GUESSED)


def moments(model: Model) -> dict[int, Moments]:
    """Distributions of all float tensors that are not constant, by tensor id."""
    found = {id(t): _remembered(model, t) for t in model.graph.inputs if t.name in model.moments}
    for graph in model.graphs():
        sort(graph)
        for node in graph.nodes:
            made = _made(node, found)
            for i, tensor in enumerate(node.outputs):
                if tensor.name in model.moments:
                    found[id(tensor)] = _remembered(model, tensor)
                elif made:
                    found[id(tensor)] = made[min(i, len(made) - 1)]
    return {key: one for key, one in found.items() if np.isfinite(one.points).all()}


def _remembered(model: Model, tensor: gs.Tensor) -> Moments:
    """Of a BatchNormalization, whose channels are along axis 1."""
    mean, deviation = (np.asarray(v, np.float64) for v in model.moments[tensor.name])
    return Moments.normal(1, mean, deviation, KNOWN)


def of(tensor: gs.Tensor, found: dict[int, Moments]) -> Moments:
    """The tensor's distributions; a guess where nothing is known."""
    return found.get(id(tensor), GUESS)


def _made(node: gs.Node, found: dict[int, Moments]) -> list[Moments]:
    """Distributions of a node's outputs; none where nothing can be said."""
    if not node.inputs:
        return []
    if node.op in LINEAR and not node.domain:
        return _linear(node, found)
    if node.op == "BatchNormalization":
        return _normalized(node)
    data = of(node.inputs[0], found)
    if node.op in ("Add", "Sub", "Sum"):
        return _sum(node, found)
    if node.op == "Mul":
        return _product(node, found)
    if node.op == "Concat":
        return _joined(node, found)
    if node.op in POOLS or node.op in ("Identity", "Dropout"):
        return [_greater(data) if "Max" in node.op else data]
    if node.op in MOVED:
        return _moved(node, data)
    if node.op in _FUNCTIONS:
        return [_through(node, data)]
    return []


def _linear(node: gs.Node, found: dict[int, Moments]) -> list[Moments]:
    """Mean W E[x] + b; variance of independent inputs."""
    try:
        weight = matrices(node, constant(node, 1))
        groups, _, inputs, _ = weight.shape
        bias = bias_row(node, outputs_of(node))
    except (Skip, ValueError):
        return []
    axis, out = (channel_axis(node, t) for t in (node.inputs[0], node.outputs[0]))
    data = of(node.inputs[0], found).spread(axis, groups * inputs)
    weight = weight * float(node.attrs.get("alpha", 1.0) if node.op == "Gemm" else 1.0)
    mean = np.einsum("goik,gi->go", weight, data.mean.reshape(groups, inputs)).reshape(-1)
    variance = np.einsum("goik,gi->go", weight**2, data.variance.reshape(groups, inputs))
    mean = mean if bias is None else mean + bias
    return [Moments.normal(out, mean, np.sqrt(variance).reshape(-1), max(data.trust - 1, 0))]


def _normalized(node: gs.Node) -> list[Moments]:
    gamma, beta = (values_of(t) for t in node.inputs[1:3])
    if gamma is None or beta is None:
        return []
    return [Moments.normal(1, beta.astype(np.float64), np.abs(gamma.astype(np.float64)), KNOWN)]


def _operands(node: gs.Node, found: dict[int, Moments]) -> list[Moments] | None:
    """The inputs, all along one axis; constants as they are."""
    parts = []
    rank = len(node.outputs[0].shape or ())
    for tensor in node.inputs:
        values = values_of(tensor)
        if values is None:
            part = of(tensor, found)
            if part.axis is not None and rank:
                part = replace(part, axis=part.axis + rank - len(tensor.shape or ()))
        elif values.size and values.dtype.kind == "f":
            part = _stored(np.asarray(values, np.float64), rank)
        else:
            return None
        parts.append(part)
    wide = max(parts, key=lambda m: len(m.points) if m.axis is not None else 0)
    if wide.axis is None:
        return parts
    return [m.spread(wide.axis, len(wide.points)) for m in parts]


def _stored(values: Values, rank: int) -> Moments:
    """A constant: of one value a channel if it has one axis that is not 1."""
    axes = [i for i, d in enumerate(values.shape) if d > 1]
    if len(axes) == 1:
        flat = values.reshape(-1)
        points = np.repeat(flat[:, None], POINTS, 1)
        return Moments(axes[0] + rank - values.ndim, points, flat, flat, KNOWN)
    points = np.quantile(values, BELOW)[None]
    return Moments(None, points, np.array([values.min()]), np.array([values.max()]), KNOWN)


def _sum(node: gs.Node, found: dict[int, Moments]) -> list[Moments]:
    """Of independent operands: means and variances add up."""
    parts = _operands(node, found)
    if parts is None:
        return []
    if node.op == "Sub":
        parts[1] = Moments(
            parts[1].axis, -parts[1].points[:, ::-1], -parts[1].hi, -parts[1].lo, parts[1].trust
        )
    points, lo, hi = (sum(getattr(m, name) for m in parts) for name in ("points", "lo", "hi"))
    whole = Moments(parts[0].axis, points, lo, hi, min(m.trust for m in parts))
    # Points were added as if all were large together: too wide.
    mean, deviation = whole.mean, np.sqrt(sum(m.variance for m in parts))
    share = deviation / np.maximum(np.sqrt(whole.variance), 1e-300)
    whole = replace(whole, points=mean[:, None] + share[:, None] * (points - mean[:, None]))
    return [_cut(whole, mean - SIGMAS * deviation, mean + SIGMAS * deviation)]


def _cut(data: Moments, lo: Values, hi: Values) -> Moments:
    """Distributions that end where they must."""
    points = np.clip(data.points, lo[:, None], hi[:, None])
    return replace(data, points=points, lo=np.maximum(data.lo, lo), hi=np.minimum(data.hi, hi))


def _product(node: gs.Node, found: dict[int, Moments]) -> list[Moments]:
    """Of independent factors; x * sigmoid(x) is a function of x."""
    for i, tensor in enumerate(node.inputs):
        gate = producer(tensor)
        other = node.inputs[1 - i]
        if gate is not None and gate.op in ("Sigmoid", "HardSigmoid") and gate.inputs[0] is other:
            return [_mapped(of(other, found), partial(_gated, gate))]
    parts = _operands(node, found)
    if parts is None:
        return []
    one, other_ = parts
    mean, squares = (
        one.mean * other_.mean,
        (one.variance + one.mean**2) * (other_.variance + other_.mean**2),
    )
    ends = np.stack([a * b for a in (one.lo, one.hi) for b in (other_.lo, other_.hi)])
    trust = min(one.trust, other_.trust)
    made = Moments.normal(one.axis, mean, np.sqrt(np.maximum(squares - mean**2, 0)), trust)
    return [_cut(made, ends.min(0), ends.max(0))]


def _gated(gate: gs.Node, x: Values) -> Values:
    return x * _FUNCTIONS[gate.op](gate, x)


def _joined(node: gs.Node, found: dict[int, Moments]) -> list[Moments]:
    out = node.outputs[0]
    if not out.shape or any(t.shape is None for t in node.inputs):
        return []
    parts = [of(t, found) for t in node.inputs]
    axis, trust = node.attrs["axis"] % len(out.shape), min(m.trust for m in parts)
    counts = [sizes(t)[axis] for t in node.inputs]
    if any(c is None for c in counts) or any(m.axis not in (None, axis) for m in parts):
        parts, axis_ = [m.pooled() for m in parts], None
    else:
        parts, axis_ = [m.spread(axis, c or 0) for m, c in zip(parts, counts, strict=True)], axis
    points, lo, hi = (
        np.concatenate([getattr(m, name) for m in parts]) for name in ("points", "lo", "hi")
    )
    made = Moments(axis_, points, lo, hi, trust)
    return [made if axis_ is not None else made.pooled()]


def _greater(data: Moments) -> Moments:
    """The greater of two neighbours, which are as of independent values: windows are correlated."""
    if (np.diff(data.points) < 0).any():
        return data
    return replace(
        data, points=np.stack([np.interp(np.sqrt(BELOW), BELOW, r) for r in data.points])
    )


def _moved(node: gs.Node, data: Moments) -> list[Moments]:
    if data.axis is None:
        return [data]
    made = MOVED[node.op](node, Channels(data.axis, np.arange(len(data.points))))
    if made is None or made.joined:
        return [data.pooled()]
    return [data.pooled() if c is None else data.taken(c.axis, c.labels) for c in made.outputs]


def _through(node: gs.Node, data: Moments) -> Moments:
    if node.op == "PRelu":
        slopes = values_of(node.inputs[1])
        if slopes is None or slopes.size not in (1, len(data.points)):
            return replace(data, trust=GUESSED)
        slope = slopes.astype(np.float64).reshape(-1, 1)
        return _mapped(data, lambda x: np.where(x < 0, slope * x, x))
    return _mapped(data, lambda x: _FUNCTIONS[node.op](node, x))


def _mapped(data: Moments, function: Callable[[Values], Values]) -> Moments:
    """Distributions behind a function of one value."""
    grid = np.linspace(data.lo, data.hi, 129).T
    grid = np.concatenate([grid, np.clip(0.0, data.lo, data.hi)[:, None]], 1)
    ends = function(grid)
    return replace(data, points=function(data.points), lo=ends.min(1), hi=ends.max(1))


_FUNCTIONS: dict[str, Callable[[gs.Node, Values], Values]] = {
    **{op: EVALUATE[op] for op in ("Relu", "Clip", "HardSigmoid", "Sigmoid", "Tanh", "Neg")},
    "LeakyRelu": lambda node, x: np.where(x < 0, node.attrs.get("alpha", 0.01) * x, x),
    "PRelu": EVALUATE["Relu"],
    "Abs": lambda _, x: np.abs(x),
    "Elu": lambda node, x: np.where(
        x < 0, node.attrs.get("alpha", 1.0) * np.expm1(np.minimum(x, 0)), x
    ),
    "HardSwish": lambda _, x: x * np.clip(x / 6 + 0.5, 0, 1),
    "Softplus": EVALUATE["Softplus"],
    "Exp": EVALUATE["Exp"],
}
