"""What the commands share: options, errors as one line, how a report is shown."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from math import isfinite
from typing import TYPE_CHECKING, Any

import click

from onnxq.cli.completing import complete_recipe, complete_target
from onnxq.cli.group import stopped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnxq.job import Progress

BUG = 70  # EX_SOFTWARE of sysexits.h
REPORTS = ("json_file", "save_plan")
FILES = ("model", "original", "result", "output", "data", "calibration")

DATA = """Samples: an .npz file (arrays named as the model's inputs, sample axis first, and maybe
`labels`), a .npy of the only input, a folder of .npz or .npy (one a sample), a folder of images
(needs onnxq[images]) or of .wav files, a .txt of token ids (a sample a line), a test_data_set
folder of ONNX, or module:function that yields dicts of arrays."""


def target_option(command: Any) -> Any:
    """The option --target, everywhere the same."""
    return click.option(
        "--target", default="ort-cpu", show_default=True, metavar="NAME",
        shell_complete=complete_target,
        help="Runtime that is to run the result: a name of `onnxq targets`, or a .toml file.",
    )(command)  # fmt: skip


def recipe_option(command: Any) -> Any:
    """The option --recipe, everywhere the same."""
    return click.option(
        "--recipe", default="auto", show_default=True, metavar="NAME",
        shell_complete=complete_recipe,
        help="What to do: a name of `onnxq recipes`, or a .toml file.",
    )(command)  # fmt: skip


def sqnr_option(text: str) -> Callable[[Any], Any]:
    """The option --min-sqnr; text: what happens when it is missed."""
    return click.option("--min-sqnr", type=float, metavar="DB", callback=_decibels, help=text)


def _decibels(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not isfinite(value):
        raise click.BadParameter(f"{value} is no number of decibels, give one such as 20")
    return value


UNITS = {
    "": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40,
}  # fmt: skip


def memory_option(command: Any) -> Any:
    """The option --max-memory."""
    return click.option(
        "--max-memory", metavar="SIZE", callback=_size,
        help="Memory that the command may take while it works on weights, such as 512MB or 1GB; "
        "fewer of them are then worked on at once.",
    )(command)  # fmt: skip


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?I?)B?", value.strip().upper())
    if found is None or found[2] not in UNITS or not float(found[1]):
        raise click.BadParameter(f"{value!r} is no size, give one such as 512MB or 1GB")
    return int(float(found[1]) * UNITS[found[2]])


def data_option(command: Any) -> Any:
    """The option --data, everywhere the same."""
    return click.option("--data", metavar="SAMPLES", help=DATA)(command)


def output_options(command: Any) -> Any:
    """--json, --quiet, --debug: how a command talks; also turns errors into one line."""

    @wraps(command)
    def run(*args: Any, debug: bool, **kwargs: Any) -> None:
        with errors(debug=debug):
            _check_reports(kwargs)
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


def _check_reports(given: Mapping[str, Any]) -> None:
    """Before the work: what is written beside the result must not take the place of a file of it.

    Raises ModelError where a file cannot be written, RecipeError where it is another of the run's.
    """
    asked = [given.get(name) for name in REPORTS]
    paths = [path for path in asked if path is not None and path != "-"]
    if paths:
        from onnxq.preconditions import check_reports

        check_reports(paths, [given[name] for name in FILES if given.get(name) is not None])


@contextmanager
def errors(*, debug: bool) -> Iterator[None]:
    """One line on stderr and the right exit code, never a traceback unless asked for."""
    from onnxq.errors import OnnxqError

    try:
        yield
    except (click.exceptions.Exit, click.ClickException):
        raise
    except KeyboardInterrupt as e:  # click would print an empty line, and exit with 1
        stopped(e)
    except Exception as e:  # no traceback for anybody who did not ask for one
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


def warn(warnings: Iterable[str], *, quiet: bool) -> None:
    """Say on stderr what is to be known of a result."""
    for warning in () if quiet else warnings:
        click.echo(f"onnxq: warning: {warning}", err=True)


def show(report: Any, json_file: str | None, *, quiet: bool) -> None:
    """Print a report for people on stdout, unless JSON goes there."""
    if json_file == "-":
        click.echo(report.to_json())
        return
    if json_file is not None:
        write_text(json_file, report.to_json() + "\n")
    if not quiet:
        from rich.console import Console

        console = Console(highlight=False, markup=False)
        if not console.is_terminal:
            console = Console(highlight=False, markup=False, width=120)
        report.print_to(console)


def write_text(path: str, text: str) -> None:
    """Write a file, whole or not at all."""
    from onnxq.files import atomic_write

    with atomic_write(path) as stream:
        stream.write(text.encode())


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

    from onnxq.job import MEGABYTES

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
        if stage.endswith(f" {MEGABYTES}"):
            rate = done / (time.monotonic() - start)
            name = stage.removesuffix(f" {MEGABYTES}")
            bar.update(tasks[stage], description=f"{name}, {rate:.0f} MB/s")

    try:
        yield tell
    finally:
        bar.stop()
