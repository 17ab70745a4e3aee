"""Gradients: both ways to them, and both checks of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.reference import Reference
from dsv4_hal.conformance.judging.backward import (
    NoGradient,
    compare_slopes,
    directions,
    gradients,
    intercepted,
    loss,
    slopes,
)
from dsv4_hal.conformance.judging.named import named
from dsv4_hal.conformance.judging.results import GRAD, Job, jobs
from dsv4_hal.conformance.judging.verdict import run
from dsv4_hal.dispatch import resolve
from dsv4_hal.numerics import exact
from dsv4_hal.ops import OPS

CASE = named("hadamard[tokens=3,heads=1,width=64]")
OPS64 = resolve([Reference(exact(torch.float64))])


def test_gradients_of_a_linear_map_are_its_transpose_times_the_cotangent() -> None:
    """The Hadamard matrix is its own transpose: the gradient is the transform of the cotangent."""
    seen: list[Tensor] = []

    class Spy(Reference):
        def hadamard(self, x: Tensor) -> Tensor:
            y = super().hadamard(x)
            y.register_hook(seen.append)  # type: ignore[no-untyped-call]
            return y

    found = gradients("hadamard", CASE, resolve([Spy(exact(torch.float64))]))
    assert found.keys() == {"grad_x"} and len(seen) == 1
    torch.testing.assert_close(found["grad_x"], OPS64.hadamard(seen[0]), rtol=1e-12, atol=1e-12)


def test_slopes_are_gradients_along_directions() -> None:
    for id in ("rms_norm[weighted=True,tokens=3,width=128,scale=10000.0]", "hadamard[tokens=3,heads=1,width=64]"):
        case = named(id)
        op = id.partition("[")[0]
        want, found = gradients(op, case, OPS64), slopes(op, case, OPS64)
        assert want.keys() == found.keys()
        for name, slope in found.items():
            along = [(want[name].double() * v).sum() for v in directions(case, name[5:], want[name])]
            torch.testing.assert_close(slope, torch.stack(along), rtol=1e-5, atol=1e-6)


def test_slopes_see_an_error_of_several_deviations_and_pass_what_is_right() -> None:
    case, budget = CASE, {"grad_x": 1e-4}
    right = gradients("hadamard", case, OPS64)
    want = slopes("hadamard", case, OPS64)
    assert all(c.ok for c in compare_slopes(case, right, want, budget).values())
    noise = torch.randn(right["grad_x"].shape, generator=torch.Generator().manual_seed(1))
    wrong = {"grad_x": right["grad_x"] * (1 + 1e-1 * noise)}
    assert not compare_slopes(case, wrong, want, budget)["grad_x"].ok
    nothing = {"grad_x": torch.zeros_like(right["grad_x"])}
    found = compare_slopes(case, nothing, want, budget)["grad_x"]
    assert not found.ok and math.isinf(found.metrics["nmse"])
    assert not compare_slopes(case, {}, want, budget)["results"].ok


def test_nan_gradients_do_not_pass() -> None:
    want = slopes("hadamard", CASE, OPS64)
    broken = {"grad_x": torch.full((3, 1, 64), torch.nan)}
    assert not compare_slopes(CASE, broken, want, {"grad_x": 1e-4})["grad_x"].ok


def test_no_graph_and_no_gradient_are_told() -> None:
    class Detached(Reference):
        def hadamard(self, x: Tensor) -> Tensor:
            return super().hadamard(x).detach()

    with pytest.raises(NoGradient, match="hadamard: result 0 has no graph"):
        gradients("hadamard", CASE, resolve([Detached(exact())]))

    class Dropped(Reference):
        def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float, **more: Tensor) -> Tensor:
            return super().rms_norm(x, None if weight is None else weight.detach(), eps, **more)

    case = named("rms_norm[weighted=True,tokens=3,width=128,scale=10000.0]")
    with pytest.raises(NoGradient, match="rms_norm: no gradient reaches weight"):
        gradients("rms_norm", case, resolve([Dropped(exact())]))


def test_infinities_count_nothing() -> None:
    t = torch.tensor([1.0, -math.inf], requires_grad=True)
    total = loss("sparse_attention", CASE, t)
    assert total is not None and total.isfinite()


def test_an_op_is_called_through_and_put_back() -> None:
    ops = resolve([Reference(exact())])
    before = ops.hadamard
    with intercepted(ops, "hadamard", lambda run, given: run({"x": given["x"] * 0})):
        assert not ops.hadamard(torch.ones(1, 4)).any()
    assert ops.hadamard == before


def test_every_op_with_gradients_has_a_case_for_them_and_no_other() -> None:
    assert {op for op, spec in OPS.items() if spec.grad} == {job.op for job in jobs(modes=[GRAD], size="full")}


def test_a_wrong_gradient_with_right_results_disagrees_and_only_there() -> None:
    class Wrong(Reference):
        name = "wrong"

        def hadamard(self, x: Tensor) -> Tensor:
            y = super().hadamard(x)
            return y.detach() + (y - y.detach()) * 1.01

    assert run(Wrong, Job("hadamard", CASE.id, "exact")).verdict == "agrees"
    outcome = run(Wrong, Job("hadamard", CASE.id, GRAD))
    assert outcome.verdict == "disagrees" and outcome.of_budget is not None and outcome.of_budget > 10
    assert "grad_x" in outcome.message
