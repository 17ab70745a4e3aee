"""Cases that nobody listed: drawn by hypothesis from the domains that the listed cases cover pairwise.

A drawn case has an id like any other, which says all of it: it can be pasted and run again. One that fails is shrunk to
the smallest that still fails, that one is what is reported, and drawing goes on. Draws depend on the seed, the op and
the version of hypothesis alone. Beside the values of a domain, steps and numbers of tokens are drawn that it does not
name. What the contract refuses, or what cannot be made at all, is no case and is drawn again.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsv4_hal.conformance.judging.named import functions, listed, named, try_out
from dsv4_hal.conformance.judging.results import Job, Outcome, up_to
from dsv4_hal.conformance.judging.verdict import judge
from dsv4_hal.conformance.judging.worker import LIMIT, Worker
from dsv4_hal.ops import SIZES
from dsv4_hal.ops.cases.domains import DOMAINS, Domain

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

PATIENCE = 60.0  # seconds that shrinking one failure may take
FAILURES = 3  # of one op, after which its drawing ends
FEW, MANY = 8, 140  # tokens of a step: of the smaller size classes, and of the others


class Disagreement(Exception):
    """A case failed."""


def generate(
    worker: Worker, ops: Sequence[str], count: int, modes: Sequence[str], size: str, seed: int = 0, limit: float = LIMIT
) -> Iterator[list[Outcome]]:
    """Op by op, outcomes of `count` drawn cases, or fewer where there are no more: those that agree, and the smallest
    cases that fail, at most FAILURES. What shrinking tries is not counted.

    size  the largest size class of a case
    ImportError where hypothesis is not installed.
    """
    for op in ops:
        yield _outcomes(worker, op, count, modes, size, zlib.crc32(f"{op} {seed}".encode()), limit)


def _outcomes(
    worker: Worker, op: str, count: int, modes: Sequence[str], size: str, seed: int, limit: float
) -> list[Outcome]:
    known: dict[str, list[Outcome]] = {}  # id -> its outcomes, of every case that was drawn
    found: list[Outcome] = []
    for attempt in range(FAILURES):
        agreed, failed = _until_failure(worker, op, count - len(known), modes, size, seed + attempt, limit, known)
        found += agreed + failed
        if not failed or len(known) >= count:
            break
    return found


def _until_failure(
    worker: Worker,
    op: str,
    count: int,
    modes: Sequence[str],
    size: str,
    seed: int,
    limit: float,
    before: dict[str, list[Outcome]],
) -> tuple[list[Outcome], list[Outcome]]:
    """Outcomes that agree, and those of the smallest case that fails. Cases in `before` are passed over; those that are
    drawn here are added to it."""
    import hypothesis

    tried: dict[str, list[Outcome]] = {}
    agreed, failed = list[Outcome](), list[Outcome]()
    until = float("inf")

    def judged(id: str) -> list[Outcome]:
        if id not in tried:
            work = [Job(op, id, mode) for mode in modes]
            tried[id] = [_judged(worker, job, limit) for job in work]
        return tried[id]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(ids(op, size))
    def run(id: str) -> None:
        nonlocal until
        if id in before or (id not in tried and time.monotonic() > until):
            return  # out of patience: what is not known to fail passes, and shrinking comes to an end
        new = id not in tried
        outcomes = judged(id)
        wrong = [outcome for outcome in outcomes if not outcome.ok]
        if not wrong:
            if new and not failed:
                agreed.extend(outcomes)
            return
        until = min(until, time.monotonic() + PATIENCE)
        failed[:] = wrong
        raise Disagreement

    try:
        run()
    except Disagreement:
        before |= {outcome.case: [outcome] for outcome in failed}
    before |= {outcome.case: [outcome] for outcome in agreed}
    return agreed, failed


def _judged(worker: Worker, job: Job, limit: float) -> Outcome:
    return judge(worker.backend, job, worker.produce(job, limit), worker.about.numerics(job.mode))


def ids(op: str, size: str) -> SearchStrategy[str]:
    """Ids of cases of an op, up to a size class."""
    from hypothesis import strategies as st

    domains = DOMAINS.get(op) or list(_of_listed(op))
    return st.one_of([_ids(domain, size) for domain in domains]).filter(_possible)


def _of_listed(op: str) -> Iterator[Domain]:
    """What the listed cases of an op have that declares no domain: every value of each parameter, with any other."""
    for run, parameters in functions(op).items():
        seen = [one.parameters for one in listed(op).values() if one.function is run]
        values: dict[str, Sequence[Any]] = {}
        for name, parameter in parameters.items():
            plain = [] if parameter.default is parameter.empty else [parameter.default]
            values[name] = list(dict.fromkeys([*plain, *(one[name] for one in seen if name in one)]))
        yield Domain(op, run, values, declared=False)


def _ids(domain: Domain, size: str) -> SearchStrategy[str]:
    """Ids of cases of a domain."""
    from hypothesis import strategies as st

    most = FEW if size in SIZES[:2] else MANY
    drawn: dict[str, SearchStrategy[Any]] = {n: st.sampled_from(list(v)) for n, v in domain.values.items()}
    if "ragged" in drawn:
        drawn["ragged"] |= ragged(most)
    if "tokens" in drawn:
        drawn["tokens"] |= lengths(most)

    def fits(parameters: Mapping[str, Any]) -> bool:
        try:
            return domain.legal(parameters) and domain.size(parameters) in up_to(size)
        except ValueError:  # a step that cannot be
            return False

    return st.fixed_dictionaries(drawn).filter(fits).map(lambda parameters: domain.case(parameters).id)


def _possible(id: str) -> bool:
    try:
        try_out(named(id))
    except ValueError:
        return False
    return True


def lengths(most: int) -> SearchStrategy[int]:
    """Small ones, and those around the edges of blocks and chunks."""
    from hypothesis import strategies as st

    edges = [n + by for n in (16, 32, 64, 128) for by in (-1, 0, 1) if n + by <= most]
    small = st.integers(0, min(most, 9))
    return small | st.sampled_from(edges) if edges else small


def ragged(most: int) -> SearchStrategy[str]:
    """Steps written out, packed or with a history."""
    from hypothesis import strategies as st

    padding = st.sampled_from(["", "", ".p1", ".p3"])
    context = st.integers(0, 9) | st.sampled_from([63, 64, 65, 126, 127, 128, 129] + [254, 255, 256] * (most > FEW))
    count = lengths(most)
    packed = st.lists(count, min_size=1, max_size=4).map(lambda all: ".".join(map(str, all)))
    pair = st.tuples(count, context).map(lambda one: f"{one[0]}at{one[1]}")
    cached = st.lists(pair, min_size=1, max_size=4).map(".".join)
    return st.tuples(packed | cached, padding).map("".join)
