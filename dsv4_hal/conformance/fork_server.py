"""Processes forked from a server that has imported torch once: each would take seconds for it.

Nothing else tells them from those of a fresh interpreter. What the server imports starts no threads that a fork would
lose, and touches no device; so no backend is imported there. It ends with who started it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import sys
from multiprocessing import forkserver, reduction
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any

import torch

PRELOADED = ["dsv4_hal.conformance.model_run", "dsv4_hal.conformance.runner"]  # whose tasks run in processes
# Variables that nothing reads as it is imported there (transformers has torch set one of TORCHINDUCTOR's), and
# PYTHONPATH: `sys.path` comes with each process. These may differ.
READ_LATE = re.compile(r"(DSV4_HAL|PYTEST|TORCHINDUCTOR)_.*|COLUMNS|PYTHONPATH")
STREAMS = (0, 1, 2)  # standard input, output and error

_read: dict[str, str] = {}  # variables that the server may have read


def context() -> tuple[ForkServerContext | SpawnContext, Surroundings | None]:
    """How to start a process, and what to hand it: from the server, or from nothing where it would not be the same.

    The first call starts the server, with whatever signals are blocked.
    """
    if not _usable():
        return multiprocessing.get_context("spawn"), None
    _start()
    return multiprocessing.get_context("forkserver"), Surroundings()


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
    """Elsewhere than on Linux, libraries of the system do not survive a fork."""
    same = not _read or _read == _read_early()
    return sys.platform == "linux" and not sys.flags.ignore_environment and same and all(map(_is_open, STREAMS))


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _read_early() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not READ_LATE.fullmatch(name)}


def _start() -> None:
    """Start the server, if it does not run. It imports what would be imported here, and nothing from the working
    directory, where `python -c`, which it is, would look first."""
    _read.update(_read_early())
    forkserver.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]
