"""Calibration alone: the statistics that a recipe wants of a model, kept in a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from onnxq.calibration import load_calibration, save_calibration
from onnxq.core import Note, Pass
from onnxq.data import ImageOptions, Spec
from onnxq.demands import why_not
from onnxq.errors import BudgetError, RecipeError
from onnxq.files import check_writable
from onnxq.job import Job, Progress
from onnxq.leftovers import temporary_folder
from onnxq.loading import ModelLike, PathLike, load, name_of
from onnxq.passes.placement import RULE
from onnxq.passes.quantize_static import QuantizeStatic
from onnxq.plausibility import doubts
from onnxq.preconditions import blames_the_model, require_outputs
from onnxq.recipes import load_recipe, plan, wants
from onnxq.report import SCHEMA, print_rows, to_json
from onnxq.sampling import samples_for, split
from onnxq.settings import Settings, configured
from onnxq.statistics import Histogram, MinMax, Statistic
from onnxq.targets import load_target
from onnxq.workflow import SYNTHETIC_RANGES

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What `calibrate` kept: ranges (least, greatest value) of tensors, by name."""

    model: str
    output: str
    recipe: str
    target: str
    samples: str
    ranges: Mapping[str, tuple[float, float]]
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]

    def to_json(self) -> str:
        """What was kept, for machines."""
        return to_json({"schema": SCHEMA, **asdict(self)})

    def print_to(self, console: Console) -> None:
        """Print what was kept, for people."""
        console.print(f"{self.model} -> {self.output}   recipe {self.recipe}, target {self.target}")
        least = min(lo for lo, _ in self.ranges.values())
        greatest = max(hi for _, hi in self.ranges.values())
        rows = [
            ("samples", self.samples),
            ("tensors", f"{len(self.ranges)}, values from {least:.4g} to {greatest:.4g}"),
            ("next", f"onnxq optimize {self.model} OUTPUT --calibration {self.output} ..."),
        ]
        print_rows(console, rows)


def calibrate(
    model: ModelLike,
    output: PathLike,
    *,
    data: Spec | None = None,
    images: ImageOptions | None = None,
    recipe: str = "auto",
    target: str = "ort-cpu",
    settings: Settings | None = None,
    layers: Sequence[str] = (),
    progress: Progress | None = None,
) -> Calibrated:
    """Observe what the recipe's passes want to know, and write it to `output` (.npz).

    The samples are those that `optimize` would calibrate on, of the same `data` and `images`; with
    this file and the same recipe and target it writes the same bytes as without. Of a recipe that
    chooses, what the first candidate wants is kept, and `optimize` adds what others want.

    Raises OnnxqError: RecipeError when the recipe calibrates nothing, BudgetError when there is
    nothing in the model to calibrate, and as `optimize` does.
    """
    check_writable(output)
    job, edited = Job(progress, layers), load(model)
    edited = edited.copy() if edited is model else edited
    chosen, aim = configured(load_recipe(recipe), settings, layers), load_target(target)
    fitted = [one for one in chosen.candidates if wants(one, "calibration")]
    if not fitted:
        raise RecipeError(f"recipe {chosen.name} has no pass that calibrates; try --recipe int8")
    chosen = fitted[0]  # the others complete the file
    require_outputs(edited, name_of(model))
    with (
        blames_the_model(model, name_of(model), chosen.name),
        temporary_folder() as folder,
    ):
        samples = samples_for(edited, data, images)
        job.warnings += doubts(edited, samples)
        job.warnings += [SYNTHETIC_RANGES] if data is None else []
        fitting, _ = split(samples)
        file = folder / "calibration.npz"
        pipeline = plan(
            chosen, aim, fitting, calibration=file, progress=job.sample_progress(len(fitting))
        )
        notes: list[Note] = []
        names = [pass_.name for pass_ in pipeline.passes]
        end = names.index(RULE) + 1 if RULE in names else len(names)  # what follows sees nothing
        for pass_ in pipeline.passes[:end]:  # what comes before decides what there is to observe
            notes += job.run(_observing(pass_), edited)
            if file.exists():
                break
        else:
            raise BudgetError(f"nothing to calibrate: {why_not(notes, edited)}; no file written")
        found, meta = load_calibration(file)
    save_calibration(output, found, meta=meta)
    return Calibrated(
        model=name_of(model),
        output=os.fspath(output),
        recipe=chosen.name,
        target=aim.name,
        samples=f"{len(fitting)} of {samples.description}",
        ranges=_ranges(found),
        warnings=tuple(job.warnings),
        seconds=job.seconds,
    )


def _observing(pass_: Pass) -> Pass:
    """The pass without a search for ranges, which is no part of what is kept."""
    if isinstance(pass_, QuantizeStatic) and pass_.range == "output":
        return replace(pass_, range="careful")
    return pass_


def _ranges(statistics: Mapping[str, Statistic]) -> dict[str, tuple[float, float]]:
    return {
        name: (s.lo, s.hi) for name, s in statistics.items() if isinstance(s, MinMax | Histogram)
    }
