"""Which inputs of layers can go, and what the rest has to become to make up for them.

A layer's results are W x + b, over vectors x of its inputs. With C the covariance of x, removing
the inputs R of a unit costs, when all others make up for it in the best way (least squares),

    tr(W_R ([C^-1]_RR)^-1 W_R^T)        W' = W - W_R ([C^-1]_RR)^-1 [C^-1]_R:

of squared error (Hassibi & Stork 1993, "Second order derivatives for network pruning: Optimal Brain
Surgeon"; of groups: Kurtic et al. 2023, "ZipLM", arXiv:2302.04089). After each removal C^-1 is that
of what is left, so that units can go one after the other, the cheapest first, and each prefix of
the order has the weights that make up for it. What depends on the mean of x goes into b.

Making up for inputs of the next layer from samples alone: Luo et al. 2017, "ThiNet"
(arXiv:1707.06342), He et al. 2017, "Channel Pruning" (arXiv:1707.06168). What stands behind a layer
decides which of its errors matter: `fitted` leaves values alone that a Relu cuts off in either
network, as in Zhang et al. 2015 (arXiv:1505.06798), by majorization: each step is least squares
again, against a target that moves where both are cut off.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
Wide = NDArray[np.float64]

DAMPING = 1e-3  # of the mean variance, added to each
STEPS = 64  # in which units go, at most: then several at once
SWEEPS = 6  # of targets moving behind a clamp


@dataclass(slots=True)
class Moments:
    """Sums over vectors [count, K]: of x and of x x^T, from which mean and covariance follow.

    Vectors wait until there are about as many as they are long: products are K x K values.
    """

    count: int = 0
    sums: Wide = field(default_factory=lambda: np.zeros(0))
    waiting: list[Values] = field(default_factory=list)
    added: Wide = field(default_factory=lambda: np.zeros((0, 0)))

    def add(self, x: Values) -> None:
        """Add vectors; products of some of them are added up in float32."""
        if not self.count:
            self.sums, self.added = np.zeros(x.shape[1]), np.zeros((x.shape[1],) * 2)
        self.count += len(x)
        self.sums += x.sum(0, dtype=np.float64)
        self.waiting.append(x)
        if sum(len(part) for part in self.waiting) >= 2 * x.shape[1]:
            self._flush()

    @np.errstate(over="ignore", invalid="ignore")  # callers ask is_finite
    def _flush(self) -> None:
        if self.waiting:
            whole = np.concatenate(self.waiting)
            self.added += whole.T @ whole
            self.waiting = []

    @property
    def products(self) -> Wide:
        """[K, K]."""
        self._flush()
        return self.added

    @property
    def mean(self) -> Wide:
        """[K]."""
        return self.sums / max(self.count, 1)

    @property
    def covariance(self) -> Wide:
        """[K, K]; of few vectors those of different values are lowered (`grams.Seen.trusted`)."""
        size = len(self.sums)
        found = self.products / max(self.count, 1) - np.outer(self.mean, self.mean)
        variance = np.maximum(np.diag(found), 0)
        found *= 1 - size / (2 * (size + self.count))
        found[np.arange(size), np.arange(size)] = variance
        return found

    @property
    def is_finite(self) -> bool:
        """Whether there are vectors, and no NaN, infinities or overflows in them."""
        return self.count > 0 and bool(np.isfinite(self.products).all())


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """What reads units: rows [O, K], covariance [K, K] of what they meet, at [units, taps].

    at: the columns of each unit. weight: how much its squared errors count.
    """

    rows: Wide
    covariance: Wide
    at: NDArray[np.intp]
    weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Elimination:
    """Units in the order in which they go; costs: squared errors when so many are gone.

    rows: for each number of units that was asked for, the rows of each reader.
    """

    order: NDArray[np.intp]
    costs: Wide
    rows: dict[int, list[Values]]


@dataclass(slots=True)
class _State:
    rows: Wide
    inverse: Wide
    at: NDArray[np.intp]
    weight: float

    def costs(self, units: NDArray[np.intp]) -> Wide:
        at = self.at[units]
        own = self.inverse[at[:, :, None], at[:, None, :]]
        rows = self.rows[:, at]  # [O, units, taps]
        if at.shape[1] == 1:
            squares = np.square(rows[:, :, 0]).sum(0)
            return np.asarray(self.weight * squares / own[:, 0, 0])
        squares = np.matmul(rows.transpose(1, 2, 0), rows.transpose(1, 0, 2))
        return np.asarray(self.weight * np.einsum("ubc,ucb->u", squares, np.linalg.inv(own)))

    def remove(self, unit: int) -> None:
        at = self.at[unit]
        made = np.linalg.solve(self.inverse[np.ix_(at, at)], self.inverse[at])
        self.rows -= self.rows[:, at] @ made
        self.inverse -= self.inverse[:, at] @ made
        self.rows[:, at] = 0
        self.inverse[at] = 0
        self.inverse[:, at] = 0


def eliminated(
    readers: Sequence[Reader],
    *,
    order: NDArray[np.intp] | None = None,
    stops: Collection[int] = (),
    damping: float = DAMPING,
) -> Elimination:
    """Remove units one after the other, the cheapest first, or in the order that is given.

    stops: numbers of units after which the rows are wanted; it ends with the last of them (all but
    one unit without any). Units that stay to the end come last in the order, by number. Raises
    ValueError without readers, or where they do not have as many units.
    """
    counts = {len(reader.at) for reader in readers}
    if len(counts) != 1:
        raise ValueError(f"readers of one number of units are wanted, not {sorted(counts)}")
    (count,) = counts
    states = [
        _State(r.rows.copy(), _inverse(r.covariance, damping), r.at, r.weight) for r in readers
    ]
    most = max(stops, default=count - 1)
    left = np.arange(count)
    gone, costs = list[int](), [0.0]
    found: dict[int, list[Values]] = {}
    pace = -(-count // STEPS)
    while len(gone) < most:
        price = np.sum([state.costs(left) for state in states], axis=0)
        room = min([s - len(gone) for s in stops if s > len(gone)], default=pace)
        if order is None:
            take = left[np.argsort(price, kind="stable")[: min(pace, room, most - len(gone))]]
        else:
            take = order[len(gone) : len(gone) + min(pace, room)]
        for unit in take.tolist():
            here = float(np.sum([state.costs(np.array([unit])) for state in states]))
            for state in states:
                state.remove(unit)
            gone.append(unit)
            costs.append(costs[-1] + max(here, 0.0))
        left = np.setdiff1d(left, take)
        if len(gone) in stops:
            found[len(gone)] = [state.rows.astype(np.float32) for state in states]
    rest = left if order is None else order[len(gone) :]
    return Elimination(np.concatenate([np.array(gone, np.intp), rest]), np.array(costs), found)


def _inverse(covariance: Wide, damping: float) -> Wide:
    size = len(covariance)
    added = damping * (float(np.trace(covariance)) / max(size, 1) or 1.0)
    eye = np.eye(size)
    for power in range(8):
        try:
            factor = np.linalg.cholesky(covariance + added * 10.0**power * eye)
        except np.linalg.LinAlgError:
            continue
        half = np.linalg.solve(factor, eye)
        return np.asarray(half.T @ half)
    raise ValueError("a covariance that is not positive semidefinite")


@dataclass(frozen=True, slots=True, eq=False)
class Aim:
    """What a layer should give: values [count, O] before what is added to them and a clamp.

    beside: what is added [count, O]; clamp: (lowest, greatest) of the sum, None without.
    """

    values: Values
    beside: Values | None = None
    clamp: tuple[float, float] | None = None

    def part(self, at: slice) -> Aim:
        """Of some of the vectors."""
        beside = None if self.beside is None else self.beside[at]
        return Aim(self.values[at], beside, self.clamp)

    def moved(self, made: Values) -> Values:
        """The target that asks for nothing where it and what is made are cut off alike."""
        if self.clamp is None:
            return self.values
        lowest, greatest = np.float32(self.clamp[0]), np.float32(self.clamp[1])
        beside = np.float32(0) if self.beside is None else self.beside
        aim, now = self.values + beside, made + beside
        aim = np.where(aim <= lowest, np.minimum(now, lowest), aim)
        return np.asarray(np.where(aim >= greatest, np.maximum(now, greatest), aim) - beside)

    def error(self, made: Values) -> float:
        """The squared error of what is left behind the clamp."""
        return float(np.square(self.moved(made) - made, dtype=np.float64).sum())


class Fitting:
    """Rows W' and a bias b' so that W' x + b' gets near an aim, from rows that were near before.

    x: [count, K], without the columns that are gone. ridge: how much a change of the rows costs, as
    a share of the variances of x. Few vectors are believed less: see `Moments.covariance`.
    """

    def __init__(self, rows: Values, x: Values, aim: Aim, *, has_bias: bool = True) -> None:
        self.rows, self.x, self.aim, self.has_bias = rows, x, aim, has_bias
        moments = Moments()
        moments.add(x)
        if not has_bias:
            moments.sums[:] = 0
        self.mean = moments.mean.astype(np.float32)
        self.covariance = moments.covariance

    @np.errstate(over="ignore", invalid="ignore")  # the error of such rows is none that wins
    def solve(self, ridge: float, sweeps: int = SWEEPS) -> tuple[Values, Values]:
        """The rows [O, K] and the bias [O] (zeros where it has none)."""
        variance = np.diag(self.covariance)
        added = ridge * (variance + variance.mean()) / 2
        floor = 1e-9 * max(float(variance.max(initial=0)), 1e-25)  # its inverse is a float32
        inverse = np.linalg.inv(self.covariance + np.diag(np.maximum(added, floor)))
        small = inverse.astype(np.float32)
        centred = self.x - self.mean
        base = centred @ self.rows.T
        target = self.aim.values
        for left in range(sweeps if self.aim.clamp is not None else 1)[::-1]:
            error = target - base
            bias = error.mean(0) if self.has_bias else np.zeros(len(self.rows), np.float32)
            change = ((error - bias).T @ centred / np.float32(len(centred))) @ small
            if left:
                target = self.aim.moved(base + centred @ change.T + bias)
        rows = self.rows + change
        return rows, np.asarray(bias - rows @ self.mean, np.float32)
