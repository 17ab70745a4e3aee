"""The verdict on what a backend made of a case: compared with the reference; the reference's with its oracles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch

from dsv4_hal.backend import Backend, described
from dsv4_hal.conformance.judging.account import Run, no_inference
from dsv4_hal.conformance.judging.backward import GRADIENTS, compare_slopes, slope_budgets, slopes
from dsv4_hal.conformance.judging.compare import Comparison, Results, compare, run_case, widen
from dsv4_hal.conformance.judging.expected import Expected, expect
from dsv4_hal.conformance.judging.named import named
from dsv4_hal.conformance.judging.results import GRAD, Job, Outcome, Produced, affordable, claims, modes, profile
from dsv4_hal.conformance.judging.worker import LIMIT, Worker, produce, results
from dsv4_hal.conformance.oracles import transformers
from dsv4_hal.conformance.oracles.naive import Naive
from dsv4_hal.conformance.workers.transport import unpack
from dsv4_hal.dispatch import Resolved, resolve
from dsv4_hal.numerics import Numerics, exact
from dsv4_hal.ops import OPS, Case, Tolerance
from dsv4_hal.registry import FALLBACK, backend_class

NAIVE, SLOPES = "the naive float64 oracle", "slopes of the naive float64 oracle"
WIDE = "itself in float64"


def conform(backend: str, work: Iterable[Job], limit: float = LIMIT) -> Iterator[Outcome]:
    """Every job that a backend affords: its part in a worker process, the verdict in this one, which never loads it."""
    work = list(work)
    with Worker(backend, modes(work)) as worker:
        for job, made in worker.map(affordable(work, worker.about), limit):
            yield judge(backend, job, made, worker.about.numerics(job.mode))


class Oracles(NamedTuple):
    """reference  in the profile of a mode
    wide       the reference in that profile widened to float64
    naive      the naive oracle in the same
    """

    reference: Resolved
    wide: Resolved
    naive: Resolved


@cache
def oracles(numerics: Numerics) -> Oracles:
    """Who knows the right results in a profile: all of them are this project's own."""
    reference = backend_class(FALLBACK)
    made = (reference(numerics), reference(widen(numerics)), Naive(widen(numerics)))
    return Oracles(*(resolve([one]) for one in made))


def run(cls: type[Backend], job: Job) -> Outcome:
    """One case of a backend, in this process."""
    return judge(cls.name, job, produce(cls, job), profile(job.mode))


@torch.inference_mode()
def judge(backend: str, job: Job, made: Produced, numerics: Numerics) -> Outcome:
    """What a backend made of a case, compared with the reference; the reference's with its oracles. Where that fails,
    the case is an error, and what became of the others is not lost.

    numerics  the profile of the job's mode, which the judge has from data: a mode's name would load a package's code
    """
    try:
        return _judged(backend, job, made, numerics)
    except Exception as error:
        told = f"it cannot be judged: {described(error)}"
        return Outcome(
            backend, job.op, job.case, job.mode, made.runs_as, "error", told, seconds=made.seconds, size=job.size
        )


def _judged(backend: str, job: Job, made: Produced, numerics: Numerics) -> Outcome:
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
            refused=made.refused,
            trace=made.trace,
            **found,
        )

    if wrong := claims(made.verdict, made.results is not None):
        return outcome("misconduct", wrong)
    if made.results is None:
        return outcome(made.verdict, made.message, of_budget=math.inf if made.verdict == "disagrees" else None)
    elsewhere = {name: p.device for name, p in made.results.items() if p.device != made.device}
    if elsewhere:
        told = "; ".join(f"{name}: on {device}, expected {made.device}" for name, device in elsewhere.items())
        return outcome("disagrees", told, of_budget=math.inf)
    case, got = named(job.case), unpack(made.results)
    if made.device == "meta":
        wrong = _shapes(got, run_case(case, oracles(numerics).reference))
        return outcome("disagrees" if wrong else "shapes", wrong)
    known = _of_reference if backend == FALLBACK else _of_backend
    against = known(job, got, numerics)
    first = next(iter(against))
    found = {
        result if oracle == first else f"{result} by {oracle}": comparison
        for oracle, comparisons in against.items()
        for result, comparison in comparisons.items()
    }
    wrong = "; ".join(f"{result}: {c.message}" for result, c in found.items() if not c.ok)
    return outcome(
        "disagrees" if wrong else "agrees",
        wrong,
        of_budget=max((c.of_budget for c in found.values() if c.of_budget is not None), default=None),
        metrics={result: c.metrics for result, c in found.items()},
        against=tuple(against),
    )


@lru_cache(maxsize=4)
def expectation(job: Job, numerics: Numerics) -> Expected:
    """What a case must give in a profile, and how far a backend may be from it."""
    return expect(partial(results, job), oracles(numerics).wide, numerics.accumulate, tolerance_of(job))


def tolerance_of(job: Job) -> Tolerance:
    return GRADIENTS if job.mode == GRAD else OPS[job.op].tolerance


def _of_backend(job: Job, got: Results, numerics: Numerics) -> dict[str, dict[str, Comparison]]:
    """Results compared with the reference."""
    return {FALLBACK: compare(got, expectation(job, numerics), tolerance_of(job))}


def _of_reference(job: Job, got: Results, numerics: Numerics) -> dict[str, dict[str, Comparison]]:
    """The reference's results compared with itself in float64, and with every oracle that knows them."""
    case, tolerance, expected = named(job.case), tolerance_of(job), expectation(job, numerics)
    if job.mode == GRAD:
        return {SLOPES: compare_slopes(case, got, slopes(job.op, case, _slow()), slope_budgets(expected))}
    knowing = {NAIVE: oracles(numerics).naive}
    if job.mode == "exact" and job.op in transformers.OPS and not transformers.missing():
        knowing[transformers.version()] = _transformers()
    judged = {name: compare(got, _told(case, expected, ops), tolerance) for name, ops in knowing.items()}
    return judged | {WIDE: compare(got, expected, tolerance)}


def _told(case: Case, expected: Expected, ops: Resolved) -> Expected:
    """What an oracle says. It may compute in float64: what it returns is rounded to what an op must return."""
    run = Run()
    with no_inference():
        made = run_case(case, run.with_ops(ops))
    dtypes = {name: t.dtype for name, t in expected.results.items()}
    exactly = {name: run.exactly(t) for name, t in made.items() if t.is_floating_point()}
    return expected.by({name: t.to(dtypes.get(name, t.dtype)) for name, t in made.items()}, exactly)


@cache
def _transformers() -> Resolved:
    return resolve([transformers.Transformers(exact())])


@cache
def _slow() -> Resolved:
    """The naive oracle in float64 throughout, between ops as well: for central differences."""
    return resolve([Naive(exact(torch.float64))])


def _shapes(got: Results, want: Results) -> str:
    a, b = ({name: (tuple(t.shape), t.dtype) for name, t in r.items()} for r in (got, want))
    return "" if a == b else f"shapes and dtypes are {a}, expected {b}"
