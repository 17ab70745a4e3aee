"""Cases that nobody thought of: drawn by hypothesis from the parameters of the functions that run an op's cases.

A drawn case has an id like any other, which says all of it: it can be pasted and run again. One that fails is shrunk to
the smallest that still fails, and that one is what is reported. Draws depend on the seed, the op and the version of
hypothesis alone. What the contract refuses, or what cannot be made at all, is no case and is drawn again.
"""

from __future__ import annotations

import contextlib
import inspect
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dsv4_hal.conformance.judging.named import functions, listed, named, try_out
from dsv4_hal.conformance.judging.results import Job, Outcome
from dsv4_hal.conformance.judging.verdict import judge
from dsv4_hal.conformance.judging.worker import LIMIT, Worker
from dsv4_hal.ops import SIZES
from dsv4_hal.ops.cases.inputs import case

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

PATIENCE = 60.0  # seconds that shrinking the failure of one op may take
FEW = 8  # tokens of a step for a backend that affords no more


class Disagreement(Exception):
    """A case failed."""


def generate(
    worker: Worker, ops: Sequence[str], count: int, modes: Sequence[str], size: str, seed: int = 0, limit: float = LIMIT
) -> Iterator[list[Outcome]]:
    """Op by op, outcomes of `count` drawn cases, or fewer where there are no more: those that agree, up to a failure,
    and the smallest case that fails. What shrinking tries is not counted.

    size  with the bounds of the smaller size classes where it is one of them
    ImportError where hypothesis is not installed.
    """
    most = FEW if size in SIZES[:2] else 140
    for op in ops:
        yield _outcomes(worker, op, count, modes, most, zlib.crc32(f"{op} {seed}".encode()), limit)


def _outcomes(
    worker: Worker, op: str, count: int, modes: Sequence[str], most: int, seed: int, limit: float
) -> list[Outcome]:
    import hypothesis

    known: dict[str, list[Outcome]] = {}
    agreed: list[Outcome] = []  # before there was a failure
    failed: list[Outcome] = []  # of the smallest case that failed so far
    until = [float("inf")]

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
    @hypothesis.given(ids(op, most))
    def run(id: str) -> None:
        if id not in known:
            if time.monotonic() > until[0]:
                return  # out of patience: what is not known to fail passes, and shrinking comes to an end
            work = [Job(op, id, mode) for mode in modes]
            known[id] = [_judged(worker, job, limit) for job in work]
            if not failed and all(outcome.ok for outcome in known[id]):
                agreed.extend(known[id])
        wrong = [outcome for outcome in known[id] if not outcome.ok]
        if wrong:
            until[0] = min(until[0], time.monotonic() + PATIENCE)
            failed[:] = wrong
            raise Disagreement

    with contextlib.suppress(Disagreement):
        run()
    return agreed + failed


def _judged(worker: Worker, job: Job, limit: float) -> Outcome:
    return judge(worker.backend, job, worker.produce(job, limit), worker.about.numerics(job.mode))


def ids(op: str, most: int) -> SearchStrategy[str]:
    """Ids of cases of an op, of steps of at most `most` tokens."""
    from hypothesis import strategies as st

    return st.one_of([_ids(op, run, parameters, most) for run, parameters in functions(op).items()]).filter(_possible)


def _ids(op: str, run: Callable[..., Any], parameters: dict[str, inspect.Parameter], most: int) -> SearchStrategy[str]:
    """Ids of one of the functions that run an op's cases."""
    from hypothesis import strategies as st

    seen = [one.run.keywords for one in listed(op).values() if one.run.func is run]  # type: ignore[attr-defined]
    draw = {name: _values(name, p, [k[name] for k in seen if name in k], most) for name, p in parameters.items()}
    required = {name: values for name, values in draw.items() if parameters[name].default is inspect.Parameter.empty}
    optional = {name: values for name, values in draw.items() if name not in required}

    def id(values: dict[str, Any]) -> str:
        told = {name: values[name] for name, p in parameters.items() if name in values and values[name] != p.default}
        return case(op, run, **told).id

    return st.fixed_dictionaries(required, optional=optional).map(id)


def _possible(id: str) -> bool:
    try:
        try_out(named(id))
    except ValueError:
        return False
    return True


def _values(name: str, parameter: inspect.Parameter, listed: Sequence[Any], most: int) -> SearchStrategy[Any]:
    """Values of a parameter: by its name; else those of the listed cases."""
    from hypothesis import strategies as st

    numbers = {
        "tokens": lengths(most),
        "columns": widths(),
        "inputs": widths(),
        "outputs": widths(),
        "heads": st.integers(0, 4),
        "groups": st.integers(1, 4),
        "streams": st.integers(1, 4),
        "iters": st.integers(1, 20),
        "experts": st.integers(1, 8),
        "k": st.integers(1, 40),
        "vocabulary": st.integers(1, 200),
        "channels": st.integers(1, 32).map(lambda half: 2 * half),
        "window": st.integers(1, 9) | st.sampled_from([16, 31, 127, 128, 129]),
        "first": lengths(most),
        "rollback": st.integers(0, 5),
        "position": st.integers(0, 1 << 20),
        "slot": st.integers(0, 1),
        "source": st.integers(0, 2),
        "target": st.integers(0, 2),
        "top_p": st.integers(0, 99).map(lambda n: (n + 0.5) / 100),  # between sums of probabilities, never on one
    }
    if name == "ragged":
        return ragged(most)
    if name == "rows":
        each = st.lists(lengths(9), min_size=1, max_size=6)
        return each.map(lambda rows: ".".join(map(str, rows))) if parameter.annotation == "str" else lengths(most)
    if name == "width":
        return st.sampled_from([1, 2, 32, 33, 64, 96, 100, 128, 256, 500, 512])
    if name in numbers and parameter.annotation == "int":
        return numbers[name]
    if name == "top_p":
        return numbers[name]
    default = [] if parameter.default is inspect.Parameter.empty else [parameter.default]
    return st.sampled_from(list(dict.fromkeys([*default, *listed])))


def lengths(most: int) -> SearchStrategy[int]:
    """Small ones, and those around the edges of blocks and chunks."""
    from hypothesis import strategies as st

    edges = [n + by for n in (16, 32, 64, 128) for by in (-1, 0, 1) if n + by <= most]
    small = st.integers(0, min(most, 9))
    return small | st.sampled_from(edges) if edges else small


def widths() -> SearchStrategy[int]:
    """Rows and columns, with blocks of 32, 64 and 128 that are whole, or have a ragged edge."""
    from hypothesis import strategies as st

    return st.sampled_from([32, 64, 128, 256, 2, 30, 34, 62, 66, 100, 126, 130, 160, 258])


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
