"""Vector quantization: neighbouring values of a row share an index; one codebook a tensor.

Lloyd's k-means on sub-vectors of x / scale, each value with the mass m s^2 (m: its importance), so
that the squared error of the weight is minimised; seeded by k-means++ (Arthur and Vassilvitskii,
2007). Both look at a sample; the last steps at everything. The last sub-vector of a row may be
short: it is filled up with zeros that have no mass. Distances come from one matrix product,

    sum m (t - c)^2 = sum m t^2 - 2 (m t) . c + m . c^2

the first term of which is the same for all entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxq.numerics.codebooks import Codebook
from onnxq.numerics.scaling import LARGEST, Rows, Scale, Sums, Values, allowed, relative_squares
from onnxq.numerics.sharing import BLOCK

SAMPLE_PER_ENTRY = 128
ITERATIONS = 30  # of Lloyd's on the sample, at most
TURNS = 2  # of Lloyd's on everything
FACTORS = (0.8, 0.9, 1.1, 1.25)  # of scales
PRODUCTS = 1 << 18  # distances at once: 1 MB


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """Sub-vectors t [n, dim] of some channels and columns.

    mass: [n], what their squared errors weigh; importance: [n, dim], of single values, or None.
    """

    channels: slice
    columns: slice  # of vectors
    t: Values
    mass: Sums
    importance: Values | None

    def weights(self) -> Sums:
        """The mass of each value, [n, dim] or [n, 1]."""
        return self.mass[:, None] * (1 if self.importance is None else self.importance)

    def nearest(self, codebook: Codebook) -> NDArray[np.intp]:
        """The nearest entry of each, [n]."""
        out = np.empty(len(self.t), np.intp)
        squares = codebook * codebook
        if self.importance is None:
            squares = squares.sum(1, keepdims=True)
        factors = np.concatenate([-2 * codebook, squares], axis=1).T
        step = max(1, PRODUCTS // len(codebook))
        for i in range(0, len(out), step):
            t = self.t[i : i + step]
            m = np.ones((len(t), 1), np.float32)
            if self.importance is not None:
                m = self.importance[i : i + step]
                t = t * m
            (np.concatenate([t, m], axis=1) @ factors).argmin(1, out=out[i : i + step])
        return out

    def errors(self, codebook: Codebook, index: NDArray[np.intp]) -> Values:
        """Squared errors against these entries, [n]; masses left out."""
        d = codebook.take(index, axis=0)
        d -= self.t
        d *= d
        if self.importance is not None:
            d *= self.importance
        return _sums(d)


def vectors(rows: Rows, scale: Scale, dim: int) -> Iterator[Vectors]:
    """All sub-vectors of rows, some rows (or a part of one) at a time."""
    channels, values = rows.values.shape
    relative = relative_squares(scale)
    divisor = np.where(scale == 0, np.float32(1), scale)
    wide = min(values, BLOCK // dim * dim)
    tall = max(1, BLOCK // max(1, wide))
    for c in range(0, channels, tall):
        at = slice(c, min(c + tall, channels))
        own = slice(None) if rows.sharing.whole else at
        for v in range(0, values, max(1, wide)):
            stop = min(v + wide, values)
            groups = np.arange(v, stop) // rows.sharing.width
            short = (0, 0), (0, (v - stop) % dim)
            t = np.asarray(rows.values[at, v:stop] / divisor[own].take(groups, axis=1), np.float32)
            t = np.pad(t, short)
            m = None if rows.importance is None else rows.importance[at, v:stop]
            if m is None and short[1][1]:
                m = np.ones((1, stop - v), np.float32)
            if m is not None:
                m = np.array(np.broadcast_to(np.pad(m, short), t.shape), np.float32)
                m = m.reshape(-1, dim)
            mass = relative[own].take(groups[::dim], axis=1)
            mass = np.asarray(np.broadcast_to(mass, (len(t), mass.shape[1])))
            columns = slice(v // dim, -(-stop // dim))
            yield Vectors(at, columns, t.reshape(-1, dim), mass.reshape(-1), m)


def fit_vectors(rows: Rows, entries: int, dim: int, seed: int) -> tuple[Codebook, Scale]:
    """The codebook [entries, dim] and the scales; the same seed, the same bytes."""
    scale = rows.start(signed=True)
    rng = np.random.default_rng(seed)
    sample = _sample(rows, scale, dim, entries * SAMPLE_PER_ENTRY, rng)
    if not sample.mass.any():
        return np.zeros((entries, dim), np.float32), scale
    book = _seeded(sample, entries, rng)
    for _ in range(ITERATIONS):
        before, book = book, _moved(iter([sample]), book)
        if np.array_equal(before, book):
            break
    for turn in range(TURNS):
        if scale.size > 1:
            scale = _improved(rows, book, scale, FACTORS if turn == 0 else ())
        book = _moved(vectors(rows, scale, dim), book)
    return book, scale


def vector_indices(rows: Rows, codebook: Codebook, scale: Scale) -> NDArray[np.uint8]:
    """The nearest entry of each sub-vector, [channels, ceil(values / dim)]."""
    dim = codebook.shape[1]
    out = np.empty((len(rows.values), -(-rows.values.shape[1] // dim)), np.uint8)
    for some in vectors(rows, scale, dim):
        part = out[some.channels, some.columns]
        part[...] = some.nearest(codebook).reshape(part.shape)
    return out


def _sums(d: Values) -> Values:
    """Sums over short rows: a product is several times as fast as numpy's sum."""
    return np.asarray(d @ np.ones(d.shape[1], np.float32))


def _sample(rows: Rows, scale: Scale, dim: int, limit: int, rng: np.random.Generator) -> Vectors:
    """At most so many sub-vectors, any of them as likely as another, in order."""
    count = len(rows.values) * -(-rows.values.shape[1] // dim)
    chosen = np.arange(count)
    if count > limit:
        chosen = np.sort(rng.choice(count, limit, replace=False, shuffle=False))
    ts, masses, importances, first = [], [], [], 0
    for some in vectors(rows, scale, dim):
        n = len(some.t)
        at = chosen[slice(*np.searchsorted(chosen, [first, first + n]))] - first
        first += n
        ts.append(some.t[at])
        masses.append(some.mass[at])
        m = np.ones((len(at), dim), np.float32) if some.importance is None else some.importance[at]
        importances.append(m)
    joined = [np.concatenate(a) for a in (ts, masses, importances)] if ts else []
    if not joined:
        joined = [np.zeros((0, dim), np.float32), np.zeros(0), np.zeros((0, dim), np.float32)]
    t, mass, m = joined
    return Vectors(slice(0), slice(0), t, mass, None if (m == 1).all() else m)


def _seeded(sample: Vectors, entries: int, rng: np.random.Generator) -> Codebook:
    """k-means++: each entry is a sub-vector drawn by its squared error against those before."""
    book = np.zeros((entries, sample.t.shape[1]), np.float32)
    chance = sample.mass if sample.importance is None else sample.weights().mean(1)
    error = np.full(len(sample.t), np.inf, np.float32)
    for k in range(entries):
        total = np.cumsum(chance)
        if not total[-1] > 0:  # all are entries already
            book[k:] = book[k - 1]
            break
        i = np.searchsorted(total, rng.random() * total[-1], side="right")
        book[k] = sample.t[min(i, len(total) - 1)]
        one = sample.errors(book[k : k + 1], np.zeros(len(sample.t), np.intp))
        error = np.minimum(error, one)
        chance = sample.mass * error
    return book


def _moved(parts: Iterator[Vectors], book: Codebook) -> Codebook:
    """One step of Lloyd's: entries become the means of the sub-vectors nearest to them.

    An entry that is nearest to none takes the place of a sub-vector of greatest error.
    """
    entries, dim = book.shape
    mass, first = np.zeros((2, dim, entries))
    used = np.zeros(entries, np.intp)
    worst, far = np.zeros((0, dim), np.float32), np.zeros(0)
    for some in parts:
        index = some.nearest(book)
        used += np.bincount(index, minlength=entries)
        weights = some.weights()
        for d in range(dim):
            w = weights[:, min(d, weights.shape[1] - 1)]
            mass[d] += np.bincount(index, w, entries)
            first[d] += np.bincount(index, w * some.t[:, d], entries)
        error = some.mass * some.errors(book, index)
        keep = np.argpartition(-error, min(entries, len(error)) - 1)[:entries]
        worst, far = np.concatenate([worst, some.t[keep]]), np.concatenate([far, error[keep]])
        keep = np.argsort(-far, kind="stable")[:entries]
        worst, far = worst[keep], far[keep]
    out = np.divide(first, mass, out=book.T.astype(np.float64), where=mass > 0).T
    empty = np.flatnonzero(used == 0)[: int((far > 0).sum())]
    out[empty] = worst[: len(empty)]
    return np.asarray(out, np.float32)


def _assess(rows: Rows, book: Codebook, scale: Scale) -> tuple[Sums, Sums]:
    """As `scaling.assess`: squared errors, and the scales of least squares."""
    dim = book.shape[1]
    sums = np.zeros((3, *scale.shape))
    per_group = max(1, -(-rows.sharing.width // dim))
    for some in vectors(rows, scale, dim):
        c = book.take(some.nearest(book), axis=0)
        d = some.t - c
        mc = c if some.importance is None else c * some.importance
        md = d if some.importance is None else d * some.importance
        parts = np.stack([_sums(d * md), _sums(d * mc), _sums(c * mc)])
        if rows.sharing.whole:
            sums[:, 0, 0] += parts.sum(1, dtype=np.float64)
            continue
        parts = parts.reshape(3, some.channels.stop - some.channels.start, -1)
        starts, first = _group_starts(some.columns, per_group)
        at = sums[:, some.channels, first : first + len(starts)]
        at += np.add.reduceat(parts, starts, axis=2)
    error, slope, weight = sums
    wide = scale.astype(np.float64)
    factor = 1 + np.divide(slope, weight, out=np.zeros_like(slope), where=weight > 0)
    return error * wide**2, np.where(factor > 0, wide * factor, wide)


def _group_starts(columns: slice, per_group: int) -> tuple[NDArray[np.intp], int]:
    """Where groups begin among columns of vectors, and the number of the first group."""
    groups = np.arange(columns.start, columns.stop) // per_group
    return np.flatnonzero(np.diff(groups, prepend=-1)), int(groups[0])


def _improved(rows: Rows, book: Codebook, scale: Scale, factors: tuple[float, ...]) -> Scale:
    """Scales of no greater squared error."""
    largest = LARGEST / max(1.0, float(np.abs(book).max()))
    best = scale
    error, follow = _assess(rows, book, best)
    for step in range(len(factors) + 1):
        searching = step < len(factors)
        candidate = allowed(scale * np.float64(factors[step]) if searching else follow, largest)
        tried, then = _assess(rows, book, candidate)
        better = tried < error
        error, follow = np.where(better, tried, error), np.where(better, then, follow)
        best = np.asarray(np.where(better, candidate, best), np.float32)
    return best
