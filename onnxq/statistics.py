"""What can be observed of a tensor: frozen values that merge, exactly and in any order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from onnxq.numerics import histograms, ranges
from onnxq.numerics.patches import Lay, Patches

Method = Literal["minmax", "percentile", "entropy", "mse", "careful"]


class Statistic(Protocol):
    """Something observed of a tensor over some samples."""

    @property
    def count(self) -> int:
        """How many samples were observed."""
        ...

    def merge(self, other: Self) -> Self:
        """Return the statistic over both sets of samples: associative, commutative, exact."""
        ...


@dataclass(frozen=True, slots=True)
class MinMax:
    """The least and the greatest finite value; (inf, -inf) if there was none.

    `has_nonfinite`: NaN or infinities occurred (attention masks of -inf): no range covers them, so
    such a tensor should be left float.
    """

    lo: float = np.inf
    hi: float = -np.inf
    count: int = 0
    has_nonfinite: bool = False

    @classmethod
    def of(cls, x: NDArray[Any]) -> MinMax:
        """Of one sample's whole tensor."""
        lo, hi, has_nonfinite = extremes(x)
        return cls(lo, hi, 1, has_nonfinite)

    def merge(self, other: MinMax) -> MinMax:
        """Return the extremes over both sets of samples."""
        return MinMax(
            min(self.lo, other.lo),
            max(self.hi, other.hi),
            self.count + other.count,
            self.has_nonfinite or other.has_nonfinite,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Counts over the upper 16 bits of the float32 pattern, occupied bins only; extremes exact.

    `bins` (uint16, ascending) and `counts` (uint64) may cover a subsample of the values that `lo`
    and `hi` cover. Size: 10 bytes for each occupied bin, of which real activations have some 3,000
    and no tensor more than 65,536. `count` is the number of samples (runs), not of values.
    """

    lo: float
    hi: float
    count: int
    has_nonfinite: bool
    bins: NDArray[np.uint16]
    counts: NDArray[np.uint64]

    @classmethod
    def of(cls, x: NDArray[Any]) -> Histogram:
        """Of one sample's whole tensor."""
        lo, hi, has_nonfinite = extremes(x)
        counts, _ = histograms.count(histograms.halves_of(x))
        return cls(lo, hi, 1, has_nonfinite, *counts)

    def merge(self, other: Histogram) -> Histogram:
        """Return the histogram over both sets of samples."""
        return Histogram(
            min(self.lo, other.lo),
            max(self.hi, other.hi),
            self.count + other.count,
            self.has_nonfinite or other.has_nonfinite,
            *histograms.add((self.bins, self.counts), (other.bins, other.counts)),
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Histogram)
            and (self.lo, self.hi, self.count, self.has_nonfinite)
            == (other.lo, other.hi, other.count, other.has_nonfinite)
            and np.array_equal(self.bins, other.bins)
            and np.array_equal(self.counts, other.counts)
        )

    __hash__ = None  # type: ignore[assignment]

    def leaning(self, share: float) -> Histogram:
        """The histogram in which negative values count `share` (above 0) as much as they do."""
        weight = np.uint64(max(1, round(1 / share)))
        counts = np.where(self.bins < histograms.ZERO, self.counts, self.counts * weight)
        return replace(self, counts=counts)

    def range(
        self, method: Method | float, *, bits: int = 8, symmetric: bool = False
    ) -> tuple[float, float]:
        """Find the (lo, hi) to quantize to `bits` bits; for the methods see `numerics.ranges`.

        A number: how much clipping counts.

        Raises ValueError when no finite value was observed.
        """
        return ranges.search(
            ranges.Density.of_counts((self.bins, self.counts), self.lo, self.hi),
            method,
            bits=bits,
            symmetric=symmetric,
        )


@dataclass(frozen=True, slots=True)
class Squares:
    """The wish for a `SumOfSquares` of each index of an axis of a tensor."""

    axis: int


LIMBS, LIMB_BITS, LEAST_BIT = 4, 32, -48  # covers 2^-48 up to 2^80


@dataclass(frozen=True, slots=True, eq=False)
class SumOfSquares:
    """Sums of squares for each index of a tensor's axis, over all other axes and all samples.

    Kept in fixed point, `limbs` [4, n] of 32 bits each from 2^-48 on (int64, not carried over): so
    that sums of any order and division are the same to the bit, for up to 2^31 samples.
    """

    limbs: NDArray[np.int64]
    count: int = 0
    has_nonfinite: bool = False

    @classmethod
    def of_sums(cls, sums: NDArray[Any]) -> SumOfSquares:
        """Of one sample's sums of squares."""
        rest = np.asarray(sums, np.float64)
        bad = not (rest < 2.0 ** (LIMBS * LIMB_BITS + LEAST_BIT)).all()  # NaN too
        rest = np.zeros_like(rest) if bad else np.ldexp(rest, -LEAST_BIT)
        limbs = np.zeros((LIMBS, rest.size), np.int64)
        for i in reversed(range(LIMBS)):
            whole = np.floor(np.ldexp(rest, -LIMB_BITS * i))
            limbs[i], rest = whole, rest - np.ldexp(whole, LIMB_BITS * i)
        return cls(limbs, 1, bad)

    @classmethod
    def of(cls, x: NDArray[Any], axis: int) -> SumOfSquares:
        """Of one sample's whole tensor."""
        rows = np.moveaxis(np.asarray(x, np.float64), axis, -1)
        return cls.of_sums(np.square(rows).sum(tuple(range(rows.ndim - 1))))

    def merge(self, other: SumOfSquares) -> SumOfSquares:
        """Return the sums over both sets of samples.

        Raises ValueError when the axis is of another length there.
        """
        if self.limbs.shape != other.limbs.shape:
            raise ValueError(f"{self.limbs.shape[1]} sums beside {other.limbs.shape[1]}")
        return SumOfSquares(
            self.limbs + other.limbs,
            self.count + other.count,
            self.has_nonfinite or other.has_nonfinite,
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SumOfSquares)
            and (self.count, self.has_nonfinite) == (other.count, other.has_nonfinite)
            and np.array_equal(self.limbs, other.limbs)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def sums(self) -> NDArray[np.float64]:
        """The sums of squares."""
        powers = [LEAST_BIT + LIMB_BITS * i for i in range(LIMBS)]
        parts = np.ldexp(self.limbs.astype(np.float64), np.array(powers)[:, None])
        return np.asarray(parts.sum(0))


@dataclass(frozen=True, slots=True)
class Products:
    """The wish for a `Gram` of the vectors that a layer makes of a tensor.

    limit: how many vectors of a sample are looked at, at most. start, stop: the samples that count,
    by number.
    """

    tensor: str
    lay: Lay
    limit: int = 1024
    start: int = 0
    stop: int | None = None

    def has(self, index: int) -> bool:
        """Whether the sample counts."""
        return index >= self.start and (self.stop is None or index < self.stop)

    def of(self, x: NDArray[Any], offset: int) -> Gram:
        """Of one sample's whole tensor; offset: which of its vectors, where there are many."""
        adding = GramTally(self)
        adding.see(x, offset)
        return adding.gram()


@dataclass(frozen=True, slots=True, eq=False)
class Gram:
    """Sums of x x^T over the vectors x that a layer multiplies its weight with.

    sums: float64 [blocks, K, K]; products of some K vectors are added in float32. Of
    samples with NaN or infinities in them nothing is added. vectors: how many were looked at.
    """

    sums: NDArray[np.float64]
    count: int = 0
    has_nonfinite: bool = False
    vectors: int = 0

    def merge(self, other: Gram) -> Gram:
        """Return the sums over both sets of samples; to the last digits the order matters.

        Raises ValueError when the vectors are of another length there.
        """
        if self.sums.shape != other.sums.shape:
            raise ValueError(f"a gram of shape {self.sums.shape} beside {other.sums.shape}")
        return Gram(
            self.sums + other.sums,
            self.count + other.count,
            self.has_nonfinite or other.has_nonfinite,
            self.vectors + other.vectors,
        )

    def whole(self, lay: Lay) -> NDArray[np.float64]:
        """The sums as the weight's rows have them."""
        return lay.assembled(self.sums) if isinstance(lay, Patches) else self.sums


@dataclass(slots=True)
class GramTally:
    """A `Gram` under construction: vectors wait until there are about as many as they are long.

    A sample's share of K x K values would be many more than its vectors have.
    """

    wish: Products
    sums: NDArray[np.float64] | None = None
    waiting: list[NDArray[np.float32]] = field(default_factory=list)
    size: int = 0
    count: int = 0
    has_nonfinite: bool = False
    vectors: int = 0

    def see(self, x: NDArray[Any], offset: int, kept: NDArray[np.bool_] | None = None) -> None:
        """Add one sample's whole tensor; kept: see `Vectors.of`."""
        vectors, share = self.wish.lay.of(x, self.wish.limit, offset, kept)
        self.count += 1
        if not np.isfinite(vectors).all():
            self.has_nonfinite = True
            vectors = np.zeros_like(vectors)
        self.waiting.append(vectors * np.float32(share**0.5))
        self.size += vectors.shape[1]
        self.vectors += vectors.shape[1]
        if self.size >= vectors.shape[2]:
            self._add()

    def gram(self) -> Gram:
        """The sums so far; empty where no sample counted."""
        if self.waiting:
            self._add()
        sums = np.zeros((1, 0, 0)) if self.sums is None else self.sums
        return Gram(sums, self.count, self.has_nonfinite, self.vectors)

    def _add(self) -> None:
        vectors = np.concatenate(self.waiting, 1)
        if self.sums is None:
            self.sums = np.zeros((len(vectors), *vectors.shape[2:] * 2))
        with np.errstate(over="ignore", invalid="ignore"):
            if len(vectors) == 1:  # numpy knows x^T x, of which BLAS computes one half
                made = (vectors[0].T @ vectors[0])[None]
            else:
                made = vectors.swapaxes(1, 2) @ vectors
        if np.isfinite(made).all():
            self.sums += made
        else:
            self.has_nonfinite = True  # their products are, in float32
        self.waiting, self.size = [], 0


def extremes(x: NDArray[Any]) -> tuple[float, float, bool]:
    """Least and greatest finite value (inf, -inf if none), and whether NaN or infinities occur."""
    values = np.asarray(x)
    if not values.size:
        return np.inf, -np.inf, False
    lo, hi = float(values.min()), float(values.max())
    if np.isfinite(lo) and np.isfinite(hi):  # min and max propagate NaN
        return lo, hi, False
    finite = values[np.isfinite(values)]
    if not finite.size:
        return np.inf, -np.inf, True
    return float(finite.min()), float(finite.max()), True
