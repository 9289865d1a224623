"""Equalize the ranges of channels between linear layers (cross-layer equalization); no data needed.

    y = Conv(Relu(Conv(x, W1, b1)), W2, b2)    =>    y = Conv(Relu(Conv(x, W1 / s, b1 / s)), W2 s, b2)

with a factor s > 0 for each channel: the same function, in floats. See `onnxq.numerics.equalization`
for the factors, and `channels` for which channels have one together: chains of any length through
Relu, LeakyRelu, PRelu, pooling, data movement, sums and joins. Not through Clip with other bounds
than 0: those would have to move with the channel.

Factors of a group are kept where the predicted noise of rounding to 8 bits falls: from input ranges
and weights, these rounded by channel and whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxq.core import Note
from onnxq.model import Model, values_of
from onnxq.numerics.equalization import Linear, equalized, groups_of, kept, noise
from onnxq.passes.channels import Layer, Network, bias_row, from_matrices, matrices, network
from onnxq.passes.linear import constant, rewrite
from onnxq.passes.moments import Moments, moments, of

NAME = "equalize_layers"
GAIN_DB = 0.1
"""Least predicted gain of a group: below, weights are not worth another rounding."""


@dataclass(frozen=True, slots=True)
class EqualizeLayers:
    """Scale channels between layers; `always`: where the prediction is against it, too."""

    always: bool = False

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Edit weights and biases in place; a note for each group of channels."""
        model.infer_shapes()
        net = network(model, NAME)
        layers = [v for v in net.layers if v.inputs.any() or v.outputs.any()]
        if not layers:
            return net.declined
        found = moments(model)
        linear = [_linear(layer, found) for layer in layers]
        groups = [g for g in groups_of(linear, net.count) if _has_both(linear, g)]
        s = equalized(linear, groups, net.count)
        notes: list[Note] = []
        chosen = s if self.always else kept(linear, groups, s)
        for group in groups:
            near = [i for i, v in enumerate(linear) if _is_near(v, group)]
            text, gain = _told(linear, near, group, chosen if chosen[group].any() else s)
            if not s[group].any():
                continue
            if chosen[group].any() and (gain >= GAIN_DB or self.always):
                notes.append(Note(NAME, layers[near[0]].node.name, text))
            else:
                chosen[group] = 0.0
                where = layers[near[0]].node.name
                notes.append(Note(NAME, where, f"{text}: left as it is", changed=False))
        if chosen.any():
            _apply(model, net, layers, np.exp2(chosen))
        return [*notes, *net.declined]


def _linear(layer: Layer, found: dict[int, Moments]) -> Linear:
    node = layer.node
    weight = matrices(node, constant(node, 1))
    groups, outputs, inputs, positions = weight.shape
    axis = 1 if node.op in ("Conv", "ConvTranspose") else len(node.inputs[0].shape or (0, 0)) - 1
    data = of(node.inputs[0], found).spread(axis, groups * inputs)
    axis = 1 if node.op in ("Conv", "ConvTranspose") else len(node.outputs[0].shape or (0, 0)) - 1
    made = of(node.outputs[0], found).spread(axis, groups * outputs)
    split = (groups, inputs)
    return Linear(
        layer.inputs,
        layer.outputs,
        np.abs(weight).max(3),
        np.square(weight).sum(3),
        positions,
        data.lo.reshape(split),
        data.hi.reshape(split),
        (data.variance + data.mean**2).reshape(split),
        (made.variance + made.mean**2).reshape(groups, outputs),
    )


def _has_both(linear: Sequence[Linear], group: NDArray[np.int64]) -> bool:
    """Whether the group has layers on either side."""
    return any(np.isin(v.outputs, group).any() for v in linear) and any(
        np.isin(v.inputs, group).any() for v in linear
    )


def _is_near(linear: Linear, group: NDArray[np.int64]) -> bool:
    return bool(np.isin(linear.outputs, group).any() or np.isin(linear.inputs, group).any())


def _told(
    linear: Sequence[Linear], near: Sequence[int], group: NDArray[np.int64], s: NDArray[np.float64]
) -> tuple[str, float]:
    """What is predicted of the layers on either side, in dB; and what is gained, on average."""
    without = s.copy()
    without[group] = 0.0
    before, after = (noise(linear, f, len(s)) for f in (without, s))
    decibels = [
        [-10 * np.log10(float(np.exp(np.log(v[list(near)] + 1e-30).mean()))) for v in pair]
        for pair in (before, after)
    ]
    gain = sum(b - a for a, b in zip(*decibels, strict=True)) / 2
    (channel, whole), (channel_after, whole_after) = decibels
    spread = float(s[group].max() - s[group].min())
    text = (
        f"{len(group)} channels between {len(near)} layers, factors within 2^{spread:.1f}: "
        f"predicted {channel:.1f} to {channel_after:.1f} dB by channel, "
        f"{whole:.1f} to {whole_after:.1f} dB by tensor"
    )
    return text, gain


def _apply(
    model: Model, net: Network, layers: Sequence[Layer], factors: NDArray[np.float64]
) -> None:
    """Write the factors into weights, biases, constants that are added, and what is known."""
    for layer in layers:
        node, into, out = layer.node, factors[layer.inputs], factors[layer.outputs]
        if (into == 1).all() and (out == 1).all():
            continue
        old = constant(node, 1)
        wide = matrices(node, old) * into[:, None, :, None] / out[:, :, None, None]
        bias = bias_row(node, out.size)
        if bias is not None:
            bias = bias / out.reshape(-1)
        rewrite(model, node, from_matrices(node, wide, old), bias)
    for shift in net.shifts:
        factor = factors[shift.labels]
        if (factor != 1).any():
            tensor = shift.node.inputs[shift.index]
            values = np.asarray(values_of(tensor))
            row = factor.reshape([-1, *[1] * (-shift.axis - 1)])
            made = (values.astype(np.float64) / row).astype(values.dtype)
            shift.node.inputs[shift.index] = model.constant(f"{tensor.name}_equalized", made)
    for tensor, channels in net.tensors.values():
        known = model.moments.get(tensor.name)
        if known is not None and len(known[0]) == channels.labels.size:
            factor = factors[channels.labels]
            model.moments[tensor.name] = known[0] / factor, known[1] / factor
