"""What a process is told apart by does not tell those of the server from those of a fresh interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest

from dsv4_hal.conformance.workers import fork_server
from dsv4_hal.conformance.workers.process import Child, Lost

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each process starts from nothing")

TASKS = """
import os, random, signal, sys

def tell(line):
    import torch
    print("to output", flush=True)
    print("to error", file=sys.stderr, flush=True)
    told = {
        # readline, which pytest imports, sets these two behind Python's back
        "environment": {k: v for k, v in os.environ.items() if k not in ("LINES", "COLUMNS")},
        "variable": os.popen("echo $DSV4_HAL_TOLD").read(), "folder": os.getcwd(),
        "path": sys.path, "arguments": sys.argv, "input": os.readlink("/proc/self/fd/0"),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "cuda": torch.cuda.is_initialized(),
        "blocked": [int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "handler": repr(signal.getsignal(signal.SIGINT)),
        "alone": os.getsid(0) == os.getpgid(0) == os.getpid(),
    }
    backends = sorted(name for name in sys.modules if name.partition(".")[0] in ("triton", "jax", "torch_npu")
                      or name.startswith("dsv4_hal.backends."))
    line.send((told, backends, os.getppid(), (random.random(), torch.initial_seed())))

def as_imported(line):
    from multiprocessing import util
    from dsv4_hal.conformance.workers import fork_server

    line.send((util.spawnv_passfds.__module__, fork_server._starter, fork_server._server._forkserver_pid))

def leave(line, how):
    how()

def raise_it(line):
    raise OSError("no device")

def echo(line):
    while True:
        line.send(line.receive())
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that only processes started from now on can find; the server runs already."""
    child = Child(print)
    child.end()
    (tmp_path / "given_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "given_tasks", raising=False)
    import given_tasks

    return given_tasks


def answer(task: Callable[..., None], *args: Any) -> Any:
    child = Child(task, *args)
    try:
        return child.receive(60)
    finally:
        child.end()


def test_a_process_has_the_surroundings_of_who_starts_it(
    tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSV4_HAL_TOLD", "for this one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["given"])
    told, backends, parent, drawn = answer(tasks.tell)
    assert (told["variable"], told["folder"], told["path"][0]) == ("for this one\n", str(tmp_path), str(tmp_path))
    assert told["environment"].items() <= os.environ.items() and told["alone"] and told["blocked"] == [signal.SIGINT]
    output = capfd.readouterr()
    assert output == ("to output\n", "to error\n")
    assert backends == [] and parent != os.getpid()
    assert all(a != b for a, b in zip(drawn, answer(tasks.tell)[-1], strict=True))
    capfd.readouterr()
    monkeypatch.setattr(fork_server, "_usable", lambda: False)
    fresh, _, parent, _ = answer(tasks.tell)
    assert parent == os.getpid() and fresh == told and capfd.readouterr() == output


def test_what_libraries_read_as_they_are_imported(tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    told, _, parent, _ = answer(tasks.tell)
    assert told["threads"][0] == 2 and parent == os.getpid()


def test_how_a_process_ended(tasks: Any, capfd: pytest.CaptureFixture[str]) -> None:
    for how, code in ((partial(os._exit, 9), 9), (partial(sys.exit, 3), 3), (os.abort, -signal.SIGABRT)):
        with pytest.raises(Lost) as lost:
            answer(tasks.leave, how)
        assert lost.value.code == code
    capfd.readouterr()
    with pytest.raises(Lost) as lost:
        answer(tasks.raise_it)
    assert lost.value.code == 1 and "OSError: no device" in capfd.readouterr().err


ASKS = """
import os, sys, signal
import given_tasks
from dsv4_hal.conformance.workers.process import Child

if __name__ == "__main__":
    children = [Child(given_tasks.echo)]
    try:
        os.killpg(0, signal.SIGINT)  # as a terminal does
        signal.pause()
    except KeyboardInterrupt:
        children.append(Child(given_tasks.echo))  # the server still runs
    for child in children:
        child.send("answers")
        print(child.receive(60))
        child.end()
"""


def test_ctrl_c_and_modules_of_the_working_directory(tmp_path: Path, tasks: Any) -> None:
    """Neither is for the server: `python -c` would find torch in the working directory, a script does not."""
    there = tmp_path / "there"
    there.mkdir()
    (there / "torch.py").write_text("import os\nos._exit(6)\n")
    (tmp_path / "asks.py").write_text(ASKS)
    done = subprocess.run(
        [sys.executable, tmp_path / "asks.py"], cwd=there, capture_output=True, text=True, start_new_session=True
    )
    assert (done.stdout, done.stderr, done.returncode) == ("answers\nanswers\n", "", 0)


PREPARES = """
import os, signal
from dsv4_hal.conformance.workers import fork_server
from dsv4_hal.conformance.workers import process
import given_tasks

def answers(task=given_tasks.tell):
    child = process.Child(task)
    received = child.receive(60)
    child.end()
    return received

if __name__ == "__main__":
    print("before", end=" ")  # not written yet
    kept = open(__file__)
    fork_server.fork()
    told, backends, server, drawn = answers()
    again, _, second, others = answers()
    assert told == again and server == second != os.getpid() and not backends
    assert all(a != b for a, b in zip(drawn, others))
    files = [os.readlink(f"/proc/{server}/fd/{name}") for name in os.listdir(f"/proc/{server}/fd")]
    assert __file__ not in files, files
    copied = open(f"/proc/{server}/cmdline").read() == open("/proc/self/cmdline").read()
    assert answers(given_tasks.as_imported) == ("multiprocessing.util", 0, None)  # it may start what it likes
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    fork_server._usable = lambda: False
    assert answers()[0] == told
    print("a copy" if copied else "an interpreter")
"""


def test_a_copy_of_a_program_that_has_only_imported_is_as_good(tmp_path: Path, tasks: Any) -> None:
    (tmp_path / "prepares.py").write_text(PREPARES)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, tmp_path / "prepares.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "before " + 3 * "to output\n" + "a copy\n"


def test_where_the_server_cannot_be_had_a_process_begins_from_nothing(
    tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def begins_from_nothing() -> bool:
        child = Child(tasks.echo)
        child.end()  # it need not import torch
        assert capfd.readouterr().err == ""
        return isinstance(child._process, SpawnProcess)

    with monkeypatch.context() as m:
        m.setattr(fork_server, "_server", fork_server.forkserver.ForkServer())
        long = tmp_path / ("long" * 30)  # a socket's path holds 107 bytes
        long.mkdir()
        m.setitem(fork_server.multiprocessing.process.current_process()._config, "tempdir", str(long))
        assert begins_from_nothing()
    with monkeypatch.context() as m:
        m.setattr(fork_server, "_starter", os.getpid() + 1)  # this process was forked since
        assert begins_from_nothing()
    with monkeypatch.context() as m:
        m.setattr(sys, "path", [*sys.path, tmp_path])  # which Python ignores
        assert begins_from_nothing()
    assert not begins_from_nothing()


def test_the_server_of_the_program_itself_is_left_alone(tasks: Any) -> None:
    """multiprocessing has one for the whole process, which knows nothing of ours."""
    answer(tasks.tell)
    assert fork_server.forkserver._forkserver._forkserver_pid is None
    assert fork_server.forkserver.connect_to_new_process == fork_server.forkserver._forkserver.connect_to_new_process
