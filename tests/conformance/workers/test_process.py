"""Processes for backends end with who started them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv4_hal.conformance.workers.process import Child, in_words

# What it starts spins in C, where no other thread of it runs, or starts more.
STARTS = """
import operator, os, subprocess, time
from dsv4_hal.conformance.workers.process import Child

def spin(line):
    operator.indexOf(range(10**18), -1)

def more(line):
    subprocess.run(["sleep", "300"])

if __name__ == "__main__":
    children = [Child(spin), Child(more)]
    os.environ["OMP_NUM_THREADS"] = "2"  # which the server has not: this one is started without it
    children.append(Child(spin))
    print(*(child._process.pid for child in children), flush=True)
    time.sleep(300)
"""


def wait(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    return true()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread does it, which code that spins in C holds up")
def test_a_process_does_not_outlive_who_started_it(tmp_path: Path) -> None:
    (tmp_path / "starts.py").write_text(STARTS)
    with subprocess.Popen([sys.executable, tmp_path / "starts.py"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        groups = [int(pid) for pid in parent.stdout.readline().split()]
        try:
            assert wait(lambda: [len(running(group=g)) for g in groups] == [1, 2, 1])  # they are there
            (server,) = {parents for pid, parents in running().items() if pid in groups} - {parent.pid}
            time.sleep(0.5)
            parent.kill()
            assert wait(lambda: not any(running(group=g) for g in groups) and server not in running())
        finally:
            parent.kill()
            for pid in [pid for g in groups for pid in running(group=g)]:
                os.kill(pid, signal.SIGKILL)


def running(group: int | None = None) -> dict[int, int]:
    """Processes that run, and their parents. group: those of a group."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, parent, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if state != "Z" and group in (None, int(its_group)):  # nobody may be there to reap it
                found[int(stat.parent.name)] = int(parent)
    return found


def test_a_process_that_is_interrupted_while_it_starts_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt waits until the process can be ended."""
    ended = []
    monkeypatch.setattr(Child, "end", lambda self: ended.append(self._process.pid))

    def start(self: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # were it let through, it would be raised here
        started.append(self)

    started: list[object] = []
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", start)
    with pytest.raises(KeyboardInterrupt):
        Child(print)
    assert started and ended == [None]


def test_seconds_in_words() -> None:
    assert [in_words(s) for s in (0.1, 9.94, 12.3)] == ["0.1 s", "9.9 s", "12 s"]
