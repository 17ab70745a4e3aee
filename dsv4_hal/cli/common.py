"""What verbs share: the console for notes, the options of a run, and loading its model."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

import dsv4_hal
from dsv4_hal.backend import BackendError
from dsv4_hal.config import PREFIX, Loaded, Run, load_run
from dsv4_hal.dispatch import Resolved
from dsv4_hal.numerics import Numerics, numerics_for
from dsv4_hal.registry import FALLBACK, backend_class, list_backends

if TYPE_CHECKING:
    from dsv4_hal.model.config import ModelConfig
    from dsv4_hal.model.transformer import Model

KINDS = ("native", "inherited", "composite", "reference")

notes = Console(stderr=True, highlight=False, soft_wrap=True)
"""Standard error: everything that is not what the verb was asked for."""

Config = Annotated[
    Path | None,
    typer.Option(help="YAML file of the run; or cpu, cuda, ascend-a5 (a name of configs/runs).", metavar="FILE"),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="A key of the run, as in generate.top_p=0.9.", metavar="KEY=VALUE")
]
Backend = Annotated[str | None, typer.Option(help="Registered backend, or several with commas; default auto.")]
Mode = Annotated[
    str | None,
    typer.Option(
        "--mode",
        "--profile",
        help="deployed (published numerics, the default), exact (float32), or a device's numeric profile.",
    ),
]
Device = Annotated[str | None, typer.Option(help="Torch device; default the backend's.")]
Strict = Annotated[bool | None, typer.Option("--strict/--no-strict", help="Refuse ops of another backend.")]
ShowConfig = Annotated[bool, typer.Option("--show-config", help="Print every value and where it came from.")]


def configure(config: Path | None, sets: list[str] | None, show: bool = False, **options: tuple[str, Any]) -> Loaded:
    """The run out of file, environment and command line. options: flag, without dashes, or
    ARGUMENT -> (key, value or None)."""
    flags = {
        f"argument {flag}" if flag.isupper() else "--" + flag.replace("_", "-"): option
        for flag, option in options.items()
    }
    loaded = load_run(config, sets or (), flags)
    if loaded.run.assume is not None:  # backends read it there, and so do the processes they are run in
        os.environ[f"{PREFIX}ASSUME"] = loaded.run.assume
    if "emulate" in loaded.places:
        os.environ[f"{PREFIX}EMULATE"] = str(loaded.run.emulate).lower()
    if show:
        notes.print(settings_yaml(loaded), markup=False)
    return loaded


def console() -> Console:
    """Standard output for tables: never so narrow that words would be lost."""
    out = Console()
    out.width = max(out.width, 80)
    return out


def settings_yaml(loaded: Loaded, write: Callable[[str], str] = str) -> str:
    """Every value of the run and where it came from: a YAML file that loads as this run. Texts go through `write`."""
    rows = [
        (f"{s.key}: {_printable(write(json.dumps(s.value, ensure_ascii=False)))}", _printable(write(s.place)))
        for s in loaded.settings()
    ]
    width = max(len(value) for value, _ in rows if len(value) < 60)
    return "\n".join(f"{value:{width}}  # {place or 'default'}" for value, place in rows)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


@contextlib.contextmanager
def placed(loaded: Loaded) -> Iterator[None]:
    """Says, of a backend that cannot be used, which setting named it."""
    try:
        yield
    except BackendError as error:
        for setting in loaded.settings():
            names = setting.value if isinstance(setting.value, tuple) else (setting.value,)
            chooses = setting.key in ("backend", "device") or setting.key.startswith("ops.")
            if chooses and setting.place and any(re.search(rf"\b{re.escape(str(n))}\b", str(error)) for n in names):
                raise BackendError(f"{setting.place}: {setting.key}: {error}") from error
        raise


def mode_of(loaded: Loaded) -> str:
    """The run's mode; where nobody chose one, that of its first backend."""
    first = loaded.run.backend[0]
    return loaded.run.mode if "mode" in loaded.places or first == "auto" else backend_class(first).deployed()


def numerics_of(loaded: Loaded) -> Numerics:
    dtype = loaded.run.dtype
    return numerics_for(mode_of(loaded), None if dtype is None else getattr(torch, dtype))


def model_of(run: Run) -> str:
    if run.model is None:
        raise ValueError("no model: name a checkpoint directory, or set `model` in the configuration")
    return run.model


def directory_of(run: Run) -> str:
    """The run's checkpoint directory. ValueError for a preset, which has no weights."""
    checkpoint(model_of(run))
    return model_of(run)


def checkpoint(model: str) -> tuple[ModelConfig, Path]:
    """Configuration and directory of a checkpoint. ValueError for a preset, which has no weights."""
    from dsv4_hal.model.config import find_config

    cfg, directory = find_config(model)
    if directory is None:
        raise ValueError(
            f"{model} is a preset: it has shapes but no weights. "
            f"Write random ones with `dsv4-hal init --preset {model} --out DIR`"
        )
    return cfg, directory


def title(model: Model) -> str:
    """What runs a model, in two words."""
    assert isinstance(model.ops, Resolved)
    return f"{model.ops.primary.name}, {model.ops.numerics.mode}"


def load(loaded: Loaded) -> Model:
    """The run's model, with a progress bar; what does not run on its backend, and other things to know, as notes."""
    from dsv4_hal.model.checkpoint import weights_are_random

    run = loaded.run
    with placed(loaded), _loading() as progress:
        model = dsv4_hal.load_model(
            model_of(run),
            run.backend,
            mode_of(loaded),
            ops=run.ops,
            device=run.device,
            dtype=numerics_of(loaded).storage if run.dtype else None,
            shared_expert_clamp=run.shared_expert_clamp,
            strict=run.strict,
            progress=progress,
        )
    assert isinstance(model.ops, Resolved)
    for line in remarks(model.ops):
        notes.print(f"[yellow]{escape(line)}[/]")
    if weights_are_random(directory_of(run)):
        notes.print("[yellow]The weights are random: expect noise, not language.[/]")
    return model


def remarks(ops: Resolved) -> Iterator[str]:
    """What a user must not overlook: backends that were passed over as broken, ops that run elsewhere, and why."""
    for info in list_backends():
        if info.name in ops.passed and not info.available:
            yield f"backend auto passed over {info.name}: {info.reason}"
    reasons: dict[str, list[str]] = {}
    for r in ops.resolutions:
        for backend, reason in r.rejected:
            reasons.setdefault(f"as {r.runs_as} ({backend}: {reason})", []).append(r.op)
    for reason, names in reasons.items():
        yield f"{names[0]} runs {reason}" if len(names) == 1 else f"{len(names)} ops run {reason}: {', '.join(names)}"
    if ops.primary.name != FALLBACK:
        yield f"{ops.primary.name}: {kinds(ops)}"


def kinds(ops: Resolved) -> str:
    """Ops by how they run, counted."""
    found = Counter(r.runs_as for r in ops.resolutions)
    return ", ".join(f"{found[kind]} {kind}" for kind in KINDS) + " ops"


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
