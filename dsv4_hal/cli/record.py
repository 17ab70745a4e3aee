"""`dsv4-hal record`: what a backend makes of the cases, or of a whole model, kept in a file for another machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4_hal.cli.compare import Chunk, Decode, ModelDir, Prompt, Seed, Tokens, refuse_auto, script, telling
from dsv4_hal.cli.conform import Grad, Mode, Op, Pattern, chosen_jobs, known_mode, progress, within

if TYPE_CHECKING:
    from dsv4_hal.conformance.judging.results import Job
    from dsv4_hal.conformance.models.replay import Script


def record(
    out: Annotated[Path, typer.Option(help="The bundle to write; must not exist.", metavar="BUNDLE")],
    backend: Annotated[str, typer.Option(help="Registered backend.")] = "reference",
    op: Op = None,
    pattern: Pattern = "",
    mode: Mode = None,
    size: Annotated[
        str | None, typer.Option(help="Cases up to this size class: tiny, interpreted, quick (default) or full.")
    ] = None,
    grad: Grad = False,
    limit: Annotated[
        float | None,
        typer.Option(
            help="Seconds that a case may take, default 60; with --model, a step, default 600.", min=0.1, max=86400
        ),
    ] = None,
    model: ModelDir = None,
    ops: Annotated[bool, typer.Option("--ops", help="With --model: what every op made, for bisect.")] = False,
    tokens: Tokens = None,
    prompt: Prompt = None,
    decode: Decode = None,
    chunk: Chunk = None,
    seed: Seed = None,
) -> None:
    """Keep what a backend makes of the cases of the contract, or with --model of a whole model, to be compared on
    another machine with `compare --against BUNDLE`, or with `bisect --against BUNDLE`.

    A case that fails is kept as that; a whole model is kept only if all of it runs.

    Exit codes: 0 written, 2 usage or a file that cannot be written, 3 backend unavailable, or it fails on the model.
    """
    from dsv4_hal.conformance.judging.results import DEFAULT_SIZE
    from dsv4_hal.conformance.judging.worker import LIMIT as CASE
    from dsv4_hal.conformance.models.run import LIMIT as STEP
    from dsv4_hal.conformance.workers.container import refuse_existing

    refuse_existing(out)
    if model is None and (ops or any(option is not None for option in (tokens, prompt, decode, chunk, seed))):
        raise ValueError("--ops, --tokens, --prompt, --decode, --chunk and --seed go with --model DIR")
    if model is not None and (op or pattern or grad or size is not None):
        raise ValueError("a whole model is recorded whole: --model does not go with -o, -p, --size or --grad")
    refuse_auto(backend)
    if model is None:
        size = size or DEFAULT_SIZE
        work = chosen_jobs(op, pattern, mode, size, grad)
        _try(out)
        told = _cases(out, backend, work, size, limit or CASE)
    else:
        plan = script(model, tokens, prompt, decode, chunk, seed)
        mode = known_mode(mode) or "deployed"
        _try(out)
        told = _model(out, backend, model, mode, plan, ops, limit or STEP)
    typer.echo(f"{out}: {told}, {out.stat().st_size / 1e6:.1f} MB")


def _try(out: Path) -> None:
    """OSError where it cannot be written: found before anything runs, whose work would be lost."""
    out.parent.mkdir(parents=True, exist_ok=True)
    longest = out.with_name(f".{out.name}.partial-{2**32}")  # it is written under a name like this first
    longest.touch()
    longest.unlink()


def _cases(out: Path, backend: str, work: list[Job], size: str, limit: float) -> str:
    from dsv4_hal.conformance.judging import results
    from dsv4_hal.conformance.judging.waivers import read_waivers
    from dsv4_hal.conformance.judging.worker import Worker
    from dsv4_hal.conformance.reports.bundle import write_bundle
    from dsv4_hal.conformance.workers.text import counted

    made = []
    with Worker(backend, results.modes(work)) as worker:
        waivers = read_waivers(Path(worker.about.waivers))
        work, extent = within(backend, work, worker.about, size)
        with progress(len(work)) as advance:
            for job, produced in worker.map(work, limit):
                made.append((job, produced))
                advance()
    write_bundle(out, backend, worker.about, made, waivers, extent)
    lost = sum(produced.results is None for _, produced in made)
    return f"{counted(len(made), 'case')} of {backend}, {lost} without results; {extent}"


def _model(out: Path, backend: str, model: str, mode: str, plan: Script, ops: bool, limit: float) -> str:
    from dsv4_hal.conformance.judging.profiles import told
    from dsv4_hal.conformance.models.run import record

    with telling() as tell:
        record(out, model, backend, told(mode), plan, ops, tell(f"{backend}, freely"), limit)
    lengths = " + ".join(str(len(prompt)) for prompt in plan.prompts)
    return f"{model} on {backend}, {mode}: {lengths} tokens and {plan.decode} decoded"
