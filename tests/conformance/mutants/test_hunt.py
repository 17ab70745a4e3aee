"""Every fault that real ports had is caught, and clearly."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor

from dsv4_hal.conformance.judging.compare import Comparison
from dsv4_hal.conformance.mutants import ENOUGH, Mutant, hunt, mutants
from dsv4_hal.ops import OPS


def test_there_are_enough_and_each_is_another() -> None:
    assert len(mutants()) >= 30
    assert len({m.name for m in mutants()}) == len({m.fault for m in mutants()}) == len(mutants())
    assert {m.op for m in mutants()} <= set(OPS)


# One for each comparer, and each kind of misconduct; CI hunts all of them as `conform --mutants`.
FEW = (
    "limit_lost",
    "index_ties_reversed",
    "other_blocks_written",
    "nibbles_swapped",
    "top_p_ignored",
    "sinkhorn_detached",
)


@pytest.mark.parametrize(
    "mutant", [pytest.param(m, id=m.name, marks=() if m.name in FEW else pytest.mark.full) for m in mutants()]
)
def test_it_is_caught(mutant: Mutant) -> None:
    with torch.inference_mode():
        catch = hunt(mutant)
    assert catch.ok and catch.outcome is not None, mutant.fault
    assert catch.outcome.op == mutant.op
    assert catch.outcome.verdict in ("disagrees", "misconduct")


def test_what_is_right_is_not_caught() -> None:
    right: Callable[..., Tensor] = lambda right, self, *args, **kwargs: right.hadamard(self, *args, **kwargs)  # noqa: E731
    with torch.inference_mode():
        catch = hunt(Mutant("right", "nothing is wrong", "hadamard", right))
    assert catch.outcome is None and not catch.ok


def test_what_is_wrong_by_little_is_not_caught_clearly() -> None:
    def slightly(right: type, self: object, x: Tensor) -> Tensor:
        return right.hadamard(self, x) * (1 + 1e-6)  # type: ignore[attr-defined,no-any-return]

    with torch.inference_mode():
        catch = hunt(Mutant("slight", "a few bits of float32", "hadamard", slightly))
    assert catch.outcome is not None and catch.outcome.of_budget is not None
    assert 1 < catch.outcome.of_budget < ENOUGH and not catch.ok


def test_a_mutant_that_does_not_fit_its_op_is_not_caught() -> None:
    with torch.inference_mode():
        catch = hunt(Mutant("misfit", "too few arguments", "hadamard", lambda right, self: None))
    assert catch.outcome is not None and catch.outcome.verdict == "error" and not catch.ok


COMPARE = import_module("dsv4_hal.conformance.judging.compare")  # the package has a function of this name
BLIND = {
    "bitwise": ("permute", "quantize", "kv_store"),
    "close": ("hc_post", "rms_norm", "sparse_attention"),
    "selection": ("index_topk",),
    "statistical": ("sample",),
}


@pytest.mark.parametrize("comparer", BLIND)
def test_a_comparer_that_cannot_fail_is_found(comparer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some mutant of these ops then escapes, and `conform --mutants` fails."""
    seen = Comparison(True, {"nmse": 0.0, "max_rel": 0.0})
    monkeypatch.setattr(COMPARE, comparer, lambda *args, **kwargs: seen)
    with torch.inference_mode():
        assert not all(hunt(mutant).ok for mutant in mutants() if mutant.op in BLIND[comparer])


def test_a_budget_that_holds_everything_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COMPARE, "outside", lambda got, want, slack: torch.zeros_like(got, dtype=torch.bool))
    with torch.inference_mode():
        assert not any(hunt(mutant).ok for mutant in mutants() if mutant.op == "hc_post" and not mutant.backward)
