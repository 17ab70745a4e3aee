"""What a run consists of: jobs, what became of each, and what a backend says of itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dsv4_hal.conformance.workers.text import counted
from dsv4_hal.conformance.workers.transport import Packed
from dsv4_hal.environment import Environment
from dsv4_hal.numerics import MODES, Numerics, numerics_for
from dsv4_hal.ops import OPS, SIZES
from dsv4_hal.registry import FALLBACK

GRAD = "exact.grad"  # gradients, in the numeric profile of mode exact
DEFAULT_SIZE = "quick"
PASSED = ("agrees", "shapes")  # verdicts that are no failure; "shapes": no values to compare, and no agreement claimed
LOST = ("error", "timeout", "crash")  # verdicts without a result
FAILED = ("disagrees", "misconduct", *LOST)
VERDICTS = (*PASSED, *FAILED)


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
    refused    why the backend's own code for the op did not run: it refused the case, or has none
    trace      where the backend raised, as Python tells it
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
    refused: str = ""
    trace: str = ""

    @property
    def ok(self) -> bool:
        return self.verdict in PASSED

    @property
    def judged(self) -> bool:
        """Whether something was found out about the backend: not where only shapes were looked at, nor where the
        reference ran in its place."""
        return self.verdict != "shapes" and not (self.refused and self.runs_as == FALLBACK)

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
    """soak: make every call of the op so often, the first one numbered so: (first, calls); None: as ever."""

    op: str
    case: str
    mode: str
    size: str = "tiny"
    soak: tuple[int, int] | None = None

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
    remarks      what is odd about its class, see `remarks.py`
    """

    waivers: str
    profiles: Mapping[str, Mapping[str, Any]]
    environment: Environment
    affords: str = SIZES[-1]
    remarks: Sequence[str] = ()

    def numerics(self, mode: str) -> Numerics:
        """The numeric profile of a mode, out of what was told. ValueError if it is none."""
        return Numerics.from_dict(self.profiles[mode])


_ABOUT = TypeAdapter(About)


def about_of(plain: Mapping[str, object]) -> About:
    """What a backend says of itself, as data. ValueError where it is not of the right kinds."""
    try:
        return _ABOUT.validate_python(plain)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


@dataclass(frozen=True)
class Extent:
    """Which size classes a run has.

    size     the largest class that was asked for
    affords  the largest one that the backend affords
    beyond   how many cases were asked for and are left out, because the backend does not afford them
    seed     of cases that were drawn, within the bounds of these classes; None: the contract's were run
    soak     calls of each op, on a few small cases of these classes; 0: every case was run
    """

    size: str = SIZES[-1]
    affords: str = SIZES[-1]
    beyond: int = 0
    seed: int | None = None
    soak: int = 0

    @property
    def classes(self) -> tuple[str, ...]:
        """What may have run."""
        return up_to(min(self.size, self.affords, key=SIZES.index))

    def __str__(self) -> str:
        ran = f"size classes {', '.join(self.classes)}"
        if self.seed is not None:
            return f"drawn with seed {self.seed}, as for {ran}"
        if self.soak:
            return f"soaked: {self.soak:,} calls of each op, on a few cases of {ran}"
        if not self.beyond:
            return ran
        return f"{ran}; {counted(self.beyond, 'larger case')} not run, since the backend affords {self.affords} at most"


WHOLE = Extent()  # nothing is left out


@dataclass(frozen=True)
class Suite:
    """What a recording is measured by: how many cases there are, in both modes or in others that it chose, and up to
    the largest size class that it has; which of them it does not have, as `Job.id`."""

    cases: int
    missing: Sequence[str] = ()

    def __str__(self) -> str:
        return f"{self.cases - len(self.missing)} of {counted(self.cases, 'case')} recorded"


def suite(made: Iterable[Job], extent: Extent) -> Suite:
    """What there is beside the jobs that were made."""
    made = list(made)
    have, chosen = {job.id for job in made}, modes(made)
    every = jobs(modes=MODES if set(chosen) <= set(MODES) else chosen, size=extent.classes[-1])
    return Suite(len(every), tuple(job.id for job in every if job.id not in have))


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


def profile(mode: str) -> Numerics:
    return numerics_for(mode.removesuffix(".grad"))


@dataclass(frozen=True)
class Produced:
    """What a backend made of a case, not yet judged.

    device          device type the backend computes on
    results         by name; None where it made none, for the reason in `verdict` and `message`
    refused, trace  as in `Outcome`
    """

    runs_as: str
    device: str
    results: Mapping[str, Packed] | None
    verdict: str = ""
    message: str = ""
    seconds: float = 0.0
    refused: str = ""
    trace: str = ""


def claims(verdict: str, made_results: bool) -> str:
    """What is wrong with what is said of a case; "" if nothing. A verdict is the judge's to give: who has no results
    says why, and who has some says nothing."""
    if not made_results and verdict not in FAILED:
        return f"it has no results, and {verdict!r} does not say why"
    if made_results and verdict:
        return f"it has results, and a verdict {verdict!r}"
    return ""


def finite(value: float | None) -> float | str | None:
    """As JSON can hold it: infinity and NaN become text."""
    return value if value is None or math.isfinite(value) else str(value)
