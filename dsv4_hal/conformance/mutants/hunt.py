"""Deliberately wrong backends: the faults that real ports of DeepSeek-V4 had, each of which the cases must catch.

A mutant is the reference with one op done wrong. To add one, write the wrong op as a function of (right, self, ...):
`right` is the reference's class, so that `right.swiglu(self, ...)` is the correct result.

    @mutant("SwiGLU: the limit is lost", "swiglu")
    def limit_lost(right, self, gate_up, limit, *args, **kwargs):
        return right.swiglu(self, gate_up, None, *args, **kwargs)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dsv4_hal.backend import Backend
from dsv4_hal.conformance.judging.results import GRAD, Outcome, jobs, profile
from dsv4_hal.conformance.judging.soak import soak
from dsv4_hal.conformance.judging.verdict import run
from dsv4_hal.conformance.judging.worker import LIMIT, produce
from dsv4_hal.numerics import MODES
from dsv4_hal.registry import FALLBACK, backend_class

ENOUGH = 10.0  # a fault must miss its budget by so much, or fail an exact check: what is caught barely is not caught


@dataclass(frozen=True)
class Mutant:
    """fault: what is wrong, in words; op: the op that is wrong; backward: its gradients are, and its results right;
    soak: calls after which it shows, where it shows in none of the cases."""

    name: str
    fault: str
    op: str
    wrong: Callable[..., Any]
    backward: bool = False
    soak: int = 0


@dataclass(frozen=True)
class Catch:
    """What caught a mutant. outcome: the clearest failure, None: nothing did."""

    mutant: Mutant
    outcome: Outcome | None

    @property
    def ok(self) -> bool:
        """Caught clearly: by an exact check, or by an error of at least ENOUGH budgets, or by the watch that is kept.

        One that merely raises is a mutant that does not fit its op's signature, and is not caught.
        """
        return self.outcome is not None and _clarity(self.outcome) >= ENOUGH


_ALL: list[Mutant] = []


def mutants() -> tuple[Mutant, ...]:
    return tuple(_ALL)


def hunt(mutant: Mutant) -> Catch:
    """Run the cases of the mutant's op until one catches it clearly."""
    right = backend_class(FALLBACK)
    cls = backend_of(mutant, right)
    if mutant.soak:
        (outcomes,) = soak(cls.name, partial(produce, cls), profile, jobs([mutant.op]), mutant.soak, LIMIT)
        return Catch(mutant, next((one for one in outcomes if not one.ok), None))
    best: Outcome | None = None
    for job in jobs([mutant.op], modes=[GRAD] if mutant.backward else reversed(MODES)):
        outcome = run(cls, job)
        if not outcome.ok and (best is None or _clarity(outcome) > _clarity(best)):
            best = outcome
        if best is not None and _clarity(best) >= ENOUGH:
            break
    return Catch(mutant, best)


def _clarity(outcome: Outcome) -> float:
    """How far beyond its budget."""
    if outcome.verdict == "misconduct":
        return math.inf
    if outcome.verdict != "disagrees":
        return 0.0
    return math.inf if outcome.of_budget is None else outcome.of_budget  # None: a call differed from itself


def backend_of(mutant: Mutant, right: type[Backend]) -> type[Backend]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mutant.wrong(right, self, *args, **kwargs)

    return type(mutant.name, (right,), {"name": mutant.name, mutant.op: method})


def mutant(
    fault: str, op: str, backward: bool = False, soak: int = 0
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a mutant; its name is the function's."""

    def declare(wrong: Callable[..., Any]) -> Callable[..., Any]:
        _ALL.append(Mutant(wrong.__name__, fault, op, wrong, backward, soak))
        return wrong

    return declare


def with_profile(self: Any, **changes: Any) -> Any:
    """The backend in another numeric profile: a rounding point that is missed."""
    other = copy.copy(self)
    other.numerics = replace(self.numerics, **changes)
    return other
