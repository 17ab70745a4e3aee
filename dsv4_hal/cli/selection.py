"""`dsv4-hal backends` and `dsv4-hal explain`: what can run here, and what would run, op by op."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dsv4_hal.backend import BackendError
from dsv4_hal.cli import common
from dsv4_hal.dispatch import Resolution, Resolved, select
from dsv4_hal.ops import OPS
from dsv4_hal.registry import BackendInfo, list_backends

Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


def backends(as_json: Json = False) -> None:
    """List the registered backends: whether each can be used here, why not, and what to install."""
    found = list_backends()
    if as_json:
        typer.echo(json.dumps([vars(info) for info in found], indent=2))
        return
    table = Table()
    for title in ("backend", "usable"):
        table.add_column(title, no_wrap=True)
    for title in ("why", "registered by"):
        table.add_column(title, overflow="fold")
    for info in found:
        usable = "[green]yes[/]" if info.available else "[red]no[/]"
        if info.available and not info.automatic:
            usable += ", by name"
        by = info.package or info.source
        why = "\n".join(filter(None, (info.reason, info.remedy and f"to use it: {info.remedy}")))
        table.add_row(escape(info.name), usable, escape(why), escape(by))
    common.console().print(table)


def explain(
    config: common.Config = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint directory or preset.", metavar="DIR|PRESET")] = None,
    sets: common.Set = None,
    backend: common.Backend = None,
    mode: common.Mode = None,
    device: common.Device = None,
    strict: common.Strict = None,
    assume: Annotated[
        str | None,
        typer.Option(help="Explain as on a machine with this architecture: sm_90, ascend950.", metavar="ARCH"),
    ] = None,
    show_config: common.ShowConfig = False,
    as_json: Json = False,
) -> None:
    """Say which backend runs each op, and why each other candidate does not. Loads no weights.

    Exit code 3 where the run is strict and would be refused.
    """
    from dsv4_hal.model.config import find_config

    loaded = common.configure(
        config,
        sets,
        show_config,
        model=("model", model),
        backend=("backend", backend),
        mode=("mode", mode),
        device=("device", device),
        strict=("strict", strict),
        assume=("assume", assume),
    )
    run = loaded.run
    facts = {} if run.model is None else vars(find_config(run.model)[0])
    with common.placed(loaded):
        ops = select(run.backend, common.numerics_of(loaded), facts, prefer=run.ops, device=run.device)
    others = [info for info in list_backends() if info.name not in _involved(ops)]
    refused = [r.fallback for r in ops.resolutions if r.fallback]
    if as_json:
        typer.echo(json.dumps(_report(ops, run.model, run.assume, others, refused if run.strict else None), indent=2))
    else:
        console = common.console()
        console.print(_table(ops))
        console.print(escape(_summary(ops, run.model, run.assume)), soft_wrap=True)
        for name, why in _passed_over(ops, others, run.assume).items():
            console.print(escape(f"passed over: {name} ({why})"), soft_wrap=True)
    if run.strict and refused:
        raise BackendError("strict: " + "\n  ".join(refused))


def _table(ops: Resolved) -> Table:
    table = Table()
    for title in ("op", "runs as", "on"):
        table.add_column(title, no_wrap=True)
    table.add_column("why", overflow="fold")
    color = {"native": "green", "composite": "cyan", "inherited": "green", "reference": "yellow"}
    for i, r in enumerate(ops.resolutions):
        if i and OPS[r.op].family != OPS[ops.resolutions[i - 1].op].family:
            table.add_section()
        why = "\n".join(filter(None, [*(f"not {name}: {said}" for name, said in r.rejected), r.adopted, r.reason]))
        runs = f"[{color[r.runs_as]}]{r.runs_as}[/]"
        table.add_row(r.op, runs, escape(r.backend) or "its parts", escape(why))
    return table


def _summary(ops: Resolved, model: str | None, assume: str | None) -> str:
    about = f"for {model}" if model else "for no model in particular (--model names one: its widths may be refused)"
    where = f"{ops.device}, taken for {assume}" if assume else str(ops.device)
    return f"{ops.primary.name} on {where}, {ops.numerics.mode}, {about}: {common.kinds(ops)}"


def _involved(ops: Resolved) -> set[str]:
    """Backends that were asked for at least one op."""
    return {n for r in ops.resolutions for n in (r.wanted, r.backend, *(name for name, _ in r.rejected))}


def _passed_over(ops: Resolved, others: list[BackendInfo], assume: str | None) -> Mapping[str, str]:
    """Backends that serve no op and were not asked to, and why; where something can be installed, what. With another
    machine assumed, what they say of it helps nobody who did not name them."""

    def why(info: BackendInfo) -> str:
        remedy = f"; {info.remedy}" if info.remedy else ""
        there = info.available or assume is not None
        return ops.passed.get(info.name, "not named in this run") if there else info.reason + remedy

    return {info.name: why(info) for info in others}


def _report(
    ops: Resolved, model: str | None, assume: str | None, others: list[BackendInfo], strict: list[str] | None
) -> dict[str, Any]:
    return {
        "backend": ops.primary.name,
        "device": str(ops.device),
        "assumed": assume,
        "mode": ops.numerics.mode,
        "model": model,
        "counts": {kind: sum(r.runs_as == kind for r in ops.resolutions) for kind in common.KINDS},
        "ops": [_row(r) for r in ops.resolutions],
        "passed_over": dict(_passed_over(ops, others, assume)),
        "strict": strict is not None,
        "refused": strict or [],
    }


def _row(r: Resolution) -> dict[str, Any]:
    rejected = [{"backend": backend, "reason": reason} for backend, reason in r.rejected]
    return {
        "op": r.op,
        "family": OPS[r.op].family,
        "runs_as": r.runs_as,
        "backend": r.backend or None,
        "wanted": r.wanted,
        "rejected": rejected,
        "adopted": r.adopted or None,
        "reason": r.reason or None,
    }
