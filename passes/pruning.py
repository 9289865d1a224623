"""How prune_weights goes through a model: how many of each weight, then one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnxq.core import Note, Skip
from onnxq.model import Model
from onnxq.numerics.pruning import pruned, saliency
from onnxq.numerics.reconstruction import squared_error
from onnxq.numerics.sparsity import (
    Choice,
    Count,
    Fixed,
    Mask,
    Pattern,
    RowCount,
    allocated,
    counts_together,
    zeros_in,
)
from onnxq.passes.grams import Layer, Seen, db
from onnxq.passes.importance import observed
from onnxq.passes.observing import Observing
from onnxq.passes.prunable import Prunable
from onnxq.passes.prune_curves import Curve, Trial, amounts_tried

Criterion = Literal["magnitude", "wanda", "obs"]
Scope = Literal["layer", "global", "sensitivity"]
Rows = NDArray[np.float32]
Zeros = Mapping[int, int]
"""How many values of a weight go, by the id of its tensor."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for: see `prune_weights`."""

    rule: str
    criterion: Criterion
    amount: float
    threshold: float | None
    pattern: Pattern | None
    scope: Scope
    damping: float

    def choice(self, weight: Prunable, rows: Rows, zeros: int | None) -> Choice:
        """How many values stay, and among which. zeros: None where an amount says it.

        Raises Skip where there is nothing to do.
        """
        if self.threshold is not None:
            kept = np.abs(rows) >= self.threshold
            if not rows[~kept].any():
                raise Skip(f"no weight is below {self.threshold:g}")
            return Fixed(kept)
        if self.pattern is not None:
            pattern = Pattern(self.pattern.kept, self.pattern.of, weight.held.taps)
            if pattern.holds(rows):
                raise Skip(f"it is {pattern} already")
            return pattern
        zeros = zeros_in(rows.size, self.amount) if zeros is None else zeros
        if rows.size - np.count_nonzero(rows) >= zeros:
            raise Skip("it has as many zeros already" if zeros else "none of it is to go")
        by_row = self.criterion == "wanda" and self.scope == "layer"
        return RowCount(zeros) if by_row else Count(zeros)


@dataclass(frozen=True, slots=True, eq=False)
class Sighted:
    """A weight, and what is known of what it is multiplied with: products, or squares, or not.

    why: what is not known is not for this reason.
    """

    weight: Prunable
    products: Seen | None = None
    squares: NDArray[np.float64] | None = None
    why: str = ""

    def scores(self, rows: Rows) -> Rows:
        """What a zero costs; without products or squares, the magnitude."""
        if self.squares is None:
            return np.abs(rows)
        return np.asarray(np.square(rows) * self.squares, np.float32)

    def shares(self, rows: Rows, damping: float) -> Rows:
        """As `scores`, so that layers compare: see `prune_weights`."""
        if self.products is not None:
            return saliency(rows, self.products.trusted, damping)
        scores = self.scores(rows)
        return scores if self.squares is None else scores / (float(scores.sum()) or 1.0)

    def solved(self, rows: Rows, choice: Choice, damping: float) -> tuple[Rows, str]:
        """The rows with zeros, and what was done."""
        plain = np.where(mask := choice.mask(self.scores(rows)), rows, np.float32(0))
        by = "magnitude" if self.squares is None else "magnitude times what it meets"
        if self.products is None:
            return plain, f"{_share(mask)} zero, by {by}{self.why}"
        made, kept = pruned(rows, self.products.trusted, choice, damping=damping)
        judging = self.products.judging
        whole = squared_error(rows, judging)
        before, after = (squared_error(rows - v, judging) for v in (plain, made))
        if not after < before:
            text = f"{_share(mask)} zero, by magnitude: results within {db(whole, before)} on "
            return plain, text + f"samples kept back, with the others set anew {db(whole, after)}"
        text = f"{_share(kept)} zero, the others set anew: results within {db(whole, after)} on "
        return made, text + f"samples kept back, by magnitude alone {db(whole, before)}"


def pruned_model(
    model: Model, weights: Sequence[Prunable], plan: Plan, observing: Observing | None
) -> list[Note]:
    """Prune weights in place; a note for each. observing: None where nothing is run."""
    work = _Work(model, plan, observing)
    zeros: Zeros = {}
    curves: Mapping[int, Curve] = {}
    if plan.scope == "global":
        zeros = work.divided(weights)
    elif plan.scope == "sensitivity":
        if _has_enough(weights, plan.amount):
            text = "together they have as many zeros already"
            return [Note(plan.rule, model.graph.name, text, changed=False)]
        curves, told = work.curves(weights)
        zeros = _allocated(weights, curves, plan.amount)
        if told is not None:
            return [told, *work.prune(weights, zeros, curves)]
    return work.prune(weights, zeros, curves)


def _has_enough(weights: Sequence[Prunable], amount: float) -> bool:
    """Whether another run would only take more from what was spared."""
    total = zeros = 0
    for weight in weights:
        try:
            rows = weight.rows()
        except Skip:
            continue
        total += rows.size
        zeros += rows.size - int(np.count_nonzero(rows))
    return bool(total) and zeros >= zeros_in(total, amount)


@dataclass(frozen=True, slots=True)
class _Work:
    model: Model
    plan: Plan
    observing: Observing | None

    def prune(
        self, weights: Sequence[Prunable], zeros: Zeros, curves: Mapping[int, Curve]
    ) -> list[Note]:
        notes = []
        for sighted in self._each(weights):
            weight, curve = sighted.weight, curves.get(id(sighted.weight.tensor), ())
            name = weight.node.name
            try:
                rows = weight.rows()
                choice = self.plan.choice(weight, rows, zeros.get(id(weight.tensor)))
                made, text = sighted.solved(rows, choice, self.plan.damping)
            except Skip as reason:
                text, made = str(reason), None
            if made is not None:
                weight.put(self.model, made)
            notes.append(Note(self.plan.rule, name, text, made is not None, tuple(curve)))
        return notes

    def divided(self, weights: Sequence[Prunable]) -> dict[int, int]:
        """How many of each go where the least of all go, by their shares.

        What cannot be compared has the amount asked for.
        """
        found: dict[int, Rows] = {}
        amount = self.plan.amount
        known = self.plan.criterion == "magnitude"
        sizes = {}
        for sighted in self._each(weights):
            key = id(sighted.weight.tensor)
            try:
                rows = sighted.weight.rows()
            except Skip:
                continue
            sizes[key] = rows.size
            if known or sighted.products is not None or sighted.squares is not None:
                found[key] = sighted.shares(rows, self.plan.damping)
        total = zeros_in(sum(sizes.values()), amount)
        zeros = {key: zeros_in(n, amount) for key, n in sizes.items() if key not in found}
        counts = counts_together(list(found.values()), total - sum(zeros.values()))
        return zeros | dict(zip(found, counts, strict=True))

    def curves(self, weights: Sequence[Prunable]) -> tuple[dict[int, Curve], Note | None]:
        """How sensitive the outputs are to each weight; and a note where none was looked at."""
        assert self.observing is not None
        try:
            trial = Trial.of(self.model, [w.tensor for w in weights], self.observing.samples)
        except Skip as reason:
            return {}, Note(self.plan.rule, self.model.graph.name, str(reason), changed=False)
        found: dict[int, Curve] = {}
        for sighted in self._each(weights):
            weight = sighted.weight
            if weight.tensor.name not in trial.fed:
                continue
            try:
                rows = weight.rows()
            except Skip:
                continue
            points = []
            for amount in amounts_tried(self.plan.amount):
                choice = Count(zeros_in(rows.size, amount))
                made, _ = sighted.solved(rows, choice, self.plan.damping)
                values = weight.held.unrolled(made).astype(weight.tensor.dtype)
                points.append((amount, trial.db(weight.tensor.name, values)))
            found[id(weight.tensor)] = tuple(points)
        return found, None

    def _each(self, weights: Sequence[Prunable]) -> Iterator[Sighted]:
        """Each weight with what the criterion looks at."""
        if self.plan.criterion == "obs":
            yield from self._with_products(weights)
            return
        squares = self._squares(weights) if self.plan.criterion == "wanda" else {}
        for weight in weights:
            yield Sighted(weight, squares=squares.get(id(weight.tensor)))

    def _with_products(self, weights: Sequence[Prunable]) -> Iterator[Sighted]:
        assert self.observing is not None
        tasks = []
        for weight in weights:
            try:
                tasks.append(_Seeing(weight, self.observing.layers(self.model, weight.uses)))
            except Skip as reason:
                yield Sighted(weight, why=f" ({reason})")
        for task, seen in self.observing.each(self.model, tasks):
            if isinstance(seen, Skip):
                yield Sighted(task.weight, why=f" ({seen})")
            else:
                yield Sighted(task.weight, products=seen)

    def _squares(self, weights: Sequence[Prunable]) -> dict[int, NDArray[np.float64]]:
        """What each value of the rows meets, squared; those that meet what cannot be seen lack."""
        assert self.observing is not None
        uses = [use for weight in weights for use in weight.uses]
        seen = observed(self.model, uses, self.observing.samples, self.observing.progress)
        found = {}
        for weight in weights:
            keys = [(id(node), held.index) for node, held in weight.uses]
            if all(key in seen for key in keys):
                parts = [
                    held.importance(seen[key])
                    for key, (_, held) in zip(keys, weight.uses, strict=True)
                ]
                found[id(weight.tensor)] = np.sum(parts, 0)
        return found


@dataclass(frozen=True, slots=True)
class _Seeing:
    weight: Prunable
    layers: tuple[Layer, ...]


def _allocated(
    weights: Sequence[Prunable], curves: Mapping[int, Curve], amount: float
) -> dict[int, int]:
    """How many of each go, where that costs least by their curves; others have the amount."""
    sizes = {id(w.tensor): w.size for w in weights}
    zeros = {key: zeros_in(n, amount) for key, n in sizes.items() if key not in curves}
    left = zeros_in(sum(sizes.values()), amount) - sum(zeros.values())
    keys = [key for key in sizes if key in curves]
    counts = allocated([curves[key] for key in keys], [sizes[key] for key in keys], left)
    return zeros | dict(zip(keys, counts, strict=True))


def _share(kept: Mask) -> str:
    zeros = kept.size - np.count_nonzero(kept)
    return f"{zeros} of {kept.size} weights ({zeros / kept.size:.1%})"
