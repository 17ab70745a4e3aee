"""The verdict on what a backend made of a case: compared with the reference; the reference's with its oracles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch

from dsv4_hal.backend import Backend, described
from dsv4_hal.conformance.judging.backward import GRADIENTS, compare_slopes, gradients, slope_budgets, slopes
from dsv4_hal.conformance.judging.compare import Budget, Comparison, Results, budget, compare, run_case, widen
from dsv4_hal.conformance.judging.compare import budgets as budgets_of
from dsv4_hal.conformance.judging.named import named
from dsv4_hal.conformance.judging.results import GRAD, Job, Outcome, Produced, affordable, claims, modes, profile
from dsv4_hal.conformance.judging.worker import LIMIT, Worker, produce, results
from dsv4_hal.conformance.oracles import transformers
from dsv4_hal.conformance.oracles.naive import Naive
from dsv4_hal.conformance.workers.transport import unpack
from dsv4_hal.dispatch import Resolved, resolve
from dsv4_hal.numerics import Numerics, exact
from dsv4_hal.ops import OPS, Compare
from dsv4_hal.registry import FALLBACK, backend_class

NAIVE, SLOPES = "the naive float64 oracle", "slopes of the naive float64 oracle"


def conform(backend: str, work: Iterable[Job], limit: float = LIMIT) -> Iterator[Outcome]:
    """Every job that a backend affords: its part in a worker process, the verdict in this one, which never loads it."""
    work = list(work)
    with Worker(backend, modes(work)) as worker:
        for job, made in worker.map(affordable(work, worker.about), limit):
            yield judge(backend, job, made, worker.about.numerics(job.mode))


@cache
def oracles(numerics: Numerics) -> tuple[Resolved, Resolved, Resolved, Resolved]:
    """The reference in a profile, in that profile widened to float64, the naive oracle, widened, and null, which knows
    what dtype each result must have. All four are this project's own."""
    reference, null = backend_class(FALLBACK), backend_class("null")
    return (
        resolve([reference(numerics)]),
        resolve([reference(widen(numerics))]),
        resolve([Naive(widen(numerics))]),
        resolve([null(numerics)]),
    )


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
        wrong = _shapes(got, run_case(case, oracles(numerics)[0]))
        return outcome("disagrees" if wrong else "shapes", wrong)
    found, shares = dict[str, Comparison](), list[float]()
    judged = (_of_reference if backend == FALLBACK else _of_backend)(job, got, numerics)
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


def _of_backend(job: Job, got: Results, numerics: Numerics) -> Judged:
    """Results compared with the reference."""
    reference, wide, _, _ = oracles(numerics)
    want, tolerance = results(job, reference), GRADIENTS if job.mode == GRAD else OPS[job.op].tolerance
    exact_check = tolerance.compare is Compare.BITWISE
    allowed = {} if exact_check else budgets_of(want, results(job, wide), tolerance, reference.numerics)
    return {FALLBACK: (compare(got, want, tolerance, allowed), allowed)}


def _of_reference(job: Job, got: Results, numerics: Numerics) -> Judged:
    """The reference's results compared with every oracle that knows them."""
    case, tolerance = named(job.case), OPS[job.op].tolerance
    reference, wide, naive, null = oracles(numerics)
    if job.mode == GRAD:
        narrow = gradients(job.op, case, reference)
        allowed = budgets_of(narrow, gradients(job.op, case, wide), GRADIENTS, reference.numerics)
        allowed = slope_budgets(narrow, allowed)
        return {SLOPES: (compare_slopes(case, got, slopes(job.op, case, _slow()), allowed), allowed)}
    knowing = {NAIVE: naive}
    if job.mode == "exact" and job.op in transformers.OPS and not transformers.missing():
        knowing[transformers.version()] = _transformers()
    dtypes = {name: t.dtype for name, t in run_case(case, null).items()}
    allowed = budget(case, tolerance, reference, wide)
    judged: Judged = {}
    for oracle, ops in knowing.items():
        # An oracle may compute in float64: what it returns is rounded to what an op must return.
        want = {name: value.to(dtypes[name]) for name, value in run_case(case, ops).items()}
        judged[oracle] = compare(got, want, tolerance, allowed), allowed
    return judged


@cache
def _transformers() -> Resolved:
    return resolve([transformers.Transformers(exact())])


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
