"""Stored rows, byte for byte, in every layout; and that no row hangs on its neighbours or on how a step was cut."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

from dsv4_hal import formats
from dsv4_hal.backends.triton_kernels import cache as kernels
from dsv4_hal.batch import cos_sin
from dsv4_hal.formats import FORMATS, RowLayout, plain_rows

BF16 = torch.bfloat16
LAYOUTS = {
    "flashmla": formats.flashmla_rows(1, 8, 192, 64),
    "ascend950": formats.ascend950_rows(1, 8, 192, 64),
    "index_fp4": formats.index_fp4_rows(4, 64),
    "index_fp8": formats.index_fp8_rows(4, 96),
    "index_int8": formats.index_int8_rows(4, 96),
    "plain": plain_rows(40, 8, 4, 0, torch.float32),
    "plain_one": plain_rows(1, 0, 4, 0, torch.float16),
    "plain_64": plain_rows(200, 8, 4, 0, BF16, FORMATS["e4m3_1x64"]),
    "plain_32": plain_rows(48, 8, 4, 0, BF16, FORMATS["mxfp8"]),
    "plain_fp4": plain_rows(40, 0, 4, 0, BF16, FORMATS["mxfp4"]),
    "plain_int8": plain_rows(24, 0, 4, 0, torch.float32, FORMATS["int8_channel"]),
}
ROWS = 5  # of a block


def rows_of(layout: RowLayout, count: int = 11) -> torch.Tensor:
    """Rows of magnitudes from the smallest to beyond what scales hold, the edges of scales, and NaN and infinity."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, layout.dim, generator=generator)
    x *= torch.exp2(torch.linspace(-40, 20, count))[:, None]
    x[1] = 0
    top = 1.0 if layout.rounding is None else layout.rounding.top
    x[2], x[3] = top, -top * (1 + 2.0**-7)  # a power of two as the scale, and what is just above it
    x[4, 0], x[5, -1], x[6, layout.dim // 2] = float("nan"), float("inf"), float("-inf")
    return x.to(layout.values)


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    finite = want.isfinite()
    assert torch.equal(got.signbit() & finite, want.signbit() & finite)


@pytest.mark.parametrize("name", LAYOUTS)
def test_new_rows_are_rounded_as_the_layout_says(name):
    layout = LAYOUTS[name]
    x = rows_of(layout)
    assert kernels.can_store(layout)
    assert_same(kernels.store(x, layout), formats.round_rows(x, layout))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_pool_holds_the_bytes_of_the_layout_and_keeps_its_padding(name):
    layout = LAYOUTS[name]
    x = rows_of(layout)
    pool = torch.full((4, layout.block_bytes(ROWS)), 0xA5, dtype=torch.uint8)
    want = pool.clone()
    source = torch.tensor([0, 8, 1, 2, 3, 7, 4, 9, 10])
    target = torch.tensor([19, -1, 3, 0, 11, 12, -1, 4, 5])  # finite rows: codes of others mean nothing
    assert kernels.store(x, layout, (pool, ROWS, source, target)) is pool
    formats.store(want, layout, ROWS, target[target >= 0], x[source[target >= 0]])
    assert torch.equal(pool, want)
    every = torch.arange(len(x))
    kernels.store(x, layout, (pool, ROWS, every, every))
    assert_same(formats.load(pool, layout, ROWS, every), formats.round_rows(x, layout))


def test_scales_at_their_edges():
    """Around every power of two that a scale may be, one amax is the last for it and the next needs the double."""
    layout = plain_rows(64, 0, 4, 0, torch.float32, FORMATS["e4m3_1x64"])
    edges = 448.0 * torch.exp2(torch.arange(-22, 100, 11.0))
    edges = torch.cat([edges, edges.nextafter(edges * 2), edges.nextafter(edges / 2)])
    x = edges[:, None] * torch.linspace(-1, 1, 64)
    assert_same(kernels.store(x, layout), formats.round_rows(x, layout))


def test_formats_and_widths_that_the_kernel_leaves_to_others():
    assert not kernels.can_store(plain_rows(32, 0, 4, 0, BF16, FORMATS["int4_channel"]))
    assert not kernels.can_store(plain_rows(32, 0, 4, 0, BF16, FORMATS["bf16"]))
    assert kernels.can_turn(9, 1 + 8)
    assert not kernels.can_turn(9, 8)


@pytest.mark.parametrize(("name", "rotate"), [("flashmla", False), ("index_fp4", True), ("plain_64", False)])
def test_a_row_does_not_hang_on_its_neighbours(name, rotate):
    layout = LAYOUTS[name]
    x = torch.randn(7, layout.dim)
    cos, sin = cos_sin(torch.arange(7), torch.rand(4), torch.float32)
    weight = torch.randn(layout.dim)
    together = kernels.store(x, layout, None, weight, 1e-6, (cos, sin), rotate)
    for i in range(7):
        alone = kernels.store(x[i : i + 1], layout, None, weight, 1e-6, (cos[i : i + 1], sin[i : i + 1]), rotate)
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (3, False)])
def test_an_entry_does_not_hang_on_where_its_tokens_lie(ratio, overlap):
    """All tokens of the entries in one step; or all but the last in the state, which holds NaN elsewhere."""
    span, width = ratio * (2 if overlap else 1), 6 * (2 if overlap else 1)
    kv, gate = torch.randn(span, width), torch.randn(span, width) * 3
    ape, positions = torch.randn(ratio, width), torch.arange(span)
    whole = kernels.compress(kv, gate, ape, positions, torch.arange(span)[None], overlap)
    state = torch.full((2, span + 1, 2, width), float("nan"))
    none = torch.empty(0, span, dtype=torch.int64)
    early, slot = positions[:-1], span + 1  # the second slot
    assert not len(kernels.compress(kv[:-1], gate[:-1], ape, early, none, overlap, state, (early, slot + early)))
    assert state[0].isnan().all()
    assert torch.equal(state[1, :-2, 0], kv[:-1])
    assert torch.equal(state[1, :-2, 1], gate[:-1] + ape[early % ratio])
    source = torch.cat([1 + slot + early, torch.zeros(1, dtype=torch.int64)])[None]
    last = kernels.compress(kv[-1:], gate[-1:], ape, positions[-1:], source, overlap, state)
    assert torch.equal(last, whole)


def test_slots_before_the_first_block_are_not_read():
    ratio, width = 4, 16
    kv, gate = torch.randn(ratio, width), torch.randn(ratio, width)
    ape = torch.zeros(ratio, width)
    source = torch.cat([torch.full((ratio,), -1), torch.arange(ratio)])[None]
    got = kernels.compress(kv, gate, ape, torch.arange(ratio), source, True)
    torch.testing.assert_close(got, (gate[:, 8:].softmax(0) * kv[:, 8:]).sum(0, keepdim=True))
