"""Running the cases of the contract on a backend, each watched, timed and apart from the others.

The cases run in a worker process: one that hangs is stopped after its time, one that kills the process is reported as
that, and the rest go on in a new worker.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, cast

import torch

from dsv4_hal.backend import Backend, BackendError, described
from dsv4_hal.conformance import transformers_oracle
from dsv4_hal.conformance.backward import GRADIENTS, NoGradient, compare_slopes, gradients, slope_budgets, slopes
from dsv4_hal.conformance.compare import Budget, Comparison, Results, budget, compare, run_case, widen
from dsv4_hal.conformance.compare import budgets as budgets_of
from dsv4_hal.conformance.guard import Misconduct, restored, state, watch
from dsv4_hal.conformance.named import named
from dsv4_hal.conformance.oracle import Naive
from dsv4_hal.conformance.process import STARTING, Child, Line, Lost, in_words
from dsv4_hal.conformance.text import counted
from dsv4_hal.conformance.transport import Packed, pack, unpack
from dsv4_hal.dispatch import Resolved, resolve, select
from dsv4_hal.environment import Environment, environment
from dsv4_hal.numerics import MODES, Numerics, exact, numerics_for
from dsv4_hal.ops import OPS, SIZES, Compare
from dsv4_hal.registry import FALLBACK, backend_class

NAIVE, SLOPES = "the naive float64 oracle", "slopes of the naive float64 oracle"
GRAD = "exact.grad"  # gradients, in the numeric profile of mode exact
DEFAULT_SIZE = "quick"
LIMIT = 60.0  # seconds a case may take
AHEAD = 8  # cases that the process may be ahead of who judges
PASSED = ("agrees", "shapes")  # verdicts that are no failure; "shapes": no values to compare, and no agreement claimed
LOST = ("error", "timeout", "crash")  # verdicts without a result
VERDICTS = (*PASSED, "disagrees", "misconduct", *LOST)


@dataclass(frozen=True)
class Outcome:
    """One case on one backend.

    runs_as    how the op ran: native, inherited, composite, reference (see `dsv4_hal.dispatch.Resolution`)
    verdict    agrees; shapes: only shapes and dtypes, all there is on the meta device, are right; disagrees; error: it
               raised; misconduct: it wrote where it must not; timeout; crash: it killed its process
    of_budget  the worst error of a result as a multiple of its budget; inf where an exact check fails; None where
               nothing was measured
    metrics    result -> numbers of its comparison; "y by transformers 5.23.0": with a further oracle
    size       size class of the case, of `dsv4_hal.ops.SIZES`
    against    what it was compared with: the reference; of the reference itself, every oracle
    """

    backend: str
    op: str
    case: str
    mode: str
    runs_as: str
    verdict: str
    message: str = ""
    of_budget: float | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    size: str = "tiny"
    against: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.verdict in PASSED

    @property
    def id(self) -> str:
        return f"{self.case}@{self.mode}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: what is not finite becomes text."""
        plain = asdict(self)
        plain["of_budget"] = finite(self.of_budget)
        plain["metrics"] = {r: {m: finite(v) for m, v in found.items()} for r, found in self.metrics.items()}
        return plain


@dataclass(frozen=True)
class Job:
    op: str
    case: str
    mode: str
    size: str = "tiny"

    @property
    def id(self) -> str:
        return f"{self.case}@{self.mode}"


@dataclass(frozen=True)
class About:
    """What a backend says of itself.

    waivers      path of a file of waivers beside its module; it need not be there. "": its class is of no file
    profiles     numeric profile of each mode
    environment  versions, machine and devices where it runs
    affords      the largest size class that it gets through
    refused      op -> why its own code is not used: the backend's `supports` refused it, or failed
    """

    waivers: str
    profiles: Mapping[str, Mapping[str, Any]]
    environment: Environment
    affords: str = SIZES[-1]
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Extent:
    """Which size classes a run has.

    size     the largest class that was asked for
    affords  the largest one that the backend affords
    beyond   how many cases were asked for and are left out, because the backend does not afford them
    seed     of cases that were drawn, within the bounds of these classes; None: the contract's were run
    """

    size: str = SIZES[-1]
    affords: str = SIZES[-1]
    beyond: int = 0
    seed: int | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """What may have run."""
        return up_to(min(self.size, self.affords, key=SIZES.index))

    def __str__(self) -> str:
        ran = f"size classes {', '.join(self.classes)}"
        if self.seed is not None:
            return f"drawn with seed {self.seed}, as for {ran}"
        if not self.beyond:
            return ran
        return f"{ran}; {counted(self.beyond, 'larger case')} not run, since the backend affords {self.affords} at most"


WHOLE = Extent()  # nothing is left out


def up_to(size: str) -> tuple[str, ...]:
    """Size classes up to one of them."""
    return SIZES[: SIZES.index(size) + 1]


def jobs(
    ops: Sequence[str] = (), pattern: str = "", modes: Iterable[str] = MODES, size: str = DEFAULT_SIZE
) -> list[Job]:
    """The cases of `ops` (default all) up to a size class, in every mode, whose id (with its mode: "case@mode")
    contains `pattern`."""
    in_modes, sizes, chosen = tuple(modes), up_to(size), [OPS[op] for op in ops or OPS]
    cases = [(spec.name, case) for spec in chosen for case in spec.cases() if case.size in sizes]
    every = (Job(op, case.id, mode, case.size) for op, case in cases for mode in in_modes if case.grad or mode != GRAD)
    return [job for job in every if pattern in job.id]


def affordable(work: Iterable[Job], about: About) -> list[Job]:
    """The jobs that a backend gets through, as it says of itself."""
    sizes = up_to(about.affords)
    return [job for job in work if job.size in sizes]


def modes(work: Iterable[Job]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(job.mode for job in work))


def conform(backend: str, work: Iterable[Job], limit: float = LIMIT) -> Iterator[Outcome]:
    """Every job that a backend affords: its part in a worker process, the verdict in this one, which never loads it."""
    work = list(work)
    with Worker(backend, modes(work)) as worker:
        for job, made in worker.map(affordable(work, worker.about), limit):
            yield judge(backend, job, made)


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
        ops = _candidate(cls, mode)
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


def profile(mode: str) -> Numerics:
    return numerics_for(mode.removesuffix(".grad"))


@cache
def oracles(mode: str) -> tuple[Resolved, Resolved, Resolved, Resolved]:
    """The reference in a mode's profile, in that profile widened to float64, the naive oracle, widened, and null, which
    knows what dtype each result must have."""
    numerics = profile(mode)
    reference, null = backend_class(FALLBACK), backend_class("null")
    return (
        resolve([reference(numerics)]),
        resolve([reference(widen(numerics))]),
        resolve([Naive(widen(numerics))]),
        resolve([null(numerics)]),
    )


_CANDIDATES: dict[tuple[type[Backend], str], Resolved] = {}


def _candidate(cls: type[Backend], mode: str) -> Resolved:
    """The ops that are put to the test: the backend's, with the reference behind it, watched."""
    if (cls, mode) not in _CANDIDATES:
        first = cls(profile(mode))
        behind = [] if cls.name == FALLBACK else [backend_class(FALLBACK)(first.numerics, first.device)]
        ops = resolve([first, *behind])
        watch(ops)
        _CANDIDATES[cls, mode] = ops
    return _CANDIDATES[cls, mode]


def _refused(cls: type[Backend], ops: Resolved) -> dict[str, str]:
    """Ops of a backend's own that are not used, and why."""
    return {
        r.op: reason
        for r in ops.resolutions
        for name, reason in r.rejected
        if name == cls.name and cls.origin(r.op).kind == "native"
    }


@dataclass(frozen=True)
class Produced:
    """What a backend made of a case, not yet judged.

    device   device type the backend computes on
    results  by name; None where it made none, for the reason in `verdict` and `message`
    """

    runs_as: str
    device: str
    results: Mapping[str, Packed] | None
    verdict: str = ""
    message: str = ""
    seconds: float = 0.0


def run(cls: type[Backend], job: Job) -> Outcome:
    """One case of a backend, in this process."""
    return judge(cls.name, job, produce(cls, job))


def produce(cls: type[Backend], job: Job) -> Produced:
    """The results of a case, watched; or what went wrong."""
    try:
        ops = _candidate(cls, job.mode)
        runs_as = next(r.runs_as for r in ops.resolutions if r.op == job.op)
    except Exception as error:
        return Produced("", "", None, "error", described(error))
    start, before = time.monotonic(), state()

    def produced(results: Mapping[str, Packed] | None, verdict: str = "", message: str = "") -> Produced:
        return Produced(runs_as, ops.device.type, results, verdict, message, round(time.monotonic() - start, 4))

    try:
        made = produced(pack(results(job, ops)))
    except Misconduct as error:
        made = produced(None, "misconduct", str(error))
    except NoGradient as error:
        made = produced(None, "disagrees", str(error))
    except Exception as error:
        made = produced(None, "error", described(error))
    finally:
        changed = restored(before)  # whatever happened: the next case must not find it
    if changed:
        told = f"{job.op} changed {', '.join(changed)}" + (f"; {made.message}" if made.message else "")
        made = replace(made, results=None, verdict="misconduct", message=told)
    return made


@torch.inference_mode()
def judge(backend: str, job: Job, made: Produced) -> Outcome:
    """What a backend made of a case, compared with the reference; the reference's with its oracles. Where that fails,
    the case is an error, and what became of the others is not lost."""
    try:
        return _judged(backend, job, made)
    except Exception as error:
        told = f"it cannot be judged: {described(error)}"
        return Outcome(
            backend, job.op, job.case, job.mode, made.runs_as, "error", told, seconds=made.seconds, size=job.size
        )


def _judged(backend: str, job: Job, made: Produced) -> Outcome:
    def outcome(verdict: str, message: str = "", **found: Any) -> Outcome:
        return Outcome(
            backend,
            job.op,
            job.case,
            job.mode,
            made.runs_as,
            verdict,
            message,
            seconds=made.seconds,
            size=job.size,
            **found,
        )

    if made.results is None:
        return outcome(made.verdict, made.message, of_budget=math.inf if made.verdict == "disagrees" else None)
    elsewhere = {name: p.device for name, p in made.results.items() if p.device != made.device}
    if elsewhere:
        told = "; ".join(f"{name}: on {device}, expected {made.device}" for name, device in elsewhere.items())
        return outcome("disagrees", told, of_budget=math.inf)
    case, got = named(job.case), unpack(made.results)
    if made.device == "meta":
        wrong = _shapes(got, run_case(case, oracles(job.mode)[0]))
        return outcome("disagrees" if wrong else "shapes", wrong)
    found, shares = dict[str, Comparison](), list[float]()
    judged = _of_reference(job, got) if backend == FALLBACK else _of_backend(job, got)
    against = tuple(judged)
    for oracle, (comparisons, budgets) in judged.items():
        for result, comparison in comparisons.items():
            found[result if oracle == against[0] else f"{result} by {oracle}"] = comparison
            share = of_budget(comparison, budgets.get(result))
            shares += [] if share is None else [share]
    wrong = "; ".join(f"{result}: {c.message}" for result, c in found.items() if not c.ok)
    return outcome(
        "disagrees" if wrong else "agrees",
        wrong,
        of_budget=max(shares, default=None),
        metrics={result: c.metrics for result, c in found.items()},
        against=against,
    )


Judged = dict[str, tuple[dict[str, Comparison], Mapping[str, Budget]]]  # by oracle: comparisons, and their budgets


def _of_backend(job: Job, got: Results) -> Judged:
    """Results compared with the reference."""
    reference, wide, _, _ = oracles(job.mode)
    want, tolerance = results(job, reference), GRADIENTS if job.mode == GRAD else OPS[job.op].tolerance
    exact_check = tolerance.compare is Compare.BITWISE
    allowed = {} if exact_check else budgets_of(want, results(job, wide), tolerance, reference.numerics)
    return {FALLBACK: (compare(got, want, tolerance, allowed), allowed)}


def _of_reference(job: Job, got: Results) -> Judged:
    """The reference's results compared with every oracle that knows them."""
    case, tolerance = named(job.case), OPS[job.op].tolerance
    reference, wide, naive, null = oracles(job.mode)
    if job.mode == GRAD:
        narrow = gradients(job.op, case, reference)
        allowed = budgets_of(narrow, gradients(job.op, case, wide), GRADIENTS, reference.numerics)
        allowed = slope_budgets(narrow, allowed)
        return {SLOPES: (compare_slopes(case, got, slopes(job.op, case, _slow()), allowed), allowed)}
    knowing = {NAIVE: naive}
    if job.mode == "exact" and job.op in transformers_oracle.OPS and not transformers_oracle.missing():
        knowing[transformers_oracle.version()] = _transformers()
    dtypes = {name: t.dtype for name, t in run_case(case, null).items()}
    allowed = budget(case, tolerance, reference, wide)
    judged: Judged = {}
    for oracle, ops in knowing.items():
        # An oracle may compute in float64: what it returns is rounded to what an op must return.
        want = {name: value.to(dtypes[name]) for name, value in run_case(case, ops).items()}
        judged[oracle] = compare(got, want, tolerance, allowed), allowed
    return judged


def results(job: Job, ops: Resolved) -> Results:
    """What ops make of a case: its results, or the gradients of its op."""
    case = named(job.case)
    return gradients(job.op, case, ops) if job.mode == GRAD else run_case(case, ops)


@cache
def _transformers() -> Resolved:
    return resolve([transformers_oracle.Transformers(exact())])


@cache
def _slow() -> Resolved:
    """The naive oracle in float64 throughout, between ops as well: for central differences."""
    return resolve([Naive(exact(torch.float64))])


def of_budget(comparison: Comparison, allowed: Budget | None) -> float | None:
    """The error of a result as a multiple of its budget: above 1 it disagrees. An exact check has no budget: inf where
    it fails, None where it does not."""
    metrics = comparison.metrics
    if allowed is None or "nmse" not in metrics:
        return None if comparison.ok else math.inf
    rms, largest = metrics["nmse"] ** 0.5, metrics["max_rel"]
    shares = ((rms, allowed.rms), (largest, allowed.largest))
    return max(error / most if most else (math.inf if error else 0.0) for error, most in shares)


def _shapes(got: Results, want: Results) -> str:
    a, b = ({name: (tuple(t.shape), t.dtype) for name, t in r.items()} for r in (got, want))
    return "" if a == b else f"shapes and dtypes are {a}, expected {b}"


def finite(value: float | None) -> float | str | None:
    """As JSON can hold it: infinity and NaN become text."""
    return value if value is None or math.isfinite(value) else str(value)
