"""Where a backend raised: its own frames, few of them for a terminal."""

from __future__ import annotations

from pathlib import Path

import torch

from dsv4_hal.backends.reference import Reference
from dsv4_hal.conformance.judging.results import jobs
from dsv4_hal.conformance.judging.trace import LONGEST, SHOWN, short, trace
from dsv4_hal.conformance.judging.worker import produce


def nested(depth: int) -> None:
    if depth:
        nested(depth - 1)
    torch.ones(2).unflatten(0, (3, 4))


class Raises(Reference):
    name = "raises"

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        nested(5)
        return x


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError


def raised(error: Exception) -> str:
    try:
        raise error
    except Exception as caught:
        return trace(caught)


def test_a_trace_begins_in_the_backend() -> None:
    (job,) = jobs(["hadamard"], "hadamard[tokens=5,heads=4,width=128]", ["exact"])
    made = produce(Raises, job)
    frames = [line for line in made.trace.splitlines() if line.startswith("  File ")]
    assert made.verdict == "error" and frames[0].endswith("in hadamard") and Path(__file__).name in frames[0]
    shown = short(made.trace)
    assert len([line for line in shown if line.startswith("  File ")]) == SHOWN
    assert shown[-1] == "    torch.ones(2).unflatten(0, (3, 4))" and "_tensor.py" in made.trace


def test_a_trace_is_bounded_and_survives_what_it_tells() -> None:
    assert len(raised(ValueError("x" * 10 * LONGEST))) == LONGEST
    assert "Mute" in raised(Mute()) and short("") == []
