"""What verbs share: the console for notes, the options of a run, and loading its model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

import dsv4_hal
from dsv4_hal.config import Loaded, Run, load_run
from dsv4_hal.dispatch import Resolved
from dsv4_hal.numerics import Numerics, numerics_for

if TYPE_CHECKING:
    from dsv4_hal.model.transformer import Model

notes = Console(stderr=True, highlight=False, soft_wrap=True)
"""Standard error: everything that is not what the verb was asked for."""

Config = Annotated[Path | None, typer.Option(help="YAML file of the run; or cpu, cpu-exact, shapes.", metavar="FILE")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="A key of the run, as in generate.top_p=0.9.", metavar="KEY=VALUE")
]
Backend = Annotated[str | None, typer.Option(help="Registered backend, or several with commas; default auto.")]
Mode = Annotated[str | None, typer.Option(help="deployed (published numerics, the default) or exact (float32).")]
Device = Annotated[str | None, typer.Option(help="Torch device; default the backend's.")]
Strict = Annotated[bool | None, typer.Option("--strict/--no-strict", help="Refuse ops of another backend.")]
ShowConfig = Annotated[bool, typer.Option("--show-config", help="Print every value and where it came from.")]


def configure(config: Path | None, sets: list[str] | None, show: bool = False, **options: tuple[str, Any]) -> Loaded:
    """The run out of file, environment and command line. options: flag, without dashes -> (key, value or None)."""
    flags = {"--" + flag.replace("_", "-"): option for flag, option in options.items()}
    loaded = load_run(config, sets or (), flags)
    if show:
        notes.print(settings_yaml(loaded), markup=False)
    return loaded


def settings_yaml(loaded: Loaded, write: Callable[[str], str] = str) -> str:
    """Every value of the run and where it came from: a YAML file that loads as this run. Texts go through `write`."""
    rows = [
        (f"{s.key}: {write(json.dumps(s.value, ensure_ascii=False))}", write(s.place) or "default")
        for s in loaded.settings()
    ]
    width = max(len(value) for value, _ in rows if len(value) < 60)
    return "\n".join(f"{value:{width}}  # {place}" for value, place in rows)


def numerics_of(run: Run) -> Numerics:
    return numerics_for(run.mode, None if run.dtype is None else getattr(torch, run.dtype))


def model_of(run: Run) -> str:
    if run.model is None:
        raise ValueError("no model: name a checkpoint directory, or set `model` in the configuration")
    return run.model


def directory_of(run: Run) -> str:
    """The run's checkpoint directory. ValueError for a preset, which has no weights."""
    from dsv4_hal.model.config import find_config

    if find_config(model_of(run))[1] is None:
        raise ValueError(
            f"{run.model} is a preset: it has shapes but no weights. "
            f"Write random ones with `dsv4-hal init --preset {run.model} --out DIR`"
        )
    return model_of(run)


def title(model: Model) -> str:
    """What runs a model, in two words."""
    assert isinstance(model.ops, Resolved)
    return f"{model.ops.primary.name}, {model.ops.numerics.mode}"


def load(run: Run) -> Model:
    """The run's model, with a progress bar, and a note for every op that its backend refused.

    Says so where the checkpoint's weights are random.
    """
    from dsv4_hal.model.checkpoint import weights_are_random

    with _loading() as progress:
        model = dsv4_hal.load_model(
            model_of(run),
            run.backend,
            run.mode,
            ops=run.preferences(),
            device=run.device,
            dtype=numerics_of(run).storage if run.dtype else None,
            shared_expert_clamp=run.shared_expert_clamp,
            strict=run.strict,
            progress=progress,
        )
    assert isinstance(model.ops, Resolved)
    for r in model.ops.resolutions:
        if r.rejected:
            why = "; ".join(f"{backend}: {reason}" for backend, reason in r.rejected)
            notes.print(f"[yellow]{r.op} runs as {r.runs_as}[/] ({escape(why)})")
    if weights_are_random(directory_of(run)):
        notes.print("[yellow]The weights are random: expect noise, not language.[/]")
    return model


class _loading:
    """A progress bar on standard error while weights are loaded, where there is a terminal to see it."""

    def __enter__(self):  # type: ignore[no-untyped-def]
        self.bar = Progress(
            TextColumn("loading"),
            BarColumn(),
            DownloadColumn(),
            console=notes,
            transient=True,
            disable=not notes.is_terminal,
        )
        self.bar.start()
        self.task = self.bar.add_task("loading", total=None)
        return lambda done, total: self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
