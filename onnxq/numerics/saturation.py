"""8-bit products added in pairs into saturating 16 bits: what can go wrong, and what it changes.

x86-64 without VNNI multiplies uint8 activations with int8 weights by VPMADDUBSW: neighbours along
the axis that is summed over are added into one int16, which saturates, before anything is widened
(Intel 64 and IA-32 Architectures Software Developer's Manual, PMADDUBSW; ONNX Runtime's
onnxruntime/core/mlas/lib/x86_64/QgemmU8X8KernelAvx2.S). 255 * 127 twice is 64,770; int16 ends at
32,767.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

LEAST, MOST = -32768, 32767
GREATEST = 255  # of an activation


def _pairs(w: NDArray[np.int8]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Even and odd rows of [K, N], each [ceil(K / 2), N]; a last single one is paired with 0."""
    wide = np.pad(w.astype(np.int32), ((0, w.shape[0] % 2), (0, 0)))
    return wide[0::2], wide[1::2]


def excess(w: NDArray[np.int8]) -> NDArray[np.float64]:
    """How far each pair of [K, N] can go, over any uint8 input: above 1 saturates.

    Shape [ceil(K / 2), N].
    """
    a, b = _pairs(w)
    above = GREATEST * (np.maximum(a, 0) + np.maximum(b, 0)) / MOST
    below = GREATEST * (np.minimum(a, 0) + np.minimum(b, 0)) / LEAST
    return np.maximum(above, below)


def saturates(rows: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Which outputs of [groups, K, N] have a pair that can saturate: shape [groups * N]."""
    return np.hstack([excess(w).max(0, initial=0.0) > 1 for w in rows])


def safe_scale(w: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The least scales, not under the given ones, with which no pair can saturate.

    w: [K, N], quantized as clip(rint(w / scale), -127, 127); scale: [N], or a scalar for all.
    """
    safe = np.array(scale, np.float32)
    while True:
        worst = excess(np.clip(np.rint(w / safe), -127, 127).astype(np.int8)).max(0, initial=0.0)
        if safe.ndim == 0:
            worst = worst.max(initial=0.0)
        if not (worst > 1).any():
            return safe
        grown = np.nextafter(safe * np.maximum(worst, 1).astype(np.float32), np.float32(np.inf))
        safe = np.where(worst > 1, grown, safe)


def lost(
    column: Callable[[int], NDArray[np.uint8]], w: NDArray[np.int8], shape: tuple[int, ...]
) -> NDArray[np.int64]:
    """What saturation adds to the exact sums x @ w: shape (*shape, N).

    column: k -> the k-th input of every sum, uint8 of `shape`; w: [K, N].
    """
    a, b = _pairs(w)
    risky = excess(w) > 1
    total = np.zeros((*shape, w.shape[1]), np.int64)
    for i in np.flatnonzero(risky.any(1)).tolist():
        n = np.flatnonzero(risky[i])
        exact = column(2 * i)[..., None].astype(np.int32) * a[i, n]
        if 2 * i + 1 < w.shape[0]:
            exact += column(2 * i + 1)[..., None].astype(np.int32) * b[i, n]
        total[..., n] += np.clip(exact, LEAST, MOST) - exact
    return total
