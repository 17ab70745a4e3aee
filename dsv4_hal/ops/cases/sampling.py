"""Cases of sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4_hal.ops.cases.inputs import Results, case, device_generator, normal, place, whole, yes

if TYPE_CHECKING:
    from dsv4_hal.dispatch import Resolved
    from dsv4_hal.ops.spec import Cases

DRAWS = 20_000
# Probabilities with two equal pairs. None is rare: among 20,000 draws a token that may be drawn is.
PROBABILITIES = (0.05, 0.3, 0.1, 0.3, 0.02, 0.1, 0.08, 0.05)


def sample() -> Cases:
    for rows in (0, 1, 5):
        yield case("sample", _greedy, rows=rows, vocabulary=50)
    yield case("sample", _greedy, "quick", rows=40, vocabulary=6)  # mostly ties
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.9), (1.0, 0.65), (1.0, 0.31), (1.0, 0.29), (1.0, 1e-6)):
        yield case("sample", _draws, "quick", temperature=temperature, top_p=top_p)
    yield case("sample", _equal, "quick", vocabulary=200, top_p=0.0525)
    yield case("sample", _draws, "quick", temperature=1.0, top_p=0.65, shift=1000.0)  # large logits
    yield case("sample", _repeat, "quick", rows=64)
    yield case("sample", _greedy, "quick", rows=128, vocabulary=1000)
    yield case("sample", _greedy, "full", rows=8, vocabulary=129280)
    for strides in ("one", "row"):
        yield case("sample", _greedy, rows=5, vocabulary=50, strides=strides)


def _greedy(ops: Resolved, generator: torch.Generator, rows: int, vocabulary: int) -> Results:
    logits = whole(ops, generator, -2, 2, rows, vocabulary, dtype=ops.numerics.accumulate)
    return {"tokens": ops.sample(logits, 0.0), "again": ops.sample(logits, 0.0, 0.5)}


def _draws(ops: Resolved, generator: torch.Generator, temperature: float, top_p: float, shift: float = 0.0) -> Results:
    """Many draws from one row: how often each token came, and which came at all."""
    return _counted(ops, generator, torch.tensor(PROBABILITIES).log() + shift, temperature, top_p)


def _equal(ops: Resolved, generator: torch.Generator, vocabulary: int, top_p: float) -> Results:
    """All tokens equally likely: the ones that are kept are the lowest ids."""
    return _counted(ops, generator, torch.zeros(vocabulary), 1.0, top_p)


def _counted(ops: Resolved, generator: torch.Generator, logits: Tensor, temperature: float, top_p: float) -> Results:
    rows = place(ops, logits, ops.numerics.accumulate).expand(DRAWS, -1)
    tokens = ops.sample(rows, temperature, top_p, device_generator(ops, generator))
    counts = torch.zeros(len(logits), dtype=torch.int64, device=ops.device)
    counts = counts.scatter_add(0, tokens, torch.ones_like(tokens))
    return {"counts": counts, "drawn": counts > 0}


def _repeat(ops: Resolved, generator: torch.Generator, rows: int) -> Results:
    """The same state of the generator gives the same draw, and the next state another one."""
    logits = normal(ops, generator, rows, 100, dtype=ops.numerics.accumulate)
    state = generator.get_state()
    source = device_generator(ops, generator)
    first, other = ops.sample(logits, generator=source), ops.sample(logits, generator=source)
    again = ops.sample(logits, generator=device_generator(ops, generator.set_state(state)))
    return {"shape": yes(ops, first.shape == (rows,)), "same": (first == again).all(), "fresh": (first != other).any()}
