"""`docs/tolerances.md`: how far results of every op may differ, and why.

python -m dsv4_hal.conformance.judging.tolerances > docs/tolerances.md
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsv4_hal.conformance.judging.backward import GRADIENTS
from dsv4_hal.conformance.judging.compare import Budget, budgets
from dsv4_hal.conformance.judging.results import GRAD, Job, jobs, profile
from dsv4_hal.conformance.judging.verdict import oracles
from dsv4_hal.conformance.judging.worker import results
from dsv4_hal.numerics import MODES
from dsv4_hal.ops import OPS, Compare, OpSpec

HEAD = """# How far results may differ

Generated: `python -m dsv4_hal.conformance.judging.tolerances > docs/tolerances.md`. A test holds it against the code.

Nobody chose these numbers. Two correct backends differ because they add in another order and take other exponentials,
and because such a difference now and then carries a value over the edge of a rounding. So the budget of a result is
derived from the case itself: the error of the reference in its numeric profile against the same profile with float64
between its rounding points, times the op's factor; and at least one unit in the last place of the result for the
largest error, and one unit in every 64th element for the mean (`dsv4_hal/conformance/judging/compare.py`
has the derivation).
A result agrees where both errors are within budget.

- rms: root of the mean square error over the mean square; largest: largest error over the largest value
- the columns show the widest budget among the cases of the classes `tiny` and `interpreted`
- bitwise: every bit is equal, of integers and booleans in every op
- selection: picks are compared as sets; what scores within twice the budget of the last pick may change places with it
- counts of draws: the factor is in standard deviations
"""


def document() -> str:
    """The whole file."""
    lines = [HEAD, "| op | factor | why results may differ at all | exact: rms, largest | deployed: rms, largest |"]
    lines += ["| --- | --- | --- | --- | --- |", *(_row(spec) for spec in OPS.values())]
    lines += [
        "",
        "## Gradients",
        "",
        f"In mode exact, with a factor of {GRADIENTS.factor:g}: {GRADIENTS.why}. The reference's own are compared with",
        "slopes of the naive oracle along random directions (`dsv4_hal/conformance/judging/backward.py`).",
        "",
        "| op | with respect to | rms, largest |",
        "| --- | --- | --- |",
        *(f"| {spec.name} | {', '.join(spec.grad)} | {_widest(spec, GRAD)} |" for spec in OPS.values() if spec.grad),
    ]
    return "\n".join(lines) + "\n"


def _row(spec: OpSpec) -> str:
    tolerance = spec.tolerance
    if tolerance.compare is Compare.BITWISE:
        return f"| {spec.name} | | {tolerance.why} | bitwise | bitwise |"
    if tolerance.compare is Compare.STATISTICAL:
        return f"| {spec.name} | {tolerance.factor:g} | {tolerance.why} | counts | counts |"
    exact, deployed = (_widest(spec, mode) for mode in MODES)
    return f"| {spec.name} | {tolerance.factor:g} | {tolerance.why} | {exact} | {deployed} |"


def _widest(spec: OpSpec, mode: str) -> str:
    found = [b for job in jobs([spec.name], modes=[mode], size="interpreted") for b in _budgets(spec, job)]
    return f"{max(b.rms for b in found):.1e}, {max(b.largest for b in found):.1e}"


def _budgets(spec: OpSpec, job: Job) -> Iterator[Budget]:
    narrow, wide, _, _ = oracles(profile(job.mode))
    tolerance = GRADIENTS if job.mode == GRAD else spec.tolerance
    yield from budgets(results(job, narrow), results(job, wide), tolerance, narrow.numerics).values()


if __name__ == "__main__":
    with torch.inference_mode():
        print(document(), end="")
