"""optimize and calibrate: the main job, and its slow half alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onnxq.cli.common import (
    data_option,
    memory_option,
    output_options,
    progress_bar,
    recipe_option,
    show,
    sqnr_option,
    target_option,
    warn,
    write_text,
)
from onnxq.cli.imaging import image_options
from onnxq.cli.setting import setting_options

if TYPE_CHECKING:
    from onnxq.choosing import Objective
    from onnxq.data import ImageOptions
    from onnxq.passes.integer_io import Type
    from onnxq.settings import Settings


@click.command()
@click.argument("model")
@click.argument("output")
@data_option
@recipe_option
@target_option
@click.option(
    "--calibration", metavar="FILE",
    help="Keep what was seen of the activations (.npz); used again if the file is there.",
)  # fmt: skip
@click.option(
    "--objective", type=click.Choice(["speed", "size"]), default="speed", show_default=True,
    help="What recipe auto looks at first; never is the result slower than the original.",
)  # fmt: skip
@sqnr_option(
    "Write nothing (exit 1) if an output's signal to noise ratio is below this; recipe auto "
    "chooses among what reaches it.  [default: 20 for auto]"
)
@click.option(
    "--integer-io",
    type=click.Choice(["auto", "int8", "uint8"]),
    is_flag=False,
    flag_value="auto",
    help="Integer inputs and outputs, of a sign or (auto) as the layers inside; scales go into the "
    "model's metadata and OUTPUT.io.json.",
)
@click.option(
    "--header",
    is_flag=True,
    help="With --integer-io: a C header beside OUTPUT, with scales, shapes and conversions.",
)
@click.option(
    "--save-plan", metavar="FILE.toml",
    help="Write the recipe that made the result; --recipe FILE.toml makes the same one again.",
)  # fmt: skip
@click.option(
    "--dry-run", is_flag=True, help="Print the plan and what the samples look like; no output."
)
@click.option(
    "--validate/--no-validate", default=None,
    help="Compare with the original and time both, or not.  [default: compare; not if a clean-up "
    "would otherwise never hold the weights in memory, and they take over 1 GiB]",
)  # fmt: skip
@click.option(
    "--allow-unchanged",
    is_flag=True,
    help="Write the model even if nothing was quantized or pruned.",
)
@click.option(
    "--requantize", is_flag=True,
    help="Recover floats from a model that is quantized already, and begin with them; ranges of "
    "activations are kept unless there is --data.",
)  # fmt: skip
@memory_option
@setting_options
@image_options
@output_options
def optimize(
    model: str,
    output: str,
    *,
    data: str | None,
    images: ImageOptions | None,
    recipe: str,
    target: str,
    settings: Settings,
    layers: tuple[str, ...],
    calibration: str | None,
    objective: Objective,
    min_sqnr: float | None,
    integer_io: Type | None,
    header: bool,
    save_plan: str | None,
    dry_run: bool,
    validate: bool | None,
    allow_unchanged: bool,
    requantize: bool,
    max_memory: int | None,
    json_file: str | None,
    quiet: bool,
) -> None:
    """Optimize MODEL and write OUTPUT (which may be the same file).

    \b
    onnxq optimize model.onnx small.onnx --data samples.npz
    onnxq optimize model.onnx small.onnx --data folder/ --min-sqnr 20 --json report.json
    onnxq optimize model.onnx small.onnx --recipe int4-weights --group-size 64 --range hqq
    onnxq optimize model.onnx small.onnx --data samples.npz --layer first=float --layer last=int16
    onnxq optimize model.onnx micro.onnx --data samples.npz --integer-io int8 --header
    onnxq optimize model.onnx sparse.onnx --data samples.npz --recipe sparse --prune 60%
    onnxq optimize model.onnx slim.onnx --data samples.npz --recipe int8 --prune-channels 0.3
    onnxq optimize model.onnx clean.onnx --recipe cleanup
    onnxq optimize int8.onnx small.onnx --requantize --recipe int4-weights
    """
    if dry_run:
        from onnxq.preview import preview

        found = preview(
            model, data=data, images=images, recipe=recipe, target=target, settings=settings,
            layers=layers, integer_io=integer_io, requantize=requantize,
        )  # fmt: skip
        show(found, json_file, quiet=quiet)
        return
    from onnxq import workflow

    with progress_bar(quiet=quiet) as progress:
        report = workflow.optimize(
            model, output, data=data, images=images, recipe=recipe, target=target,
            settings=settings, layers=layers, integer_io=integer_io, header=header,
            calibration=calibration, objective=objective, min_sqnr=min_sqnr, validate=validate,
            allow_unchanged=allow_unchanged, requantize=requantize, max_memory=max_memory,
            progress=progress,
        )  # fmt: skip
    if save_plan is not None:
        write_text(save_plan, report.plan.to_toml())
    warn(report.warnings, quiet=quiet)
    show(report, json_file, quiet=quiet)


@click.command()
@click.argument("model")
@click.argument("output", metavar="STATS.npz")
@data_option
@recipe_option
@target_option
@setting_options
@image_options
@output_options
def calibrate(
    model: str,
    output: str,
    *,
    data: str | None,
    images: ImageOptions | None,
    recipe: str,
    target: str,
    settings: Settings,
    layers: tuple[str, ...],
    json_file: str | None,
    quiet: bool,
) -> None:
    """Keep in STATS.npz what a recipe wants to know of activations.

    optimize --calibration STATS.npz then gives the same result as without, and sooner; ranges and
    options of the recipe can be tried without running the samples again.

    \b
    onnxq calibrate model.onnx stats.npz --data samples.npz
    onnxq optimize model.onnx small.onnx --data samples.npz --calibration stats.npz
    """
    from onnxq.precalibration import calibrate as run

    with progress_bar(quiet=quiet) as progress:
        done = run(
            model, output, data=data, images=images, recipe=recipe, target=target,
            settings=settings, layers=layers, progress=progress,
        )  # fmt: skip
    warn(done.warnings, quiet=quiet)
    show(done, json_file, quiet=quiet)
