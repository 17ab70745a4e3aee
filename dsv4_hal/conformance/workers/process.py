"""A process for a backend's code, which may hang, crash or fork: it ends with whoever started it, and so does all that
it has started."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, cast

from dsv4_hal.conformance.workers import fork_server
from dsv4_hal.conformance.workers.transport import plain

STARTING = 600.0  # seconds a process may take until its backend is there


class Lost(Exception):
    """A process that ended, with its exit code, or that said nothing in time (code None). seconds: how long it took."""

    def __init__(self, code: int | None, seconds: float) -> None:
        self.code, self.seconds = code, seconds


class Child:
    """A process that runs `task(line, *args)`; `line` is its end of a pipe, see `Line`. To be ended by `end`.

    It does not outlive the process that made it, and no Ctrl-C reaches it: that is for who made it to act on.
    """

    def __init__(self, task: Callable[..., None], *args: Any) -> None:
        self._pipe, there = multiprocessing.Pipe()
        process = None
        try:
            with there, _without_interrupts():  # one that came meanwhile is raised at its end
                self._process = process = fork_server.started(_run, there, task, args)
        except BaseException:
            if process is not None:
                self.end()
            self._pipe.close()
            raise

    def send(self, what: Any) -> None:
        with contextlib.suppress(OSError):  # a process that is gone is found where its answer is waited for
            self._pipe.send(what)

    def receive(self, seconds: float) -> Any:
        """What the process sends next, plain data. Lost if it takes longer, or is gone; Foreign if it sends more."""
        start = time.monotonic()
        ready = wait([self._pipe, self._process.sentinel], seconds)
        if not ready:
            raise Lost(None, time.monotonic() - start)
        if self._pipe in ready or self._pipe.poll():
            with contextlib.suppress(EOFError, ConnectionResetError):
                return plain(self._pipe.recv_bytes())
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


def _run(
    _: fork_server.Surroundings | None, there: Connection, task: Callable[..., None], args: tuple[Any, ...]
) -> None:
    with contextlib.suppress(OSError):
        os.setsid()  # so that what it starts can be ended with it
    parent = cast(Any, multiprocessing.parent_process())
    if sys.platform == "linux":
        _killed_when_closed(parent.sentinel)
        if wait([parent.sentinel], 0):  # gone before that was said
            os._exit(1)
    else:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    task(Line(there), *args)


def _killed_when_closed(pipe: int) -> None:
    """Have the system kill this process's group when a pipe's other end closes, whatever it is doing: code that spins
    in C lets no thread of Python run. (PR_SET_PDEATHSIG would wait for the server that forked it.)"""
    import fcntl  # not everywhere

    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)


def _end_with(parent: Any) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """A Ctrl-C waits till the end, and what is started does not get it."""
    resource_tracker.ensure_running()  # its start, inside the other's, would let it through
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which what is started inherits
    waiting: list[tuple[int, FrameType | None]] = []
    mine = threading.current_thread() is threading.main_thread()
    # Another thread may take the signal, whose handler runs in the main one, mask or not.
    before = signal.signal(signal.SIGINT, lambda *what: waiting.append(what)) if mine else None
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if mine:
            signal.signal(signal.SIGINT, before)
        if waiting and callable(before):
            before(*waiting[0])
