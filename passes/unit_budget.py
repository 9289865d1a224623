"""How many units of each group to remove, for a share of a network's multiply-accumulates.

    least  sum_g noise_g(removed_g)      with      work(removed) <= (1 - share) work(nothing)

noise_g: the error of the model's outputs when units of this group alone are gone. Errors of several
groups about add up, so that the group goes next whose step costs the least error for what it saves
(steps may be long: a cheap one may lie behind a dear one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.model import Model
from onnxq.passes.costs import rounded_up
from onnxq.passes.removal import Structure
from onnxq.passes.unit_labels import Layer
from onnxq.passes.work import Shapes, macs

Curve = Mapping[int, float]
"""Noise by the number of units that are removed."""
Counts = NDArray[np.int64]
LANES = 4  # channels in multiples of which onnxruntime's blocked convolutions read


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A layer: its multiply-accumulates, and how many of its rows and columns are of which group.

    rows, columns: by group, the last ones those that stay; no rows: all stay.
    """

    work: float
    rows: Counts
    columns: Counts
    is_blocked: bool = False

    def left(self, kept: NDArray[np.float64], block: int) -> float:
        """What is left of the work; kept: shares by group, the last one 1."""
        found = self.work
        for counts, step in ((self.rows, block), (self.columns, LANES if block > 1 else 1)):
            whole = float(counts.sum())
            left = float(counts @ kept)
            if whole and self.is_blocked and step > 1:
                whole, left = (rounded_up(round(n), step) for n in (whole, left))
            found *= left / whole if whole else 1.0
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Multiply-accumulates of a model, by how many units of each group are removed: [groups]."""

    parts: tuple[_Part, ...]
    sizes: Counts
    touched: tuple[tuple[_Part, ...], ...]

    @classmethod
    def of(cls, model: Model, found: Structure, shapes: Shapes | None = None) -> Work:
        """shapes: of tensors by name, where they are better known than to the model."""
        known = macs(model, shapes)
        sizes = np.array([len(g) for g in found.groups], np.int64)
        area: dict[int, int] = {}
        for layer in found.layers:
            area[id(layer.node)] = area.get(id(layer.node), 0) + _area(layer)
        parts = list[_Part]()
        for layer in found.layers:
            work = known.get(id(layer.node), 0.0) * _area(layer) / max(area[id(layer.node)], 1)
            is_blocked = layer.node.op == "Conv" and len(layer.node.inputs[1].shape) == 4
            columns = np.zeros(0, np.int64) if layer.is_depthwise else layer.inputs
            parts.append(_Part(work, _counts(found, layer.outputs), _counts(found, columns),
                               is_blocked and not layer.is_depthwise))  # fmt: skip
        done = set(area)
        for node in model.nodes():  # of two activations
            if id(node) in known and id(node) not in done:
                parts.append(_of_activations(found, node, known[id(node)]))
        touched = tuple(
            tuple(p for p in parts if p.rows[g] or p.columns[g]) for g in range(len(sizes))
        )
        return cls(tuple(parts), sizes, touched)

    def left(self, removed: Counts, block: int = 1) -> float:
        """What is left; block: of channels that convolutions make at a time."""
        kept = self._kept(removed)
        return sum(part.left(kept, block) for part in self.parts)

    def saved(self, removed: Counts, group: int, more: int, block: int = 1) -> float:
        """What it saves to remove so many units of a group instead."""
        now, then = self._kept(removed), self._kept(removed)
        then[group] = 1 - more / self.sizes[group]
        parts = self.touched[group]
        return sum(part.left(now, block) - part.left(then, block) for part in parts)

    def _kept(self, removed: Counts) -> NDArray[np.float64]:
        return np.append(1 - removed / np.maximum(self.sizes, 1), 1.0)


def _area(layer: Layer) -> int:
    return int(layer.outputs.size * max(layer.inputs.shape[1], 1))


def _counts(found: Structure, units: NDArray[np.int64]) -> Counts:
    """How many are of each group, and how many stay."""
    groups = np.append(found.group_of, len(found.groups))[np.asarray(units, np.int64).reshape(-1)]
    return np.bincount(groups, minlength=len(found.groups) + 1)


def _of_activations(found: Structure, node: gs.Node, work: float) -> _Part:
    rows = found.tensors.get(id(node.outputs[0]))
    columns = found.tensors.get(id(node.inputs[0]))
    rank = len(node.inputs[0].shape or ())
    sums = columns is not None and columns[1].axes == (rank - 1,)
    nothing = np.zeros(0, np.int64)
    return _Part(
        work,
        _counts(found, nothing if rows is None else rows[1].labels),
        _counts(found, columns[1].labels if columns is not None and sums else nothing),
    )


def allotted(work: Work, curves: Sequence[Curve], share: float, block: int = 1) -> Counts:
    """How many units of each group to remove, so that `share` of the work goes, or all that can.

    curves: for each group, numbers of units that may go, and the noise that this makes. block: what
    is saved counts as convolutions in blocks of channels save it; the share does not.
    """
    removed = np.zeros(len(curves), np.int64)
    whole = work.left(removed)
    steps = [sorted(curve.items()) for curve in curves]
    while work.left(removed) > (1 - share) * whole * (1 + 1e-9):
        best: tuple[float, int, int] | None = None
        for group, curve in enumerate(curves):
            noise = curve.get(int(removed[group]), 0.0)
            for more, then in steps[group]:
                if more <= removed[group]:
                    continue
                saved = work.saved(removed, group, more, block)
                plain = work.saved(removed, group, more)
                gain = max(saved, 0.1 * plain)
                if gain > 0 and (best is None or (then - noise) / gain < best[0]):
                    best = (then - noise) / gain, group, more
        if best is None:
            break
        removed[best[1]] = best[2]
    return removed


def even(size: int, amount: float, multiple: int = 1) -> int:
    """How many units of a group go; what is kept is rounded up to a multiple, or is all."""
    kept = max(1, size - int(amount * size + 1e-9))
    return size - min(size, -(-kept // multiple) * multiple)
