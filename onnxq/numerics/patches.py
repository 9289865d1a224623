"""What a layer multiplies its weight with, as vectors: one for each result, of the weight's rows.

A layer's results are sums over a row of its weight, result = sum_k row[k] x[k]. The vectors x are
an axis of its input (`Vectors`) or, in convolutions, the patches under the kernel (`Patches`). The
sum over them of x x^T is all that squared errors of weights depend on: with an error d of a row,
the squared error of the results is d^T (sum x x^T) d.

Of many vectors some are taken: every s-th, s the least number with `limit` or fewer of them that is
prime to their count and to the length of a line, from another offset for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Vectors:
    """Vectors along an axis of a tensor. blocks: an axis whose indices have weights of their own.

    (LSTM's states are [steps, directions, batch, H], and each direction has its rows.)
    """

    axis: int
    blocks: int | None = None

    def of(
        self, x: NDArray[Any], limit: int, offset: int, kept: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.float32], float]:
        """Vectors [blocks, count, K] of one sample, and how many each of them stands for.

        kept: which vectors count, where it has their shape: those that no mask leaves out.
        """
        moved = np.moveaxis(x, self.axis, -1)
        if self.blocks is None:
            fits = kept is not None and kept.shape == moved.shape[:-1]
            rows = (moved[kept] if fits else moved).reshape(1, -1, moved.shape[-1])
        else:
            rows = np.moveaxis(moved, self.blocks, 0)
            rows = rows.reshape(len(rows), prod(rows.shape[1:-1]), rows.shape[-1])
        count = rows.shape[1]
        step = spacing(count, limit, x.shape[-1])
        taken = rows[:, offset % step :: step]
        return taken.astype(np.float32, copy=False), count / max(taken.shape[1], 1)


@dataclass(frozen=True, slots=True)
class Patches:
    """Patches of a convolution over [batch, channels, *space], channels first as in the weight.

    pads: begins, then ends; or SAME_UPPER, SAME_LOWER, as `auto_pad` has it. groups: blocks of
    channels with weights of their own. transposed: of ConvTranspose, whose input is spread out by
    the strides, and whose groups share rows: one block, in which nothing links the groups.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | str
    groups: int = 1
    transposed: bool = False

    def of(
        self, x: NDArray[Any], limit: int, offset: int, kept: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.float32], float]:
        """Vectors [blocks, count, K] of one sample, and how many each of them stands for.

        Of a transposed convolution the blocks are the groups: `assembled` makes one of them.
        """
        view = self._windows(x)
        rank = len(self.kernel)
        places = (view.shape[0], *view.shape[2 : 2 + rank])
        count = prod(places)
        step = spacing(count, limit, places[-1])
        at: tuple[Any, ...] = np.unravel_index(np.arange(offset % step, count, step), places)
        rows = view[(at[0], slice(None), *at[1:])]  # [rows, channels, *kernel]
        if self.transposed:
            rows = np.flip(rows, tuple(range(2, 2 + rank)))
        length = prod(rows.shape[1:]) // self.groups
        rows = rows.reshape(len(rows), self.groups, length).swapaxes(0, 1)
        return np.ascontiguousarray(rows, np.float32), count / max(rows.shape[1], 1)

    def assembled(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums [blocks, K, K] as the weight's rows have them."""
        if not self.transposed or self.groups == 1:
            return sums
        blocks, k, _ = sums.shape
        whole = np.zeros((1, blocks * k, blocks * k), sums.dtype)
        for i, block in enumerate(sums):
            whole[0, i * k : (i + 1) * k, i * k : (i + 1) * k] = block
        return whole

    def _windows(self, x: NDArray[Any]) -> NDArray[Any]:
        """A view [batch, channels, *places, *kernel] of the input, padded."""
        rank = len(self.kernel)
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        strides = self.strides
        begins, ends = self._padding(x.shape[2:], spans)
        if self.transposed:
            x, strides = _spread(x, strides), (1,) * rank
            begins = [s - 1 - b for s, b in zip(spans, begins, strict=True)]
            ends = [s - 1 - e for s, e in zip(spans, ends, strict=True)]
        sides = zip(begins, ends, strict=True)
        padded = np.pad(x, [(0, 0), (0, 0), *((max(b, 0), max(e, 0)) for b, e in sides)])
        cut = [
            slice(max(-b, 0), padded.shape[2 + i] - max(-e, 0))
            for i, (b, e) in enumerate(zip(begins, ends, strict=True))
        ]
        axes = tuple(range(2, 2 + rank))
        view = sliding_window_view(padded[(slice(None), slice(None), *cut)], spans, axes)
        steps = [slice(None, None, s) for s in (*strides, *self.dilations)]
        return view[(slice(None), slice(None), *steps)]

    def _padding(
        self, space: Sequence[int], spans: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]:
        rank = len(self.kernel)
        if not isinstance(self.pads, str):
            return self.pads[:rank], self.pads[rank:]
        if self.transposed:  # output = input * stride
            totals = [max(s - t, 0) for s, t in zip(spans, self.strides, strict=True)]
        else:
            lines = zip(space, self.strides, spans, strict=True)
            totals = [max((-(-n // s) - 1) * s + span - n, 0) for n, s, span in lines]
        less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
        return (less, more) if self.pads == "SAME_UPPER" else (more, less)


Lay = Vectors | Patches


def spacing(count: int, limit: int, line: int) -> int:
    """The least step that leaves at most `limit` of `count`, prime to it and to a line's length."""
    step = max(1, -(-count // limit))
    while step > 1 and (gcd(step, count) > 1 or gcd(step, max(line, 1)) > 1):
        step += 1
    return step


def _spread(x: NDArray[Any], strides: Sequence[int]) -> NDArray[Any]:
    """Zeros between the values along each axis of space."""
    space = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True)]
    out = np.zeros((*x.shape[:2], *space), x.dtype)
    out[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x
    return out
