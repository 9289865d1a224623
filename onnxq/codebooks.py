"""Weights as indices into a codebook: value = codebook[index] * scale.

    nf4            the 16 values of 4-bit NormalFloat, scale = the greatest magnitude
    power-of-two   0 and +-2^-k
    logarithmic    0 and +-b^-k, the base chosen from the range
    exponential    0 and +-(e^(a t) - 1) / (e^a - 1), t in equal steps: linear for a = 0
    kmeans         whatever entries have the least squared error, one codebook a tensor
    vector         the same, of 2 to 8 neighbouring values at once

The numerics, with their sources, are in `onnxq.numerics.codebooks`, `kmeans` and `vectors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from onnxq.numerics.codebooks import NF4, exponential, geometric, logarithmic
from onnxq.numerics.learning import fit_kmeans, fit_shape
from onnxq.numerics.scaling import Rows, bounded, indices
from onnxq.numerics.sharing import Sharing
from onnxq.numerics.vectors import fit_vectors, vector_indices
from onnxq.schemes import Granularity, PerChannel, PerGroup, PerTensor

Kind = Literal["nf4", "kmeans", "power-of-two", "logarithmic", "exponential", "vector"]

SCALE_BITS = ENTRY_BITS = 32
BY_CHANNEL = PerChannel(0)


@dataclass(frozen=True, slots=True)
class CodebookScheme:
    """How a weight is put into a codebook.

    bits: of an index, 1 to 8; nf4 has 4. granularity: which values share a scale: of rows
    [channels, values], so PerChannel(0) and PerGroup(size, 1). dim: of vectors, how many
    neighbouring values of a row share an index.
    """

    kind: Kind = "kmeans"
    bits: int = 4
    granularity: Granularity = BY_CHANNEL
    dim: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"unknown codebook {self.kind!r}: one of {', '.join(get_args(Kind))}")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"an index has 1 to 8 bits, not {self.bits}")
        if self.kind == "nf4" and self.bits != 4:
            raise ValueError(f"nf4 has 4 bits, not {self.bits}: use kmeans for others")
        if self.kind == "vector" and not 2 <= self.dim <= 8:
            raise ValueError(f"a vector has 2 to 8 values, not {self.dim}: use kmeans for one")
        if self.kind != "vector" and self.dim != 1:
            raise ValueError(f"{self.kind} has an index for each value: use vector, or dim=1")
        grain = self.granularity
        if isinstance(grain, PerChannel) and grain.axis not in (0, None):
            raise ValueError("channels are axis 0 of the rows: use PerChannel(0)")
        if isinstance(grain, PerGroup):
            if grain.axis not in (1, -1, None):
                raise ValueError("groups are along axis 1 of the rows: use PerGroup(size, 1)")
            if grain.size % self.dim:
                raise ValueError(
                    f"vectors of {self.dim} do not fill groups of {grain.size}: use a multiple"
                )

    @property
    def entries(self) -> int:
        """How many entries the codebook has."""
        return 1 << self.bits

    def bits_per_weight(self, shape: tuple[int, int], *, index_bits: int | None = None) -> float:
        """Bits for each value of rows of this shape: indices, scales (float32) and codebook.

        index_bits: those that an index takes where it is stored; None: as many as it needs.
        """
        channels, values = shape
        indices = channels * -(-values // self.dim) * (index_bits or self.bits)
        scales = int(np.prod(self.sharing(shape).public_shape, dtype=np.int64)) * SCALE_BITS
        codebook = self.entries * self.dim * ENTRY_BITS
        return (indices + scales + codebook) / max(1, channels * values)

    def sharing(self, shape: tuple[int, int]) -> Sharing:
        """Which values of rows of this shape share a scale."""
        size = self.granularity.size if isinstance(self.granularity, PerGroup) else None
        return Sharing(*shape, size, whole=isinstance(self.granularity, PerTensor))


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """Rows as indices: rows = codebook[indices] * scale.

    indices: [channels, values]; of vectors [channels, ceil(values / dim)]. codebook: [entries],
    ascending; of vectors [entries, dim]. scale: (), [channels] or [channels, groups]; it may be
    negative, and is 0 where all values are and the codebook has no 0.
    """

    indices: NDArray[np.uint8]
    codebook: NDArray[np.float32]
    scale: NDArray[np.float32]
    group_size: int | None = None

    def values(self, length: int) -> NDArray[np.float32]:
        """The rows, [channels, length]: each value is one float32 product."""
        channels, count = self.indices.shape
        dim = self.codebook[0].size
        out = self.codebook.take(self.indices, axis=0).reshape(channels, count * dim)
        out = np.ascontiguousarray(out[:, :length])
        if self.group_size is None:
            out *= self.scale[:, None] if self.scale.ndim else self.scale
            return out
        sharing = Sharing(channels, length, self.group_size)
        for block in sharing.blocks():
            part = block.of(out)
            part *= block.params(self.scale)
        return out


def fit_codebook(
    rows: NDArray[Any],
    scheme: CodebookScheme,
    *,
    importance: NDArray[Any] | None = None,
    seed: int = 0,
) -> Codes:
    """Choose codebook, scales and indices of rows [channels, values] for the least squared error.

    importance: not negative, broadcasts to rows; mean squares of the layer's inputs, by which
    squared errors are weighed. seed: of vectors; the same seed, the same bytes.

    Raises ValueError for NaN or infinities, and for an importance that does not fit.
    """
    rows = _checked(rows)
    sharing = scheme.sharing((rows.shape[0], rows.shape[1]))
    task = Rows(rows, sharing, _importance(importance, rows.shape))
    codebook, scale = _fit(task, scheme, seed)
    scale = bounded(scale, codebook)
    choose = vector_indices if scheme.kind == "vector" else indices
    index = choose(task, codebook, scale)
    if (codebook.reshape(len(codebook), -1) == 0).all(1).any():
        scale = np.where(scale == 0, np.float32(1), scale)
    return Codes(index, codebook, scale.reshape(sharing.public_shape), sharing.size)


def _fit(
    rows: Rows, scheme: CodebookScheme, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Codebook, and scales as the numerics have them: 0 where all is 0."""
    shapes = _shapes(scheme)
    if scheme.kind == "nf4":
        return np.array(NF4, np.float32), rows.start(signed=False)
    if shapes is not None:
        return fit_shape(rows, shapes)
    if scheme.kind == "vector":
        return fit_vectors(rows, scheme.entries, scheme.dim, seed)
    return fit_kmeans(rows, scheme.entries)


def is_of(scheme: CodebookScheme, codebook: NDArray[np.float32]) -> bool:
    """Whether a codebook of single values could be one of a scheme."""
    if scheme.dim != 1 or codebook.shape != (scheme.entries,) or (np.diff(codebook) < 0).any():
        return False
    shapes = _shapes(scheme)
    return shapes is None or any(np.array_equal(shape, codebook) for shape in shapes)


def _shapes(scheme: CodebookScheme) -> list[NDArray[np.float32]] | None:
    """The codebooks among which a scheme chooses; None: it makes its own."""
    match scheme.kind:
        case "nf4":
            return [np.array(NF4, np.float32)]
        case "power-of-two":
            return geometric(scheme.bits, 2)
        case "logarithmic":
            return logarithmic(scheme.bits)
        case "exponential":
            return exponential(scheme.bits)
    return None


def _checked(rows: NDArray[Any]) -> NDArray[np.float32]:
    rows = np.asarray(rows)
    if rows.ndim != 2:
        raise ValueError(f"rows are [channels, values], not {rows.ndim}-dimensional: reshape")
    rows = np.ascontiguousarray(rows, np.float32)
    if not (np.isfinite(rows.min(initial=0)) and np.isfinite(rows.max(initial=0))):
        raise ValueError("a weight with NaN or infinities has no codebook: keep it float")
    return rows


def _importance(
    importance: NDArray[Any] | None, shape: tuple[int, ...]
) -> NDArray[np.float32] | None:
    """Importance over its greatest, as a view of the rows' shape; None if there is none."""
    if importance is None:
        return None
    wide = np.asarray(importance, np.float64)
    if not np.isfinite(wide).all() or (wide < 0).any():
        raise ValueError("importance must be finite and not negative: give mean squares")
    try:
        seen = np.broadcast_to((wide / (wide.max(initial=0) or 1)).astype(np.float32), shape)
    except ValueError:
        raise ValueError(f"importance {wide.shape} does not fit rows {shape}: broadcast") from None
    return seen if seen.any() else None
