"""Shell completion: click's own, with names of recipes, targets and passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

VARIABLE = "_ONNXQ_COMPLETE"  # what click derives from the command's name


def complete_recipe(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Recipes by name, and files."""
    from onnxq.recipes import names

    return _items(names(), incomplete, files=True)


def complete_target(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Targets by name, and files."""
    from onnxq.targets import names

    return _items(names(), incomplete, files=True)


def complete_pass(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Passes by name, installed ones too."""
    from onnxq.errors import RecipeError
    from onnxq.plugins import names

    try:
        return _items(names(), incomplete)
    except RecipeError:  # a shell that completes has no place for errors
        return []


def complete_format(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Number formats by name."""
    from onnxq.schemes import FORMATS

    return _items(FORMATS, incomplete)


def complete_layer(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Behind the `=` what may stand there; before it, the patterns that are no names."""
    from onnxq.layers import formats

    pattern, equals, _ = incomplete.rpartition("=")
    if equals:
        return _items([f"{pattern}={name}" for name in formats()], incomplete)
    return _items(["first=", "last=", "op:"], incomplete)


def complete_amount(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Behind the `:` the criteria; before it, amounts."""
    from onnxq.amounts import CRITERIA

    amount, colon, _ = incomplete.rpartition(":")
    if colon:
        return _items([f"{amount}:{name}" for name in CRITERIA], incomplete)
    return _items(["0.3", "0.5", "0.7"], incomplete)


def complete_pattern(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The patterns that runtimes know."""
    return _items(["2:4", "4:8", "1:4"], incomplete)


def _items(names: Iterable[str], incomplete: str, *, files: bool = False) -> list[CompletionItem]:
    """Names that begin so; a file name when none does."""
    from click.shell_completion import CompletionItem

    found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return found or ([CompletionItem(incomplete, type="file")] if files else [])


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete onnxq's commands.

    Options, and names of recipes, targets and passes are completed too.

    \b
    bash:  eval "$(onnxq completion bash)"       in ~/.bashrc
    zsh:   eval "$(onnxq completion zsh)"        in ~/.zshrc
    fish:  onnxq completion fish | source        in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # click has these three
    # source_template and not source(): that one starts a bash to ask its version
    root = ctx.find_root()
    made = kind(root.command, {}, "onnxq", VARIABLE)
    click.echo(made.source_template % made.source_vars())
