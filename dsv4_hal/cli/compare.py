"""`dsv4-hal compare`: backends on a whole model, or a run that was recorded elsewhere."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from dsv4_hal.cli import common
from dsv4_hal.cli.conform import conclude, known_mode, progress
from dsv4_hal.registry import FALLBACK

if TYPE_CHECKING:
    from dsv4_hal.conformance.models.compare import Compared, Tell
    from dsv4_hal.conformance.models.replay import Script

Backends = Annotated[
    str | None, typer.Option(help="Backends with commas; each is compared with the first.", metavar="A,B[,C]")
]
ModelDir = Annotated[str | None, typer.Option(help="Checkpoint directory.", metavar="DIR")]
Against = Annotated[Path | None, typer.Option(help="A bundle that `record` wrote.", metavar="BUNDLE")]
Here = Annotated[str, typer.Option(help="With a bundle of a model: the backend here that it is compared with.")]
Numerics = Annotated[
    str | None,
    typer.Option("--mode", "--profile", help="deployed (default), exact, or a device's numeric profile."),
]
Tokens = Annotated[
    str | None, typer.Option(help="Lengths of random prompts, with commas; default 160,90.", metavar="N[,N]")
]
Prompt = Annotated[list[str] | None, typer.Option(help="A text to continue; may be repeated.")]
Decode = Annotated[int | None, typer.Option(help="Tokens to decode after the prompts; default 8.", min=0)]
Chunk = Annotated[int | None, typer.Option(help="Prompt tokens in one step; default 128.", min=1)]
Seed = Annotated[int | None, typer.Option(help="Seed of random prompts; default 0.", min=0, max=2**64 - 1)]
StepLimit = Annotated[
    float | None, typer.Option("--limit", help="Seconds that a step may take; default 600.", min=0.1, max=86400)
]
Out = Annotated[Path | None, typer.Option(help="Write the reports here.")]


def compare(
    backends: Backends = None,
    model: ModelDir = None,
    against: Against = None,
    backend: Here = "reference",
    mode: Numerics = None,
    tokens: Tokens = None,
    prompt: Prompt = None,
    decode: Decode = None,
    chunk: Chunk = None,
    seed: Seed = None,
    limit: StepLimit = None,
    out: Out = None,
) -> None:
    """Compare backends part by part on a model, or a recorded run with this machine.

    `--backends a,b --model DIR`: every part of b from what a's saw, with its picks; then both freely. That b raises,
    hangs or crashes is a difference; where a does, nothing can be compared.
    `--against BUNDLE`: cases of the contract with the reference here, as `conform` would. `--against BUNDLE --model
    DIR`: a model run recorded elsewhere.

    Exit codes: 0 agrees, 1 disagrees, 2 usage or a bundle that cannot be read, 3 backend unavailable, or the one that
    others are compared with fails, 4 a waiver is stale, 5 nothing was judged: shapes only, or a backend refused
    everything, and the reference ran in its place.
    """
    from dsv4_hal.conformance.models.compare import live
    from dsv4_hal.conformance.models.run import LIMIT
    from dsv4_hal.conformance.reports import saved

    options = (mode, tokens, prompt, decode, chunk, seed)
    if against is not None:
        if backends is not None or any(option is not None for option in options):
            raise ValueError(
                "--against BUNDLE says what was run: it goes with --model, --backend, --limit and --out only"
            )
        refuse_auto(backend)
        if model is None and limit is not None:
            raise ValueError("--limit goes with --model DIR: to judge recorded cases no backend is run")
        if out is not None:
            saved.folder(out, saved.OPS_FILE if model is None else saved.MODEL_FILE)
        if model is None:
            _recorded_cases(against, backend, out)
        else:
            _recorded_model(against, model, backend, limit or LIMIT, out)
        return
    if backends is None or model is None:
        raise ValueError("name what to compare: --backends a,b --model DIR, or --against BUNDLE")
    if backend != "reference":
        raise ValueError("--backend goes with --against; with --backends, the first one is compared with")
    names = backend_names(backends)
    plan = script(model, tokens, prompt, decode, chunk, seed)
    if out is not None:
        saved.folder(out, saved.MODEL_FILE)
    with telling() as tell:
        found = live(model, names, known_mode(mode) or "deployed", plan, tell, limit or LIMIT)
    conclude_model(found, out)


def backend_names(text: str) -> list[str]:
    """At least two different ones."""
    names = [name.strip() for name in text.split(",")]
    if len(names) < 2 or not all(names) or len(set(names)) != len(names):
        raise ValueError(f"--backends needs two or more different names with commas between them, got {text!r}")
    for name in names:
        refuse_auto(name)
    return names


def refuse_auto(name: str) -> None:
    """It stands for another backend, and who reads a report would not know for which."""
    if name == "auto":
        raise ValueError("auto is not a backend to compare: name one that `dsv4-hal backends` lists")


def script(
    model: str,
    tokens: str | None,
    prompt: Sequence[str] | None,
    decode: int | None,
    chunk: int | None,
    seed: int | None,
) -> Script:
    """What is run: the prompts given, or random tokens. ValueError where the model has no room for it."""
    from dsv4_hal.conformance.models.replay import Script
    from dsv4_hal.conformance.models.run import check_room
    from dsv4_hal.model.tokenizer import encode, load_tokenizer

    cfg, directory = common.checkpoint(model)
    steps = 8 if decode is None else decode
    if prompt:
        if tokens is not None or seed is not None:
            raise ValueError("--prompt gives the tokens: it does not go with --tokens or --seed")
        tokenizer = load_tokenizer(directory, cfg.vocab_size)
        prompts = tuple(tuple(encode(tokenizer, text, cfg.bos_token_id)) for text in prompt)
    else:
        generator = torch.Generator().manual_seed(seed or 0)
        lengths = _lengths("160,90" if tokens is None else tokens)
        check_room(max(lengths) + steps, cfg)  # before they are drawn
        prompts = tuple(
            tuple(torch.randint(cfg.vocab_size, (length,), generator=generator).tolist()) for length in lengths
        )
    plan = Script(prompts, steps, chunk or 128)
    check_room(plan.room, cfg)
    return plan


def _lengths(text: str) -> list[int]:
    parts = text.split(",")
    # No model has a context of twenty digits.
    if not all(re.fullmatch("0*[1-9][0-9]{0,18}", part.strip(" ")) for part in parts):
        raise ValueError(f"--tokens must be whole numbers of at least 1 with commas between them, got {text!r}")
    return [int(part) for part in parts]


def _recorded_cases(against: Path, backend: str, out: Path | None) -> None:
    from dsv4_hal.conformance.answers.known import LIVE
    from dsv4_hal.conformance.judging.verdict import judge
    from dsv4_hal.conformance.reports.bundle import read_bundle
    from dsv4_hal.conformance.reports.report import Run
    from dsv4_hal.conformance.workers import container

    if backend != "reference":
        raise ValueError("cases of the contract are compared with the reference; --backend goes with a model's bundle")
    if container.read_header(against)["kind"] == "model":
        raise ValueError(f"{against} holds a whole model: add --model DIR")
    bundle = read_bundle(against)
    outcomes = []
    with progress(len(bundle.made)) as advance, torch.inference_mode():
        for job, produced in bundle.made:
            outcomes.append(judge(bundle.backend, job, produced, bundle.about.numerics(job.mode)))
            advance()
    where = bundle.about.environment
    versions = {**where["program"], **where["machine"], "torch": where["packages"].get("torch", "unknown")}
    versions["python"], _, _ = versions["python"].partition(",")  # without the path of its program
    told = ", ".join(f"{key} {versions[key]}" for key in ("dsv4-hal", "torch", "python", "system"))
    common.notes.print(escape(f"recorded with {told}"))
    unasked = LIVE if bundle.backend == FALLBACK else ()
    run = Run(bundle.backend, outcomes, bundle.about, bundle.waivers, bundle.extent, unasked, suite=bundle.suite)
    conclude(run, out)


def _recorded_model(against: Path, model: str, backend: str, limit: float, out: Path | None) -> None:
    from dsv4_hal.conformance.models.compare import recorded

    with telling() as tell:
        found = recorded(model, against, backend, tell, limit)
    conclude_model(found, out)


def conclude_model(compared: Compared, out: Path | None) -> None:
    """Show a comparison, write its files, and leave with its exit code."""
    from dsv4_hal.conformance.reports.model_report import write

    show_model(compared)
    if out is not None:
        write(compared, out)
        common.notes.print(f"[dim]written: {escape(str(out))}/model.jsonl, junit.xml, report.md, report.html[/]")
    if compared.failed:
        raise typer.Exit(1)
    if compared.unjudged:
        raise typer.Exit(5)


def show_model(compared: Compared) -> None:
    from dsv4_hal.conformance.models.compare import headline
    from dsv4_hal.conformance.models.drift import GOOD, Part
    from dsv4_hal.conformance.reports.model_report import cells

    console = common.console()
    for backend in compared.head["backends"]:
        table = Table(title=f"{backend} against {compared.head['baseline']}, {compared.head['mode']}")
        for title in ("part", "error", "median", "worst token", "of budget", "verdict"):
            table.add_column(title, no_wrap=True)
        for row in compared.rows:
            if isinstance(row, Part) and row.backend == backend:
                *values, verdict = map(escape, cells(row))
                table.add_row(*values, verdict if row.verdict in GOOD else f"[red]{verdict}[/]")
        console.print(table)
    for row in compared.failed:
        console.print(
            escape(f"{row.backend}: {row.name}: {row.verdict}: {row.message}"), soft_wrap=True, highlight=False
        )
    for line in headline(compared):
        console.print(escape(line), soft_wrap=True, highlight=False)


@contextlib.contextmanager
def telling() -> Iterator[Tell]:
    """Bars on standard error, one per run, where there is a terminal to see them."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=common.notes,
        transient=True,
        disable=not common.notes.is_terminal,
    )

    def tell(what: str):  # type: ignore[no-untyped-def]
        task = bars.add_task(what, total=None)
        return lambda done, total: bars.update(task, completed=done, total=total)

    with bars:
        yield tell
