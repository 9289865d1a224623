"""The command `onnxq` itself: whatever goes wrong is one line, with the right exit code."""

from __future__ import annotations

import difflib
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import click

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
TERMINATED = 143  # 128 + SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM; raised so that temporary files go as they do for SIGINT."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


class OneLineErrors(click.Group):
    """A group whose usage errors take one line, like all other errors; options are listed."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command and exit with its code."""

        def run() -> Any:
            return super(OneLineErrors, self).main(
                args, prog_name, complete_var, standalone_mode=False, **extra
            )

        if not standalone_mode:
            return run()
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            sys.exit(run() or 0)
        except click.UsageError as e:
            if isinstance(e, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # click 8.2 on
                e.show()
                sys.exit(e.exit_code)
            where = e.ctx.command_path if e.ctx is not None else "onnxq"
            text = " ".join(e.format_message().split()).rstrip(".?")
            click.echo(f"onnxq: error: {text}; see {where} --help", err=True)
            sys.exit(e.exit_code)
        except click.ClickException as e:
            click.echo(f"onnxq: error: {e.format_message()}", err=True)
            sys.exit(e.exit_code)
        except (click.Abort, KeyboardInterrupt) as e:
            stopped(e)
        finally:
            signal.signal(signal.SIGTERM, before)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; for a typo, name the one that is meant."""
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


def stopped(error: BaseException) -> NoReturn:
    """Say that the run was stopped; files are written whole or not at all."""
    click.echo("onnxq: interrupted; no file was left half written", err=True)
    sys.exit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED)
