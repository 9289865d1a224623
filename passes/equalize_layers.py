"""Equalize the ranges of channels between linear layers (cross-layer equalization), without data.

    y = Conv(Relu(Conv(x, V, b)), W, c)    =>    y = Conv(Relu(Conv(x, V / s, b / s)), W s, c)

with a factor s > 0 for each channel: the same function, in floats. The factors are those of
`onnxq.numerics.equalization`; which channels have one together is found in `channels`: over chains
of any length, through Relu, LeakyRelu, PRelu, pooling, data movement, sums and joins. Not through
Clip with other bounds than 0 (Relu6): those would have to move with the channel, as a Min in floats
between layers that are one integer kernel otherwise; the paper takes the bound away.

Factors of a group of channels are kept where the predicted noise of rounding to 8 bits falls, from
the ranges of inputs and of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxq.core import Note
from onnxq.model import Model, values_of
from onnxq.numerics.equalization import (
    Group,
    Linear,
    equalized,
    gains_db,
    groups_of,
    kept,
    read_by,
)
from onnxq.passes.channels import (
    Layer,
    Network,
    bias_row,
    channel_axis,
    from_matrices,
    matrices,
    network,
)
from onnxq.passes.formats import Granularity
from onnxq.passes.linear import constant, rewrite
from onnxq.passes.moments import GUESSED, Moments, moments, of

NAME = "equalize_layers"
WHOLE = {"auto": 0.5, "tensor": 1.0, "channel": 0.0, "group": 0.0}
ROUNDS = 5
EQUAL = 0.02  # log2 of factors that are none
GAIN_DB, GUESSED_GAIN_DB = 3.0, 6.0
"""Least predicted gain: half a bit; more where inputs are guessed, not from BatchNormalizations.

What is less was as often a loss, on nine nets; of superres_espcn 5.6 dB were 8 dB lost.
"""


@dataclass(frozen=True, slots=True)
class EqualizeLayers:
    """Scale channels between layers.

    granularity: of the weights' scales, for which the noise is predicted; auto: channel and tensor,
    half each. always: also where the prediction is against it.
    """

    granularity: Granularity = "auto"
    always: bool = False

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Edit weights and biases in place; a note for each group of channels."""
        model.infer_shapes()
        done: list[Note] = []
        for _ in range(ROUNDS):  # what was left may pay when its neighbours are done
            notes = self._round(model)
            done += [note for note in notes if note.changed]
            if not any(note.changed for note in notes):
                break
        return [*done, *(note for note in notes if not note.changed)]

    def _round(self, model: Model) -> Sequence[Note]:
        net = network(model, NAME)
        layers = [v for v in net.layers if v.inputs.any() or v.outputs.any()]
        if not layers:
            return net.declined
        found = moments(model)
        linear = [_linear(layer, found) for layer in layers]
        groups = groups_of(linear, net.count)
        s = equalized(linear, groups, net.count)
        for group in groups:
            if np.abs(s[group.labels]).max() < EQUAL:
                s[group.labels] = 0.0
        least = [_least(layers, group, found) for group in groups]
        chosen = s if self.always else kept(linear, groups, s, least, WHOLE[self.granularity])
        notes: list[Note] = []
        for group in groups:
            if s[group.labels].any():
                is_done = bool(chosen[group.labels].any())
                text = _told(linear, group, chosen if is_done else s)
                text += "" if is_done else ": left as it is"
                first = layers[group.near[0]].node
                notes.append(Note(NAME, first.name, text, changed=is_done))
        if chosen.any():
            _apply(model, net, layers, np.exp2(chosen))
        return [*notes, *net.declined]


def _linear(layer: Layer, found: dict[int, Moments]) -> Linear:
    node = layer.node
    weight = matrices(node, constant(node, 1))
    groups, outputs, inputs, positions = weight.shape
    data, made = (
        of(t, found).spread(channel_axis(node, t), groups * count)
        for t, count in ((node.inputs[0], inputs), (node.outputs[0], outputs))
    )
    split = (groups, inputs)
    return Linear(
        layer.inputs,
        layer.outputs,
        np.abs(weight).max(3),
        np.square(weight, dtype=np.float64).sum(3),
        positions,
        data.lo.reshape(split),
        data.hi.reshape(split),
        (data.variance + data.mean**2).reshape(split),
        (made.variance + made.mean**2).reshape(groups, outputs),
    )


def _least(layers: Sequence[Layer], group: Group, found: dict[int, Moments]) -> float:
    """The gain that a group has to bring, in dB."""
    trusts = [of(layers[i].node.inputs[0], found).trust for i in group.readers]
    return GUESSED_GAIN_DB if min(trusts) == GUESSED else GAIN_DB


def _told(linear: Sequence[Linear], group: Group, s: NDArray[np.float64]) -> str:
    """How far factors go, and what they are predicted to bring."""
    channel, whole = gains_db(linear, group, s, read_by(linear, len(s)))
    spread = float(np.ptp(s[group.labels]))
    return (
        f"{len(group.labels)} channels between {len(group.near)} layers, factors within "
        f"2^{spread:.1f}: predicted {channel:+.1f} dB by channel, {whole:+.1f} dB by tensor"
    )


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
