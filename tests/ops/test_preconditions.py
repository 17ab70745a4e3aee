"""Every precondition of every primitive: a call that holds them passes, and each change that breaks one is refused."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.reference import Reference
from dsv4_hal.batch import Batch
from dsv4_hal.dispatch import resolve
from dsv4_hal.formats import FORMATS, Weight, new_pool, plain_format
from dsv4_hal.numerics import exact
from dsv4_hal.ops import KV, OPS, ContractError

REFERENCE = resolve([Reference(exact())])
INTS = torch.zeros(2, 2, dtype=torch.int64)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def ints(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.int64)


def plain(*shape: int) -> Weight:
    return Weight(zeros(*shape), None, plain_format(torch.float32))


def quantised(*shape: int) -> Weight:
    q = REFERENCE.quantize(zeros(*shape), FORMATS["mxfp8"])
    return Weight(q.data, q.scale, q.format)


WINDOW = REFERENCE.row_layout("window", 8, 4, 1, 3)
ENTRIES = REFERENCE.row_layout("entries", 8, 4, 4)
INDEX = REFERENCE.row_layout("index", 8, 0, 4)


def paged(tables: bool = True, block_tokens: int = 256) -> Batch:
    """Two sequences with 4 and 1 new tokens; the first completes an entry. The window ring is one block of 16 rows."""
    table = np.arange(2).reshape(2, 1) if tables else None
    return Batch(
        np.array([4, 1]),
        np.array([8, 20]),
        torch.device("cpu"),
        slots=np.arange(2),
        token_table=table,
        window_table=table,
        block_tokens=block_tokens,
    )


PAGED = REFERENCE.plan(paged(), {4: True, 128: False}, {})
TABLELESS = REFERENCE.plan(paged(tables=False), {4: True}, {})
SHORT = REFERENCE.plan(paged(block_tokens=8), {4: True}, {})
PACKED = REFERENCE.plan(Batch.packed([4, 1]), {4: True, 128: False}, {})
POOL = KV(new_pool(WINDOW, 2, 16, torch.device("cpu")), WINDOW, 16)
ENTRY_POOL = KV(new_pool(ENTRIES, 2, 64, torch.device("cpu")), ENTRIES, 64)
ROWS = KV(zeros(5, 8), WINDOW)
ENTRY_ROWS = KV(zeros(2, 8), ENTRIES)
TABLES = (zeros(3, 2), zeros(3, 2))

# op -> a call that is right, and changes that make it wrong
CALLS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "quantize": ({"x": zeros(2, 4), "fmt": FORMATS["mxfp8"]}, [{"x": INTS}]),
    "dequantize": ({"w": quantised(2, 4), "dtype": torch.float32}, [{"dtype": torch.int32}]),
    "linear": (
        {"x": zeros(3, 4), "w": plain(5, 4)},
        [
            {"w": plain(1, 5, 4)},
            {"x": zeros(3, 5)},
            {"x": zeros(1, 3, 4)},
            {"x": zeros(4)},
            {"x": zeros(3, 4).double()},
            {"out": zeros(7, 3, 5)},
            {"out": zeros(3, 5).half()},
        ],
    ),
    "grouped_linear": (
        {"rows": zeros(3, 4), "w": plain(2, 5, 4), "offsets": torch.tensor([0, 1, 3])},
        [
            {"w": plain(5, 4)},
            {"rows": zeros(3, 5)},
            {"rows": zeros(1, 3, 4)},
            {"offsets": torch.tensor([0, 3])},
            {"offsets": torch.tensor([0, 1, 3], dtype=torch.int32)},
            {"rows": zeros(3, 4).bfloat16()},
            {"out": zeros(2, 5)},
        ],
    ),
    "block_diagonal_linear": (
        {"x": zeros(3, 2, 4), "w": plain(2, 5, 4)},
        [
            {"w": plain(5, 4)},
            {"x": zeros(3, 8)},
            {"x": zeros(3, 1, 4)},
            {"x": zeros(3, 2, 5)},
            {"x": zeros(3, 2, 4).double()},
            {"out": zeros(3, 10)},
        ],
    ),
    "embedding": (
        {"ids": ints(3), "w": plain(5, 4)},
        [{"ids": zeros(3)}, {"ids": ints(3, 1)}, {"ids": ints(3).int()}, {"w": quantised(5, 4)}, {"w": plain(1, 5, 4)}],
    ),
    "rms_norm": (
        {"x": zeros(3, 4), "weight": zeros(4), "eps": 1e-6},
        [{"weight": zeros(3)}, {"weight": zeros(1, 4)}, {"out": zeros(3, 5)}],
    ),
    "rope": (
        {"x": zeros(3, 2, 6), "cos_sin": TABLES},
        [
            {"cos_sin": (zeros(3, 2), zeros(3, 1))},
            {"cos_sin": (zeros(2, 2), zeros(2, 2))},
            {"cos_sin": (zeros(3, 1, 2), zeros(3, 1, 2))},
            {"cos_sin": (zeros(3, 4), zeros(3, 4))},
            {"x": zeros(3)},
            {"out": zeros(3, 6)},
        ],
    ),
    "hadamard": ({"x": zeros(3, 8)}, [{"x": zeros(3, 6)}, {"x": zeros(3, 0)}, {"x": zeros()}]),
    "plan": (
        {"batch": paged(), "ratios": {4: True, 128: False}, "ropes": {}},
        [{"ratios": {1: False}}, {"ratios": {4: True, 3: False}}, {"batch": paged(block_tokens=64)}],
    ),
    "kv_store": (
        {"rows": zeros(5, 8), "layout": WINDOW, "batch": PAGED, "pool": POOL},
        [
            {"rows": zeros(4, 8)},
            {"rows": zeros(5, 9)},
            {"layout": ENTRIES, "pool": ENTRY_POOL},  # one entry, not five
            {"pool": ROWS},
            {"batch": TABLELESS},
            {"layout": REFERENCE.row_layout("window", 8, 4, 1, 14)},  # 13 + 4 rows in a ring of 16
            {"pool": None},  # this batch has context
            {"layout": REFERENCE.row_layout("entries", 8, 4, 8), "rows": zeros(1, 8)},  # not planned
            {"layout": ENTRIES, "rows": zeros(1, 8), "pool": ENTRY_POOL, "batch": SHORT},  # 12 tokens in a table of 8
        ],
    ),
    "kv_load": (
        {"kv": ENTRY_POOL, "batch": PAGED, "sequence": 1, "start": 0, "stop": 5},
        [
            {"sequence": 2},
            {"sequence": -1},
            {"stop": 6},
            {"start": -1},
            {"start": 3, "stop": 2},
            {"kv": ENTRY_ROWS},
            {"kv": POOL, "start": 4, "stop": 21},  # 21 positions, the ring holds 16
        ],
    ),
    "state_new": (
        {"slots": 2, "ratio": 4, "overlap": True, "width": 16},
        [{"slots": -1}, {"ratio": 1}, {"width": -1}, {"rollback": -1}],
    ),
    "state_copy": (
        {"state": zeros(2, 8, 2, 16), "source": 0, "target": 1},
        [{"source": 2}, {"source": -1}, {"target": 2}, {"target": -1}],
    ),
    "state_reset": ({"state": zeros(2, 8, 2, 16), "slot": 1}, [{"slot": 2}, {"slot": -1}]),
    "compress": (
        {
            "kv": zeros(5, 16),
            "gate": zeros(5, 16),
            "ape": zeros(4, 16),
            "batch": PAGED,
            "ratio": 4,
            "overlap": True,
            "state": zeros(2, 8, 2, 16),
        },
        [
            {"kv": zeros(5, 8)},
            {"kv": zeros(4, 16), "gate": zeros(4, 16)},
            {"kv": zeros(5, 15), "gate": zeros(5, 15), "ape": zeros(4, 15)},
            {"ape": zeros(4, 8)},
            {"ape": zeros(2, 16), "ratio": 2},  # not planned
            {"state": None},
            {"batch": PACKED},
        ],
    ),
    "index_topk": (
        {
            "q": zeros(5, 2, 8),
            "weights": zeros(5, 2),
            "keys": KV(zeros(1, 8), INDEX),
            "batch": PACKED,
            "k": 2,
        },
        [
            {"q": zeros(5, 16)},
            {"q": zeros(4, 2, 8)},
            {"q": zeros(5, 2, 4)},
            {"weights": zeros(5, 3)},
            {"k": 0},
            {"keys": KV(zeros(5, 8), WINDOW)},
        ],
    ),
    "sparse_attention": (
        {
            "q": zeros(5, 2, 8),
            "window_kv": ROWS,
            "sink": zeros(2),
            "scale": 1.0,
            "batch": PACKED,
            "entries": ENTRY_ROWS,
            "picks": ints(5, 1) - 1,
        },
        [
            {"q": zeros(5, 16)},
            {"q": zeros(4, 2, 8)},
            {"q": zeros(5, 2, 4)},
            {"window_kv": ENTRY_ROWS},
            {"sink": zeros(3)},
            {"entries": ROWS},
            {"entries": KV(zeros(1, 4), REFERENCE.row_layout("entries", 4, 2, 4))},
            {"entries": None},
            {"picks": ints(4, 1)},
            {"picks": ints(5)},
            {"picks": zeros(5, 1)},
        ],
    ),
    "route": (
        {"logits": zeros(3, 4), "k": 2, "scale": 1.0, "bias": zeros(4), "picks": ints(3, 2)},
        [
            {"logits": zeros(12)},
            {"logits": zeros(3, 4, dtype=torch.bfloat16)},
            {"k": 0, "picks": None},
            {"k": 5, "picks": None},
            {"bias": zeros(3)},
            {"picks": ints(2, 2)},  # ids and rows of different length
            {"picks": ints(3, 1)},
            {"picks": ints(3, 2).int()},
        ],
    ),
    "permute": (
        {"x": zeros(3, 4), "ids": ints(3, 2), "experts": 4},
        [{"ids": ints(2, 2)}, {"ids": ints(3)}, {"ids": ints(3, 2).int()}],
    ),
    "unpermute": (
        {"rows": zeros(6, 4), "order": torch.arange(6), "shape": (3, 2)},
        [{"order": torch.arange(5)}, {"shape": (3, 3)}],
    ),
    "swiglu": (
        {"gate_up": zeros(3, 4), "limit": 1.0, "row_weight": zeros(3)},
        [{"gate_up": zeros(3, 5)}, {"gate_up": zeros(12)}, {"limit": 0.0}, {"limit": -1.0}, {"row_weight": zeros(2)}],
    ),
    "hc_pre": (
        {
            "streams": zeros(2, 4, 8),
            "fn": zeros(24, 32),
            "base": zeros(24),
            "scale": zeros(3),
            "iters": 2,
            "norm_eps": 1e-6,
            "eps": 1e-6,
        },
        [
            {"streams": zeros(2, 32)},
            {"streams": zeros(2, 2, 16)},
            {"fn": zeros(24, 31)},
            {"base": zeros(23)},
            {"scale": zeros(1)},
            {"iters": 0},
        ],
    ),
    "hc_post": (
        {"y": zeros(2, 8), "streams": zeros(2, 4, 8), "post": zeros(2, 4), "comb": zeros(2, 4, 4)},
        [
            {"y": zeros(2, 7)},
            {"y": zeros(3, 8)},
            {"post": zeros(2, 3)},
            {"comb": zeros(2, 4)},
            {"streams": zeros(2, 3, 8)},
        ],
    ),
    "hc_head": (
        {
            "streams": zeros(2, 4, 8),
            "fn": zeros(4, 32),
            "base": zeros(4),
            "scale": zeros(1),
            "norm_eps": 1e-6,
            "eps": 1e-6,
        },
        [{"streams": zeros(2, 32)}, {"fn": zeros(24, 32)}, {"base": zeros(3)}, {"scale": zeros(3)}],
    ),
    "sample": (
        {"logits": zeros(2, 3)},
        [
            {"logits": zeros(3)},
            {"logits": zeros(2, 0)},
            {"temperature": -1.0},
            {"temperature": float("inf")},
            {"temperature": float("nan")},
            {"top_p": 0.0},
            {"top_p": 1.5},
            {"top_p": float("nan")},
        ],
    ),
}
BROKEN = [(op, number) for op, (_, changes) in CALLS.items() for number in range(len(changes))]


def test_the_table_is_complete() -> None:
    primitives = {name: spec for name, spec in OPS.items() if not spec.composite}
    assert set(CALLS) == set(primitives)
    for name, spec in primitives.items():
        raises = inspect.getsource(spec.definition).count("raise ContractError")
        assert 0 < raises <= len(CALLS[name][1]), name


@pytest.mark.parametrize("op", CALLS)
def test_a_right_call_passes(op: str) -> None:
    getattr(REFERENCE, op)(**CALLS[op][0])


@pytest.mark.parametrize(("op", "number"), BROKEN)
def test_a_wrong_call_is_refused(op: str, number: int) -> None:
    call, changes = CALLS[op]
    with pytest.raises(ContractError, match=rf"^{op}: "):
        getattr(REFERENCE, op)(**(call | changes[number]))


@pytest.mark.parametrize("op", ["kv_store", "compress", "index_topk", "sparse_attention"])
def test_a_batch_without_a_plan_is_refused(op: str) -> None:
    with pytest.raises(ValueError, match=r"ops\.plan"):
        getattr(REFERENCE, op)(**(CALLS[op][0] | {"batch": Batch.packed([4, 1])}))


def test_the_messages_name_the_weight() -> None:
    w = Weight(zeros(5, 4), None, FORMATS["fp32"], "layers.3.attn.wq_a")
    with pytest.raises(ContractError, match=r"layers\.3\.attn\.wq_a"):
        REFERENCE.linear(zeros(3, 5), w)
