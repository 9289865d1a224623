"""How many bits the numbers of a weight carry: the entropy of their empirical distribution.

    H = -sum p log2 p        (Shannon, "A Mathematical Theory of Communication", 1948)

Nothing that codes each number by itself stores them in fewer bits; what a format has beyond that
costs nothing to give up. Of float32 the upper 16 bits of each pattern count (sign, exponent, 7 bits
of mantissa), as in `onnxq.numerics.histograms`: the lower ones are noise, or nothing. A large
tensor is judged by a part of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WHOLE = 1 << 20  # bytes up to which all of a tensor is counted
PIECE = 1 << 14  # bytes of a piece of a larger one; the pieces are spread evenly


def entropy_of(raw: NDArray[np.uint8], bits: int, count: int | None = None) -> float:
    """Entropy in bits a number; raw: the bytes as stored, little-endian.

    bits: of a number: 2, 4, 8, 16, or 32 (float32). count: of numbers, where the last byte is not
    filled. Of more than a MiB, about as much is looked at, which is exact to some 0.01 bits.
    """
    numbers = raw.size * 8 // bits if count is None else count
    if raw.size > WHOLE:
        raw = excerpt(raw)
        numbers = raw.size * 8 // bits
    counts = histogram(raw, bits)
    counts[0] -= max(0, counts.sum() - numbers)  # what fills up the last byte
    return entropy_bits(counts)


def excerpt(raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """About a MiB of more bytes than that, in pieces that are spread evenly."""
    starts = np.linspace(0, raw.size - PIECE, WHOLE // PIECE).astype(np.int64) & ~np.int64(7)
    return np.concatenate([raw[start : start + PIECE] for start in starts.tolist()])


def float_zeros(raw: NDArray[np.uint8], bits: int) -> float:
    """The share of zeros among floats of 16 or 32 bits, as bytes; -0.0 is one."""
    plain = np.ascontiguousarray(raw).view(f"<u{bits // 8}") & ((1 << (bits - 1)) - 1)
    return float(1 - np.count_nonzero(plain) / max(1, plain.size))


def histogram(raw: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """How often each number of so many bits occurs: shape [2^bits], of 32 bits the upper 16."""
    if bits == 32:
        return np.bincount(np.ascontiguousarray(raw).view("<u4") >> 16, minlength=1 << 16)
    if bits == 16:
        return np.bincount(np.ascontiguousarray(raw).view("<u2"), minlength=1 << 16)
    counts = np.bincount(raw, minlength=256).astype(np.int64)
    if bits == 8:
        return counts
    parts = np.zeros(1 << bits, np.int64)
    values = np.arange(256)
    for shift in range(0, 8, bits):
        np.add.at(parts, (values >> shift) & ((1 << bits) - 1), counts)
    return parts


def entropy_bits(counts: NDArray[np.int64]) -> float:
    """The entropy of a distribution, in bits; 0 of nothing."""
    total = int(counts.sum())
    share = counts[counts > 0] / max(total, 1)
    return float(max(0.0, -(share * np.log2(share)).sum()))
