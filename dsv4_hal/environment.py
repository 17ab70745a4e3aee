"""Where a run takes place: versions, machine, backends and their devices, and nothing secret."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch

from dsv4_hal.backend import described
from dsv4_hal.config import PREFIX
from dsv4_hal.registry import BackendInfo, backend_class, list_backends

VARIABLES = re.compile(r"(DSV4_HAL|OMP|MKL|OPENBLAS|TORCH|PYTORCH)_\w+")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)

Environment = Mapping[str, Mapping[str, str]]
"""Section -> name -> what it is."""


def environment(backends: Sequence[str] | None = None) -> Environment:
    """What a bug report needs, of the backends named (default: of all). Texts are as they may be shown, see `safe`."""
    infos = list_backends(backends)
    return {
        "program": {"dsv4-hal": version("dsv4-hal"), "installed in": safe(str(Path(__file__).parent))},
        "machine": _machine(),
        "packages": _packages(),
        "backends": {i.name: f"{'usable' if i.available else 'not usable'}: {safe(i.reason)}" for i in infos},
        **_devices(infos),
        "variables": {n: _value(n, v) for n, v in sorted(os.environ.items()) if VARIABLES.fullmatch(n)},
    }


def emulated(of: Environment, backend: str) -> str:
    """What stood for a backend's device, in parentheses; "" where it computed itself."""
    told = of.get(f"backend {backend}", {}).get("emulated", "")
    return f" ({told})" if told else ""


def _machine() -> dict[str, str]:
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()}), {safe(sys.executable)}",
        "system": platform.platform(),
        "cpu": f"{_cpu()}, {os.cpu_count()} logical cores",
        "memory": _memory(),
        "torch threads": str(torch.get_num_threads()),
    }


def _devices(infos: Iterable[BackendInfo]) -> dict[str, dict[str, str]]:
    """What each usable backend says of its devices."""
    out: dict[str, dict[str, str]] = {}
    for info in infos:
        try:
            facts = dict(backend_class(info.name).environment()) if info.available else {}
        except (Exception, SystemExit) as error:
            facts = {"environment() failed": described(error)}
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
    return "(masked)" if SECRET.search(name) and not name.startswith(PREFIX) else safe(value)


def safe(text: str) -> str:
    """Without the user's name, as far as it is the home directory's, and without passwords inside addresses."""
    home = os.path.expanduser("~")
    text = text.replace(home, "~") if len(home) > 1 else text
    return re.sub(r"\b(\w+://)[^/\s@]+@", r"\1(masked)@", text)
