"""`dsv4-hal report`: results of one or several runs, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="The folder that `conform` or `compare` wrote, or its .jsonl.", metavar="RUN..."),
    ],
    out: Annotated[Path, typer.Option(help="The page to write.", metavar="FILE.html")],
) -> None:
    """Put the results of runs side by side, on one HTML page that needs no network and no other file.

    Exit codes: 0 written, whatever the verdicts on it; 2 usage, or results that cannot be read.
    """
    from dsv4_hal.conformance.reports import html, saved
    from dsv4_hal.conformance.workers.text import counted

    if out.suffix != ".html":  # never over results
        raise ValueError(f"--out must be a file whose name ends in .html, got {out}")
    found = [run for path in runs for run in saved.read(path)]
    out.parent.mkdir(parents=True, exist_ok=True)
    html.write(found, out)
    typer.echo(f"{out}: {counted(len(found), 'run')}, {out.stat().st_size / 1e6:.1f} MB")
