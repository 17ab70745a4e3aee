"""`dsv4-hal record` and `dsv4-hal compare`: a run on one machine, its verdicts on another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

from dsv4_hal.cli import common
from dsv4_hal.cli.conform import Limit, Mode, Op, Out, Pattern, Size, chosen_jobs, conclude, progress, within


def record(
    out: Annotated[Path, typer.Option(help="The bundle to write; must not exist.", metavar="BUNDLE")],
    backend: Annotated[str, typer.Option(help="Registered backend.")] = "reference",
    op: Op = None,
    pattern: Pattern = "",
    mode: Mode = None,
    size: Size = "quick",
    limit: Limit = 60.0,
) -> None:
    """Run the cases of the contract on a backend and keep what it makes of them, to be compared on another machine."""
    from dsv4_hal.conformance import runner
    from dsv4_hal.conformance.bundle import write_bundle
    from dsv4_hal.conformance.waivers import read_waivers

    if out.exists():
        raise FileExistsError(f"{out} exists, and a bundle is not written over it")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = chosen_jobs(op, pattern, mode, size)
    made = []
    with runner.Worker(backend, runner.modes(work)) as worker:
        waivers = read_waivers(Path(worker.about.waivers))
        work, extent = within(backend, work, worker.about, size)
        with progress(len(work)) as advance:
            for job, produced in worker.map(work, limit):
                made.append((job, produced))
                advance()
    write_bundle(out, backend, worker.about, made, waivers, extent)
    lost = sum(produced.results is None for _, produced in made)
    megabytes = out.stat().st_size / 1e6
    typer.echo(f"{out}: {len(made)} cases of {backend}, {lost} without results, {megabytes:.1f} MB; {extent}")


def compare(
    against: Annotated[Path, typer.Option(help="A bundle that `record` wrote.", metavar="BUNDLE")], out: Out = None
) -> None:
    """Compare a recorded run with the reference of this machine: the verdicts are those of `conform` there.

    Exit codes: 0 agrees, 1 disagrees, 2 usage or a bundle that cannot be read, 4 a waiver is stale.
    """
    from dsv4_hal.conformance.bundle import read_bundle
    from dsv4_hal.conformance.report import Run
    from dsv4_hal.conformance.runner import judge

    bundle = read_bundle(against)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with progress(len(bundle.made)) as advance, torch.inference_mode():
        for job, produced in bundle.made:
            outcomes.append(judge(bundle.backend, job, produced))
            advance()
    where = bundle.about.environment
    versions = {**where["program"], **where["machine"], "torch": where["packages"].get("torch", "unknown")}
    recorded = ", ".join(f"{key} {versions[key]}" for key in ("dsv4-hal", "torch", "python", "system"))
    common.notes.print(escape(f"recorded with {recorded}"))
    conclude(Run(bundle.backend, outcomes, bundle.about, bundle.waivers, bundle.extent), out)
