"""Soaking: thousands of calls of an op on a few small cases, all of which must return the same, to the bit.

A case is judged once, as ever. Then its calls are made again and again, in the same process, while other threads
compute, allocate and free memory there. What is wrong once in thousands of calls, or once a thread or an allocation
comes between, shows as a call that differs from the first; its number among the calls of the op is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from dsv4_hal.conformance.judging.compare import run_case
from dsv4_hal.conformance.judging.named import named
from dsv4_hal.conformance.judging.rehearsal import difference
from dsv4_hal.conformance.judging.results import Job, Outcome, Produced, profile
from dsv4_hal.conformance.judging.verdict import judge
from dsv4_hal.dispatch import resolve
from dsv4_hal.ops import SIZES
from dsv4_hal.registry import backend_class

CASES = 3  # of an op in each mode
CHUNK = 500  # times that every call of a case is made until the process is heard of again, unless that takes too long
SHARE = 0.1  # of what a case may take: so long a chunk should take


def soak(
    backend: str, produce: Callable[[Job], Produced], work: Sequence[Job], calls: int, limit: float
) -> Iterator[list[Outcome]]:
    """Op by op, an outcome of each of a few small cases among `work`: its verdict, or that of a call that differed.

    produce  makes a job's results on the backend, within `limit` seconds
    calls    of an op, all its cases together; each case has its share, rounded up
    An op of which no case returns anything is left out.
    """
    for op in dict.fromkeys(job.op for job in work):
        chosen = few([job for job in work if job.op == op])
        first, outcomes = 1, list[Outcome]()
        for job, own in chosen:
            share = -(-calls // len(chosen))
            outcomes.append(_soaked(backend, produce, job, own, first, share, limit))
            first += share
        yield outcomes


def few(work: Sequence[Job]) -> list[tuple[Job, int]]:
    """Jobs of the smallest class that is there, CASES of each mode as far from one another in the list as can be, with
    how often a case calls its op. Cases that return nothing are none."""
    facts = {job: _facts(job) for job in work}
    telling = [job for job, (own, returns) in facts.items() if own and returns]
    smallest = min((job.size for job in telling), key=SIZES.index, default="")
    chosen = []
    for mode in dict.fromkeys(job.mode for job in telling):
        mine = [job for job in telling if (job.mode, job.size) == (mode, smallest)]
        places = {round(i * (len(mine) - 1) / (CASES - 1)) for i in range(CASES)} if mine else ()
        chosen += [mine[place] for place in sorted(places)]
    return [(job, facts[job][0]) for job in chosen]


def _facts(job: Job) -> tuple[int, bool]:
    """How often a case calls its op, and whether it returns anything at all: found without a device."""
    ops = resolve([backend_class("null")(profile(job.mode))])
    calls = ops.count_calls()
    results = run_case(named(job.case), ops)
    return calls[job.op], any(t.numel() for t in results.values())


def _soaked(
    backend: str, produce: Callable[[Job], Produced], job: Job, own: int, first: int, calls: int, limit: float
) -> Outcome:
    """own: how often the case calls its op. first: number of the first of `calls` calls."""
    made = produce(job)
    outcome = judge(backend, job, made)
    if outcome.verdict != "agrees" or made.results is None:
        return outcome
    number, seconds, times = first, made.seconds, 1
    while number < first + calls:
        at_once = int(limit * SHARE / max(seconds / times, 1e-6))
        times = max(1, min(CHUNK, at_once, -(-(first + calls - number) // own)))
        again = produce(replace(job, soak=(number, times)))
        seconds, last = again.seconds, number + times * own - 1
        told = f"in calls {number:,} to {last:,} of {job.op}"
        if again.results is None:
            if again.verdict != "disagrees":  # which says the number itself
                again = replace(again, message=f"{again.message} ({told})")
            return judge(backend, job, again)
        if again.results != made.results:
            differs = f"{told} a result differs from the first run's: {difference(again.results, made.results)}"
            return judge(backend, job, replace(again, results=None, verdict="disagrees", message=differs))
        number = last + 1
    return replace(outcome, message=f"{number - first:,} calls returned the same")
