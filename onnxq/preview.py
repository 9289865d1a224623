"""What `optimize --dry-run` shows: the plan, and what the samples look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from onnxq.core import Pipeline
from onnxq.data import ImageOptions, Spec
from onnxq.interfaces import with_integer_io
from onnxq.loading import ModelLike, load
from onnxq.passes.dequantize_model import DequantizeModel
from onnxq.passes.integer_io import Type
from onnxq.plausibility import SeenInput, first, found, look
from onnxq.recipes import load_recipe, plans, wants
from onnxq.report import SCHEMA, to_json
from onnxq.sampling import NO_SAMPLES, samples_for
from onnxq.settings import Settings, configured
from onnxq.targets import load_target

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Preview:
    """The passes that would run, of each recipe that would be tried, and what would be fed.

    warnings: recipes that the target cannot run, and where the samples look unlike what the graph
    expects.
    """

    passes: Mapping[str, tuple[str, ...]]
    samples: str
    inputs: tuple[SeenInput, ...]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The preview for machines."""
        return to_json({"schema": SCHEMA, **asdict(self)})

    def print_to(self, console: Console) -> None:
        """Print the preview for people."""
        for recipe, passes in self.passes.items():
            console.print(f"would run {recipe}:")
            for text in passes:
                console.print(f"  {text}")
        console.print(f"on {self.samples}:")
        for seen in self.inputs:
            shapes = ", ".join(str(list(shape)) for shape in seen.shapes)
            console.print(
                f"  {seen.name} {seen.dtype} {shapes}, values {seen.lo:.4g} to {seen.hi:.4g}, "
                f"mean {seen.mean:.4g}, std {seen.std:.4g}"
            )
        for warning in self.warnings:
            console.print(f"warning: {warning}")
        console.print("nothing was written")


def preview(
    model: ModelLike,
    *,
    data: Spec | None = None,
    images: ImageOptions | None = None,
    recipe: str = "auto",
    target: str = "ort-cpu",
    settings: Settings | None = None,
    layers: Sequence[str] = (),
    integer_io: Type | None = None,
    requantize: bool = False,
) -> Preview:
    """Plan, and look at the first samples; nothing runs and nothing is written.

    Raises OnnxqError as `optimize` does for files, samples and names that cannot be used.
    """
    loaded, aim = load(model), load_target(target)
    chosen = with_integer_io(configured(load_recipe(recipe), settings, layers), integer_io)
    samples = NO_SAMPLES
    if data is not None or images is not None or wants(chosen, "samples"):
        samples = samples_for(loaded, data, images)
    told, warnings = dict[str, tuple[str, ...]](), list[str]()
    for name, planned in plans(chosen, aim, samples).items():
        if isinstance(planned, Pipeline):
            told[name] = tuple(map(_told, planned.passes))
        else:
            warnings.append(f"{name} is left out: {planned}")
    feeds = first(samples)
    warnings += [] if samples.synthetic else found(loaded, feeds)
    first_of_all = (_told(DequantizeModel(ranges=data is None)),) if requantize else ()
    told = {name: (*first_of_all, *passes) for name, passes in told.items()}
    return Preview(told, samples.description, look(feeds) if feeds else (), tuple(warnings))


def _told(pass_: object) -> str:
    options = {
        name: getattr(pass_, name)
        for name in getattr(pass_, "__dataclass_fields__", {})
        if name not in ("samples", "progress", "inner", "limit", "rule")
    }
    shown = ", ".join(f"{k}={getattr(v, 'name', v)}" for k, v in options.items() if v is not None)
    return f"{pass_.name}({shown})" if shown else str(pass_.name)  # type: ignore[attr-defined]
