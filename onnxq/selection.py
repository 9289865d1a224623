"""Recipes run on a model: one as it is told, or the best of several by what they turn out to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from onnxq import runtime
from onnxq.attempts import Attempt, Setting, attempt
from onnxq.choosing import BUDGET, SLOWER, Candidate, Objective, choose, judged
from onnxq.core import Note, Pass
from onnxq.demands import NOTHING, NOTHING_PRUNED, missed
from onnxq.errors import BudgetError, ModelError, OnnxqError, RecipeError
from onnxq.fingerprint import fingerprint
from onnxq.leftovers import temporary_folder
from onnxq.loading import size_of
from onnxq.model import Model
from onnxq.recipes import Recipe, plan, wants
from onnxq.runtime import Latency
from onnxq.targets import is_here

NEEDS_DATA, SAME = "needs --data", "the same as"
SECONDS = 3.0  # for timing one result against the original


@dataclass(frozen=True, slots=True, eq=False)
class Selected:
    """What is handed over; latency: None where it cannot be timed. candidates: what was tried."""

    attempt: Attempt
    latency: Latency | None
    candidates: tuple[Candidate, ...] = ()


def select(
    recipe: Recipe,
    model: Model,
    setting: Setting,
    *,
    objective: Objective,
    min_sqnr: float | None,
    has_data: bool,
) -> Selected:
    """Run a recipe on the model, or all that it chooses from; see `run_one` and `choose_one`."""
    if not recipe.choose:
        return run_one(recipe, model, setting, min_sqnr)
    return choose_one(
        recipe, model, setting, objective=objective, min_sqnr=min_sqnr, has_data=has_data
    )


def run_one(recipe: Recipe, model: Model, setting: Setting, min_sqnr: float | None) -> Selected:
    """Run a recipe on the model, in place.

    Raises BudgetError as `attempt` does, and when min_sqnr (dB) is missed.
    """
    notes = _rewrite(model, _planned(recipe, setting), setting)
    done = attempt(recipe, model, notes, setting)
    if min_sqnr is not None and done.fidelity and done.fidelity.sqnr_db < min_sqnr:
        raise missed(setting.original, done.model, setting.held, done.fidelity.sqnr_db, min_sqnr)
    return Selected(done, _timed(done.model, setting, SECONDS))


@dataclass(slots=True, eq=False)
class _Try:
    """One recipe of a choice on its way."""

    candidate: Candidate
    done: Attempt | None = None
    latency: Latency | None = None


def choose_one(
    recipe: Recipe,
    model: Model,
    setting: Setting,
    *,
    objective: Objective,
    min_sqnr: float | None,
    has_data: bool,
) -> Selected:
    """Run all recipes that the recipe chooses from, each on a copy, and take the best.

    Where the target is another machine nothing is timed, and the order of the recipes counts.

    Raises BudgetError when none of them loses little enough and is not slower than the original.
    """
    budget = BUDGET if min_sqnr is None else min_sqnr
    tries = _tried(recipe, model, setting, has_data=has_data)
    for one in tries:
        one.candidate = judged(one.candidate, budget)
    _time(tries, setting, SECONDS)
    if not any(one.candidate.is_open for one in tries):  # other work on the machine, maybe
        for one in tries:
            if one.candidate.verdict == SLOWER:
                one.candidate = replace(one.candidate, verdict="")
        if not setting.allow_unchanged:
            _time(tries, setting, 2 * SECONDS)
    best = choose([one.candidate for one in tries], objective)
    if best is None:
        raise _none_of(recipe, tries, setting, budget)
    done, latency = tries[best].done, tries[best].latency
    assert done is not None
    told = [one.candidate for one in tries]
    told[best] = replace(told[best], verdict="chosen")
    return Selected(done, latency, tuple(told))


def _tried(recipe: Recipe, model: Model, setting: Setting, *, has_data: bool) -> list[_Try]:
    """A result of each recipe, or why there is none; what all begin with is done once.

    One that stumbles is out, and the others go on: what is wrong with all of them is an error.
    """
    tries = []
    planned: dict[int, tuple[Pass, ...]] = {}  # by place: files of two folders may have one name
    for number, one in enumerate(recipe.choose):
        verdict = ""
        if wants(one, "samples") and not has_data:
            verdict = NEEDS_DATA
        else:
            try:
                planned[number] = _planned(one, setting)
            except RecipeError as e:
                verdict = str(e)
        tries.append(_Try(Candidate(one.name, verdict=verdict)))
    with temporary_folder() as folder:
        seen: dict[str, int] = {}
        errors: list[OnnxqError] = []
        branches = _Branches(_told_apart(planned, folder), model, setting)
        for number in planned:
            this = tries[number]
            try:
                made, notes = branches.result(number)
                earlier = seen.setdefault(fingerprint(made), number)
                if earlier != number:
                    verdict = f"{SAME} {recipe.choose[earlier].name}"
                    this.candidate = replace(this.candidate, verdict=verdict)
                    continue
                _judge(this, recipe.choose[number], made, notes, setting)
            except (RecipeError, ModelError) as e:
                errors.append(e)
                this.candidate = replace(this.candidate, verdict=str(e))
    if errors and not any(this.done for this in tries):
        raise errors[0]
    return tries


def _told_apart(
    planned: Mapping[int, tuple[Pass, ...]], folder: Path
) -> dict[int, tuple[Pass, ...]]:
    """Give candidates that calibrate another model than the first one files in the folder.

    Which model it is depends on the passes before (a newer opset, say); those with the same ones
    share what was seen, and the first one's is kept where the caller wants it.
    """
    models: list[tuple[Pass, ...]] = []
    result = {}
    for number, passes in planned.items():
        before = tuple(takewhile(lambda pass_: not _calibrates(pass_), passes))
        result[number] = passes
        if len(before) < len(passes):
            if before not in models:
                models.append(before)
            if place := models.index(before):
                file = folder / f"{place}.npz"
                result[number] = tuple(
                    replace(cast(Any, p), calibration=file) if _calibrates(p) else p for p in passes
                )
    return result


def _calibrates(pass_: Pass) -> bool:
    return is_dataclass(pass_) and any(f.name == "calibration" for f in fields(pass_))


def _rewrite(model: Model, passes: Sequence[Pass], setting: Setting) -> list[Note]:
    return [note for pass_ in passes for note in setting.job.run(pass_, model)]


def _judge(
    this: _Try, recipe: Recipe, model: Model, notes: Sequence[Note], setting: Setting
) -> None:
    try:
        this.done = done = attempt(recipe, model, notes, setting)
    except BudgetError as e:
        this.candidate = replace(this.candidate, verdict=str(e))
        return
    this.candidate = replace(
        this.candidate,
        size_bytes=size_of(model, model),
        sqnr_db=done.fidelity.sqnr_db if done.fidelity else None,
    )


def _planned(recipe: Recipe, setting: Setting) -> tuple[Pass, ...]:
    return plan(
        recipe, setting.target, setting.fitting, calibration=setting.calibration,
        progress=setting.job.sample_progress(len(setting.fitting)), crew=setting.job.crew(),
    ).passes  # fmt: skip


class _Branches:
    """Runs pipelines on one model; what some of them begin with is done once."""

    def __init__(
        self, pipelines: Mapping[int, tuple[Pass, ...]], model: Model, setting: Setting
    ) -> None:
        self.todo, self.setting = dict(pipelines), setting
        self.made: list[tuple[tuple[Pass, ...], Model, list[Note]]] = [((), model, [])]

    def result(self, number: int) -> tuple[Model, list[Note]]:
        """What one pipeline makes of a copy of the model, each of them once."""
        passes = self.todo.pop(number)
        self.made = [one for one in self.made if not one[0] or self._is_wanted(one[0], passes)]
        done, model, notes = max(
            (one for one in self.made if _common(one[0], passes) == len(one[0])),
            key=lambda one: len(one[0]),
        )
        model, notes = model.copy(), list(notes)
        for at in self._forks(passes):
            if at > len(done):
                notes += _rewrite(model, passes[len(done) : at], self.setting)
                done = passes[:at]
                self.made.append((done, model, list(notes)))
                model = model.copy()
        return model, notes + _rewrite(model, passes[len(done) :], self.setting)

    def _forks(self, passes: tuple[Pass, ...]) -> list[int]:
        """Where pipelines that are still to run leave this one."""
        return sorted({_common(passes, other) for other in self.todo.values()})

    def _is_wanted(self, done: tuple[Pass, ...], passes: tuple[Pass, ...]) -> bool:
        return any(_common(done, p) == len(done) for p in (passes, *self.todo.values()))


def _common(one: tuple[Pass, ...], other: tuple[Pass, ...]) -> int:
    """How many passes both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _time(tries: Sequence[_Try], setting: Setting, seconds: float) -> None:
    for this in tries:
        if this.candidate.is_open and this.done is not None:
            this.latency = _timed(this.done.model, setting, seconds)
            ratio = this.latency.ratio if this.latency else None
            this.candidate = judged(replace(this.candidate, time_ratio=ratio), float("-inf"))


def _timed(model: Model, setting: Setting, seconds: float) -> Latency | None:
    """Time against the original, where the target's machine is of this one's kind."""
    if not len(setting.held) or not is_here(setting.target):
        return None
    with setting.job.stage("time"):
        return runtime.latency(setting.original, model, setting.feed, seconds=seconds)


def _none_of(
    recipe: Recipe, tries: Sequence[_Try], setting: Setting, min_sqnr: float
) -> BudgetError:
    """Why none will do; of those that lose too much, the layers to blame in the best."""
    verdicts = [one.candidate.verdict for one in tries]
    reasons = [v for v in verdicts if v != NEEDS_DATA and not v.startswith(SAME)]
    if reasons and all(reason.startswith((NOTHING, NOTHING_PRUNED)) for reason in reasons):
        hint = "; with --data more can be tried" if NEEDS_DATA in verdicts else ""
        return BudgetError(reasons[0] + hint)
    told = "; ".join(f"{one.candidate.recipe}: {one.candidate.told()}" for one in tries)
    lossy = [one for one in tries if one.done and one.candidate.verdict != SLOWER]
    if not lossy:
        return BudgetError(f"nothing that {recipe.name} tried will do, nothing was written: {told}")
    best = max(lossy, key=lambda one: one.candidate.sqnr_db or 0.0)
    assert best.done is not None
    reached = best.candidate.sqnr_db or 0.0
    blamed = missed(setting.original, best.done.model, setting.held, reached, min_sqnr)
    return BudgetError(f"{blamed} ({told})")
