"""`dsv4-hal conform`: a backend against the contract, case by case."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from dsv4_hal.cli import common
from dsv4_hal.numerics import MODES, mode_names
from dsv4_hal.ops import FAMILIES, OPS, SIZES
from dsv4_hal.registry import FALLBACK

SHORTEST, LONGEST = 0.1, 86400.0  # seconds that a case may be given

if TYPE_CHECKING:
    from dsv4_hal.conformance.judging.results import About, Extent, Job, Outcome
    from dsv4_hal.conformance.judging.worker import Worker
    from dsv4_hal.conformance.reports.report import Run


Op = Annotated[list[str] | None, typer.Option("-o", "--op", help="Only this op, or family of ops.")]
Pattern = Annotated[
    str, typer.Option("-p", "--pattern", help="Only cases whose id contains this; or any whole id, listed or not.")
]
Mode = Annotated[
    str | None,
    typer.Option(
        "--mode", "--profile", help="exact, deployed, or a device's numeric profile; default exact and deployed."
    ),
]
Size = Annotated[str, typer.Option(help="Cases up to this size class: tiny, interpreted, quick or full.")]
Grad = Annotated[bool, typer.Option("--grad", help="Gradients instead, in mode exact.")]
Out = Annotated[Path | None, typer.Option(help="Write results.jsonl, junit.xml, report.md and report.html here.")]
Limit = Annotated[float, typer.Option(help="Seconds that a case may take.", min=SHORTEST, max=LONGEST)]


def conform(
    backend: Annotated[str, typer.Option(help="Registered backend.")] = "reference",
    op: Op = None,
    pattern: Pattern = "",
    mode: Mode = None,
    size: Size = "quick",
    grad: Grad = False,
    out: Out = None,
    limit: Limit = 60.0,
    generate: Annotated[int, typer.Option(help="Draw so many cases of every op instead.", min=0, max=100000)] = 0,
    seed: Annotated[int | None, typer.Option(help="Of what --generate draws; default 0.")] = None,
    soak: Annotated[
        int,
        typer.Option(
            help="Call every op so often on a few small cases instead: the same to the bit?", min=0, max=10**9
        ),
    ] = 0,
    golden: Annotated[
        Path | None, typer.Option(help="Golden vectors, for the reference; default tests/data/tiny of the sources.")
    ] = None,
    show_cases: Annotated[bool, typer.Option("--list", help="List the cases and run none.")] = False,
    mutants: Annotated[
        bool, typer.Option("--mutants", help="Run deliberately wrong backends: is each caught?")
    ] = False,
) -> None:
    """Compare a backend with the reference on the cases of the contract.

    The reference itself is compared with a naive float64 oracle, with HF transformers, closed forms and golden vectors.

    Exit codes: 0 agrees, 1 disagrees, 2 usage, 3 backend unavailable, 4 a waiver is stale, 5 nothing was judged: the
    backend computes shapes only, or refused every case, and the reference ran in its place.
    """
    from dsv4_hal.conformance.answers.known import Answers, answers
    from dsv4_hal.conformance.judging import results
    from dsv4_hal.conformance.judging.waivers import read_waivers
    from dsv4_hal.conformance.judging.worker import LIMIT, Worker
    from dsv4_hal.conformance.reports import saved
    from dsv4_hal.conformance.reports.report import Run

    if mutants:
        others = (op, pattern, mode, grad, out, show_cases, golden, generate, seed is not None, soak)
        if any(others) or (backend, size, limit) != ("reference", "quick", LIMIT):
            raise ValueError(
                "--mutants runs all wrong backends on the cases of their ops; it goes with no other option"
            )
        raise typer.Exit(_mutants())
    if generate and (pattern or grad or show_cases):
        raise ValueError("--generate draws cases of its own: it does not go with -p, --grad or --list")
    if seed is not None and not generate:
        raise ValueError("--seed goes with --generate")
    if soak and (generate or grad or show_cases):
        raise ValueError("--soak repeats calls of a few cases: it does not go with --generate, --grad or --list")
    known = Answers()
    if backend == FALLBACK and not grad and not generate and not soak:
        one = known_mode(mode)
        known = answers(chosen_ops(op or ()), pattern, (one,) if one else MODES, golden)
    elif golden is not None:
        raise ValueError("--golden goes with --backend reference, and not with --grad, --generate or --soak")
    if known.ids and any(what in pattern for what in ("form=", "golden=")):
        known_size(size)
        work = []  # the pattern names answers that are known beforehand, and no case
    else:
        work = chosen_jobs(op, pattern, mode, size, grad)
    if show_cases:
        typer.echo("\n".join([*dict.fromkeys(job.case for job in work), *known.ids]))
        return
    if out is not None:
        saved.folder(out, saved.OPS_FILE)
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # the worker has the other half
    outcomes: list[results.Outcome] = []
    interrupted_of: int | None = None
    with Worker(backend, results.modes(work)) as worker:
        waivers = read_waivers(Path(worker.about.waivers))
        work, extent = within(backend, work, worker.about, size)
        if generate:
            extent = results.Extent(extent.size, extent.affords, seed=seed or 0)
            ops, modes = {job.op: None for job in work}, results.modes(work)
            total, bar = generate * len(ops) * len(modes), progress(len(ops), "ops")
            found = _drawn(worker, list(ops), generate, modes, extent, limit)
        elif soak:
            extent = results.Extent(extent.size, extent.affords, soak=soak)
            total = len({job.op for job in work})
            bar, found = progress(total, "ops"), _soaked(worker, work, soak, limit)
        else:
            total = len(work) + len(known.ids)
            bar, found = progress(total), _listed(worker, work, known.outcomes(), limit)
        try:
            with bar as advance:
                for some in found:
                    outcomes += some
                    advance()
        except KeyboardInterrupt:
            interrupted_of = total
    conclude(Run(backend, outcomes, worker.about, waivers, extent, known.unasked, interrupted_of), out)


def _listed(worker: Worker, work: Sequence[Job], known: Iterable[Outcome], limit: float) -> Iterator[list[Outcome]]:
    from dsv4_hal.conformance.judging import verdict

    for job, made in worker.map(work, limit):
        yield [verdict.judge(worker.backend, job, made, worker.about.numerics(job.mode))]
    for outcome in known:
        yield [outcome]


def _drawn(
    worker: Worker, ops: Sequence[str], count: int, modes: Sequence[str], extent: Extent, limit: float
) -> Iterator[list[Outcome]]:
    """Cases that are drawn, op by op."""
    from dsv4_hal.conformance.judging.generated import generate

    try:
        yield from generate(worker, ops, count, modes, extent.classes[-1], extent.seed or 0, limit)
    except ImportError as error:
        raise RuntimeError(f"--generate needs hypothesis: pip install 'dsv4-hal[fuzz]' ({error})") from error


def _soaked(worker: Worker, work: Sequence[Job], calls: int, limit: float) -> Iterator[list[Outcome]]:
    """A few cases of each op, again and again."""
    from dsv4_hal.conformance.judging.soak import soak

    console, produce = common.console(), partial(worker.produce, limit=limit)
    for outcomes in soak(worker.backend, produce, worker.about.numerics, work, calls, limit):
        yield outcomes
        for outcome in outcomes:
            if outcome.ok:
                console.print(escape(f"{outcome.id}: {outcome.message}"), soft_wrap=True, highlight=False)


def conclude(run: Run, out: Path | None) -> None:
    """Show a run, write its files, and leave with its exit code. One that was interrupted does not replace another that
    was not."""
    from dsv4_hal.conformance.reports import saved
    from dsv4_hal.conformance.reports.report import write

    show(run)
    if out is not None and run.interrupted and saved.finished(out):
        common.notes.print(f"[yellow]not written: {escape(str(out))} holds a run that came to its end[/]")
    elif out is not None:
        write(run, out)
        common.notes.print(f"[dim]written: {escape(str(out))}/results.jsonl, junit.xml, report.md, report.html[/]")
    if run.interrupted:
        raise KeyboardInterrupt
    if run.failed:
        raise typer.Exit(1)
    if run.stale:
        raise typer.Exit(4)
    if not run.judged:
        raise typer.Exit(5)


def chosen_jobs(op: Sequence[str] | None, pattern: str, mode: str | None, size: str, grad: bool) -> list[Job]:
    """The cases that the options choose. ValueError where they choose none, or name what is not there."""
    from dsv4_hal.conformance.judging import results
    from dsv4_hal.conformance.judging.named import split

    known_mode(mode)
    if grad and mode not in (None, "exact"):
        raise ValueError(f"--grad is in mode exact: mode {mode} rounds, and has no gradients")
    known_size(size)
    ops = chosen_ops(op or ())
    modes: tuple[str, ...] = (results.GRAD,) if grad else MODES if mode is None else (mode,)
    id, _, pasted = pattern.partition("@")
    if split(id):
        return _pasted(id, pasted, modes, ops)
    if grad and not (ops := [op for op in ops if OPS[op].grad]):
        raise ValueError(f"no case of {', '.join(op or ())} has gradients")
    if work := results.jobs(ops, pattern, modes, size):
        return work
    if larger := results.jobs(ops, pattern, modes, SIZES[-1]):
        raise ValueError(f"{larger[0].case} is larger than --size {size}: it needs --size {larger[0].size}")
    raise ValueError(f"no case has {pattern!r} in its id; conform --list shows them all")


def known_mode(mode: str | None) -> str | None:
    """The mode, if it is one or none. ValueError otherwise."""
    if mode not in (None, *(names := mode_names())):
        raise ValueError(f"--mode must be {', '.join(names[:-1])} or {names[-1]}, got {mode!r}")
    return mode


def known_size(size: str) -> None:
    """ValueError where it is none."""
    if size not in SIZES:
        raise ValueError(f"--size must be {', '.join(SIZES[:-1])} or {SIZES[-1]}, got {size!r}")


def _pasted(id: str, pasted: str, modes: Sequence[str], ops: Sequence[str]) -> list[Job]:
    """The case that a whole id names, whatever its size and whether or not it is listed: somebody saw it fail."""
    from dsv4_hal.conformance.judging import results
    from dsv4_hal.conformance.judging.named import named, try_out

    if pasted not in ("", *mode_names(), results.GRAD):
        raise ValueError(f"{id}@{pasted}: a case runs in mode {', '.join(mode_names())} or {results.GRAD}")
    case, op = named(id), id.partition("[")[0]
    try_out(case)
    if op not in ops:
        raise ValueError(f"{id} is a case of {op}, and -o chooses others")
    chosen = [pasted] if pasted else modes
    if results.GRAD in chosen and not OPS[op].grad:
        raise ValueError(f"{op} has no gradients")
    return [results.Job(op, id, mode, case.size) for mode in chosen]


def within(backend: str, work: Sequence[Job], about: About, size: str) -> tuple[list[Job], Extent]:
    """The jobs that a backend affords, and what to tell of those that it does not. ValueError where it affords none."""
    from dsv4_hal.conformance.judging import results

    kept = results.affordable(work, about)
    if work and not kept:
        raise ValueError(
            f"backend {backend} affords {about.affords} cases at most, and all {len(work)} chosen are larger"
        )
    return kept, results.Extent(size, about.affords, len(work) - len(kept))


def chosen_ops(names: Sequence[str]) -> list[str]:
    """Ops named, families as their ops. ValueError names the nearest for one that is not there."""
    for name in names:
        if name not in OPS and name not in FAMILIES:
            near = difflib.get_close_matches(name, [*OPS, *FAMILIES], 1)
            raise ValueError(f"no op or family is called {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return [op for op, spec in OPS.items() if not names or op in names or spec.family in names]


def show(run: Run) -> None:
    from dsv4_hal.conformance.judging.trace import short
    from dsv4_hal.conformance.reports import saved
    from dsv4_hal.conformance.reports.report import rows
    from dsv4_hal.conformance.workers.text import one_line

    traces = list[list[str]]()
    table = Table()
    for title in ("op", "runs as", "cases", "failed", "of budget"):
        table.add_column(title, no_wrap=True)
    for row in rows(run):
        failed = f"[red]{row['failed']}[/]" if row["failed"] else "0"
        table.add_row(row["op"], row["runs_as"], str(row["cases"]), failed, row["of_budget"])
    console = common.console()
    console.print(table)
    for outcome in run.outcomes:
        if not outcome.ok:
            waiver = run.waiver(outcome)
            told = f"waived {waiver.date} ({waiver.reason})" if waiver else outcome.verdict
            line = one_line(f"{outcome.id}: {told}: {outcome.message}")
            console.print(escape(line), soft_wrap=True, highlight=False)
            where = short(outcome.trace)
            if where and where not in traces:  # many cases end at one place
                traces.append(where)
                console.print(escape(saved.printable("\n".join(where))), soft_wrap=True, highlight=False)
    for op, why in run.refused.items():
        line = one_line(f"{op} is refused: {why}")
        console.print(escape(line), soft_wrap=True, highlight=False)
    for waiver in run.stale:
        console.print(escape(f"stale waiver: {waiver.case} of {waiver.date}: {waiver.why_stale}"), soft_wrap=True)
    for told in run.about.remarks:
        console.print(escape(one_line(f"remark: {told}")), soft_wrap=True, highlight=False)
    if run.unrecorded:
        console.print(escape(f"not recorded: {run.unrecorded}"), soft_wrap=True, highlight=False)
    for told in run.unasked:
        console.print(escape(f"not asked: {told}"), soft_wrap=True, highlight=False)
    console.print(escape(run.headline), soft_wrap=True, highlight=False)


def _mutants() -> int:
    """Show what catches each mutant; the exit code."""
    from dsv4_hal.conformance.mutants import ENOUGH, hunt, mutants

    caught, console = 0, common.console()
    with progress(len(mutants())) as advance, torch.inference_mode():
        for mutant in mutants():
            catch = hunt(mutant)
            caught += catch.ok
            found = (
                "not caught" if catch.outcome is None else f"{_clear(catch.outcome.of_budget)} by {catch.outcome.id}"
            )
            color = "green" if catch.ok else "red"
            console.print(f"[{color}]{escape(mutant.fault)}[/]: {escape(found)}", soft_wrap=True, highlight=False)
            advance()
    console.print(f"{caught} of {len(mutants())} mutants caught, by an exact check or at {ENOUGH:g} budgets or more")
    return 0 if caught == len(mutants()) else 1


def _clear(of_budget: float | None) -> str:
    return "exactly" if of_budget is None or math.isinf(of_budget) else f"at {of_budget:.3g} budgets"


class progress:
    """A bar on standard error, where there is a terminal to see it; `with` gives the function that advances it."""

    def __init__(self, total: int, what: str = "cases") -> None:
        self.what = what
        self.bar = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            console=common.notes,
            transient=True,
            disable=not common.notes.is_terminal,
        )
        self.total = total

    def __enter__(self):  # type: ignore[no-untyped-def]
        self.bar.start()
        task = self.bar.add_task(self.what, total=self.total)
        return lambda: self.bar.advance(task)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
