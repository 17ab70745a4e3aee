"""Running the cases of the contract on a backend, each watched, timed and apart from the others.

The cases run in a worker process: one that hangs is stopped after its time, one that kills the process is reported as
that, and the rest go on in a new worker.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, count, islice
from pathlib import Path

import torch

from dsv4_hal.backend import Backend, BackendError, described
from dsv4_hal.conformance.judging.backward import NoGradient, gradients
from dsv4_hal.conformance.judging.compare import Results, run_case
from dsv4_hal.conformance.judging.facts import Asking, asking
from dsv4_hal.conformance.judging.guard import Guard, Misconduct, restored, state
from dsv4_hal.conformance.judging.named import named
from dsv4_hal.conformance.judging.profiles import known
from dsv4_hal.conformance.judging.rehearsal import FEW, ROUND, SHORT, Unsteady, due, rehearsed, repeated
from dsv4_hal.conformance.judging.remarks import remarks
from dsv4_hal.conformance.judging.results import GRAD, About, Job, Produced, about_of, profile, up_to
from dsv4_hal.conformance.judging.trace import trace
from dsv4_hal.conformance.workers.process import STARTING, Child, Line, Lost, in_words
from dsv4_hal.conformance.workers.transport import Foreign, Packed, pack
from dsv4_hal.dispatch import Resolved, select
from dsv4_hal.environment import environment
from dsv4_hal.numerics import MODES
from dsv4_hal.ops import SIZES
from dsv4_hal.registry import FALLBACK, backend_class

LIMIT = 60.0  # seconds a case may take
AHEAD = 8  # cases that the process may be ahead of who judges
ENOUGH = 3  # hangs and crashes of an op: its other cases are not run


class Worker:
    """A process that runs a backend's cases, and another one whenever it is lost.

        with Worker("mychip") as worker:
            for job, made in worker.map(jobs()):
                outcome = judge("mychip", job, made, worker.about.numerics(job.mode))

    about  what the backend says of itself, see `About`
    BackendError where the backend cannot be used at all.
    """

    about: About

    def __init__(self, backend: str, modes: Iterable[str] = MODES) -> None:
        self.backend, self.modes = backend, tuple(modes)
        self._gone = ""  # why the backend cannot be made again
        self._device = ""  # type of the device that its first answer was computed on
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
        A case that hangs or kills the process is that case's result, and the rest go on in a new process, but for those
        of an op that did so ENOUGH times. Where the backend cannot be made again, they are errors.
        """
        todo, ahead, lost = iter(work), deque[tuple[int, Job]](), Counter[str]()
        while not self._gone:
            for job in islice(todo, AHEAD - len(ahead)):
                ahead.append((next(self._numbers), job))
                if lost[job.op] < ENOUGH:
                    self._child.send(ahead[-1])
            if not ahead:
                return
            number, job = ahead.popleft()
            if lost[job.op] == ENOUGH:
                yield job, Produced("", "", None, "error", f"not run, after {ENOUGH} hangs or crashes of {job.op}")
                continue
            made, usable = self._answer(number, limit)
            lost[job.op] += made.verdict in ("timeout", "crash")
            yield job, made
            if usable:
                continue
            self._child.end()
            try:
                self._start()
            except BackendError as gone:
                self._gone = f"after an earlier case was lost: {gone}"
            for numbered in ahead:
                if lost[numbered[1].op] < ENOUGH:
                    self._child.send(numbered)
        for job in chain((job for _, job in ahead), todo):
            yield job, Produced("", "", None, "error", self._gone)

    def _answer(self, number: int, limit: float) -> tuple[Produced, bool]:
        """What became of a job, and whether the process can go on."""
        try:
            answer = self._child.receive(limit)
        except Lost as lost:
            seconds = round(lost.seconds, 3)
            if lost.code is None:
                return Produced("", "", None, "timeout", f"no result after {in_words(seconds)}", seconds), False
            told = f"the process of backend {self.backend} ended with exit code {lost.code}"
            return Produced("", "", None, "crash", told, seconds), False
        except Foreign as error:
            return Produced("", "", None, "misconduct", f"backend {self.backend}: {error}"), False
        match answer:
            case (int(answered), Produced(str(), str(device), _, str(), str(), int() | float(), str(), str()) as made):
                self._device = self._device or device
                if answered == number and device in ("", self._device):
                    return made, True
                if answered == number:  # shapes alone are not compared in values
                    told = f"backend {self.backend} computed on {device}, and on {self._device} before"
                    return Produced("", "", None, "misconduct", told), True
        return Produced("", "", None, "misconduct", f"backend {self.backend} answered for another case"), False

    def _start(self) -> About:
        self._child = Child(_work, self.backend, self.modes)
        with contextlib.ExitStack() as failed:
            failed.callback(self._child.end)
            try:
                told = self._child.receive(STARTING)
            except Lost as lost:
                if lost.code is None:
                    raise BackendError(f"backend {self.backend} could not be made within {STARTING:g} s") from None
                raise BackendError(f"backend {self.backend} killed its process (exit code {lost.code})") from None
            except Foreign as error:
                raise BackendError(f"backend {self.backend}: {error}") from None
            if isinstance(told, str):
                raise BackendError(told)
            try:
                about = about_of(told)
                for mode in self.modes:
                    known(mode.removesuffix(".grad"), about.profiles.get(mode, {}))
            except ValueError as error:
                raise BackendError(f"backend {self.backend}: {error}") from error
            failed.pop_all()
        return about


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
    line.send(asdict(about))
    with torch.inference_mode(), contextlib.suppress(EOFError):
        while True:
            number, job = line.receive()
            try:
                made = produce(cls, job)
            except BaseException as error:
                made = Produced("", "", None, "error", described(error), trace=trace(error))
            line.send((number, made))


def _about(cls: type[Backend], modes: Sequence[str]) -> About:
    profiles = {}
    for mode in modes:
        select([cls.name], profile(mode))
        profiles[mode] = _candidate(cls).asking(mode).numerics.to_dict()
    if GRAD in modes and not cls.differentiable:
        raise BackendError(f"backend {cls.name} has no gradients: it says of itself that it is for inference only")
    if cls.affords not in SIZES:
        raise BackendError(f"backend {cls.name} affords {cls.affords!r}, which is none of {', '.join(SIZES)}")
    try:
        waivers = str(Path(inspect.getfile(cls)).parent / "waivers.yaml")
    except (TypeError, OSError):  # a class that was made, and lies in no file
        waivers = ""
    return About(waivers, profiles, environment([cls.name]), cls.affords, remarks(cls))


@dataclass
class _Candidate:
    """A backend that is put to the test.

    ops     of each mode: the backend's, with the reference behind it for what it refuses, watched
    guard   what watches them
    rounds  ops whose results have come round, see `rehearsed`
    """

    cls: type[Backend]
    ops: dict[str, Asking] = field(default_factory=dict)
    guard: Guard = field(default_factory=Guard)
    rounds: set[str] = field(default_factory=set)

    def asking(self, mode: str) -> Asking:
        if mode not in self.ops:
            first = self.cls(profile(mode))
            behind = [] if self.cls.name == FALLBACK else [backend_class(FALLBACK)(first.numerics, first.device)]
            ops = asking([first, *behind])
            self.guard.watch(ops)
            self.ops[mode] = ops
        return self.ops[mode]

    @contextlib.contextmanager
    def tested(self, job: Job, ops: Asking) -> Iterator[None]:
        """What the calls of a case have to stand."""
        with self.guard.case(), self._more_calls(job, ops):
            yield

    def _more_calls(self, job: Job, ops: Asking) -> contextlib.AbstractContextManager[None]:
        if job.soak:
            return repeated(ops, job.op, *job.soak)
        if ops.device.type == "meta" or not due(job, self.cls.affords):
            return contextlib.nullcontext()
        turns = SHORT if self.cls.affords in up_to(FEW) else ROUND
        return rehearsed(ops, job.op, self.guard, self.rounds, turns)


_LAST: list[_Candidate] = []  # the one; what it keeps, and what is kept of it, goes with it


def _candidate(cls: type[Backend]) -> _Candidate:
    if not _LAST or _LAST[0].cls is not cls:
        _LAST[:] = [_Candidate(cls)]
    return _LAST[0]


def produce(cls: type[Backend], job: Job) -> Produced:
    """The results of a case, watched; or what went wrong."""
    try:
        candidate = _candidate(cls)
        ops = candidate.asking(job.mode)
        ops.asked.clear()
    except Exception as error:
        return Produced("", "", None, "error", described(error), trace=trace(error))
    start, before = time.monotonic(), state()

    def produced(
        results: Mapping[str, Packed] | None, verdict: str = "", message: str = "", where: str = ""
    ) -> Produced:
        runs_as, refused = ops.ran(job.op)
        seconds = round(time.monotonic() - start, 4)
        return Produced(runs_as, ops.device.type, results, verdict, message, seconds, refused, where)

    try:
        with candidate.tested(job, ops):
            made = produced(pack(results(job, ops)))
    except Misconduct as error:
        made = produced(None, "misconduct", str(error))
    except (NoGradient, Unsteady) as error:
        made = produced(None, "disagrees", str(error))
    except Exception as error:
        made = produced(None, "error", described(error), trace(error))
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
