"""inspect and compare: look at models without changing them."""

from __future__ import annotations

import click

from onnxq.cli.common import (
    data_option,
    output_options,
    progress_bar,
    show,
    sqnr_option,
    target_option,
)


@click.command()
@click.argument("model")
@target_option
@output_options
def inspect(model: str, *, target: str, json_file: str | None, quiet: bool) -> None:
    """Say what MODEL is made of, and what a target could quantize of it.

    \b
    onnxq inspect model.onnx
    onnxq inspect model.onnx --target generic --json -
    """
    from onnxq import workflow

    show(workflow.inspect(model, target=target), json_file, quiet=quiet)


@click.command()
@click.argument("original")
@click.argument("result")
@data_option
@sqnr_option("Exit 1 if an output's signal to noise ratio is below this.")
@output_options
def compare(
    original: str,
    result: str,
    *,
    data: str | None,
    min_sqnr: float | None,
    json_file: str | None,
    quiet: bool,
) -> None:
    """Compare RESULT with ORIGINAL: each output, and each layer that both have by name.

    \b
    onnxq compare model.onnx small.onnx --data samples.npz
    """
    from onnxq import workflow

    with progress_bar(quiet=quiet) as progress:
        comparison = workflow.compare(original, result, data=data, progress=progress)
    show(comparison, json_file, quiet=quiet)
    if min_sqnr is not None and comparison.fidelity.sqnr_db < min_sqnr:
        from onnxq.errors import BudgetError

        raise BudgetError(f"{comparison.fidelity.sqnr_db:.1f} dB is below --min-sqnr {min_sqnr:g}")
