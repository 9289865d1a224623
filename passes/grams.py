"""The products of what layers multiply their weights with, and when to observe which of them.

A `Gram` has K x K values for a row of K weights, so not all layers are observed at once. Rounds
hold as many as memory allows, in graph order: layers of later rounds see what the rewritten layers
of earlier ones give them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.calibration import calibrate
from onnxq.core import Skip
from onnxq.data import Samples
from onnxq.model import Model
from onnxq.numerics.patches import Lay, Patches, Vectors
from onnxq.passes.layouts import Held
from onnxq.passes.ops import is_constant
from onnxq.passes.work import RECURRENT
from onnxq.sampling import divided
from onnxq.statistics import Gram, Products

VECTORS, LEAST = 8, 16384  # vectors that are looked at: for each value of a row, and at least
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Seen:
    """Products [blocks, K, K] of the samples that weights are fitted to, and of those that judge.

    Both are the same where there are too few samples to keep some back.
    """

    fitted: NDArray[np.float64]
    judging: NDArray[np.float64]
    vectors: int

    @property
    def trusted(self) -> NDArray[np.float64]:
        """What weights are fitted to: of few vectors, products of different values are lowered.

        They are chance in part, by which integers would only seem to get better. Of n vectors of K
        values, K / (2 (K + n)) of them are taken off (measured on MiniLM, 550 words: 1 dB).
        """
        size = self.fitted.shape[1]
        kept = 1 - size / (2 * (size + self.vectors))
        lowered: NDArray[np.float64] = self.fitted * kept
        at = np.arange(size)
        lowered[:, at, at] = self.fitted[:, at, at]
        return lowered

    @classmethod
    def of(cls, layers: Sequence[Layer], seen: Mapping[tuple[int, int], Seen]) -> Seen:
        """Of all layers that share a weight; raises Skip where one has none."""
        keys = [(id(layer.node), layer.held.index) for layer in layers]
        if not all(key in seen for key in keys):
            raise Skip("its inputs are zeros, or have NaN or infinite values")
        first = seen[keys[0]]
        for key in keys[1:]:
            more = seen[key]
            first = cls(
                first.fitted + more.fitted,
                first.judging + more.judging,
                first.vectors + more.vectors,
            )
        return first


@dataclass(frozen=True, slots=True)
class Layer:
    """A node's weight, and the vectors that it is multiplied with: of a tensor."""

    node: gs.Node
    held: Held
    tensor: gs.Tensor
    lay: Lay

    @classmethod
    def of(cls, model: Model, node: gs.Node, held: Held) -> Layer:
        """Raises Skip where what a weight meets cannot be observed."""
        if held.meets is None:
            raise Skip("a table: nothing is multiplied with it")
        tensor = held.meets[0]
        if model.home(tensor) is not model.graph:
            raise Skip("its input is in a body, where products are not observed")
        if is_constant(tensor) or tensor.dtype not in (np.float32, np.float16, np.float64):
            raise Skip("its input is not a float activation")
        return cls(node, held, tensor, _lay(node, held))

    @property
    def size_bytes(self) -> int:
        """What its products take."""
        return 8 * self.held.length**2 * self.blocks

    @property
    def blocks(self) -> int:
        """How many parts its rows have, each multiplied with vectors of its own."""
        if isinstance(self.lay, Patches):
            return 1 if self.lay.transposed else self.lay.groups
        return 1 if self.lay.blocks is None else self.held.shape[0]


def _lay(node: gs.Node, held: Held) -> Lay:
    assert held.meets is not None
    if node.op in ("Conv", "ConvTranspose"):
        return _patches(node, held.shape)
    axis = held.meets[1]
    if node.op == "MatMul" and len(held.shape) != 2:
        shape = tuple(held.meets[0].shape or ())
        if len(held.shape) > 3 or len(shape) < 3 or shape[-3] != held.shape[0]:
            raise Skip(f"a stack of {held.shape[0]} matrices, not each with inputs of its own")
        return Vectors(axis, blocks=len(shape) - 3)
    if node.op in RECURRENT and held.index == 2:
        return Vectors(axis, blocks=2 if node.attrs.get("layout", 0) else 1)
    return Vectors(axis)


def _patches(node: gs.Node, shape: tuple[int, ...]) -> Patches:
    rank = len(shape) - 2
    auto = node.attrs.get("auto_pad", "NOTSET")
    pads = tuple(node.attrs.get("pads", (0,) * 2 * rank))
    return Patches(
        shape[2:],
        tuple(node.attrs.get("strides", (1,) * rank)),
        tuple(node.attrs.get("dilations", (1,) * rank)),
        auto if auto.startswith("SAME") else (0,) * 2 * rank if auto == "VALID" else pads,
        int(node.attrs.get("group", 1)),
        transposed=node.op == "ConvTranspose",
    )


def depths(model: Model, layers: Sequence[gs.Node]) -> dict[int, int]:
    """How many of the layers come before each, on the longest way; by node id.

    Those in bodies: before what they read of the main graph.
    """
    ids = {id(node) for node in layers}
    behind: dict[int, int] = {}
    found = {}
    for node in model.graph.nodes:
        depth = max((behind.get(id(t), 0) for t in node.inputs), default=0)
        if id(node) in ids:
            found[id(node)] = depth
            depth += 1
        behind.update((id(t), depth) for t in node.outputs)
    for node in layers:
        if id(node) not in found:
            found[id(node)] = max((behind.get(id(t), 0) for t in node.inputs), default=0)
    return found


def in_rounds(items: Sequence[tuple[int, int, T]], rounds: int, memory: int) -> Iterator[list[T]]:
    """Divide items (depth, bytes, anything) among about `rounds` rounds of ascending depth.

    Each has at most `memory` bytes, or a single item: there may be more rounds for that.
    """
    ordered = sorted(items, key=lambda item: item[0])  # stable: graph order
    levels = [list(level) for _, level in groupby(ordered, key=lambda item: item[0])]
    count = min(rounds, len(levels))
    for i in range(count):
        part = levels[i * len(levels) // count : (i + 1) * len(levels) // count]
        batch: list[T] = []
        size = 0
        for _, own, item in (item for level in part for item in level):
            if batch and size + own > memory:
                yield batch
                batch, size = [], 0
            batch.append(item)
            size += own
        yield batch


def observed_products(
    model: Model,
    layers: Sequence[Layer],
    samples: Samples,
    progress: Callable[[int], None] | None = None,
) -> Mapping[tuple[int, int], Seen]:
    """Run the model over samples; products by (node id, input index).

    The last quarter of the samples is for judging. What has NaN, infinities or nothing but zeros in
    it is left out.
    """
    first = len(divided(samples)[0])
    judge = first if first < len(samples) else 0
    wanted: dict[str, Products] = {}
    names = []
    for layer in layers:
        limit = -(-max(LEAST, VECTORS * layer.held.length) // first)
        own = [
            Products(layer.tensor.name, layer.lay, limit, start, stop)
            for start, stop in ((0, first if judge else None), (judge, None))
        ]
        keys = [f"{layer.tensor.name} {wish}" for wish in own]
        wanted.update(zip(keys, own, strict=True))
        names.append(keys)
    seen = calibrate(model, wanted, samples, progress=progress) if wanted else {}
    found = {}
    for layer, keys in zip(layers, names, strict=True):
        grams = [seen[key] for key in keys]
        assert all(isinstance(gram, Gram) for gram in grams)
        whole = [gram.whole(layer.lay) for gram in grams if isinstance(gram, Gram)]
        vectors = grams[0].vectors  # type: ignore[attr-defined]
        is_finite = not any(gram.has_nonfinite for gram in grams)  # type: ignore[attr-defined]
        if is_finite and all(sums.any() for sums in whole):
            found[id(layer.node), layer.held.index] = Seen(whole[0], whole[1], vectors)
    return found


def db(signal: float, noise: float) -> str:
    """How far a squared error is below what it is an error of, for notes."""
    return f"{10 * np.log10(signal / noise):.1f} dB" if noise and signal else "no error"
