"""How far whole models and answers known beforehand may be off: by the mean square, and by the largest error.

The reference's own error, `e`, is measured: in its profile against the same profile with float64 between its rounding
points, from the same inputs. Another order of the sums errs otherwise, and may err more: a chain of K additions errs as
sqrt(K), a CPU adds in the 16 lanes of its vectors and a device may add in one chain, which errs 4 times as much; and
the largest of a few errors may be twice what it is in another draw. So the budget is 8 e; and at least one unit in
the last place of the result for the largest error, and for the mean that of one unit in every 64th element, or in one
element if there are fewer: few elements may show none of the flips of a rounding while e is measured. Rows of a cache
are rounded to a format of few bits at last; its unit is the floor of their largest error.

Cases of the contract are judged more strictly, element by element: see `expected.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_hal.conformance.judging.compare import Comparison, measure, misplaced, structure
from dsv4_hal.formats import Format
from dsv4_hal.numerics import Numerics

UNIT = {"e4m3": 1 / 8, "e2m1": 1 / 3, "int8": 1 / 127, "int4": 1 / 7}  # largest step over the largest value of a block
FLIPPED = 1 / 64  # share of elements that may be off by one unit


@dataclass(frozen=True)
class Budget:
    """rms: root of the mean square error over the mean square. largest: largest error over largest value."""

    rms: float
    largest: float


def derive(
    narrow: Tensor, wide: Tensor, factor: float, rows: Format | None = None, rounded: torch.dtype | None = None
) -> Budget:
    """The budget of a result: see the head of this file.

    narrow, wide  the reference's result in its profile, and in the widened one
    rows          what its rows were rounded to at last, where they are rows of a cache
    rounded       dtype of its last rounding, where its own is finer
    """
    measured = measure(narrow, wide)
    if not math.isfinite(measured["nmse"]):
        raise ValueError("the reference disagrees with itself in float64: no tolerance can be derived")
    finite = wide.double()[wide.isfinite()]
    norm = float(finite.norm())
    # What one element, the largest, contributes to the mean.
    alone = float(finite.abs().max()) / norm if norm else 0.0
    eps = torch.finfo(rounded or narrow.dtype).eps
    unit = eps if rows is None else max(eps, UNIT[rows.element])
    return Budget(
        max(factor * math.sqrt(measured["nmse"]), eps * math.sqrt(FLIPPED), unit * alone),
        max(factor * measured["max_rel"], unit),
    )


def row_format(name: str, numerics: Numerics) -> Format | None:
    """Format that the rows of a result were rounded to, by its name."""
    return {"kv": numerics.kv, "index": numerics.index}.get(name.split("_")[0])


def nmse(got: Tensor, want: Tensor, budget: Budget, device: str | None = None) -> Comparison:
    """Mean square error over mean square, and largest error over largest value, within the budget."""
    if wrong := structure(got, want, device):
        return Comparison(False, {}, wrong)
    metrics, over = measure(got, want), []
    if math.isinf(metrics["nmse"]) and (wrong := misplaced(got, want)):
        return Comparison(False, metrics, wrong)
    if not metrics["nmse"] <= budget.rms**2:
        over.append(f"nmse {metrics['nmse']:.3g} over {budget.rms**2:.3g}")
    if not metrics["max_rel"] <= budget.largest:
        over.append(f"largest error {metrics['max_rel']:.3g} of the largest value, over {budget.largest:.3g}")
    return Comparison(not over, metrics, "; ".join(over))


def of_budget(comparison: Comparison, allowed: Budget | None) -> float | None:
    """The error of a result as a multiple of its budget: above 1 it disagrees. An exact check has no budget: inf where
    it fails, None where it does not."""
    metrics = comparison.metrics
    if allowed is None or "nmse" not in metrics:
        return None if comparison.ok else math.inf
    rms, largest = metrics["nmse"] ** 0.5, metrics["max_rel"]
    shares = ((rms, allowed.rms), (largest, allowed.largest))
    return max(error / most if most else (math.inf if error else 0.0) for error, most in shares)
