"""`dsv4-hal env`: what a bug report needs, and nothing secret."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

import dsv4_hal
from dsv4_hal.cli import common
from dsv4_hal.cli.selection import Json
from dsv4_hal.config import PREFIX
from dsv4_hal.registry import backend_class, list_backends

VARIABLES = re.compile(r"(DSV4_HAL|OMP|MKL|OPENBLAS|TORCH|PYTORCH)_\w+")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)


def env(config: common.Config = None, sets: common.Set = None, as_json: Json = False) -> None:
    """Print what a bug report needs: versions, machine, backends, and the run configuration with its origins.

    Environment variables are shown where they steer this program or its libraries; those that sound like a secret are
    masked, and your home directory is written as ~.
    """
    loaded = common.configure(config, sets)
    if as_json:
        settings = {s.key: {"value": _plain(s.value), "from": _safe(s.place) or "default"} for s in loaded.settings()}
        typer.echo(json.dumps({**_facts(), "run": settings}, indent=2, ensure_ascii=False))
        return
    table = Table(show_header=False)
    for title in ("what", "is"):
        table.add_column(title, overflow="fold")
    for section, values in _facts().items():
        table.add_row(f"[bold]{escape(section)}[/]", "")
        for name, value in values.items():
            table.add_row(f"  {escape(name)}", escape(value))
    common.console().print(table)
    typer.echo(common.settings_yaml(loaded, _safe))


def _facts() -> dict[str, dict[str, str]]:
    return {
        "program": {"dsv4-hal": dsv4_hal.__version__, "installed in": _safe(str(Path(dsv4_hal.__file__).parent))},
        "machine": _machine(),
        "packages": _packages(),
        "backends": {
            i.name: f"{'usable' if i.available else 'not usable'}: {_safe(i.reason)}" for i in list_backends()
        },
        **_devices(),
        "variables": {n: _value(n, v) for n, v in sorted(os.environ.items()) if VARIABLES.fullmatch(n)},
    }


def _machine() -> dict[str, str]:
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()}), {_safe(sys.executable)}",
        "system": platform.platform(),
        "cpu": f"{_cpu()}, {os.cpu_count()} logical cores",
        "memory": _memory(),
        "torch threads": str(torch.get_num_threads()),
    }


def _devices() -> dict[str, dict[str, str]]:
    """What each usable backend says of its devices."""
    out: dict[str, dict[str, str]] = {}
    for info in list_backends():
        try:
            facts = dict(backend_class(info.name).environment()) if info.available else {}
        except (Exception, SystemExit) as error:
            facts = {"environment() failed": f"{type(error).__name__}: {error}"}
        if facts:
            out[f"backend {info.name}"] = {str(name): _value(str(name), str(value)) for name, value in facts.items()}
    return out


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def _packages() -> dict[str, str]:
    """Versions of the packages that this one needs or can use, read without importing them."""
    out: dict[str, str] = {}
    for requirement in requires("dsv4-hal") or ():
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        with contextlib.suppress(PackageNotFoundError):
            out[name] = version(name)
    return dict(sorted(out.items()))


def _value(name: str, value: str) -> str:
    """As it may be shown: this program's own settings hold no secret, whatever their names."""
    return "(masked)" if SECRET.search(name) and not name.startswith(PREFIX) else _safe(value)


def _safe(text: str) -> str:
    """Without the user's name, as far as it is the home directory's, and without passwords inside addresses."""
    home = os.path.expanduser("~")
    text = text.replace(home, "~") if len(home) > 1 else text
    return re.sub(r"(\w+://)[^/\s@]+@", r"\1(masked)@", text)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else _safe(value) if isinstance(value, str) else value
