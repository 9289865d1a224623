"""passes, recipes and targets: what there is, and what it takes."""

from __future__ import annotations

import click

from onnxq.cli.common import output_options, show
from onnxq.cli.completing import complete_pass, complete_recipe, complete_target


@click.command()
@click.argument("name", required=False, shell_complete=complete_pass)
@output_options
def passes(name: str | None, *, json_file: str | None, quiet: bool) -> None:
    """List the passes; or tell the pass NAME and its options.

    Passes of your own: an installed distribution with the entry point group onnxq.passes, or
    package.module:PassClass, here and in a recipe.

    \b
    onnxq passes
    onnxq passes quantize_static
    """
    from onnxq import catalog

    found = catalog.passes() if name is None else catalog.describe_pass(name)
    show(found, json_file, quiet=quiet)


@click.command()
@click.argument("name", required=False, shell_complete=complete_recipe)
@output_options
def recipes(name: str | None, *, json_file: str | None, quiet: bool) -> None:
    """List the recipes; or print the recipe NAME as a file.

    \b
    onnxq recipes
    onnxq recipes int8 > mine.toml
    onnxq optimize model.onnx small.onnx --recipe mine.toml
    """
    from onnxq import catalog

    found = catalog.recipes() if name is None else catalog.describe_recipe(name)
    show(found, json_file, quiet=quiet)


@click.command()
@click.argument("name", required=False, shell_complete=complete_target)
@output_options
def targets(name: str | None, *, json_file: str | None, quiet: bool) -> None:
    """List the targets; or tell what is known of the target NAME.

    \b
    onnxq targets
    onnxq targets openvino
    """
    from onnxq.targets import facts

    found = facts.targets() if name is None else facts.describe_target(name)
    show(found, json_file, quiet=quiet)
