"""A new accelerator in one file: subclass a backend that works, override op by op, ask the contract what is left.

    python examples/new_accelerator.py

A real one lives in a package of its own and is found through its entry point:

    [project.entry-points."dsv4_hal.backends"]
    mychip = "my_package:MyChip"
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsv4_hal.backends.reference import Reference
from dsv4_hal.conformance import budget, compare, run_case, widen
from dsv4_hal.dispatch import resolve
from dsv4_hal.numerics import exact
from dsv4_hal.ops import OPS


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
    """Compare every op of MyChip with the reference on every case; print one line per op."""
    profile = exact()
    ops, reference, wide = (resolve([b]) for b in (MyChip(profile), Reference(profile), Reference(widen(profile))))
    table = Table("op", "runs as", "cases", "of budget", "verdict", title="mychip against the reference")
    wrong = 0
    for resolution in ops.resolutions:
        spec = OPS[resolution.op]
        worst, failures, count = 0.0, [], 0
        for case in spec.cases():
            count += 1
            budgets = budget(case, spec.tolerance, reference, wide)
            results = compare(run_case(case, ops), run_case(case, reference), spec.tolerance, budgets, ops.device.type)
            for name, result in results.items():
                if name in budgets and "nmse" in result.metrics:
                    worst = max(worst, result.metrics["nmse"] ** 0.5 / budgets[name].rms)
                if not result.ok:
                    failures.append(f"{case.id} {name}: {result.message}")
        wrong += bool(failures)
        table.add_row(
            spec.name,
            resolution.backend or resolution.kind,
            str(count),
            f"{worst:.2f}",
            failures[0] if failures else "agrees",
        )
    Console().print(table)
    return 1 if wrong else 0


if __name__ == "__main__":
    with torch.inference_mode():
        raise SystemExit(main())
