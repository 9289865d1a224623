"""inspect, compare and check: look at models without changing them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onnxq.cli.common import (
    data_option,
    output_options,
    progress_bar,
    show,
    sqnr_option,
    target_option,
)
from onnxq.cli.imaging import image_options

if TYPE_CHECKING:
    from onnxq.data import ImageOptions


@click.command()
@click.argument("model")
@target_option
@output_options
def inspect(model: str, *, target: str, json_file: str | None, quiet: bool) -> None:
    """Say what MODEL is made of, and what a target could quantize.

    \b
    onnxq inspect model.onnx
    onnxq inspect model.onnx --target generic --json -
    """
    from onnxq import looking

    show(looking.inspect(model, target=target), json_file, quiet=quiet)


@click.command()
@click.argument("original")
@click.argument("result")
@data_option
@sqnr_option("Exit 1 if an output's signal to noise ratio is below this.")
@image_options
@output_options
def compare(
    original: str,
    result: str,
    *,
    data: str | None,
    images: ImageOptions | None,
    min_sqnr: float | None,
    json_file: str | None,
    quiet: bool,
) -> None:
    """Compare RESULT with ORIGINAL: outputs, and layers by name.

    \b
    onnxq compare model.onnx small.onnx --data samples.npz
    """
    from onnxq import looking

    with progress_bar(quiet=quiet) as progress:
        comparison = looking.compare(original, result, data=data, images=images, progress=progress)
    show(comparison, json_file, quiet=quiet)
    if min_sqnr is not None and comparison.fidelity.sqnr_db < min_sqnr:
        from onnxq.errors import BudgetError

        raise BudgetError(f"{comparison.fidelity.sqnr_db:.1f} dB is below --min-sqnr {min_sqnr:g}")


@click.command()
@click.argument("model")
@target_option
@output_options
def check(model: str, *, target: str, json_file: str | None, quiet: bool) -> None:
    """Hold MODEL against what a target can run.

    Each violation with node, rule and source; exit 1 if there is one.

    \b
    onnxq check small.onnx --target tensorrt
    onnxq check small.onnx --target tflite-int8 --json -
    """
    from onnxq.lint import check as run

    found = run(model, target=target)
    show(found, json_file, quiet=quiet)
    if not found.is_clean:
        raise click.exceptions.Exit(1)
