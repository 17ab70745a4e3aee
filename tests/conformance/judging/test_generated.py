"""Cases that are drawn."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dsv4_hal.conformance.judging.generated import FAILURES, generate
from dsv4_hal.conformance.judging.named import listed, named
from dsv4_hal.conformance.judging.results import Outcome
from dsv4_hal.conformance.judging.worker import Worker

FAULTY = """
import torch
from dsv4_hal.backends.reference import Reference

class Faulty(Reference):
    name = "faulty"

    def rope(self, x, cos_sin, inverse=False, *, out=None):
        y = super().rope(x, cos_sin, inverse, out=out)
        if x.dim() == 3 and x.shape[1] >= 2:  # its last head is lost: listed cases show it as well
            y[:, -1] = 0
        return y
"""


def drawn(backend: str, op: str, count: int, seed: int = 0, size: str = "tiny") -> list[Outcome]:
    with Worker(backend, ("exact",)) as worker:
        return [o for found in generate(worker, [op], count, ("exact",), size, seed) for o in found]


def test_draws_are_new_and_the_same_every_time() -> None:
    first, again, other = (drawn("reference", "rms_norm", 8, seed) for seed in (0, 0, 1))
    assert [o.case for o in first] == [o.case for o in again] != [o.case for o in other]
    assert len(first) == 8 and all(o.verdict == "agrees" for o in first)
    assert any(o.case not in listed("rms_norm") for o in first)
    assert all(named(o.case).id == o.case for o in first)


def test_failures_are_shrunk_to_the_smallest(package: Callable[[str, str, str], None]) -> None:
    package("faulty", FAULTY, "Faulty")
    outcomes = drawn("faulty", "rope", 60)
    failed = [o for o in outcomes if not o.ok]
    assert 1 <= len(failed) <= FAILURES and len({o.case for o in failed}) == len(failed)
    assert all(o.verdict == "disagrees" and "tokens=1," in o.case for o in failed), failed
    before = outcomes[: outcomes.index(failed[0])]
    right = drawn("reference", "rope", 60)
    assert [o.case for o in before] == [o.case for o in right[: len(before)]]  # and nothing that shrinking tried


@pytest.mark.parametrize("op", ["sparse_attention", "grouped_linear", "state_copy"])
def test_draws_are_possible(op: str) -> None:
    outcomes = drawn("reference", op, 4, size="interpreted")
    assert outcomes and all(o.verdict == "agrees" for o in outcomes)
