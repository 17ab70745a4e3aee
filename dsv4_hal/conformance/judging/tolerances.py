"""`docs/tolerances.md`: how far results of every op may differ, and why.

python -m dsv4_hal.conformance.judging.tolerances > docs/tolerances.md
"""

from __future__ import annotations

import torch

from dsv4_hal.conformance.judging.backward import GRADIENTS
from dsv4_hal.conformance.judging.results import GRAD, jobs, profile
from dsv4_hal.conformance.judging.verdict import expectation
from dsv4_hal.numerics import MODES
from dsv4_hal.ops import OPS, Compare, OpSpec

HEAD = """# How far results may differ

Generated: `python -m dsv4_hal.conformance.judging.tolerances > docs/tolerances.md`. A test holds it against the code.

Nobody chose these numbers, and they are the same on every machine. Two correct backends differ because they add in
another order and take other exponentials. So the reference runs in float64, and again with the errors put in that
float32 may make at every step (`dsv4_hal/conformance/judging/account.py` states them), times the op's factor. The
difference is the slack of a result: a share of the largest value of its row. Every element must be the rounding of a
number within the slack of what the reference has before its last rounding.

Where a rounding point lies inside an op, such an error now and then carries a value over the edge of its rounding. So a
few elements may lie further off: twice as many, and by twice as much, as where those errors may flip decisions, or as
where the closest decision of every rounding point is turned round, and that of the largest value
(`dsv4_hal/conformance/judging/expected.py`).

- the columns show the widest slack among the cases of the classes `tiny` and `interpreted`, and after it the largest
  share of a result's elements that may be flipped
- bitwise: every bit is equal, of integers and booleans in every op
- selection: picks are compared as sets; scores within twice their slack, and their flips, may change places
- counts of draws: the factor is in standard deviations
"""


def document() -> str:
    """The whole file."""
    lines = [
        HEAD,
        "| op | factor | why results may differ at all | exact | deployed |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [row(spec) for spec in OPS.values()]
    lines += [
        "",
        "## Gradients",
        "",
        f"In mode exact, with a factor of {GRADIENTS.factor:g}: {GRADIENTS.why}. The reference's own are compared with",
        "slopes of the naive oracle along random directions (`dsv4_hal/conformance/judging/backward.py`).",
        "",
        "| op | with respect to | slack |",
        "| --- | --- | --- |",
        *(gradient_row(spec) for spec in OPS.values() if spec.grad),
    ]
    return "\n".join(lines) + "\n"


def row(spec: OpSpec) -> str:
    tolerance = spec.tolerance
    if tolerance.compare is Compare.BITWISE:
        return f"| {spec.name} | | {tolerance.why} | bitwise | bitwise |"
    if tolerance.compare is Compare.STATISTICAL:
        return f"| {spec.name} | {tolerance.factor:g} | {tolerance.why} | counts | counts |"
    exact, deployed = (_widest(spec, mode) for mode in MODES)
    return f"| {spec.name} | {tolerance.factor:g} | {tolerance.why} | {exact} | {deployed} |"


def gradient_row(spec: OpSpec) -> str:
    return f"| {spec.name} | {', '.join(spec.grad)} | {_widest(spec, GRAD)} |"


def _widest(spec: OpSpec, mode: str) -> str:
    slack = flips = 0.0
    for job in jobs([spec.name], modes=[mode], size="interpreted"):
        expected = expectation(job, profile(job.mode))
        slack = max([slack, *(expected.share(name) for name in expected.slack)])
        sizes = {name: max(1, t.numel()) for name, t in expected.results.items()}
        flips = max([flips, *(some.count / sizes[name] for name, some in expected.flips.items())])
    return f"{slack:.1e}" + (f", {flips:.1%}" if flips else "")


if __name__ == "__main__":
    with torch.inference_mode():
        print(document(), end="")
