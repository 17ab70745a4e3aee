"""Cache rows on Ascend: their layouts by profile, and the writes that put them into a pool, byte by byte."""

from __future__ import annotations

from types import MappingProxyType, ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4_hal import formats
from dsv4_hal.backends.ascend import TABLE, Ascend
from dsv4_hal.backends.ascend.cache import SCATTER, SCATTER_V2, packed
from dsv4_hal.backends.ascend.devices import Soc
from dsv4_hal.backends.ascend.providers import choose
from dsv4_hal.batch import Batch
from dsv4_hal.formats import RowLayout, new_pool
from dsv4_hal.numerics import numerics_for
from dsv4_hal.ops import KV

NAMES = {"a3": ("plain", "plain", "index_int8"), "a5": ("ascend950", "ascend950", "index_fp8")}
KINDS = ("window", "entries", "index")


@pytest.fixture
def backend(torch_npu: ModuleType, soc: Soc) -> Ascend:
    return Ascend(numerics_for(soc.mode))


def row_layout(backend: Ascend, kind: str) -> RowLayout:
    dim, rope, ratio, window = {"window": (512, 64, 1, 128), "entries": (512, 64, 4, 0), "index": (128, 0, 4, 0)}[kind]
    return backend.row_layout(kind, dim, rope, ratio, window)


def test_row_layouts(backend: Ascend, soc: Soc) -> None:
    assert tuple(row_layout(backend, kind).name for kind in KINDS) == NAMES[soc.mode]
    odd = backend.row_layout("window", 100, 30, 1, 8)  # fills no group of 64
    assert odd.plain and odd.rounding == backend.numerics.kv


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()


def planned(backend: Ascend, layout: RowLayout, fixed: bool = False) -> tuple[Batch, KV]:
    """A step of two sequences, 9 and 3 tokens, with one of padding; and a pool of bytes 0xA5."""
    batch = Batch(
        np.array([9, 3]),
        np.array([0, 0]),
        torch.device("cpu"),
        padding=1,
        slots=np.array([0, 1]),
        token_table=np.array([[4], [2]]),
        window_table=np.array([[5, 1, 3, 0, 2, 4, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16, 17]]),
        window_block=16,
        fixed=fixed,
    )
    backend.plan(batch, {4: True}, {})
    rows = 16 if layout.ratio == 1 else 64
    return batch, KV(new_pool(layout, 18, rows).fill_(0xA5), layout, rows)


def values(batch: Batch, layout: RowLayout) -> Tensor:
    count = batch.tokens if layout.ratio == 1 else batch.require_plan().entries[layout.ratio].count
    rows = randn(count, layout.dim)
    if layout.ratio == 1:
        rows[batch.seq_host < 0] = float("nan")
    return rows


def expected(batch: Batch, kv: KV, rows: Tensor) -> Tensor:
    """The pool by the layouts' own store: it leaves padding as it is, the operators make it zero."""
    source, target = batch.require_plan().write[kv.layout.ratio]
    source, target = source[target >= 0], target[target >= 0]
    pool = kv.data.clone()
    if kv.layout.name == "ascend950":
        pool.view(-1, 640)[target, 583:] = 0
    formats.store(pool, kv.layout, kv.rows, target, rows[source])
    return pool


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_kv_store(backend: Ascend, kind: str, fixed: bool) -> None:
    layout = row_layout(backend, kind)
    batch, pool = planned(backend, layout, fixed)
    rows = values(batch, layout)
    want = expected(batch, pool, rows)
    assert backend.kv_store(rows, layout, batch, pool) is pool
    assert torch.equal(pool.data, want)


def test_a_step_that_completes_nothing_writes_nothing(backend: Ascend) -> None:
    layout = row_layout(backend, "entries")
    batch, pool = planned(backend, layout)
    batch.q_lens, batch.plan = np.array([3, 3]), None
    batch = Batch(np.array([3, 3]), batch.context, batch.device, slots=batch.slots, token_table=batch.token_table)
    backend.plan(batch, {4: True}, {})
    backend.kv_store(torch.zeros(0, 512).bfloat16(), layout, batch, pool)
    assert (pool.data == 0xA5).all()


def test_without_a_pool_rows_are_rounded(backend: Ascend) -> None:
    layout = row_layout(backend, "window")
    rows = randn(5, 512)
    batch = backend.plan(Batch.packed([5]), {}, {})
    assert torch.equal(backend.kv_store(rows, layout, batch).data, formats.round_rows(rows, layout))


def test_the_first_operator_that_can_be_called_writes(
    backend: Ascend, soc: Soc, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = choose(TABLE, "kv_store", soc, {SCATTER: "it is gone"})
    assert [p.calls[0] for p in choice.used] == ([SCATTER_V2] if soc.mode == "a3" else [])
    if not choice.used:
        return
    backend.choices = MappingProxyType({**backend.choices, "kv_store": choice})
    layout = row_layout(backend, "index")
    batch, pool = planned(backend, layout)
    rows = values(batch, layout)
    want = expected(batch, pool, rows)
    backend.kv_store(rows, layout, batch, pool)
    assert torch.equal(pool.data, want)


def test_packed_rows_are_a_block(backend: Ascend) -> None:
    for kind in KINDS:
        layout = row_layout(backend, kind)
        rows = randn(6, layout.dim)
        block = new_pool(layout, 1, 6)
        formats.store(block, layout, 6, torch.arange(6), rows)
        assert torch.equal(packed(rows, layout), block)


def test_why_kv_compress_epilog_is_refused(backend: Ascend, soc: Soc) -> None:
    """Its rows are the contract's, bit for bit, but where a group's largest value is 448 times a power of two."""
    if soc.mode != "a5":
        pytest.skip("an operator of the 950")
    layout, rows = row_layout(backend, "window"), randn(32, 512)
    rows = rows.clamp(-1.5, 1.5)
    rows[:, ::64] = 1.5  # no other group's largest value is such a one
    rows[0, :64], rows[0, 0], rows[0, 1] = 0, 448.0, 2.0**-9
    cache = torch.zeros(32, 1, 640, dtype=torch.uint8)
    torch.ops._C_ascend.kv_compress_epilog(
        cache.view(torch.float8_e4m3fn), rows, torch.arange(32, dtype=torch.int32), 64, 2, True, 1
    )
    want = packed(rows, layout).view(32, 640)
    assert torch.equal(cache[1:, 0], want[1:])
    scale = 2 * 64 + 448
    assert int(cache[0, 0, scale]) == int(want[0, scale]) + 1
    found, wanted = (formats.load(b.view(1, -1), layout, 32, torch.tensor([0])) for b in (cache, want))
    assert wanted[0, 1] == 2.0**-9 and found[0, 1] == 0


def test_why_indexer_compress_epilog_is_refused(backend: Ascend, soc: Soc) -> None:
    """Its scales differ from the contract's by a unit in the last place, and small rows have no floor."""
    if soc.mode != "a5":
        pytest.skip("an operator of the 950")
    layout, rows = row_layout(backend, "index"), randn(64, 128)
    rows[0] *= 1e-6
    cache = torch.zeros(1, 64, 1, 132, dtype=torch.uint8)
    torch.ops._C_ascend.indexer_compress_epilog_v2(cache, rows, torch.arange(64, dtype=torch.int32))
    found, want = (formats.views(b.view(1, -1), layout, 64)["scales"][0, :, 0] for b in (cache, packed(rows, layout)))
    ratio = (found / want).double()
    assert ratio[0] < 0.1
    assert (ratio[1:] != 1).any() and ((ratio[1:] - 1).abs() < 2.5e-7).all()
