"""Excerpts of activations: some rows or windows of some samples, for errors of candidates.

What a layer's output would be with other numbers cannot be told from statistics of its input alone:
rounding depends on the values. An excerpt is small and of bounded size, however many samples there
are: `VALUES` floats of a tensor. Tensors whose samples are large are fetched in several rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq import runtime
from onnxq.calibration import check_feed
from onnxq.data import Samples
from onnxq.errors import DataError
from onnxq.model import Model

VALUES = 1 << 17  # of one tensor's excerpt, about
ROWS = 256  # of one tensor's excerpt
WINDOW = 24  # length of a window along each axis of space
ROUND = 1 << 26  # values that one round fetches of a sample, unless one tensor has more
RUNS = 8  # samples that are run

Excerpt = list[NDArray[np.float32]]


def excerpts(model: Model, axes: Mapping[str, int], samples: Samples) -> dict[str, Excerpt]:
    """Parts of tensors, from samples spread over all of them; tensor name -> channel axis.

    Of tensors whose channels are last: rows [n, channels]; of others windows [1, channels, ...]
    with all channels, those of one shape together. One with values that are not finite has none.

    Raises DataError for samples that do not fit.
    """
    found: dict[str, Excerpt] = {name: [] for name in axes}
    step = -(-len(samples) // RUNS)
    count = -(-len(samples) // step)
    for names in _rounds(model, list(axes), samples):
        proto = model.to_proto()
        inputs = [i.name for i in proto.graph.input]
        del proto.graph.output[:]
        kept = [n for n in names if n not in inputs]
        proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in kept or _any(proto))
        session = runtime.session(proto)
        wanted = [i.name for i in session.get_inputs()]
        del proto
        for index, feed in enumerate(islice(samples, 0, None, step)):
            check_feed(feed, index * step, wanted)
            try:
                made = session.run(kept, {n: np.asarray(feed[n]) for n in wanted}) if kept else []
            except Exception as e:  # onnxruntime's exceptions have no base class of their own
                raise DataError(
                    f"sample {index * step} does not run: {str(e).splitlines()[0]}"
                ) from e
            values = dict(zip(kept, made, strict=True))
            for name in names:
                whole = np.asarray(values[name] if name in values else feed[name])
                found[name].append(_part(whole, axes[name], index, count))
    return {
        name: _joined(parts) if all(np.isfinite(p).all() for p in parts) else []
        for name, parts in found.items()
    }


def _any(proto: onnx.ModelProto) -> Sequence[str]:
    return [proto.graph.node[0].output[0]]


def _rounds(model: Model, names: Sequence[str], samples: Samples) -> Iterator[list[str]]:
    """The tensors, so many at a time that a sample's are not too many values."""
    first = next(iter(samples))
    shapes = model.shapes_for({name: np.shape(values) for name, values in first.items()})
    found, size = list[str](), 0
    for name in names:
        own = prod(shapes.get(name, (ROUND // 8,)))
        if found and size + own > ROUND:
            yield found
            found, size = [], 0
        found.append(name)
        size += own
    if found:
        yield found


def _part(whole: NDArray[Any], axis: int, index: int, count: int) -> NDArray[np.float32]:
    """One sample's share of the excerpt, at another place for each sample (a Weyl sequence)."""
    offset = index * 2654435769 % (1 << 31)  # 2^32 / golden ratio (Knuth 6.4)
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


def _joined(parts: Sequence[NDArray[np.float32]]) -> Excerpt:
    """Those of one shape, but for the first axis, as one array."""
    by_shape: dict[tuple[int, ...], list[NDArray[np.float32]]] = {}
    for part in parts:
        if part.size:
            by_shape.setdefault(part.shape[1:], []).append(part)
    return [np.concatenate(group) for group in by_shape.values()]
