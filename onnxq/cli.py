"""The command line: parse, call one function, print one report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnxq.data import ImageOptions
    from onnxq.workflow import Progress

BUG = 70  # EX_SOFTWARE of sysexits.h

DATA = """Samples: an .npz file (arrays named as the model's inputs, sample axis first, and maybe
`labels`), a .npy of the only input, a folder of .npz or .npy (one a sample), a folder of images
(needs onnxq[images]) or of .wav files, a .txt of token ids (a sample a line), a test_data_set
folder of ONNX, or module:function that yields dicts of arrays."""


def _version() -> str:
    try:
        return version("onnxq")
    except PackageNotFoundError:
        return "unknown (not installed)"


def target_option(command: Any) -> Any:
    """The option --target, everywhere the same."""
    return click.option(
        "--target", default="ort-cpu", show_default=True, metavar="NAME",
        help="Runtime that is to run the result (`onnxq targets` lists them), or a .toml file.",
    )(command)  # fmt: skip


def data_option(command: Any) -> Any:
    """The option --data, everywhere the same."""
    return click.option("--data", metavar="SAMPLES", help=DATA)(command)


def image_options(command: Any) -> Any:
    """How a folder of images is fed, as the one keyword `images`; everywhere the same."""

    @wraps(command)
    def run(*args: Any, size: str | None, mean: str | None, std: str | None, **kwargs: Any) -> None:
        names = ("scale", "bgr", "resize", "preset")
        given = {n: value for n in names if (value := kwargs.pop(n)) not in (None, False)}
        given |= {n: _numbers(n, text) for n, text in (("mean", mean), ("std", std)) if text}
        if size is not None:
            given["size"] = _size(size)
        with errors(debug=kwargs["debug"]):
            images = _images(given) if given else None
        command(*args, images=images, **kwargs)

    for option in reversed(IMAGE_OPTIONS):
        run = option(run)
    return run


IMAGE_OPTIONS = (
    click.option(
        "--preset", metavar="NAME",
        help="For images: imagenet (mean and std of ImageNet, crop) or yolo (letterbox); "
        "the options below change single values of it.",
    ),
    click.option(
        "--size", metavar="HxW",
        help="For images, where the model's input leaves it free; default: the first image's.",
    ),
    click.option(
        "--scale", type=float, metavar="FACTOR",
        help="For images: pixels of 0..255 are multiplied by this first; default: 1/255.",
    ),
    click.option(
        "--mean", metavar="M[,M,M]",
        help="For images: taken off after --scale, one for all or one a channel; default: 0.",
    ),
    click.option(
        "--std", metavar="S[,S,S]",
        help="For images: divided by after --mean, one for all or one a channel; default: 1.",
    ),
    click.option(
        "--bgr", is_flag=True, help="For images: blue first (and in --mean, --std); default: RGB."
    ),
    click.option(
        "--resize", metavar="HOW",
        help="For images: stretch (default), crop (cover the size, cut the middle out) or "
        "letterbox (fit in, grey borders).",
    ),
)  # fmt: skip


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise click.UsageError(f"--{name} {text}: give one number, or three with commas") from None


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    try:
        return int(height), int(width or height)
    except ValueError:
        raise click.UsageError(f"--size {text}: give height x width, as in 224x224") from None


def _images(given: dict[str, Any]) -> ImageOptions:
    from onnxq.data import ImageOptions

    return ImageOptions(**given)


def output_options(command: Any) -> Any:
    """--json, --quiet, --debug: how a command talks; also turns errors into one line."""

    @wraps(command)
    def run(*args: Any, debug: bool, **kwargs: Any) -> None:
        with errors(debug=debug):
            command(*args, **kwargs)

    for option in (
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        click.option("--quiet", is_flag=True, help="Print nothing but errors."),
        click.option(
            "--json", "json_file", metavar="FILE", help="Write the report as JSON; - is stdout."
        ),
    ):
        run = option(run)
    return run


@contextmanager
def errors(*, debug: bool) -> Iterator[None]:
    """One line on stderr and the right exit code, never a traceback unless asked for."""
    from onnxq.errors import OnnxqError

    try:
        yield
    except (click.exceptions.Exit, click.ClickException):
        raise
    except KeyboardInterrupt:
        click.echo("onnxq: interrupted, nothing was written", err=True)
        sys.exit(130)
    except Exception as e:
        if debug:
            raise
        text = " ".join(str(e).split()) or type(e).__name__
        if isinstance(e, OnnxqError):
            click.echo(f"onnxq: error: {text}", err=True)
            sys.exit(e.exit_code)
        if isinstance(e, OSError | MemoryError):
            click.echo(f"onnxq: error: {type(e).__name__}: {text}", err=True)
            sys.exit(2)
        click.echo(
            f"onnxq: bug: {type(e).__name__}: {text}; run with --debug and report it", err=True
        )
        sys.exit(BUG)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="onnxq")
def main() -> None:
    r"""Make an ONNX model smaller and faster for a small device, and say what that cost.

    \b
    onnxq optimize model.onnx small.onnx --data samples.npz
    onnxq inspect model.onnx
    onnxq compare model.onnx small.onnx --data samples.npz

    Exit codes: 0 done; 1 a budget was missed or nothing was quantized; 2 wrong use or files.
    """


@main.command()
@click.argument("model")
@click.argument("output")
@data_option
@image_options
@click.option(
    "--recipe", default="int8", show_default=True, metavar="NAME",
    help="What to do: int8, cleanup (floats stay floats), or a .toml file.",
)  # fmt: skip
@target_option
@click.option(
    "--calibration", metavar="FILE",
    help="Keep what was seen of the activations (.npz); used again if the file is there.",
)  # fmt: skip
@click.option(
    "--min-sqnr", type=float, metavar="DB",
    help="Write nothing (exit 1) if an output's signal to noise ratio is below this.",
)  # fmt: skip
@click.option(
    "--dry-run", is_flag=True, help="Print the plan and what the samples look like; no output."
)
@click.option("--no-validate", is_flag=True, help="Do not compare with the original or time it.")
@click.option(
    "--allow-unchanged", is_flag=True, help="Write the model even if nothing was quantized."
)
@output_options
def optimize(
    model: str,
    output: str,
    *,
    data: str | None,
    images: ImageOptions | None,
    recipe: str,
    target: str,
    calibration: str | None,
    min_sqnr: float | None,
    dry_run: bool,
    no_validate: bool,
    allow_unchanged: bool,
    json_file: str | None,
    quiet: bool,
) -> None:
    r"""Optimize MODEL and write OUTPUT (which may be the same file).

    \b
    onnxq optimize model.onnx small.onnx --data samples.npz
    onnxq optimize model.onnx small.onnx --data folder/ --min-sqnr 20 --json report.json
    onnxq optimize model.onnx clean.onnx --recipe cleanup
    """
    if dry_run:
        from onnxq.preview import preview

        shown = preview(model, data=data, images=images, recipe=recipe, target=target)
        show(shown, json_file, quiet=quiet)
        return
    from onnxq import workflow

    with progress_bar(quiet=quiet) as progress:
        report = workflow.optimize(
            model, output, data=data, images=images, recipe=recipe, target=target,
            calibration=calibration, min_sqnr=min_sqnr, validate=not no_validate,
            allow_unchanged=allow_unchanged, progress=progress,
        )  # fmt: skip
    for warning in report.warnings:
        if not quiet:
            click.echo(f"onnxq: warning: {warning}", err=True)
    show(report, json_file, quiet=quiet)


@main.command()
@click.argument("model")
@target_option
@output_options
def inspect(model: str, *, target: str, json_file: str | None, quiet: bool) -> None:
    r"""Say what MODEL is made of, and what a target could quantize of it.

    \b
    onnxq inspect model.onnx
    onnxq inspect model.onnx --target generic --json -
    """
    from onnxq import workflow

    show(workflow.inspect(model, target=target), json_file, quiet=quiet)


@main.command()
@click.argument("original")
@click.argument("result")
@data_option
@image_options
@click.option(
    "--min-sqnr", type=float, metavar="DB",
    help="Exit 1 if an output's signal to noise ratio is below this.",
)  # fmt: skip
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
    r"""Compare RESULT with ORIGINAL: each output, and each layer that both have by name.

    \b
    onnxq compare model.onnx small.onnx --data samples.npz
    """
    from onnxq import workflow

    with progress_bar(quiet=quiet) as progress:
        comparison = workflow.compare(original, result, data=data, images=images, progress=progress)
    show(comparison, json_file, quiet=quiet)
    if min_sqnr is not None and comparison.fidelity.sqnr_db < min_sqnr:
        from onnxq.errors import BudgetError

        raise BudgetError(f"{comparison.fidelity.sqnr_db:.1f} dB is below --min-sqnr {min_sqnr:g}")


@main.command()
@click.argument("model")
@target_option
@output_options
def check(model: str, *, target: str, json_file: str | None, quiet: bool) -> None:
    r"""Hold MODEL against what a target can run: exit 1 if it breaks a rule.

    \b
    onnxq check small.onnx --target tensorrt
    onnxq check small.onnx --target tflite-int8 --json -
    """
    from onnxq.lint import check

    found = check(model, target=target)
    show(found, json_file, quiet=quiet)
    if not found.is_clean:
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("name", required=False)
@output_options
def targets(name: str | None, *, json_file: str | None, quiet: bool) -> None:
    r"""List the targets, or say what is known of one: facts, operators, sources.

    \b
    onnxq targets
    onnxq targets openvino
    """
    from onnxq.catalogue import targets

    show(targets(name), json_file, quiet=quiet)


def show(report: Any, json_file: str | None, *, quiet: bool) -> None:
    """Print a report for people on stdout, unless JSON goes there."""
    if json_file == "-":
        click.echo(report.to_json())
        return
    if json_file is not None:
        from onnxq.files import atomic_write

        with atomic_write(json_file) as stream:
            stream.write(report.to_json().encode() + b"\n")
    if not quiet:
        from rich.console import Console

        console = Console(highlight=False, markup=False)
        if not console.is_terminal:
            console = Console(highlight=False, markup=False, width=120)
        report.print_to(console)


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[Progress | None]:
    """A bar on stderr for stages of over a second, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    with suppress(ImportError):
        from rich.console import Console
        from rich.progress import Progress as Bar

        yield from _bar(Bar(console=Console(stderr=True), transient=True))


def _bar(bar: Any) -> Iterator[Callable[[str, int, int], None]]:
    import time

    begun: dict[str, float] = {}
    tasks: dict[str, Any] = {}

    def tell(stage: str, done: int, total: int) -> None:
        start = begun.setdefault(stage, time.monotonic())
        if time.monotonic() - start < 1:
            return
        if stage not in tasks:
            bar.start()
            tasks[stage] = bar.add_task(stage, total=total)
        bar.update(tasks[stage], completed=done)

    try:
        yield tell
    finally:
        bar.stop()
