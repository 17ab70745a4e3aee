"""`dsv4-hal record`: what a backend makes of the cases, or of a whole model, kept in a file for another machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4_hal.cli.compare import Chunk, Decode, ModelDir, Prompt, Seed, Tokens, script, telling
from dsv4_hal.cli.conform import Grad, Limit, Mode, Op, Pattern, Size, chosen_jobs, known_mode, progress, within

if TYPE_CHECKING:
    from dsv4_hal.conformance.replay import Script
    from dsv4_hal.conformance.runner import Job


def record(
    out: Annotated[Path, typer.Option(help="The bundle to write; must not exist.", metavar="BUNDLE")],
    backend: Annotated[str, typer.Option(help="Registered backend.")] = "reference",
    op: Op = None,
    pattern: Pattern = "",
    mode: Mode = None,
    size: Size = "quick",
    grad: Grad = False,
    limit: Limit = 60.0,
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
    """
    from dsv4_hal.conformance.container import refuse_existing

    refuse_existing(out)
    if model is None and (ops or any(option is not None for option in (tokens, prompt, decode, chunk, seed))):
        raise ValueError("--ops, --tokens, --prompt, --decode, --chunk and --seed go with --model DIR")
    if model is not None and (op or pattern or grad):
        raise ValueError("a whole model is recorded whole: --model does not go with -o, -p or --grad")
    out.parent.mkdir(parents=True, exist_ok=True)
    if model is None:
        told = _cases(out, backend, chosen_jobs(op, pattern, mode, size, grad), size, limit)
    else:
        told = _model(
            out, backend, model, known_mode(mode) or "deployed", script(model, tokens, prompt, decode, chunk, seed), ops
        )
    typer.echo(f"{out}: {told}, {out.stat().st_size / 1e6:.1f} MB")


def _cases(out: Path, backend: str, work: list[Job], size: str, limit: float) -> str:
    from dsv4_hal.conformance import runner
    from dsv4_hal.conformance.bundle import write_bundle
    from dsv4_hal.conformance.text import counted
    from dsv4_hal.conformance.waivers import read_waivers

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
    return f"{counted(len(made), 'case')} of {backend}, {lost} without results; {extent}"


def _model(out: Path, backend: str, model: str, mode: str, plan: Script, ops: bool) -> str:
    from dsv4_hal.conformance.model_run import record

    with telling() as tell:
        record(out, model, backend, mode, plan, ops, tell(f"{backend}, freely"))
    lengths = " + ".join(str(len(prompt)) for prompt in plan.prompts)
    return f"{model} on {backend}, {mode}: {lengths} tokens and {plan.decode} decoded"
