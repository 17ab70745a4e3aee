"""Every case keeps the bounds of its size class, seen from the shapes of what its op is called with."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch import Tensor

from dsv4_hal.backends.null import Null
from dsv4_hal.batch import Batch
from dsv4_hal.conformance import run_case
from dsv4_hal.dispatch import resolve
from dsv4_hal.formats import QTensor
from dsv4_hal.numerics import exact
from dsv4_hal.ops import OPS, SIZES, Case

SMALL = {"tokens": 8, "heads": 4, "width": 512}
BOUNDS = {"tiny": SMALL, "interpreted": SMALL, "full": {"tokens": 64, "experts": 8}}
ACTIVATIONS = {"x", "q", "kv", "gate", "rows", "ids", "weights", "logits", "gate_up", "y", "streams", "post", "comb"}
WEIGHTS = {"w", "w13", "w2", "wo_a", "wo_b"}
EXPERT_ORDER = {"grouped_linear", "unpermute"}  # a row per token and each of its 6 experts


def last_call(op: str, case: Case) -> dict[str, Any]:
    """Arguments of the last call of an op that a case makes, on meta tensors: those before it make a history."""
    ops, calls = resolve([Null(exact())]), list[dict[str, Any]]()
    run = getattr(ops, op)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(inspect.signature(OPS[op].definition).bind(None, *args, **kwargs).arguments)
        return run(*args, **kwargs)

    setattr(ops, op, call)
    run_case(case, ops)
    return calls[-1]


def extent(op: str, case: Case) -> dict[str, int]:
    """Tokens; heads, streams or groups; experts; and the widest row or column of what an op is called with."""
    found = {"tokens": [0], "heads": [0], "experts": [0], "width": [0]}
    for name, value in last_call(op, case).items():
        if isinstance(value, Batch):
            found["tokens"].append(value.tokens)
        elif isinstance(value, QTensor) and name in WEIGHTS:
            found["width"] += value.shape[-2:]
            grouped = name == "wo_a" or op == "block_diagonal_linear"
            found["heads" if grouped else "experts"] += value.shape[:-2]
        elif isinstance(value, Tensor) and (name in ACTIVATIONS or name == "fn"):
            found["width"].append(value.shape[-1])
            if name != "fn":
                found["tokens"].append(value.shape[0] // (6 if op in EXPERT_ORDER else 1))
                found["heads"] += value.shape[1:-1]
    return {name: max(values) for name, values in found.items()}


@pytest.mark.parametrize("sizes", [SIZES[:-1], pytest.param(SIZES[-1:], marks=pytest.mark.full)], ids=["less", "full"])
@pytest.mark.parametrize("op", OPS)
def test_bounds(op: str, sizes: tuple[str, ...]) -> None:
    """Of the full class as a long level: its weights are made to be looked at."""
    for case in OPS[op].cases():
        assert case.size in SIZES
        if case.size not in sizes:
            continue
        found = extent(op, case)
        over = {name: found[name] for name, most in BOUNDS.get(case.size, {}).items() if found[name] > most}
        assert not over, (case.id, case.size)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_case_that_every_backend_affords(op: str) -> None:
    assert any(case.size in ("tiny", "interpreted") for case in OPS[op].cases())
