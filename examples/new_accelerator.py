"""A new accelerator in one file: subclass a backend that works, override op by op, ask the contract what is left.

    python examples/new_accelerator.py

A real one lives in a package of its own and is found through its entry point:

    [project.entry-points."dsv4_hal.backends"]
    mychip = "my_package:MyChip"

and is then compared, every case watched in a process of its own, by `dsv4-hal conform --backend mychip`.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsv4_hal.backends.reference import Reference
from dsv4_hal.conformance.judging.results import About, Extent, Outcome, jobs
from dsv4_hal.conformance.judging.verdict import run
from dsv4_hal.conformance.reports.cells import share
from dsv4_hal.conformance.reports.report import Run
from dsv4_hal.ops import OPS

SIZE = "interpreted"  # `conform` runs larger cases too


class MyChip(Reference):
    """Runs everything through PyTorch on its device, and has one op of its own."""

    name = "mychip"
    device_type = "cpu"  # the torch device of the accelerator

    def swiglu(
        self, gate_up: Tensor, limit: float | None, row_weight: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        gate, up = gate_up.to(self.numerics.accumulate).chunk(2, -1)
        if limit is not None:
            gate, up = gate.minimum(gate.new_tensor(limit)), up.clamp(-limit, limit)
        hidden = gate / (1 + (-gate).exp()) * up
        if row_weight is not None:
            hidden *= row_weight[:, None]
        result = hidden.to(self.numerics.storage).contiguous()
        return result if out is None else out.copy_(result)


def main() -> int:
    """Compare every op of MyChip with the reference on cases in both modes; print one line per op, and what it
    comes to: how many ops are MyChip's own, and how many cases agree."""
    table = Table("op", "runs as", "cases", "of budget", "verdict", title="mychip against the reference")
    every: list[Outcome] = []
    for op in OPS:
        outcomes = [run(MyChip, job) for job in jobs([op], size=SIZE)]
        failed = [o for o in outcomes if not o.ok]
        every += outcomes
        worst = max((o.of_budget for o in outcomes if o.of_budget is not None), default=None)
        verdict = f"{failed[0].id}: {failed[0].message}" if failed else "agrees"
        table.add_row(op, outcomes[0].runs_as, str(len(outcomes)), share(worst), verdict)
    Console().print(table)
    compared = Run(MyChip.name, every, About("", {}, {}), extent=Extent(SIZE))
    print(compared.headline)
    return 1 if compared.failed else 0


if __name__ == "__main__":
    with torch.inference_mode():
        raise SystemExit(main())
