"""Cache rows of every layout, read and rounded inside a kernel: `dsv4_hal.formats` bit for bit. Interpreted."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

import triton
import triton.language as tl

from dsv4_hal import formats
from dsv4_hal.backends.triton_kernels.rows import Rows, locate, of, read, round_rows, rows_of
from dsv4_hal.backends.triton_kernels.runtime import launch
from dsv4_hal.formats import FORMATS, RowLayout

POISON = 0xFF  # NaN in every format
LAYOUTS = {
    "plain": formats.plain_rows(512, 64, 4, 0, torch.bfloat16, FORMATS["e4m3_1x64"]),
    "plain_float32": formats.plain_rows(96, 32, 1, 8, torch.float32),
    "plain_float16": formats.plain_rows(40, 0, 1, 8, torch.float16),
    "flashmla": formats.flashmla_rows(1, 128),
    "flashmla_small": formats.flashmla_rows(4, 0, 96, 32),
    "ascend950": formats.ascend950_rows(4, 0),
    "index_fp4": formats.index_fp4_rows(4),
    "index_fp4_small": formats.index_fp4_rows(4, 96),
    "index_fp8": formats.index_fp8_rows(4),
    "index_fp8_small": formats.index_fp8_rows(4, 96),
    "index_int8": formats.index_int8_rows(4),
    "index_int8_small": formats.index_int8_rows(4, 24),
}


@triton.jit
def gather(out, rows, index, count, sequence, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    logical = tl.load(index + at, mask=at < count, other=-1).to(tl.int32)
    there = logical >= 0
    value = read(rows, locate(rows, sequence, logical, there), there)
    column = tl.arange(0, of(rows.form, "width"))[None]
    tl.store(out + at[:, None] * of(rows.form, "width") + column, value)


def gathered(rows: Rows, sequence: int, index: Tensor, layout: RowLayout) -> Tensor:
    """Logical rows `index` of a sequence [n, dim]; what lies beyond the last channel and beyond n must be zero."""
    out = torch.full((16, rows.form.value.width), float("nan"), dtype=layout.values)
    launch(gather, (1,), out, rows, index, len(index), sequence, COUNT=16)
    assert not out[:, layout.dim :].any() and not out[len(index) :].any()
    return out[: len(index), : layout.dim]


def values(layout: RowLayout, count: int) -> Tensor:
    scale = torch.exp2(torch.arange(count) * 3.0 - 20)[:, None]
    made = torch.randn(count, layout.dim, generator=torch.Generator().manual_seed(5)) * scale
    made[1, : layout.dim - layout.rope] = 0
    return made.to(layout.values)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_pool_through_its_tables(name, fp8):
    """Rows in blocks that a table names, a ring among them; rows that are not asked for hold NaN."""
    layout, rows = LAYOUTS[name], 4
    table = torch.tensor([[6, 0], [3, 5]])
    pool = formats.new_pool(layout, 7, rows).fill_(POISON)
    index = torch.tensor([0, 5, -1, 7, 9, 2])  # 9 is in the ring's first block again, where 1 was
    there = index >= 0
    physical = (table[1][index // rows % 2] * rows + index % rows)[there]
    stored = values(layout, int(there.sum()))
    formats.store(pool, layout, rows, physical, stored)
    want = torch.zeros(len(index), layout.dim, dtype=layout.values)
    want[there] = formats.round_rows(stored, layout)
    assert torch.equal(gathered(rows_of(pool, layout, rows, table, fp8), 1, index, layout), want)


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_rows_are_values_in_every_layout(name):
    layout = LAYOUTS[name]
    stored = values(layout, 7)
    loose = torch.full((7, layout.dim + 1), float("nan"), dtype=layout.values)
    loose[:, : layout.dim] = stored
    rows = rows_of(loose[:, : layout.dim], layout, 0, torch.tensor([0, 3]), False)
    got = gathered(rows, 1, torch.tensor([3, -1, 0]), layout)
    assert torch.equal(got, torch.stack([stored[6], torch.zeros_like(stored[0]), stored[3]]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_rounding_is_that_of_stored_rows(name):
    layout = LAYOUTS[name]
    given = values(layout, 9)
    assert torch.equal(round_rows(given, layout), formats.round_rows(given, layout))
    wide = torch.cat([given, given], -1)[:, : layout.dim].unflatten(0, (3, 3))  # rows with gaps
    assert torch.equal(round_rows(wide, layout), formats.round_rows(given, layout).view(3, 3, -1))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_block_with_nan_or_infinity_becomes_nan():
    layout = LAYOUTS["flashmla"]
    given = values(layout, 3)
    given[0, 70], given[1, 130] = float("nan"), float("inf")
    torch.testing.assert_close(
        round_rows(given, layout), formats.round_rows(given, layout), rtol=0, atol=0, equal_nan=True
    )
