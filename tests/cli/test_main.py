"""The command as such: version, help, and where errors go."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import dsv4_hal
from dsv4_hal.cli import app

Tool = Callable[..., Any]
VERBS = ("backends", "explain", "env", "info", "init", "generate", "chat")


def test_version(tool: Tool) -> None:
    assert tool("--version").out == f"dsv4-hal {dsv4_hal.__version__}\n"


def test_every_verb_has_help(tool: Tool) -> None:
    assert tuple(str(c.callback.__name__) for c in app.registered_commands if c.callback) == VERBS
    for verb in VERBS:
        done = tool(verb, "--help")
        assert done.code == 0
        assert f"dsv4-hal {verb}" in done.out


def test_a_closed_pipe_is_no_error() -> None:
    """`dsv4-hal explain | head -1` ends in silence."""
    line = f"{sys.executable} -m dsv4_hal explain | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""


def test_no_vendor_package_is_imported() -> None:
    code = "import sys, dsv4_hal.cli; print([n for n in ('triton', 'torch_npu', 'matplotlib') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
