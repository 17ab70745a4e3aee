"""Processes for backends end with who started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from dsv4_hal.conformance.process import Child, in_words

# What it starts spins in C, where no other thread of it runs.
SPIN = """
import operator, time
from functools import partial
from dsv4_hal.conformance.process import Child

if __name__ == "__main__":
    child = Child(partial(operator.indexOf, range(10**18)))
    print(child._process.pid, flush=True)
    time.sleep(300)
"""


def wait(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    return true()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread does it, which code that spins in C holds up")
def test_a_process_does_not_outlive_who_started_it() -> None:
    with subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        try:
            assert wait(lambda: os.getpgid(pid) == pid)  # it is there
            time.sleep(0.5)
            parent.kill()
            assert wait(lambda: not _runs(pid))
        finally:
            parent.kill()
            if _runs(pid):
                os.kill(pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"  # nobody may be there to reap it
    except FileNotFoundError:
        return False


def test_a_process_that_is_interrupted_while_it_starts_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt waits until the process can be ended."""
    ended = []
    monkeypatch.setattr(Child, "end", lambda self: ended.append(self._process.pid))

    def start(self: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # were it let through, it would be raised here
        started.append(self)

    started: list[object] = []
    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", start)
    with pytest.raises(KeyboardInterrupt):
        Child(print)
    assert started and ended == [None]


def test_seconds_in_words() -> None:
    assert [in_words(s) for s in (0.1, 9.94, 12.3)] == ["0.1 s", "9.9 s", "12 s"]
