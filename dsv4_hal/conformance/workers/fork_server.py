"""Processes forked from a server that has imported torch once: each would take seconds for it.

They are as those of a fresh interpreter, but that the seed of string hashes is the same in all, and what an edited file
held when the server was started. What the server imports starts no threads that a fork would lose, and touches no
device; so no backend is imported there. It ends with who started it (killed, that leaves an empty folder behind).

The server is an interpreter of its own; or, of a program that calls `fork` before anything else, a copy of that, with
all that the program had imported.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, reduction, resource_tracker, util
from multiprocessing.process import BaseProcess
from typing import Any
from unittest.mock import patch

import torch

PRELOADED = ["dsv4_hal.conformance.models.run", "dsv4_hal.conformance.judging.worker"]  # whose tasks run in processes
# Variables that nothing reads as it is imported there (transformers has torch set one of TORCHINDUCTOR's), and
# PYTHONPATH: `sys.path` comes with each process. These may differ.
READ_LATE = re.compile(r"(DSV4_HAL|PYTEST|TORCHINDUCTOR)_.*|COLUMNS|PYTHONPATH")
STREAMS = (0, 1, 2)  # standard input, output and error

_server = forkserver.ForkServer()  # ours: multiprocessing's own is the program's
_read: dict[str, str] = {}  # variables that the server may have read
_starter = 0  # the process that started it, which alone can ask it
_one_at_a_time = threading.Lock()
_spawn = util.spawnv_passfds


def started(run: Callable[..., None], *args: Any) -> BaseProcess:
    """A process that runs `run(surroundings, *args)`, forked from the server; or begun from nothing, which takes longer
    and is the same, where it would not be the same or the server cannot be had: its socket needs a short path, say.

    The first call starts the server, with whatever signals are blocked.
    """
    with _one_at_a_time:
        if _usable():
            with contextlib.suppress(OSError, EOFError):
                return _forked(run, args)
        process = multiprocessing.get_context("spawn").Process(target=run, args=(None, *args))
        process.start()
        return process


class Surroundings:
    """Environment and standard streams: what a process inherits from who starts it, and from a server does not.

    To unpickle it is to have them. Working directory and `sys.path` come with every process of multiprocessing.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _surround, (dict(os.environ), [reduction.DupFd(stream) for stream in STREAMS])


def _surround(environment: dict[str, str], streams: list[Any]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, duplicate in zip(STREAMS, streams, strict=True):
        here = duplicate.detach()
        os.dup2(here, stream)
        os.close(here)
    importlib.invalidate_caches()  # of folders that were not there
    torch.default_generator.seed()  # at random, as it is in each interpreter


def _usable() -> bool:
    """Elsewhere than on Linux, libraries of the system do not survive a fork. Text is all that a server can be told."""
    same = not _starter or (_starter == os.getpid() and _read == _read_early())
    told = not sys.flags.ignore_environment and all(isinstance(entry, str) for entry in sys.path)
    return sys.platform == "linux" and same and told and all(map(_is_open, STREAMS))


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _read_early() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not READ_LATE.fullmatch(name)}


def fork() -> None:
    """Start the server as a copy of this process, which so far has done nothing but import: no thread of torch's has
    begun (one of OpenBLAS's may have, which sees to it itself), no device was touched. What the server would import for
    seconds is imported here already.

    Where the server cannot be had, nothing happens.
    """
    if _starter or not _usable():
        return
    for module in PRELOADED:
        importlib.import_module(module)
    with contextlib.suppress(OSError):
        with _environment(PYTHONSAFEPATH="1"):
            resource_tracker.ensure_running()  # no copy of this process; it lets interrupts through
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which the copy inherits
        try:
            with patch.object(util, "spawnv_passfds", _copy):
                _start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _copy(_: str, arguments: list[str], passed: list[int]) -> int:
    """The pid of a copy that does what `spawnv_passfds` would start: `python ... -c CODE`, with these descriptors."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or the copy would write it as well
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, wherever another thread is
        pid = os.fork()
    if pid:
        return pid
    try:
        _forget()
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in (*STREAMS, *passed):
                with contextlib.suppress(OSError):  # that of the list itself
                    os.close(int(name))
        exec(arguments[-1], {})
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)  # what this process has still to do is not for its copy


def _forget() -> None:
    """In a copy: that a server was being started."""
    global _server, _starter
    _server, _starter = forkserver.ForkServer(), 0
    _read.clear()
    util.spawnv_passfds = _spawn


def _start() -> None:
    """Where it does not run: it imports what would be imported here, and nothing from the working directory, where an
    interpreter with `-c` would look first."""
    global _starter
    if not _starter:
        _read.update(_read_early())
        _starter = os.getpid()
        _server.set_forkserver_preload(PRELOADED)
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    with _environment(PYTHONPATH=path, PYTHONSAFEPATH="1"):
        _server.ensure_running()


def _forked(run: Callable[..., None], args: tuple[Any, ...]) -> BaseProcess:
    _start()
    process = multiprocessing.get_context("forkserver").Process(target=run, args=(Surroundings(), *args))
    with patch.object(forkserver, "connect_to_new_process", _server.connect_to_new_process):
        process.start()
    return process


@contextlib.contextmanager
def _environment(**changes: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
