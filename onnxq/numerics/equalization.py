"""Cross-layer equalization: factors for channels between linear layers, weights only.

M. Nagel, M. van Baalen, T. Blankevoort, M. Welling, "Data-Free Quantization Through Weight
Equalization and Bias Correction", ICCV 2019, section 4.1. Channel l is made by rows of weights and
read by columns of others. With a_l the greatest weight that makes it, and b_l the greatest that
reads it,

    W'[o, i] = W[o, i] s[i] / s[o],    s_l = sqrt(a_l / b_l)    =>    a'_l = b'_l = sqrt(a_l b_l)

Here a channel may have several writers and readers (residual sums, joins): a_l and b_l are maxima
over them; readers are taken relative to their own greatest weight. One group of channels after the
other, over and over until no factor moves: chains of depthwise layers too.

Whether it helps is predicted with the noise of rounding, of variance step^2 / 12, to 8 bits. For
the noise n_o in the outputs y_o of a layer, from rounded inputs and weights,

    n_o = dx^2 / 12 sum_i |W_oi|^2 + dw_o^2 / 12 K sum_i E[x_i^2]
    noise = sum_o n_o v_o / sum_o E[y_o^2] v_o,    v_o = sum of squared weights that read o

which factors alone do not change, but the steps that they lead to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Labels = NDArray[np.int64]

SWEEPS = 100
CLOSE = 1e-3  # of log2 of a factor, where it moves no more
DEAD = 2.0**-20  # of the greatest in a group: a weight below tells nothing of its channel
LARGEST = 16.0  # log2 of a factor
WEIGHT_LEVELS, LEVELS = 127.0, 255.0
TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Linear:
    """A layer: labels of inputs [groups, i] and outputs [groups, o], 0 where they must stay.

    peaks, powers: greatest magnitude and sum of squares over kernel positions, [groups, o, i].
    positions: of the kernel. lo, hi, squares: ends and mean squares of inputs, [groups, i];
    made: mean squares of outputs, [groups, o].
    """

    inputs: Labels
    outputs: Labels
    peaks: Values
    powers: Values
    positions: int
    lo: Values
    hi: Values
    squares: Values
    made: Values


@dataclass(frozen=True, slots=True)
class Group:
    """Labels that stand side by side in some layer; indices of the layers that make and read them.

    All labels of a layer's outputs that may change are in one group, and all of its inputs.
    """

    labels: Labels
    writers: Sequence[int]
    readers: Sequence[int]

    @property
    def near(self) -> list[int]:
        """The layers on either side."""
        return sorted({*self.writers, *self.readers})


def groups_of(layers: Sequence[Linear], count: int) -> list[Group]:
    """All groups that have layers on both sides; label 0 is in none."""
    parent = list(range(count))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    sides = [[v[v > 0] for v in (layer.outputs, layer.inputs)] for layer in layers]
    for free in (side for both in sides for side in both):
        for label in free[1:]:
            parent[find(int(label))] = find(int(free[0]))
    members: dict[int, list[int]] = {}
    for label in range(1, count):
        members.setdefault(find(label), []).append(label)
    ends: tuple[dict[int, list[int]], ...] = ({}, {})
    for index, both in enumerate(sides):
        for users, free in zip(ends, both, strict=True):
            if free.size:
                users.setdefault(find(int(free[0])), []).append(index)
    writers, readers = ends
    return [
        Group(np.array(labels, np.int64), writers[root], readers[root])
        for root, labels in members.items()
        if root in writers and root in readers
    ]


def equalized(layers: Sequence[Linear], groups: Sequence[Group], count: int) -> Values:
    """log2 of the factor of each label."""
    s = np.zeros(count)
    for _ in range(SWEEPS):
        moved = 0.0
        for group in groups:
            made, read = np.zeros(count), np.zeros(count)
            for layer in (layers[i] for i in group.writers):
                np.maximum.at(made, layer.outputs, _scaled(layer, s).max(2))
            for layer in (layers[i] for i in group.readers):
                peaks = _scaled(layer, s).max(1)
                np.maximum.at(read, layer.inputs, peaks / (peaks.max() or 1.0))
            a, b = made[group.labels], read[group.labels]
            alive = (a > DEAD * a.max(initial=0)) & (b > DEAD * b.max(initial=0))
            if not alive.any():
                continue
            step = np.zeros(len(a))
            step[alive] = np.log2(a[alive] / b[alive]) / 2
            step[alive] -= np.median(step[alive])
            before = s[group.labels]
            s[group.labels] = np.clip(before + step, -LARGEST, LARGEST)
            moved = max(moved, float(np.abs(s[group.labels] - before).max()))
        if moved < CLOSE:
            break
    return s


def noise(layers: Sequence[Linear], s: Values, worth: Values) -> tuple[Values, Values]:
    """The noise of each layer, of its output's power: weights rounded by channel, and whole.

    worth: as `read_by` gives it for all layers.
    """
    pairs = [_noise_of(layer, s, worth) for layer in layers]
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])


def read_by(layers: Sequence[Linear], count: int) -> Values:
    """For each label the squares of all weights that read it, without factors; of 0 none."""
    worth = np.zeros(count)
    for layer in layers:
        np.add.at(worth, layer.inputs, layer.powers.sum(1))
    worth[0] = 0.0
    return worth


def kept(
    layers: Sequence[Linear],
    groups: Sequence[Group],
    s: Values,
    least_db: Sequence[float],
    whole: float,
) -> Values:
    """The factors without those of groups that do not lower the noise around them by least_db.

    least_db: of each group. whole: the share that weights rounded by tensor have in that, the rest
    is of those by channel. The worst goes first, since the others may be better off then.
    """
    s, worth = s.copy(), read_by(layers, len(s))
    gains: dict[int, float] = {}
    changed = set(range(len(layers)))
    while True:
        for index, group in enumerate(groups):
            if s[group.labels].any() and changed.intersection(group.near):
                channel, tensor = gains_db(layers, group, s, worth)
                gains[index] = (1 - whole) * channel + whole * tensor - least_db[index]
        worst = min(gains, key=lambda index: gains[index], default=None)
        if worst is None or gains[worst] >= 0:
            return s
        s[groups[worst].labels] = 0.0
        changed = set(groups[worst].near)
        del gains[worst]


def gains_db(
    layers: Sequence[Linear], group: Group, s: Values, worth: Values
) -> tuple[float, float]:
    """By how much a group's factors lower the noise of the layers on either side, on average.

    With weights rounded by channel, and whole; worth: as `read_by` gives it.
    """
    without, near = s.copy(), [layers[i] for i in group.near]
    without[group.labels] = 0.0
    before, after = (np.stack(noise(near, f, worth)) for f in (without, s))
    channel, whole = 10 * np.log10((before + TINY) / (after + TINY)).mean(1)
    return float(channel), float(whole)


def _scaled(layer: Linear, s: Values) -> Values:
    """Peaks with their factors."""
    into, out = np.exp2(s[layer.inputs]), np.exp2(-s[layer.outputs])
    return np.asarray(layer.peaks * into[:, None, :] * out[:, :, None])


def _noise_of(layer: Linear, s: Values, worth: Values) -> tuple[float, float]:
    into, out = np.exp2(s[layer.inputs]), np.exp2(s[layer.outputs])
    lo, hi = min(float((layer.lo / into).min()), 0.0), max(float((layer.hi / into).max()), 0.0)
    step = ((hi - lo) / LEVELS) ** 2 / 12
    powers = np.einsum("goi,gi->go", layer.powers, into**2) / out**2
    peaks = _scaled(layer, s).max(2)
    squares = (layer.squares / into**2).sum(1)[:, None] * layer.positions
    value = worth[layer.outputs] * out**2
    if not (value * layer.made).any():
        value = out**2  # no layer reads it: as it was without factors
    signal = float((layer.made / out**2 * value).sum()) or 1.0
    rows, whole = (np.square(p / WEIGHT_LEVELS) / 12 for p in (peaks, peaks.max()))
    found = [float(((step * powers + w * squares) * value).sum()) / signal for w in (rows, whole)]
    return found[0], found[1]
