"""Running the cases of the contract on a backend, each watched, timed and apart from the others.

The cases run in a worker process: one that hangs is stopped after its time, one that kills the process is reported as
that, and the rest go on in a new worker.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import cast

import torch

from dsv4_hal.backend import Backend, BackendError, described
from dsv4_hal.conformance.judging.backward import NoGradient, gradients
from dsv4_hal.conformance.judging.compare import Results, run_case
from dsv4_hal.conformance.judging.guard import Guard, Misconduct, restored, state
from dsv4_hal.conformance.judging.named import named
from dsv4_hal.conformance.judging.rehearsal import FEW, ROUND, SHORT, Unsteady, beside, due, rehearsed, repeated
from dsv4_hal.conformance.judging.results import GRAD, About, Job, Produced, profile, up_to
from dsv4_hal.conformance.workers.process import STARTING, Child, Line, Lost, in_words
from dsv4_hal.conformance.workers.transport import Packed, pack
from dsv4_hal.dispatch import Resolved, resolve, select
from dsv4_hal.environment import environment
from dsv4_hal.numerics import MODES
from dsv4_hal.ops import SIZES
from dsv4_hal.registry import FALLBACK, backend_class

LIMIT = 60.0  # seconds a case may take
AHEAD = 8  # cases that the process may be ahead of who judges


class Worker:
    """A process that runs a backend's cases, and another one whenever it is lost.

        with Worker("mychip") as worker:
            for job, made in worker.map(jobs()):
                outcome = judge("mychip", job, made)

    about  what the backend says of itself, see `About`
    BackendError where the backend cannot be used at all.
    """

    about: About

    def __init__(self, backend: str, modes: Iterable[str] = MODES) -> None:
        self.backend, self.modes = backend, tuple(modes)
        self._gone = ""  # why the backend cannot be made again
        self._numbers = count()  # of jobs: an answer says which one it is to
        self.about = self._start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._child.end()

    def produce(self, job: Job, limit: float = LIMIT) -> Produced:
        """What the backend makes of one case."""
        ((_, made),) = self.map([job], limit)  # to its end: where the process was lost, the next one is made there
        return made

    def map(self, work: Iterable[Job], limit: float = LIMIT) -> Iterator[tuple[Job, Produced]]:
        """What the backend makes of every job, in order; the process is some cases ahead of the caller.

        limit  seconds a case may take
        A case that hangs or kills the process is that case's result, and the rest go on in a new process; where the
        backend cannot be made again, they are errors.
        """
        todo, ahead = iter(work), deque[tuple[int, Job]]()
        while not self._gone:
            for job in islice(todo, AHEAD - len(ahead)):
                ahead.append((next(self._numbers), job))
                self._child.send(ahead[-1])
            if not ahead:
                return
            number, job = ahead.popleft()
            made, usable = self._answer(number, limit)
            yield job, made
            if usable:
                continue
            self._child.end()
            try:
                self._start()
            except BackendError as gone:
                self._gone = f"after an earlier case was lost: {gone}"
            for numbered in ahead:
                self._child.send(numbered)
        for job in chain((job for _, job in ahead), todo):
            yield job, Produced("", "", None, "error", self._gone)

    def _answer(self, number: int, limit: float) -> tuple[Produced, bool]:
        """What became of a job, and whether the process can go on."""
        try:
            answered, made = self._child.receive(limit)
        except Lost as lost:
            seconds = round(lost.seconds, 3)
            if lost.code is None:
                return Produced("", "", None, "timeout", f"no result after {in_words(seconds)}", seconds), False
            told = f"the process of backend {self.backend} ended with exit code {lost.code}"
            return Produced("", "", None, "crash", told, seconds), False
        if answered != number:
            return Produced("", "", None, "misconduct", f"backend {self.backend} answered for another case"), False
        return made, True

    def _start(self) -> About:
        self._child = Child(_work, self.backend, self.modes)
        with contextlib.ExitStack() as failed:
            failed.callback(self._child.end)
            try:
                about = self._child.receive(STARTING)
            except Lost as lost:
                if lost.code is None:
                    raise BackendError(f"backend {self.backend} could not be made within {STARTING:g} s") from None
                raise BackendError(f"backend {self.backend} killed its process (exit code {lost.code})") from None
            if isinstance(about, str):
                raise BackendError(about)
            failed.pop_all()
        return cast(About, about)


def _work(line: Line, backend: str, modes: Sequence[str]) -> None:
    """The process: what the backend says of itself, or why it cannot be made; then what it makes of every job.

    No interrupt reaches it (see `Child`), so an exception of any kind is the backend's.
    """
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # the process that judges needs the other half
    try:
        cls = backend_class(backend)
        about = _about(cls, modes)
    except BackendError as error:
        line.send(str(error))
        return
    except BaseException as error:
        line.send(f"backend {backend} cannot be made: {described(error)}")
        return
    line.send(about)
    with torch.inference_mode(), contextlib.suppress(EOFError):
        while True:
            number, job = line.receive()
            try:
                made = produce(cls, job)
            except BaseException as error:
                made = Produced("", "", None, "error", described(error))
            line.send((number, made))


def _about(cls: type[Backend], modes: Sequence[str]) -> About:
    profiles, refused = {}, dict[str, str]()
    for mode in modes:
        select([cls.name], profile(mode))
        ops = _candidate(cls).resolved(mode)
        profiles[mode] = ops.numerics.to_dict()
        refused |= _refused(cls, ops)
    if GRAD in modes and not cls.differentiable:
        raise BackendError(f"backend {cls.name} has no gradients: it says of itself that it is for inference only")
    if cls.affords not in SIZES:
        raise BackendError(f"backend {cls.name} affords {cls.affords!r}, which is none of {', '.join(SIZES)}")
    try:
        waivers = str(Path(inspect.getfile(cls)).parent / "waivers.yaml")
    except (TypeError, OSError):  # a class that was made, and lies in no file
        waivers = ""
    return About(waivers, profiles, environment([cls.name]), cls.affords, refused)


@dataclass
class _Candidate:
    """A backend that is put to the test.

    ops     of each mode: the backend's, with the reference behind it, watched
    guard   what watches them
    rounds  ops whose results have come round, see `rehearsed`
    """

    cls: type[Backend]
    ops: dict[str, Resolved] = field(default_factory=dict)
    guard: Guard = field(default_factory=Guard)
    rounds: set[str] = field(default_factory=set)

    def resolved(self, mode: str) -> Resolved:
        if mode not in self.ops:
            first = self.cls(profile(mode))
            behind = [] if self.cls.name == FALLBACK else [backend_class(FALLBACK)(first.numerics, first.device)]
            ops = resolve([first, *behind])
            self.guard.watch(ops)
            self.ops[mode] = ops
        return self.ops[mode]

    @contextlib.contextmanager
    def tested(self, job: Job, ops: Resolved) -> Iterator[None]:
        """What a case's calls have to stand."""
        with contextlib.ExitStack() as tests:
            tests.enter_context(self.guard.case())
            if ops.device.type == "meta":
                pass
            elif job.soak:
                tests.enter_context(beside(ops.device))
                tests.enter_context(repeated(ops, job.op, *job.soak))
            elif due(job, self.cls.affords):
                turns = SHORT if self.cls.affords in up_to(FEW) else ROUND
                tests.enter_context(rehearsed(ops, job.op, self.guard, self.rounds, turns))
            yield


_LAST: list[_Candidate] = []  # the one; what it keeps, and what is kept of it, goes with it


def _candidate(cls: type[Backend]) -> _Candidate:
    if not _LAST or _LAST[0].cls is not cls:
        _LAST[:] = [_Candidate(cls)]
    return _LAST[0]


def _refused(cls: type[Backend], ops: Resolved) -> dict[str, str]:
    """Ops of a backend's own that are not used, and why."""
    return {
        r.op: reason
        for r in ops.resolutions
        for name, reason in r.rejected
        if name == cls.name and cls.origin(r.op).kind == "native"
    }


def produce(cls: type[Backend], job: Job) -> Produced:
    """The results of a case, watched; or what went wrong."""
    try:
        candidate = _candidate(cls)
        ops = candidate.resolved(job.mode)
        runs_as = next(r.runs_as for r in ops.resolutions if r.op == job.op)
    except Exception as error:
        return Produced("", "", None, "error", described(error))
    start, before = time.monotonic(), state()

    def produced(results: Mapping[str, Packed] | None, verdict: str = "", message: str = "") -> Produced:
        return Produced(runs_as, ops.device.type, results, verdict, message, round(time.monotonic() - start, 4))

    try:
        with candidate.tested(job, ops):
            made = produced(pack(results(job, ops)))
    except Misconduct as error:
        made = produced(None, "misconduct", str(error))
    except (NoGradient, Unsteady) as error:
        made = produced(None, "disagrees", str(error))
    except Exception as error:
        made = produced(None, "error", described(error))
    finally:
        changed = restored(before)  # whatever happened: the next case must not find it
    if changed:
        told = f"{job.op} changed {', '.join(changed)}" + (f"; {made.message}" if made.message else "")
        made = replace(made, results=None, verdict="misconduct", message=told)
    return made


def results(job: Job, ops: Resolved) -> Results:
    """What ops make of a case: its results, or the gradients of its op."""
    case = named(job.case)
    return gradients(job.op, case, ops) if job.mode == GRAD else run_case(case, ops)
