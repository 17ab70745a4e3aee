"""A process for a backend's code, which may hang, crash or fork: it ends with whoever started it, and so does all that
it has started."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, cast

STARTING = 600.0  # seconds a process may take until its backend is there
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Lost(Exception):
    """A process that ended, with its exit code, or that said nothing in time (code None). seconds: how long it took."""

    def __init__(self, code: int | None, seconds: float) -> None:
        self.code, self.seconds = code, seconds


class Child:
    """A process that runs `task(line, *args)`; `line` is its end of a pipe, see `Line`. To be ended by `end`.

    It does not outlive the thread that made it, and no Ctrl-C reaches it: that is for who made it to act on.
    """

    def __init__(self, task: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_run, args=(there, os.getpid(), task, args))
        try:
            with there, _without_interrupts():
                self._process.start()
        except BaseException:
            self.end()
            raise

    def send(self, what: Any) -> None:
        with contextlib.suppress(OSError):  # a process that is gone is found where its answer is waited for
            self._pipe.send(what)

    def receive(self, seconds: float) -> Any:
        """What the process sends next. Lost if it takes longer, or is gone."""
        start = time.monotonic()
        ready = wait([self._pipe, self._process.sentinel], seconds)
        if not ready:
            raise Lost(None, time.monotonic() - start)
        if self._pipe in ready or self._pipe.poll():
            with contextlib.suppress(EOFError, ConnectionResetError):
                return self._pipe.recv()
        self._process.join(5)  # it may have closed the pipe, and go on
        after = time.monotonic() - start
        self.end()
        raise Lost(self._process.exitcode, after)

    def end(self) -> None:
        """End the process and whatever it has started."""
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
        self._pipe.close()


class Line:
    """The process's end of the pipe. Where a backend has forked, the copy ends here: two would answer."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._pid = pipe, os.getpid()

    def send(self, what: Any) -> None:
        self._end_copies()
        self._pipe.send(what)

    def receive(self) -> Any:
        """What was sent next. EOFError if nothing will be."""
        self._end_copies()
        return self._pipe.recv()

    def _end_copies(self) -> None:
        if os.getpid() != self._pid:
            os._exit(0)


def in_words(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def _run(there: Connection, parent: int, task: Callable[..., None], args: tuple[Any, ...]) -> None:
    with contextlib.suppress(OSError):
        os.setsid()  # so that what it starts can be ended with it
    if sys.platform == "linux":  # whatever it is doing: code that spins in C lets no thread of Python run
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # gone before that was said
            os._exit(1)
    else:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    task(Line(there), *args)


def _end_with_parent() -> None:
    parent = cast(Any, multiprocessing.parent_process())
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """A Ctrl-C waits till the end, and what is started does not get it."""
    resource_tracker.ensure_running()  # its start, inside the other's, would let it through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
