"""What `optimize --dry-run` shows: the plan, and what the samples look like."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from onnxq.data import Samples, Spec, open_samples
from onnxq.loading import ModelLike, load
from onnxq.recipes import load_recipe, plan, wants
from onnxq.report import SCHEMA, to_json
from onnxq.synthetic import synthetic_samples
from onnxq.targets import load_target
from onnxq.workflow import NO_SAMPLES, SYNTHETIC

if TYPE_CHECKING:
    from rich.console import Console

LOOKED_AT = 16  # samples whose ranges are shown


@dataclass(frozen=True, slots=True)
class SeenInput:
    """One input over the first samples: type, shapes, least and greatest value."""

    name: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    lo: float
    hi: float


@dataclass(frozen=True, slots=True)
class Preview:
    """The passes that would run, with their options, and the samples that would be fed."""

    passes: tuple[str, ...]
    samples: str
    inputs: tuple[SeenInput, ...]

    def to_json(self) -> str:
        """The preview for machines."""
        return to_json({"schema": SCHEMA, **asdict(self)})

    def print_to(self, console: Console) -> None:
        """Print the preview for people."""
        console.print("would run:")
        for text in self.passes:
            console.print(f"  {text}")
        console.print(f"on {self.samples}:")
        for seen in self.inputs:
            shapes = ", ".join(str(list(shape)) for shape in seen.shapes)
            console.print(
                f"  {seen.name} {seen.dtype} {shapes}, values {seen.lo:.4g} to {seen.hi:.4g}"
            )
        console.print("nothing was written")


def preview(
    model: ModelLike, *, data: Spec | None = None, recipe: str = "int8", target: str = "ort-cpu"
) -> Preview:
    """Plan, and look at the first samples; nothing runs and nothing is written.

    Raises OnnxqError as `optimize` does for files, samples and names that cannot be used.
    """
    loaded, chosen, aim = load(model), load_recipe(recipe), load_target(target)
    if data is not None:
        samples = open_samples(data, loaded)
    else:
        runs = wants(chosen, "samples")
        samples = synthetic_samples(loaded, SYNTHETIC) if runs else NO_SAMPLES
    pipeline = plan(chosen, aim, samples)
    return Preview(tuple(_told(p) for p in pipeline.passes), samples.description, _seen(samples))


def _told(pass_: object) -> str:
    options = {
        name: getattr(pass_, name)
        for name in getattr(pass_, "__dataclass_fields__", {})
        if name not in ("samples", "progress", "inner", "limit")
    }
    shown = ", ".join(f"{k}={getattr(v, 'name', v)}" for k, v in options.items() if v is not None)
    return f"{pass_.name}({shown})" if shown else str(pass_.name)  # type: ignore[attr-defined]


def _seen(samples: Samples) -> tuple[SeenInput, ...]:
    found: dict[str, SeenInput] = {}
    for feed in samples.take(LOOKED_AT):
        for name, array in feed.items():
            lo, hi = (float(array.min()), float(array.max())) if array.size else (np.nan, np.nan)
            old = found.get(name)
            shapes = (
                (array.shape,) if old is None else tuple(dict.fromkeys((*old.shapes, array.shape)))
            )
            if old is not None:
                lo, hi = min(lo, old.lo), max(hi, old.hi)
            found[name] = SeenInput(name, str(array.dtype), shapes, lo, hi)
    return tuple(found.values())
