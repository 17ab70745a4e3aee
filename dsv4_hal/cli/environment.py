"""`dsv4-hal env`: what a bug report needs, and nothing secret."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from dsv4_hal.cli import common
from dsv4_hal.cli.selection import Json
from dsv4_hal.environment import environment, safe


def env(config: common.Config = None, sets: common.Set = None, as_json: Json = False) -> None:
    """Print what a bug report needs: versions, machine, backends, and the run configuration with its origins.

    Environment variables are shown where they steer this program or its libraries; those that sound like a secret are
    masked, and your home directory is written as ~.
    """
    loaded = common.configure(config, sets)
    if as_json:
        settings = {s.key: {"value": _plain(s.value), "from": safe(s.place) or "default"} for s in loaded.settings()}
        typer.echo(json.dumps({**environment(), "run": settings}, indent=2, ensure_ascii=False))
        return
    table = Table(show_header=False)
    for title in ("what", "is"):
        table.add_column(title, overflow="fold")
    for section, values in environment().items():
        table.add_row(f"[bold]{escape(section)}[/]", "")
        for name, value in values.items():
            table.add_row(f"  {escape(name)}", escape(value))
    common.console().print(table)
    typer.echo(common.settings_yaml(loaded, safe))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else safe(value) if isinstance(value, str) else value
