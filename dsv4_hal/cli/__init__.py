"""The command line: `dsv4-hal VERB`. One file per verb or group of them; the work is done elsewhere.

Exit codes: 0 done, 1 disagreement, 2 usage or bad input, 3 backend unavailable, 4 stale waiver, 5 nothing judged, 130
interrupted, 143 terminated.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.markup import escape

import dsv4_hal
from dsv4_hal.cli.bisect import bisect
from dsv4_hal.cli.chat import chat
from dsv4_hal.cli.common import notes
from dsv4_hal.cli.compare import compare
from dsv4_hal.cli.conform import conform
from dsv4_hal.cli.convert import convert
from dsv4_hal.cli.environment import env
from dsv4_hal.cli.generate import generate
from dsv4_hal.cli.info import info
from dsv4_hal.cli.init import init
from dsv4_hal.cli.record import record
from dsv4_hal.cli.report import report
from dsv4_hal.cli.selection import backends, explain
from dsv4_hal.conformance.workers import fork_server

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="DeepSeek-V4 on any backend.", pretty_exceptions_enable=False
)
for verb in (backends, explain, env, info, init, convert, generate, chat, conform, compare, bisect, record, report):
    app.command()(verb)
WATCHED = ("conform", "compare", "bisect", "record")  # they run backends in processes of their own


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"dsv4-hal {dsv4_hal.__version__}")
        raise typer.Exit


def main() -> None:
    """The tool as a program, which has done nothing before this."""
    run(fork_server.fork)


def run(prepare: Callable[[], None] | None = None) -> None:
    """Run a verb; errors of input and environment become one line and an exit code.

    prepare  is called first where the verb runs backends in processes of their own
    """
    if sys.stdin is None:  # closed: the next file would be opened in its place, and taken for it by a process
        os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
    if sys.stderr is None:  # closed: notes have nowhere to go, and answers must not be lost for it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
        os.set_inheritable(sys.stderr.fileno(), True)
    if sys.stdout is None:
        _fail(ValueError("standard output is closed"), 2)
    before = signal.getsignal(signal.SIGTERM)
    try:
        if prepare is not None and sys.argv[1:2] and sys.argv[1] in WATCHED:
            prepare()  # before anything is set that is for this process alone
        if hasattr(
            sys.stdout, "reconfigure"
        ):  # what an encoding lacks: a mark for eyes, an escape where nothing may be lost
            sys.stdout.reconfigure(errors="replace" if sys.stdout.isatty() else "backslashreplace")
        signal.signal(signal.SIGTERM, _terminated)
        app()
    except dsv4_hal.BackendError as error:
        _fail(error, 3)
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        _fail(error, 2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: object) -> None:
    """As an exit, so that processes are ended and temporary files removed on the way out."""
    sys.exit(128 + number)


def _fail(error: Exception, code: int) -> None:
    notes.print("[red]error:[/] " + escape(str(error) or type(error).__name__))
    sys.exit(code)
