"""`dsv4-hal convert`: a checkpoint with its weights in another number format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from dsv4_hal.cli import common


def convert(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory.", metavar="DIR")],
    to: Annotated[str, typer.Option(help="ascend-a3-w8a8, ascend-a3-w4a8 or bf16.")],
    out: Annotated[Path, typer.Option(help="Directory to write; new, empty, or of a conversion that was stopped.")],
) -> None:
    """Write a checkpoint with its weights in another number format, and a report of what that changed.

    Runs file by file; if it is stopped, the same command goes on. `conversion.md` and `conversion.json` in the new
    directory have the error of every tensor.
    """
    from dsv4_hal.model.convert import TABLE, by_kind
    from dsv4_hal.model.convert import convert as run

    columns = (TextColumn("converting"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=common.notes, transient=True, disable=not common.notes.is_terminal) as bar:
        task = bar.add_task("", total=None)
        made = run(model, out, to, lambda done, total: bar.update(task, completed=done, total=total))
    for source, target, count, mean, largest, worst in by_kind(made):
        where = f"{worst.name}, its channel {worst.worst_channel} {worst.worst_error:.2%}"
        error = f"rms error {mean:.2%} on average, {largest:.2%} in {where}" if largest else "exact"
        typer.echo(f"{source} to {target}: {count} tensors, {error}")
    before, after = made.nbytes
    typer.echo(
        f"{out}: {to}, {len(made.changes)} tensors converted, {made.kept} kept, "
        f"{before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after; every tensor in {TABLE}"
    )
