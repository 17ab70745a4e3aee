"""Running cases apart from one another: whatever a backend does is reported as that, and the run goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4_hal.backend import BackendError
from dsv4_hal.backends.reference import Reference
from dsv4_hal.conformance.guard import Misconduct, watch
from dsv4_hal.conformance.runner import Job, Outcome, conform, jobs, run
from dsv4_hal.dispatch import resolve
from dsv4_hal.numerics import exact
from dsv4_hal.ops import OPS

EVIL = """
import os, time
import torch
from dsv4_hal.backends.reference import Reference

class Evil(Reference):
    name = "evil"

    def hadamard(self, x):
        return torch.full_like(x, float("nan"))

    def rms_norm(self, x, *args, **kwargs):
        return super().rms_norm(x, *args, **kwargs).double()

    def rope(self, x, *args, **kwargs):
        y = super().rope(x, *args, **kwargs)
        x.add_(1)
        return y

    def swiglu(self, gate_up, *args, out=None, **kwargs):
        y = super().swiglu(gate_up, *args, out=out, **kwargs)
        if out is not None:
            torch.as_strided(out, (1,), (1,), out.storage_offset() + out.numel()).zero_()
        return y

    def embedding(self, ids, w):
        time.sleep(60)

    def unpermute(self, rows, order, shape):
        os._exit(9)

    def permute(self, x, ids, experts):
        raise ZeroDivisionError("no experts")

    def hc_post(self, *args):
        return super().hc_post(*args).to("meta")

    def hc_head(self, *args):
        return super().hc_head(*args)[:-1]
"""
EXPECTED = {
    "hadamard": ("disagrees", "nmse inf"),
    "rms_norm": ("disagrees", "dtype torch.float64, expected"),
    "rope": ("misconduct", "rope changed its input x"),
    "swiglu": ("misconduct", "swiglu wrote outside of out"),
    "embedding": ("timeout", "no result after"),
    "unpermute": ("crash", "the process ended with exit code 9"),
    "permute": ("error", "ZeroDivisionError: no experts"),
    "hc_post": ("disagrees", "on meta, expected cpu"),
    "hc_head": ("disagrees", "shape"),
    "linear": ("agrees", ""),
}


def package(path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str, target: str) -> None:
    """Install a backend of the given code."""
    facts = path / f"{name}-1.0.dist-info"
    facts.mkdir(parents=True)
    (path / f"{name}_module.py").write_text(code)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: third-vendor\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[dsv4_hal.backends]\n{name} = {name}_module:{target}\n")
    monkeypatch.syspath_prepend(str(path))
    monkeypatch.delitem(sys.modules, f"{name}_module", raising=False)


def test_everything_is_reported_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path / "evil", monkeypatch, "evil", EVIL, "Evil")
    wanted = {"swiglu": "how=out", "embedding": "tokens=5", "unpermute": "tokens=5", "linear": "tokens=5,inputs=256"}
    work = []
    for op in EXPECTED:
        found = [job for job in jobs([op], modes=["exact"]) if wanted.get(op, "tokens=5") in job.case]
        work.append(found[0])
    outcomes = {outcome.op: outcome for outcome in conform("evil", work, limit=3.0)}
    assert list(outcomes) == list(EXPECTED)
    for op, (verdict, message) in EXPECTED.items():
        assert (outcomes[op].verdict, outcomes[op].case) == (verdict, next(j.case for j in work if j.op == op))
        assert message in outcomes[op].message, op


def test_a_backend_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path / "fatal", monkeypatch, "fatal", "import os\nos._exit(5)\n", "Fatal")
    work = jobs(["hadamard"], modes=["exact"])
    with pytest.raises(BackendError, match=r"backend fatal killed its process \(exit code 5\)"):
        list(conform("fatal", work))
    with pytest.raises(BackendError, match="no backend is called 'nowhere'"):
        list(conform("nowhere", work))


def test_jobs() -> None:
    every = jobs()
    assert {job.op for job in every} == set(OPS)
    assert len(every) == len(set(every)) == 2 * sum(len(list(spec.cases())) for spec in OPS.values())
    one = jobs(["linear"], "linear[format=mxfp4,tokens=5,", ["exact"])
    assert one == [Job("linear", "linear[format=mxfp4,tokens=5,inputs=256,outputs=384]", "exact")]


class Half(Reference):
    """Right, but for one op, which is off by a little more than its budget."""

    name = "half"

    def hadamard(self, x: Tensor) -> Tensor:
        return super().hadamard(x) * (1 + 1e-5)


def outcome(cls: type[Reference], op: str, mode: str = "exact") -> Outcome:
    with torch.inference_mode():
        return run(cls, jobs([op], "tokens=5", [mode])[0])


def test_an_outcome_tells_how_the_op_ran_and_how_far_it_was_off() -> None:
    wrong, right = outcome(Half, "hadamard"), outcome(Half, "rms_norm")
    assert (wrong.verdict, wrong.runs_as, right.verdict, right.runs_as) == (
        "disagrees", "native", "agrees", "reference",
    )  # fmt: skip
    assert wrong.of_budget is not None and wrong.of_budget > 1
    assert right.of_budget == 0  # the same code
    assert wrong.metrics["y"]["max_rel"] == pytest.approx(1e-5, rel=0.1)


def test_the_reference_is_compared_with_the_oracle_not_with_itself() -> None:
    found = outcome(Reference, "rms_norm")
    assert found.verdict == "agrees"
    assert found.of_budget is not None and 0 < found.of_budget <= 1


def test_a_composite_runs_as_one() -> None:
    assert outcome(Half, "mlp").runs_as == "composite"


def test_watching() -> None:
    ops = resolve([Reference(exact())])
    watch(ops)
    x = torch.ones(3, 8)
    assert torch.equal(ops.hadamard(x), Reference(exact()).hadamard(x))

    class Greedy(Reference):
        name = "greedy"

        def hadamard(self, x: Tensor) -> Tensor:
            return x.zero_()

    ops = resolve([Greedy(exact())])
    watch(ops)
    with pytest.raises(Misconduct, match="hadamard changed its input x"):
        ops.hadamard(x)
