"""Options of passes as flags, and overrides for single layers: as two keywords."""

from __future__ import annotations

from dataclasses import fields
from functools import wraps
from typing import Any

import click

from onnxq.cli.common import errors
from onnxq.cli.completing import complete_amount, complete_format, complete_layer, complete_pattern

RANGES = ("minmax", "mse", "standardized", "hqq", "importance")
CODEBOOKS = ("kmeans", "nf4", "power-of-two", "logarithmic", "exponential", "vector")

OPTIONS = (
    click.option(
        "--weights", metavar="FORMAT", shell_complete=complete_format,
        help="Format of weights: int8, uint4, int2, float8e4m3fn ...; default: the recipe's.",
    ),
    click.option(
        "--activations", metavar="FORMAT", shell_complete=complete_format,
        help="Format of activations with fixed ranges: a8, a16, or by name; default: the recipe's.",
    ),
    click.option(
        "--granularity", type=click.Choice(["tensor", "channel", "group"]),
        help="One scale for a weight, for each of its channels, or for groups of values.",
    ),
    click.option(
        "--group-size", type=click.IntRange(min=1), metavar="N",
        help="Values of a weight that share a scale, with --granularity group.",
    ),
    click.option(
        "--symmetric/--no-symmetric", default=None, help="Weights without zero points, or with."
    ),
    click.option(
        "--range", type=click.Choice(RANGES), help="How ranges of weights are chosen."
    ),
    click.option(
        "--activation-range",
        type=click.Choice(["minmax", "percentile", "entropy", "mse", "careful", "output"]),
        help="How ranges of activations are chosen; output: by the error of the model's outputs.",
    ),
    click.option(
        "--bias", type=click.Choice(["int32", "float"]),
        help="Biases beside quantized activations, where the target takes either.",
    ),
    click.option(
        "--encoding", type=click.Choice(["auto", "compute", "storage"]),
        help="Weights beside float activations: multiplied as integers, or unpacked at load; "
        "16-bit floats: computed in, or stored.",
    ),
    click.option(
        "--interface", type=click.Choice(["kept", "half"]),
        help="float32 inputs and outputs: as they are, or in the recipe's 16 bits, too.",
    ),
    click.option(
        "--codebook", type=click.Choice(CODEBOOKS), help="How codebooks of weights are chosen."
    ),
    click.option(
        "--bits", type=click.IntRange(1, 8), metavar="N",
        help="Bits of an index into a codebook, 1 to 8; default: 4, of vectors 8.",
    ),
    click.option(
        "--dim", type=click.IntRange(2, 8), metavar="N",
        help="Weights that share an index, with --codebook vector; default: 4.",
    ),
    click.option(
        "--prune", metavar="AMOUNT[:CRITERION]", shell_complete=complete_amount,
        help="Share of the weights that become zero (0.5, 50%), and which: magnitude, wanda or "
        "obs, which makes the others up for it; default: obs with --data, else magnitude.",
    ),
    click.option(
        "--prune-channels", metavar="AMOUNT",
        help="Share of the multiply-accumulates that go with whole channels (0.3, 30%).",
    ),
    click.option(
        "--nm", metavar="N:M", shell_complete=complete_pattern,
        help="N of each M weights beside each other stay (2:4), in place of --prune AMOUNT.",
    ),
    click.option(
        "--layer", "layers", multiple=True, metavar="PATTERN=FORMAT",
        shell_complete=complete_layer,
        help="For single layers, the last match wins: a glob on node names, op:LSTM, first or "
        "last, and float, int8, int4, int16 (16-bit activations), a16w4, dense (not pruned) ...",
    ),
)  # fmt: skip


def setting_options(command: Any) -> Any:
    """The flags, as the keywords `settings` and `layers`; everywhere the same."""

    @wraps(command)
    def run(*args: Any, layers: tuple[str, ...], **kwargs: Any) -> None:
        from onnxq.settings import Settings

        given = {f.name: kwargs.pop(f.name) for f in fields(Settings)}
        with errors(debug=kwargs["debug"]):
            settings = Settings(**given)
        command(*args, settings=settings, layers=layers, **kwargs)

    for option in reversed(OPTIONS):
        run = option(run)
    return run
