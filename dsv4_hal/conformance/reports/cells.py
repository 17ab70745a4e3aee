"""Outcomes gathered by op, number format and run: the cells of the report's matrix, and what each may claim."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dsv4_hal.conformance.reports.saved import OpsRun, SavedOutcome
from dsv4_hal.ops import OPS
from dsv4_hal.registry import FALLBACK

STATES = {  # the worst first: mark, and what it means
    "fails": ("✕", "fails"),
    "waived": ("⚑", "fails, and a waiver covers it"),
    "shapes": ("▢", "right in shapes and dtypes; no values compared"),
    "borrowed": ("○", "agrees, by code that is not the backend’s own, or by its parts"),
    "agrees": ("✓", "agrees, by the backend’s own code"),
}


@dataclass(frozen=True)
class Cell:
    """The cases of an op in a number format ("" if it has none) on a backend, the worst first.

    text     the worst share of a budget, or why there is none
    fill     the part of the cell that shows it, of 1
    runs_as  how the op ran
    """

    id: str
    op: str
    format: str
    label: str
    state: str
    text: str
    fill: float
    runs_as: str
    outcomes: Sequence[SavedOutcome]

    @property
    def failed(self) -> int:
        return sum(not o.ok for o in self.outcomes)

    @property
    def metrics(self) -> list[str]:
        """Names of the numbers that its comparisons have."""
        return list(dict.fromkeys(m for o in self.outcomes for found in o.metrics.values() for m in found))


def gather(runs: Mapping[str, OpsRun]) -> list[Cell]:
    """In the order of the contract, then ops that it does not know; plain floats first among the formats."""
    found: dict[tuple[str, str, str], list[SavedOutcome]] = {}
    for label, run in runs.items():
        for outcome in run.outcomes:
            found.setdefault((outcome.op, format_of(outcome.case), label), []).append(outcome)
    ops, plain, labels = [*OPS, *(op for op, _, _ in found if op not in OPS)], ("", "fp32", "bf16", "fp16"), list(runs)

    def order(key: tuple[str, str, str]) -> tuple[int, int, str, int]:
        op, format, label = key
        rank = plain.index(format) if format in plain else len(plain)
        return ops.index(op), rank, format, labels.index(label)

    keys = sorted(found, key=order)
    return [_cell(f"cases-{i}", *key, found[key]) for i, key in enumerate(keys)]


def _cell(id: str, op: str, format: str, label: str, outcomes: Iterable[SavedOutcome]) -> Cell:
    ordered = sorted(outcomes, key=lambda o: (_rank(o), -_badness(o)))
    worst = ordered[0]
    if worst.of_budget is None and (not worst.ok or worst.verdict == "shapes"):
        text, fill = worst.verdict, 0.0
    else:
        text, fill = share(worst.of_budget), min(1.0, magnitude(worst.of_budget or 0.0))
    worst_state = min(map(state, ordered), key=list(STATES).index)
    runs_as = " / ".join(dict.fromkeys(o.runs_as for o in ordered if o.runs_as))
    return Cell(id, op, format, label, worst_state, text, fill, runs_as, ordered)


def _rank(outcome: SavedOutcome) -> int:
    """Failures first, then what was not compared, then what agrees, whosever code it is."""
    return 3 if outcome.verdict == "agrees" else list(STATES).index(state(outcome))


def _badness(outcome: SavedOutcome) -> float:
    """What failed without being measured is as bad as it gets."""
    unmeasured = 0.0 if outcome.ok else math.inf
    return unmeasured if outcome.of_budget is None else magnitude(outcome.of_budget)


def state(outcome: SavedOutcome) -> str:
    """A key of STATES. The reference's code is its own; elsewhere, what is not native is borrowed."""
    if not outcome.ok:
        return "waived" if outcome.waived else "fails"
    if outcome.verdict == "shapes":
        return "shapes"
    return "agrees" if outcome.runs_as == "native" or outcome.backend == FALLBACK else "borrowed"


def share(of_budget: float | None) -> str:
    """A share of a budget in a few characters. A check that passed and has none was exact."""
    if of_budget is None:
        return "exact"
    if not math.isfinite(of_budget):
        return "∞" if math.isinf(of_budget) else "NaN"
    if 0 < of_budget < 0.005:
        return "<0.01"
    return f"{of_budget:.2f}" if of_budget < 10 else f"{of_budget:.3g}"


def format_of(case: str) -> str:
    """The number format that a case's id names; "" if none."""
    facts = case.partition("[")[2].rstrip("]").split(",")
    return next((fact.partition("=")[2] for fact in facts if fact.startswith("format=")), "")


def magnitude(error: float) -> float:
    """To sort by: NaN is as bad as infinity."""
    return math.inf if math.isnan(error) else error
