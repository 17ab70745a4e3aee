"""The command as such: version, help, and where errors go."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsv4_hal
from dsv4_hal.cli import app, run

Tool = Callable[..., Any]
VERBS = (
    *("backends", "explain", "env", "info", "init", "convert", "generate", "chat"),
    *("conform", "compare", "bisect", "record", "report"),
)


def test_version(tool: Tool) -> None:
    assert tool("--version").out == f"dsv4-hal {dsv4_hal.__version__}\n"


def test_every_verb_has_help(tool: Tool) -> None:
    assert tuple(str(c.callback.__name__) for c in app.registered_commands if c.callback) == VERBS
    for verb in VERBS:
        done = tool(verb, "--help")
        assert done.code == 0
        assert f"dsv4-hal {verb}" in done.out


def test_a_closed_pipe_is_no_error() -> None:
    """`dsv4-hal explain | true` ends in silence."""
    command = [sys.executable, "-m", "dsv4_hal", "explain", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # the reader is gone before the first word
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(("closed", "code"), [(">&-", 2), ("2>&-", 0), ("<&-", 0)])
def test_closed_streams(closed: str, code: int) -> None:
    line = f"{sys.executable} -m dsv4_hal explain --json {closed}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert ("standard output is closed" in done.stderr) == (closed == ">&-")
    assert done.stdout.startswith("{") == (code == 0)


def test_processes_for_backends_where_no_stream_is_open() -> None:
    """None of their own files is taken for a stream that is closed."""
    line = f"{sys.executable} -m dsv4_hal conform --backend null -o rope --size tiny <&- 2>&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 5 and "22 cases: 22 shapes" in done.stdout


RUNS = """
import sys
from dsv4_hal.cli import fork_server, main

sys.argv = ["dsv4-hal", "conform", "--backend", "null", "-o", "hadamard", "--size", "tiny"]
try:
    main()
except SystemExit as end:
    ended = f"exit code {end.code}"
mine, server = (open(f"/proc/{pid}/cmdline").read() for pid in ("self", fork_server._server._forkserver_pid))
print(ended, "a copy" if mine == server else "no copy")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each process starts from nothing")
def test_a_verb_is_the_server_of_its_processes() -> None:
    done = subprocess.run([sys.executable, "-c", RUNS], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.endswith("exit code 5 a copy\n"), done


def test_a_closed_input_is_told_where_it_is_needed(tiny_dir: Path) -> None:
    line = f"{sys.executable} -m dsv4_hal generate '{tiny_dir}' --backend reference --prompt - <&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "standard input is closed" in done.stderr


def test_an_interrupt_while_processes_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["dsv4-hal", "conform"])
    with pytest.raises(SystemExit, match="130"):
        run(interrupted)


def test_no_vendor_package_is_imported() -> None:
    code = "import sys, dsv4_hal.cli; print([n for n in ('triton', 'torch_npu', 'matplotlib') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_processes_for_backends_are_forked_from_a_copy_of_the_tool(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr("sys.argv", ["dsv4-hal", verb])
    monkeypatch.setattr("dsv4_hal.cli.app", lambda: order.append("run"))
    run(lambda: order.append("fork"))
    assert order == (["fork"] if verb in ("conform", "compare", "bisect", "record") else []) + ["run"]
