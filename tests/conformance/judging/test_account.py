"""What rounding may do to a result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.reference import Reference
from dsv4_hal.conformance import run_case, widen
from dsv4_hal.conformance.judging.account import Run, no_inference
from dsv4_hal.conformance.judging.named import named
from dsv4_hal.dispatch import resolve
from dsv4_hal.numerics import Numerics, deployed, exact

X = torch.randn(64, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made(run: Run, reckon: Any, *given: Tensor) -> Tensor:
    with no_inference(), run:
        return reckon(*given)


def results(id: str, numerics: Numerics, run: Run) -> dict[str, Tensor]:
    with no_inference():
        return run_case(named(id), run.with_ops(resolve([Reference(widen(numerics))])))


def test_what_stood_before_a_rounding_is_kept_wherever_it_is_moved() -> None:
    run = Run()

    def reckon(x: Tensor) -> Tensor:
        y = (x * 3).to(torch.bfloat16)
        out = torch.zeros(2, 64, 512, dtype=torch.bfloat16)
        out[1, :, ::2] = y[:, ::2]
        out[0] = torch.cat([y[32:], y[:32]]).flip(0)
        return out.transpose(0, 1).contiguous()

    y = made(run, reckon, X)
    exactly = run.exactly(y)
    assert torch.equal(exactly.to(torch.bfloat16), y) and not torch.equal(exactly, y.double())
    assert torch.equal(exactly[5, 1, ::2], 3 * X[5, ::2])


def test_arithmetic_on_what_was_rounded_is_no_rounding_of_it() -> None:
    run = Run()

    def reckon(x: Tensor) -> Tensor:
        y = x.to(torch.bfloat16)
        y += 1
        return y

    y = made(run, reckon, X)
    assert torch.equal(run.exactly(y), y.double()) and run.inside


@pytest.mark.parametrize("terms", [16, 512, 4096])
def test_the_error_of_a_sum_covers_one_chain_of_float32(terms: int) -> None:
    """The largest error of 64 chains is within what is put in; and that is not more than 50 times as much."""
    x = torch.randn(64, terms, generator=torch.Generator().manual_seed(terms), dtype=torch.float32)
    chain = torch.zeros(64)
    for column in x.unbind(1):
        chain = chain + column
    error = float((chain.double() - x.double().sum(1)).abs().max())
    put = made(Run(noise=1.0), lambda x: x.sum(1), x.double()) - x.double().sum(1)
    assert error <= float(put.abs().min()) * 2 and float(put.abs().max()) < 50 * error


def test_what_float32_holds_exactly_has_no_error() -> None:
    whole = torch.arange(-40, 40, dtype=torch.float64).view(8, 10)
    for reckon in (lambda x: x @ x.T, lambda x: x.sum(0) * 0.5, lambda x: x - 3):
        assert torch.equal(made(Run(noise=100.0), reckon, whole), reckon(whole))
    assert not torch.equal(made(Run(noise=1.0), torch.exp, whole / 40), torch.exp(whole / 40))


def test_the_same_seed_puts_in_the_same_errors() -> None:
    first, again, other = (made(Run(1.0, seed), lambda x: x @ x.T, X) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


MLP = "mlp[format=bf16,tokens=5,limit=2.0]"


def test_decisions_can_be_taken_over() -> None:
    plain = Run()
    want = results(MLP, deployed(), plain)["y"]
    assert plain.inside and plain.tape
    free, bound = Run(2.0**12), Run(2.0**12, 0, plain.tape)
    flipped, same = results(MLP, deployed(), free)["y"], results(MLP, deployed(), bound)["y"]
    assert not torch.equal(flipped, want) and torch.equal(same, want)
    assert not torch.equal(bound.exactly(same), plain.exactly(want))


def test_decisions_of_a_rounding_point_are_turned_round() -> None:
    plain = Run()
    want = results(MLP, deployed(), plain)["y"]
    turned = Run(flips=[numbers[0] for numbers in plain.shapes.values()])
    got = results(MLP, deployed(), turned)["y"]
    assert torch.equal(turned.tape[0], plain.tape[0])  # what was written down is the decision itself
    assert 0 < int((got != want).sum()) < want.numel() / 2


def test_nothing_is_rounded_inside_an_op_that_rounds_once() -> None:
    for id, numerics in (("hc_post[tokens=5,streams=4,width=128]", deployed()), (MLP, exact())):
        run = Run()
        results(id, numerics, run)
        assert not run.inside, id
