"""`dsv4-hal bisect`: the first op of a forward pass that a backend makes wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from dsv4_hal.cli import common
from dsv4_hal.cli.compare import (
    Against,
    Chunk,
    Decode,
    Here,
    ModelDir,
    Numerics,
    Prompt,
    Seed,
    StepLimit,
    Tokens,
    backend_names,
    refuse_auto,
    script,
    telling,
)
from dsv4_hal.cli.conform import known_mode

if TYPE_CHECKING:
    from dsv4_hal.conformance.models.compare import Bisected
    from dsv4_hal.conformance.models.drift import Call


def bisect(
    backends: Annotated[
        str | None, typer.Option(help="Two backends: the second is compared with the first.", metavar="A,B")
    ] = None,
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
) -> None:
    """Find the first op in the forward pass whose output leaves its budget: of two backends, or in a bundle.

    The first part beyond its budget is found as `compare` does. Both then run it from the same inputs, and what its ops
    make is compared one by one: what follows the first wrong one got wrong inputs. A bundle must have been recorded
    with `--ops`.

    Exit codes: 0 none found, 1 found, or the second backend fails, 2 usage or a bundle that cannot be read, 3 backend
    unavailable, or the first one fails.
    """
    from dsv4_hal.conformance.models.compare import bisect_live, bisect_recorded
    from dsv4_hal.conformance.models.run import LIMIT

    if model is None or (backends is None and against is None):
        raise ValueError("name what to compare: --backends a,b --model DIR, or --against BUNDLE --model DIR")
    if against is not None:
        if backends is not None or any(option is not None for option in (mode, tokens, prompt, decode, chunk, seed)):
            raise ValueError("--against BUNDLE says what was run: it goes with --model, --backend and --limit only")
        refuse_auto(backend)
        with telling() as tell:
            found = bisect_recorded(model, against, backend, tell, limit or LIMIT)
    else:
        names = backend_names(backends or "")
        if len(names) != 2:
            raise ValueError(f"bisect takes two backends, got {', '.join(names)}")
        if backend != "reference":
            raise ValueError("--backend goes with --against; with --backends, the first one is compared with")
        plan = script(model, tokens, prompt, decode, chunk, seed)
        with telling() as tell:
            found = bisect_live(model, names, known_mode(mode) or "deployed", plan, tell, limit or LIMIT)
    _show(found)
    if found.place or found.compared.failed:
        raise typer.Exit(1)


def _show(found: Bisected) -> None:
    """The ops of the part, and the first wrong one."""
    from dsv4_hal.conformance.reports.cells import share

    console, head = common.console(), found.compared.head
    backend = head["backends"][0]
    for row in found.compared.failed:
        console.print(escape(f"{backend}: {row.name}: {row.verdict}: {row.message}"), soft_wrap=True, highlight=False)
    if found.compared.failed and not found.place:
        return
    if not found.place:
        told = "in every part" if not found.calls else f"in all {len(found.calls)} calls of ops"
        console.print(escape(f"{backend} agrees with {head['baseline']} {told}"), soft_wrap=True, highlight=False)
        return
    first = found.first
    step = first.step if first else 0
    shown = [call for call in found.calls if call.name.startswith(f"{found.place}/") and call.step == step]
    table = Table(title=f"{found.place}, step {step} ({head['steps'][step]} tokens)")
    for title in ("op", "runs as", "of budget", "verdict"):
        table.add_column(title, no_wrap=True)
    for call in sorted(shown, key=_order):
        depth = call.name.count("/") - 1
        verdict = "agrees" if call.ok else "[red]wrong[/]" if call is first else "[dim]follows[/]"
        table.add_row("  " * depth + call.op, head["ops"][backend].get(call.op, ""), share(call.of_budget), verdict)
    console.print(table)
    if first is None:
        console.print(f"no op of {found.place} is beyond its own budget: their errors add up, or its picks differ")
        return
    path = " > ".join(part.partition(":")[2] for part in first.name.split("/")[1:])
    console.print(
        escape(f"first wrong op: {path} in {found.place}, step {first.step}: {first.message}"),
        soft_wrap=True,
        highlight=False,
    )
    console.print(escape(f"alone: dsv4-hal conform --backend {backend} -o {first.op}"), soft_wrap=True, highlight=False)


def _order(call: Call) -> list[int]:
    """A composite in front of its parts: its number among the calls of the place, then theirs."""
    return [int(part.partition(":")[0]) for part in call.name.split("/")[1:]]
