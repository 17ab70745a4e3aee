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
from dsv4_hal.conformance.judging.results import Job, Outcome, Produced
from dsv4_hal.conformance.judging.verdict import judge
from dsv4_hal.dispatch import resolve
from dsv4_hal.numerics import Numerics
from dsv4_hal.ops import SIZES
from dsv4_hal.registry import backend_class

CASES = 3  # of an op in each mode
CHUNK = 500  # times that every call of a case is made until the process is heard of again, unless that takes too long
SHARE = 0.1  # of what a case may take: so long a chunk should take


Produce = Callable[[Job], Produced]
Profile = Callable[[str], Numerics]


def soak(
    backend: str, produce: Produce, profile: Profile, work: Sequence[Job], calls: int, limit: float
) -> Iterator[list[Outcome]]:
    """Op by op, outcomes of a few small cases among `work`, up to one that fails: a call that differed, or was lost.

    produce  makes a job's results on the backend, within `limit` seconds
    profile  the numeric profile of a mode
    calls    of an op, all its cases together; each has its share, rounded up
    An op of which no case returns anything is left out.
    """
    for op in dict.fromkeys(job.op for job in work):
        chosen = few([job for job in work if job.op == op], profile)
        share = -(-calls // max(1, len(chosen)))
        outcomes = list[Outcome]()
        for turn, (job, own) in enumerate(chosen):
            outcomes.append(_soaked(backend, produce, profile(job.mode), job, own, 1 + turn * share, share, limit))
            if not outcomes[-1].ok:
                break
        yield outcomes


def few(work: Sequence[Job], profile: Profile) -> list[tuple[Job, int]]:
    """Jobs of the smallest class that is there, CASES of each mode as far from one another in the list as can be, with
    how often a case calls its op. Cases that return nothing are none."""
    facts = {job: _facts(job, profile(job.mode)) for job in work}
    telling = [job for job, (own, returns) in facts.items() if own and returns]
    smallest = min((job.size for job in telling), key=SIZES.index, default="")
    chosen = []
    for mode in dict.fromkeys(job.mode for job in telling):
        mine = [job for job in telling if (job.mode, job.size) == (mode, smallest)]
        places = {round(i * (len(mine) - 1) / (CASES - 1)) for i in range(CASES)} if mine else ()
        chosen += [mine[place] for place in sorted(places)]
    return [(job, facts[job][0]) for job in chosen]


def _facts(job: Job, numerics: Numerics) -> tuple[int, bool]:
    """How often a case calls its op, and whether it returns anything at all: found without a device."""
    ops = resolve([backend_class("null")(numerics)])
    calls = ops.count_calls()
    results = run_case(named(job.case), ops)
    return calls[job.op], any(t.numel() for t in results.values())


def _soaked(
    backend: str, produce: Produce, numerics: Numerics, job: Job, own: int, first: int, calls: int, limit: float
) -> Outcome:
    """own: how often the case calls its op. first: number of the first of `calls` calls."""
    made = produce(job)
    outcome = judge(backend, job, made, numerics)
    if outcome.verdict != "agrees" or made.results is None:
        return outcome
    number, end, seconds, times = first, first + calls, made.seconds, 1
    while number < end:
        affordable = int(limit * SHARE / max(seconds / times, 1e-6))
        times = max(1, min(CHUNK, affordable, -(-(end - number) // own)))
        again = produce(replace(job, soak=(number, times)))
        told = f"calls {number:,} to {number + times * own - 1:,} of {job.op}"
        if again.results is None:
            if again.verdict != "disagrees":  # which names the call
                again = replace(again, message=f"{again.message}, in {told}")
            return judge(backend, job, again, numerics)
        if again.results != made.results:
            differs = f"{told} come to another result: {difference(again.results, made.results)}"
            return judge(backend, job, replace(again, results=None, verdict="disagrees", message=differs), numerics)
        number, seconds = number + times * own, again.seconds
    return replace(outcome, message=f"{number - first:,} calls returned the same")
