"""Excerpts of activations: some rows or windows of some samples, for errors of candidates.

What a layer's output would be with other numbers cannot be told from statistics of its input alone:
rounding depends on the values. An excerpt is small and of bounded size, however many samples there
are: `VALUES` floats of a tensor. Where a sample's tensors are large they are fetched in several
runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq import runtime
from onnxq.calibration import check_feed
from onnxq.data import Samples
from onnxq.model import Model
from onnxq.numerics.sequences import weyl

VALUES = 1 << 17  # of one tensor's excerpt, about
ROWS = 192  # of one tensor's excerpt
WINDOW = 12  # length of a window along each axis of space
ROUND = 1 << 26  # values that are fetched at a time, unless one tensor has more
UNKNOWN = ROUND >> 3  # values that a tensor is thought to have before the first run

Array = NDArray[np.float32]
Feed = Mapping[str, NDArray[Any]]
Place = tuple[str, int]  # a tensor, and its axis of channels


@dataclass(frozen=True, slots=True, eq=False)
class Excerpt:
    """Rows [n, channels] or windows [n, channels, ...], those of one shape as one array.

    lo, hi: least and greatest value of each channel in all of the tensor, in the samples that ran.
    """

    parts: Sequence[Array]
    lo: Array
    hi: Array

    def divided(self, factor: NDArray[np.float64]) -> list[Array]:
        """The parts, divided by [channels]."""
        s = factor.astype(np.float32)
        return [x / s.reshape(-1, *[1] * (x.ndim - 2)) for x in self.parts]


@dataclass(slots=True)
class _Tally:
    """An excerpt under construction; values that are not finite spoil it."""

    axis: int
    parts: dict[tuple[int, ...], list[Array]] = field(default_factory=dict)
    lo: Any = np.inf
    hi: Any = -np.inf

    def see(self, whole: NDArray[Any], index: int, count: int) -> None:
        if not whole.size:
            return
        others = tuple(a for a in range(whole.ndim) if a != self.axis % whole.ndim)
        self.lo = np.minimum(self.lo, whole.min(others))
        self.hi = np.maximum(self.hi, whole.max(others))
        part = _part(whole, self.axis, index, count)
        self.parts.setdefault(part.shape[1:], []).append(part)

    def excerpt(self) -> Excerpt | None:
        if not self.parts or not np.isfinite([self.lo, self.hi]).all():
            return None
        parts = [np.concatenate(group) for group in self.parts.values()]
        return Excerpt(parts, np.asarray(self.lo, np.float32), np.asarray(self.hi, np.float32))


def excerpts(
    model: Model, places: Sequence[Place], *divisions: tuple[Samples, int]
) -> list[dict[Place, Excerpt]]:
    """Excerpts of tensors, for each division: samples, and how many of them to run.

    Of tensors whose channels are last: rows; of others windows with all channels. Tensors with
    values that are not finite, or without any, have none.

    Raises DataError for samples that do not fit.
    """
    proto = model.to_proto()
    inputs = {i.name for i in proto.graph.input}
    tensors = dict.fromkeys(name for name, _ in places)
    made = [n for n in tensors if n not in inputs]
    del proto.graph.output[:]
    names = made or [proto.graph.node[0].output[0]]  # a graph must have an output
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    session = runtime.session(proto)
    del proto
    wanted = [i.name for i in session.get_inputs()]
    sizes, found = dict[str, int](), list[dict[Place, Excerpt]]()
    for samples, limit in divisions:
        tallies = {place: _Tally(place[1]) for place in places}
        step = -(-len(samples) // limit)
        count = -(-len(samples) // step)
        for index, feed in enumerate(islice(samples, 0, None, step)):
            check_feed(feed, index * step, wanted)
            given = {n: np.asarray(feed[n]) for n in wanted}
            known = [(n, given[n]) for n in tensors if n in inputs]
            for name, whole in chain(known, _fetched(session, made, given, sizes, index * step)):
                for place in places:
                    if place[0] == name:
                        tallies[place].see(whole, index, count)
        made_of = {place: tally.excerpt() for place, tally in tallies.items()}
        found.append({place: one for place, one in made_of.items() if one is not None})
    return found


def _fetched(
    session: Any, names: Sequence[str], feed: Feed, sizes: dict[str, int], index: int
) -> Iterator[tuple[str, NDArray[Any]]]:
    """A sample's tensors, in as many runs as it takes; sizes: learnt on the way."""
    for group in _groups(names, sizes):
        with runtime.blames_sample(index):
            values = session.run(group, feed)
        for name, whole in zip(group, values, strict=True):
            sizes[name] = max(sizes.get(name, 0), whole.size)
            yield name, whole


def _groups(names: Sequence[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The tensors, so many at a time that they are not too many values."""
    group, total = list[str](), 0
    for name in names:
        size = sizes.get(name, UNKNOWN)
        if group and total + size > ROUND:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


def _part(whole: NDArray[Any], axis: int, index: int, count: int) -> Array:
    """One sample's share of the excerpt, at another place for each sample (a Weyl sequence)."""
    offset = weyl(index)
    if axis % whole.ndim == whole.ndim - 1:
        rows = whole.reshape(-1, whole.shape[-1])
        wanted = max(1, min(ROWS, VALUES // max(rows.shape[1], 1)) // count)
        step = max(1, len(rows) // wanted)
        return np.ascontiguousarray(rows[offset % step :: step][:wanted], np.float32)
    cut: list[slice] = [slice(0, 1), slice(None)]
    side = WINDOW
    while side > 4 and count * whole.shape[1] * side ** (whole.ndim - 2) > VALUES:
        side -= 4
    for length in whole.shape[2:]:
        start = offset % max(1, length - side + 1)
        cut.append(slice(start, start + side))
        offset //= 7
    return np.ascontiguousarray(whole[tuple(cut)], np.float32)
