"""The command line: parse, call one function, print one report; one module a group of commands.

Nothing heavy is imported before a command runs: `onnxq --help` and completion are to be quick.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import click

from onnxq.cli.completing import completion
from onnxq.cli.group import OneLineErrors
from onnxq.cli.listing import passes, recipes, targets
from onnxq.cli.looking import check, compare, inspect
from onnxq.cli.optimizing import calibrate, optimize


def _version() -> str:
    try:
        return version("onnxq")
    except PackageNotFoundError:
        return "unknown (not installed)"


@click.group(
    cls=OneLineErrors,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
    Completion in the shell (names of recipes, targets and passes too):
      eval "$(onnxq completion bash)"     in ~/.bashrc
      onnxq completion --help              says how in zsh and fish""",
)
@click.version_option(_version(), prog_name="onnxq")
def main() -> None:
    """Make an ONNX model smaller and faster for a small device, and say what that cost.

    \b
    onnxq optimize model.onnx small.onnx --data samples.npz
    onnxq inspect model.onnx
    onnxq compare model.onnx small.onnx --data samples.npz

    Exit codes: 0 done; 1 a budget was missed, nothing was quantized or pruned, or a rule of the
    target is broken; 2 wrong use or files; 130 interrupted.
    """


for command in (
    optimize, calibrate, inspect, compare, check, passes, recipes, targets, completion,
):  # fmt: skip
    main.add_command(command)
