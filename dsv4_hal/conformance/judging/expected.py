"""What a case must give, and how far a backend may be from it. Nothing in it hangs on the machine that judges.

Two correct backends differ for two reasons.
1. Between rounding points they add in another order and take other exponentials. How much that is, is reckoned: the
   reference runs in float64, again with the errors that float32 may make put in (`account.py`), times the op's factor,
   and with every decision of a rounding point as it was. The largest difference in a row is its slack; and at least
   twice the share of a row's largest value that it is over all rows. A result that was rounded at last is right where
   it is the rounding of a number within the slack of what the reference has before that rounding.
2. Where a rounding point lies inside the op, such an error, however small, now and then carries a value over the edge
   of its rounding, and what follows is beyond the slack. So few elements may be: twice as many as where the errors may
   flip decisions, and they are the factor times as likely to there; or as many as where the closest decision of every
   rounding point is turned round, and that of the largest value; and by twice as much as in these runs. A rounding that
   is left out moves a quarter of all elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dsv4_hal.conformance.judging.account import Run, no_inference
from dsv4_hal.dispatch import Resolved
from dsv4_hal.ops.spec import Compare, Tolerance

Results = Mapping[str, Tensor]

RUNS = 2  # with errors put in, of either kind
SPARE = 2.0  # flips may be so many times as often as in these runs, and as large


@dataclass(frozen=True)
class Flips:
    """How many elements may lie beyond the slack, and by what share of their row's largest value."""

    count: int
    size: float


@dataclass(frozen=True)
class Expected:
    """results  what the reference gives, in the dtypes that a backend must return
    exactly  the same in float64, before the last rounding where there is one
    slack    result -> [rows, 1] how far each row may be from that; floating results only
    flips    result -> what may lie further off; none where no rounding point lies inside the op
    """

    results: dict[str, Tensor]
    exactly: dict[str, Tensor]
    slack: dict[str, Tensor] = field(default_factory=dict)
    flips: dict[str, Flips] = field(default_factory=dict)

    def by(self, results: Results, exactly: Results) -> Expected:
        """The same slack around what somebody else says."""
        return replace(self, results=dict(results), exactly=dict(exactly))

    def share(self, name: str) -> float:
        """The slack of a result as a share of the largest values of its rows."""
        size = float(largest(rows(self.exactly[name])).norm())
        return float(self.slack[name].norm()) / size if size else 0.0


def expect(
    make: Callable[[Resolved], Results], wide: Resolved, accumulate: torch.dtype, tolerance: Tolerance
) -> Expected:
    """What `make` gives on the reference in float64, and how far others may be from it.

    make        runs a case on ops
    wide        the reference in a profile widened to float64
    accumulate  what the profile itself has in place of float64
    """
    plain = Run()
    with no_inference():
        made = make(plain.with_ops(wide))
        results = {name: t.to(accumulate) if t.dtype == torch.float64 else t for name, t in made.items()}
        exactly = {name: plain.exactly(t).detach() for name, t in made.items() if t.is_floating_point()}
        if tolerance.compare is Compare.BITWISE or not exactly:
            return Expected(results, exactly)
        noisy = [Run(tolerance.factor, seed, plain.tape) for seed in range(RUNS)]
        moved = [{name: run.exactly(t) for name, t in make(run.with_ops(wide)).items()} for run in noisy]
        slack = {name: _slack(t, [other[name] for other in moved]) for name, t in exactly.items()}
        found = Expected(results, exactly, slack)
        if not plain.inside:
            return found
        flipping = [Run(tolerance.factor, RUNS + seed) for seed in range(RUNS)]
        flipping.append(Run(flips=[numbers[0] for numbers in plain.shapes.values()]))
        others = [make(run.with_ops(wide)) for run in flipping]
        return replace(found, flips={name: _flips(found, name, *(o[name] for o in others)) for name in exactly})


def rows(t: Tensor) -> Tensor:
    """[rows, last axis]; a scalar is a row of one."""
    if not t.dim():
        return t.reshape(1, 1)
    return t.reshape(-1, t.shape[-1]) if t.numel() else t.reshape(0, max(1, t.shape[-1]))


def largest(t: Tensor) -> Tensor:
    """[rows, 1] largest finite magnitude."""
    if not t.numel():
        return t.new_zeros(len(t), 1)
    return t.abs().masked_fill(~t.isfinite(), 0).amax(-1, keepdim=True)


def _slack(exactly: Tensor, moved: list[Tensor]) -> Tensor:
    want, scale = rows(exactly), largest(rows(exactly))
    off = torch.stack([largest((rows(other) - want).masked_fill(~want.isfinite(), 0)) for other in moved]).amax(0)
    size = float(scale.norm())
    return torch.maximum(off, scale * (2 * float(off.norm()) / size if size else 0.0))


def _flips(expected: Expected, name: str, *others: Tensor) -> Flips:
    """The last of the others is that with decisions turned round."""
    want, scale = rows(expected.exactly[name]), largest(rows(expected.exactly[name]))
    counts, size = list[int](), 0.0
    for other in others:
        got = rows(other.to(expected.results[name].dtype))
        beyond = outside(got, want, expected.slack[name])
        counts.append(int(beyond.sum()))
        off = ((got.double() - want).abs() / scale).masked_fill(~beyond, 0).nan_to_num(0, 0, 0)
        size = max(size, float(off.max()) if off.numel() else 0.0)
    return Flips(max(int(SPARE * max(counts[:-1])), counts[-1]), SPARE * size)


def outside(got: Tensor, want: Tensor, slack: Tensor) -> Tensor:
    """Which elements [rows, n] are the rounding of no number within the slack of `want`, float64."""
    low, high = ((want + by).to(got.dtype) for by in (-slack, slack))
    fits = torch.where(want.isfinite(), (low <= got) & (got <= high), (got == want) | (got.isnan() & want.isnan()))
    return ~fits
