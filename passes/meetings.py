"""What layers are multiplied with in two models, place by place: as it should be, and as it is.

Unlike a Gram, the vectors themselves: what stands behind a layer (a Relu) decides place by place
which of its errors matter. Some places of each sample, the same in both models, so that their
number has a bound however many samples there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq import runtime
from onnxq.calibration import check_feed
from onnxq.data import Samples
from onnxq.model import Model
from onnxq.numerics.patches import Patches
from onnxq.numerics.sequences import weyl
from onnxq.passes.grams import Layer
from onnxq.sampling import divided

Values = NDArray[np.float32]
LARGEST = 1e15  # 10^8 squares of less add up in float32
EACH, LEAST = 32, 1024  # places: for each value of a row, and at least


@dataclass(frozen=True, slots=True, eq=False)
class Met:
    """Vectors [blocks, values, places] of two models; the first `fitted` places are for fitting.

    The others judge; all of them do where there are too few samples to keep some back.
    """

    exact: Values
    rounded: Values
    fitted: int

    @property
    def is_finite(self) -> bool:
        """Whether there are no NaN or infinities, and none in sums of squares."""
        ends = (np.abs(v).max(initial=0) for v in (self.exact, self.rounded))
        return bool(all(end < LARGEST for end in ends))

    def part(self, *, judging: bool) -> tuple[Values, Values]:
        """The places for fitting, or those that judge: exact and rounded."""
        whole = self.exact.shape[2]
        at = slice(None, self.fitted)
        if judging:
            at = slice(self.fitted if self.fitted < whole else 0, None)
        return tuple(np.ascontiguousarray(v[:, :, at]) for v in (self.exact, self.rounded))  # type: ignore[return-value]


def meetings(
    models: tuple[Model, Model],
    layers: Sequence[tuple[Layer, Layer]],
    samples: Samples,
    places: int,
    progress: Callable[[int], None] | None = None,
) -> list[Met]:
    """Run two models, of which each has one of a pair of layers, over samples.

    places: for fitting, at most, about; a third more for judging. Raises DataError for samples that
    do not fit.
    """
    first = len(divided(samples)[0])
    limits = [-(-min(places, wanted_places(layer)) // first) for layer, _ in layers]
    found = []
    for which, model in enumerate(models):
        mine = [pair[which] for pair in layers]
        shown = progress if which else None
        found.append(_vectors(model, mine, samples, limits, shown))
    together = []
    for exact, rounded in zip(*found, strict=True):
        fitted = sum(part.shape[2] for part in rounded[:first])
        together.append(Met(np.concatenate(exact, 2), np.concatenate(rounded, 2), fitted))
    return together


def wanted_places(layer: Layer) -> int:
    """How many places tell enough of a layer."""
    blocks = layer.lay.groups if isinstance(layer.lay, Patches) and layer.lay.transposed else 1
    return max(LEAST, EACH * (layer.held.length // blocks))


def _vectors(
    model: Model,
    layers: Sequence[Layer],
    samples: Samples,
    limits: Sequence[int],
    progress: Callable[[int], None] | None,
) -> list[list[Values]]:
    """Of each layer, the vectors of each sample; limits: of their numbers."""
    names = {layer.tensor.name for layer in layers}
    session, fetched = _showing(model, names)
    wanted = [i.name for i in session.get_inputs()]
    found: list[list[Values]] = [[] for _ in layers]
    for index, feed in enumerate(samples):
        check_feed(feed, index, wanted)
        with runtime.blames_sample(index):
            made = session.run(fetched, {n: np.asarray(feed[n]) for n in wanted}) if fetched else []
        values: Mapping[str, Any] = {**feed, **dict(zip(fetched, made, strict=True))}
        offset = weyl(index)
        for layer, limit, parts in zip(layers, limits, found, strict=True):
            taken, _ = layer.lay.of(np.asarray(values[layer.tensor.name]), limit, offset)
            parts.append(np.ascontiguousarray(taken.swapaxes(1, 2)))
        if progress is not None:
            progress(index + 1)
    return found


def _showing(model: Model, names: set[str]) -> tuple[Any, list[str]]:
    """A session of what the tensors are computed from; and which of them are fetched."""
    part = model.copy()
    inputs = {t.name for t in part.graph.inputs}
    made = {t.name: t for node in part.graph.nodes for t in node.outputs}
    fetched = sorted(names - inputs)
    first = part.graph.nodes[0].outputs[0].name  # a graph must have an output
    part.graph.outputs = [made[name] for name in fetched or [first]]
    part.sweep()
    used = {id(t) for node in part.nodes() for t in node.inputs}
    part.graph.inputs = [t for t in part.graph.inputs if id(t) in used]
    return runtime.session(part.to_proto()), fetched


def blocks_of(layer: Layer, rows: NDArray[Any]) -> NDArray[Any]:
    """A weight's rows [channels, values] as the vectors meet them: [blocks, rows, values]."""
    if isinstance(layer.lay, Patches):
        groups = layer.lay.groups
        if layer.lay.transposed:  # groups share rows: each has some of their values
            return rows.reshape(len(rows), groups, -1).swapaxes(0, 1)
        return rows.reshape(groups, -1, rows.shape[1])
    return rows[None]


def rows_of(layer: Layer, blocks: NDArray[Any]) -> NDArray[Any]:
    """What `blocks_of` has made of rows, as rows."""
    if isinstance(layer.lay, Patches) and layer.lay.transposed:
        return blocks.swapaxes(0, 1).reshape(blocks.shape[1], -1)
    return blocks.reshape(-1, blocks.shape[2])
