"""What a run consists of: jobs, what became of each, and what a backend says of itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dsv4_hal.conformance.workers.text import counted
from dsv4_hal.conformance.workers.transport import Packed
from dsv4_hal.environment import Environment
from dsv4_hal.numerics import MODES, Numerics, numerics_for
from dsv4_hal.ops import OPS, SIZES

GRAD = "exact.grad"  # gradients, in the numeric profile of mode exact
DEFAULT_SIZE = "quick"
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

    device   device type the backend computes on
    results  by name; None where it made none, for the reason in `verdict` and `message`
    """

    runs_as: str
    device: str
    results: Mapping[str, Packed] | None
    verdict: str = ""
    message: str = ""
    seconds: float = 0.0


def finite(value: float | None) -> float | str | None:
    """As JSON can hold it: infinity and NaN become text."""
    return value if value is None or math.isfinite(value) else str(value)
