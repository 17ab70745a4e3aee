"""Running cases apart from one another: whatever a backend does is reported as that, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_hal.backend import BackendError
from dsv4_hal.backends.reference import Reference
from dsv4_hal.conformance.judging import verdict, worker
from dsv4_hal.conformance.judging.backward import intercepted
from dsv4_hal.conformance.judging.compare import run_case
from dsv4_hal.conformance.judging.facts import FACTS
from dsv4_hal.conformance.judging.guard import Guard, Misconduct
from dsv4_hal.conformance.judging.named import named
from dsv4_hal.conformance.judging.results import Job, Outcome, jobs
from dsv4_hal.conformance.judging.verdict import conform, judge, run
from dsv4_hal.conformance.judging.waivers import read_waivers
from dsv4_hal.conformance.judging.worker import Worker, produce
from dsv4_hal.dispatch import resolve
from dsv4_hal.model.config import ModelConfig
from dsv4_hal.numerics import exact
from dsv4_hal.ops import OPS, SIZES

Package = Callable[[str, str, str], None]

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

    def grouped_linear(self, *args):
        return None

    def block_diagonal_linear(self, *args):
        y = super().block_diagonal_linear(*args)
        return y[:1].expand(y.shape)

    def sparse_attention(self, q, kv, sink, scale, batch, *args, **kwargs):
        y = super().sparse_attention(q, kv, sink, scale, batch, *args, **kwargs)
        batch.positions.zero_()
        return y

    def quantize(self, x, fmt):
        import subprocess
        subprocess.run(["true"])  # a worker may start processes of its own
        return super().quantize(x, fmt)

    def hc_pre(self, *args):
        raise KeyboardInterrupt

    def route(self, *args):
        raise Mute

    def index_topk(self, *args, **kwargs):
        torch.set_default_dtype(torch.float16)
        torch.set_default_device("meta")
        torch.set_grad_enabled(True)
        torch.set_num_threads(3)
        torch.set_deterministic_debug_mode("warn")
        os.chdir("/")
        os.environ.clear()
        return super().index_topk(*args, **kwargs)

    def dequantize(self, *args):
        if not hasattr(Evil, "forked"):
            Evil.forked = os.fork()  # and both go on
        return super().dequantize(*args)

    def q_norm_rope(self, *args):
        import gc
        from dsv4_hal.conformance.workers.process import Line
        for line in [found for found in gc.get_objects() if type(found) is Line]:
            line.send((0, None))

class Mute(Exception):
    def __str__(self):
        raise ValueError
"""
EXPECTED = {
    "hadamard": (
        "disagrees",
        "2560 of 2560 elements are NaN or infinite where the reference is not, or the reverse, the first at [0, 0, ",
    ),
    "rms_norm": ("disagrees", "dtype torch.float64, expected"),
    "rope": ("misconduct", "rope changed its input x"),
    "swiglu": ("misconduct", "swiglu wrote outside of out"),
    "embedding": ("timeout", "no result after"),
    "unpermute": ("crash", "the process of backend evil ended with exit code 9"),
    "permute": ("error", "ZeroDivisionError: no experts"),
    "hc_post": ("disagrees", "on meta, expected cpu"),
    "hc_head": ("disagrees", "shape"),
    "grouped_linear": ("error", "y: returned None, expected a tensor"),
    "block_diagonal_linear": ("disagrees", "y: strides (0, "),
    "sparse_attention": ("misconduct", "sparse_attention changed its input batch"),
    "quantize": ("agrees", ""),
    "hc_pre": ("error", "KeyboardInterrupt"),
    "route": ("error", "Mute: (its text raises ValueError)"),
    "index_topk": (
        "misconduct",
        "index_topk changed the default dtype, the default device, whether gradients are recorded, the number of "
        "threads, whether algorithms are deterministic, the working directory, variables of the environment",
    ),
    "mlp": ("agrees", ""),  # finds nothing of that
    "dequantize": ("agrees", ""),
    "q_norm_rope": ("misconduct", "backend evil answered for another case"),
    "linear": ("agrees", ""),
}


def test_everything_is_reported_as_what_it_is(package: Package, capfd: pytest.CaptureFixture[str]) -> None:
    package("evil", EVIL, "Evil")
    wanted = {"swiglu": "how=out", "embedding": "tokens=5", "unpermute": "tokens=5", "linear": "tokens=5,inputs=256"}
    wanted |= {
        "sparse_attention": "ragged=chunked,entries=none",
        "quantize": "rows=5",
        "grouped_linear": "rows=",
        "dequantize": "rows=130",
        "index_topk": "ragged=chunked",
    }
    work = []
    for op in EXPECTED:
        found = [job for job in jobs([op], modes=["exact"]) if wanted.get(op, "tokens=5") in job.case]  # fmt: skip
        work.append(found[0])
    outcomes = {outcome.op: outcome for outcome in conform("evil", work, limit=3.0)}
    assert list(outcomes) == list(EXPECTED)
    for op, (expected, message) in EXPECTED.items():
        assert (outcomes[op].verdict, outcomes[op].case) == (expected, next(j.case for j in work if j.op == op))
        assert message in outcomes[op].message, op
    assert capfd.readouterr().err == ""


def test_what_cannot_be_judged_is_an_error_of_that_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("out of memory")

    (job,) = jobs(["hadamard"], "tokens=5", ["exact"])
    made = produce(Reference, job)
    monkeypatch.setattr(verdict, "_of_reference", broken)
    outcome = judge("reference", job, made, exact())
    assert (outcome.verdict, outcome.size) == ("error", job.size)
    assert outcome.message == "it cannot be judged: RuntimeError: out of memory"


REFUSING = """
from dsv4_hal.backend import Verdict
from dsv4_hal.backends.reference import Reference

class Refusing(Reference):
    name = "refusing"

    def supports(self, op, facts):
        if op == "hadamard" and facts.get("index_head_dim", 0) > 128:
            return Verdict(False, f"rows of {facts['index_head_dim']}, and 128 fit")
        if op in ("rms_norm", "linear"):
            return Verdict(False, "no such unit")
        if op == "hc_post" and facts and facts["o_lora_rank"] > 9:
            return Verdict(False, "a call does not tell it")
        return super().supports(op, facts)

    def hadamard(self, x):
        assert x.shape[-1] <= 128, "the kernel crashes"
        return super().hadamard(x)

    def hc_post(self, *args):
        return super().hc_post(*args)
"""


def test_a_backend_is_asked_with_the_facts_of_the_case(package: Package) -> None:
    """What it refuses for them runs on the reference, and is not its own; what the arguments do not tell is not asked
    for."""
    package("refusing", REFUSING, "Refusing")
    work = [
        "hadamard[tokens=5,heads=4,width=128]",
        "hadamard[tokens=5,heads=4,width=512]",
        "rms_norm[weighted=True,tokens=5,width=96]",
        "mlp[format=bf16,tokens=5,limit=2.0]",  # a composite, one of whose parts is refused
        "hc_post[tokens=5,streams=4,width=128]",
        "hadamard[tokens=3,heads=4,width=128]",
    ]
    found = list(conform("refusing", [Job(case.partition("[")[0], case, "exact") for case in work]))
    assert [(o.verdict, o.runs_as, o.refused, o.judged) for o in found] == [
        ("agrees", "native", "", True),
        ("agrees", "reference", "rows of 512, and 128 fit", False),
        ("agrees", "reference", "no such unit", False),
        ("agrees", "composite", "", True),
        ("agrees", "native", "", True),
        ("agrees", "native", "", True),
    ]


NOTHING = """
from dsv4_hal.backend import Verdict
from dsv4_hal.backends.reference import Reference

class Nothing(Reference):
    name = "nothing"

    def supports(self, op, facts):
        kept = op in ("mlp", "moe_experts")  # whose definition is the contract's
        return Verdict(kept, "not today")
"""


def test_a_composite_of_refused_parts_is_refused(package: Package) -> None:
    package("nothing", NOTHING, "Nothing")
    (found,) = conform("nothing", [Job("mlp", "mlp[format=bf16,tokens=5,limit=2.0]", "exact")])
    assert (found.verdict, found.runs_as, found.refused, found.judged) == ("agrees", "reference", "not today", False)


def test_every_op_says_what_its_arguments_tell_by_names_of_config_json() -> None:
    assert FACTS.keys() == OPS.keys()
    names = {field.name for field in fields(ModelConfig)}
    for op in OPS:
        case = jobs([op], modes=["exact"])[0].case
        ops, given = resolve([Reference(exact())]), []

        def kept(run: Callable[..., Any], arguments: dict[str, Any], given: list[Any] = given) -> Any:
            given.append(arguments)
            return run(arguments)

        with intercepted(ops, op, kept):
            run_case(named(case), ops)
        told = FACTS[op](given[0])
        assert told.keys() <= names, op
        assert told or op in ("quantize", "dequantize", "state_copy", "state_reset")


def test_a_backend_that_cannot_be_used(package: Package) -> None:
    package("fatal", "import os\nos._exit(5)\n", "Fatal")
    work = jobs(["hadamard"], modes=["exact"])
    with pytest.raises(BackendError, match=r"backend fatal killed its process \(exit code 5\)"):
        list(conform("fatal", work))
    with pytest.raises(BackendError, match="no backend is called 'nowhere'"):
        list(conform("nowhere", work))


LOST = """
import os, pathlib
from dsv4_hal.backend import Verdict
from dsv4_hal.backends.reference import Reference

FLAG = pathlib.Path(__file__).with_name("lost")

class Lost(Reference):
    name = "lost"

    @classmethod
    def available(cls):
        return Verdict(not FLAG.exists(), "the device fell off the bus")

    def hadamard(self, x):
        FLAG.touch()
        os._exit(7)
"""


def test_a_device_that_is_lost_loses_no_outcome(package: Package) -> None:
    package("lost", LOST, "Lost")
    work = jobs(["rms_norm", "hadamard", "rope"], "tokens=5", ["exact"])
    outcomes = list(conform("lost", work))
    assert [o.case for o in outcomes] == [job.case for job in work]
    verdicts = [o.verdict for o in outcomes]
    first = next(i for i, job in enumerate(work) if job.op == "hadamard")
    assert verdicts[first] == "crash" and set(verdicts[:first]) == {"agrees"}
    assert set(verdicts[first + 1 :]) == {"error"} and "fell off the bus" in outcomes[-1].message


@pytest.mark.parametrize(("name", "code", "after"), [("evil", EVIL, ""), ("lost", LOST, "error")])
def test_one_case_at_a_time(package: Package, name: str, code: str, after: str) -> None:
    """A crash is that case's; the next ones run in a new process, or say that there is none."""
    package(name, code, name.capitalize())
    crashing = {"evil": "unpermute", "lost": "hadamard"}[name]
    with Worker(name, ["exact"]) as worker:
        made = [worker.produce(jobs([op], "tokens=5", ["exact"])[0]) for op in ("linear", crashing, "linear", "linear")]
    assert [m.verdict for m in made] == ["", "crash", after, after]


MODEST = """
import os
from dsv4_hal.backends.reference import Reference

class Modest(Reference):
    name = "modest"
    affords = "{affords}"

os.fork()  # the copy would say of itself the same, and would run the same cases
"""


def test_a_backend_runs_what_it_affords(package: Package) -> None:
    package("modest", MODEST.format(affords="tiny"), "Modest")
    work = jobs(["hc_post"], modes=["exact"])
    assert {job.size for job in work} == {"tiny", "quick"}
    outcomes = list(conform("modest", work))
    assert [o.case for o in outcomes] == [job.case for job in work if job.size == "tiny"]
    assert {o.size for o in outcomes} == {"tiny"}


def test_a_backend_must_afford_something_known(package: Package) -> None:
    package("modest", MODEST.format(affords="all"), "Modest")
    with pytest.raises(BackendError, match="affords 'all', which is none of tiny, interpreted, quick, full"):
        list(conform("modest", jobs(["hc_post"])))


SLOW = """
import time
from dsv4_hal.backends.reference import Reference

class Slow(Reference):
    name = "slow"
    __module__ = "nowhere"  # of no file

    def __init__(self, *args):
        time.sleep(1.5)
        super().__init__(*args)
"""


def test_the_time_to_make_a_backend_is_not_a_case_s(package: Package) -> None:
    package("slow", SLOW, "Slow")
    with Worker("slow", ["exact"]) as worker:
        made = worker.produce(jobs(["hadamard"], "tokens=5", ["exact"])[0], limit=1.0)
    assert made.verdict == "" and read_waivers(Path(worker.about.waivers)) == []


class Interrupted:
    """A process: the user has enough while it starts."""

    ended = 0

    def __init__(self, *args: object) -> None:
        pass

    def receive(self, seconds: float) -> None:
        raise KeyboardInterrupt

    def end(self) -> None:
        Interrupted.ended += 1


def test_a_worker_that_is_interrupted_while_it_starts_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "Child", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        Worker("reference")
    assert Interrupted.ended == 1


def test_jobs() -> None:
    every = jobs(size="full")
    assert {job.op for job in every} == set(OPS)
    assert len(every) == len(set(every)) == 2 * sum(len(list(spec.cases())) for spec in OPS.values())
    for size, larger in pairwise(SIZES):  # each class with those before it
        assert set(jobs(size=size)) <= set(jobs(size=larger))
        assert {job.size for job in jobs(size=size)} <= set(SIZES[: SIZES.index(size) + 1])
    assert jobs() == jobs(size="quick")
    one = jobs(["linear"], "linear[format=mxfp4,tokens=5,inputs=256", ["exact"])
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
    assert right.of_budget is not None and right.of_budget < 0.1  # float32 beside float64
    assert wrong.metrics["y"]["max_rel"] == pytest.approx(1e-5, rel=0.1)


def test_the_reference_is_compared_with_the_oracle_not_with_itself() -> None:
    found = outcome(Reference, "rms_norm")
    assert found.verdict == "agrees"
    assert found.of_budget is not None and 0 < found.of_budget <= 1


def test_a_composite_runs_as_one() -> None:
    assert outcome(Half, "mlp").runs_as == "composite"


def test_watching() -> None:
    ops = resolve([Reference(exact())])
    Guard().watch(ops)
    x = torch.ones(3, 8)
    assert torch.equal(ops.hadamard(x), Reference(exact()).hadamard(x))

    class Greedy(Reference):
        name = "greedy"

        def hadamard(self, x: Tensor) -> Tensor:
            return x.zero_()

    ops = resolve([Greedy(exact())])
    Guard().watch(ops)
    with pytest.raises(Misconduct, match="hadamard changed its input x"):
        ops.hadamard(x)


def test_a_result_in_the_memory_of_an_earlier_one() -> None:
    class Static(Reference):
        name = "static"
        buffer = torch.zeros(3, 8)

        def hadamard(self, x: Tensor) -> Tensor:
            return self.buffer.copy_(super().hadamard(x))

    ops = resolve([Static(exact())])
    Guard().watch(ops)
    ops.hadamard(torch.ones(3, 8))
    with pytest.raises(Misconduct, match="hadamard returned the memory of an earlier result"):
        ops.hadamard(torch.ones(3, 8))


@pytest.mark.parametrize("what", ["returned", "was given"])
@pytest.mark.parametrize("between", [False, True])
def test_what_an_earlier_call_got_and_returned_stays(what: str, between: bool) -> None:
    class Late(Reference):
        name = "late"
        before: Tensor | None = None

        def hadamard(self, x: Tensor) -> Tensor:
            self.spoil()
            y = super().hadamard(x)
            self.before = (y if what == "returned" else x).view(-1)
            return y

        def swiglu(self, *args: Any, **kwargs: Any) -> Tensor:
            self.spoil()
            return super().swiglu(*args, **kwargs)

        def spoil(self) -> None:
            if self.before is not None:
                self.before.zero_()

    ops = resolve([Late(exact())])
    Guard().watch(ops)
    x, y = torch.ones(3, 8), torch.ones(3, 8)
    assert ops.hadamard(x).any()
    with pytest.raises(Misconduct, match=f"changed what an earlier call of hadamard {what}"):
        ops.swiglu(torch.ones(3, 8), None) if between else ops.hadamard(y)


def test_what_a_call_may_write_to_may_be_of_an_earlier_one() -> None:
    ops = resolve([Reference(exact())])
    Guard().watch(ops)
    y = ops.hadamard(torch.ones(3, 8))
    ops.swiglu(torch.ones(3, 16), None, out=y)
    state = ops.state_new(2, 4, True, 8, 0)
    ops.state_reset(state, 1)


class Narrow(Reference):
    """Called the reference, but with a dtype of its own."""

    name = "reference"

    def rms_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().rms_norm(*args, **kwargs).double()


def test_the_reference_too_must_return_the_dtypes_of_the_contract() -> None:
    assert "dtype torch.float64" in outcome(Narrow, "rms_norm").message
