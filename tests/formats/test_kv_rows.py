"""Cache rows, byte by byte: where a field lies, what a pool holds, what comes back."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4_hal.formats import (
    FORMATS,
    Field,
    RowLayout,
    ascend950_rows,
    flashmla_rows,
    index_fp4_rows,
    index_fp8_rows,
    index_int8_rows,
    load,
    new_pool,
    pack,
    plain_rows,
    round_rows,
    simulate,
    store,
    unpack,
    views,
)

LAYOUTS: dict[str, RowLayout] = {
    "plain_bf16": plain_rows(512, 64, 1, 128, torch.bfloat16, FORMATS["e4m3_1x64"]),
    "plain_fp32": plain_rows(24, 8, 4, 0, torch.float32),
    "plain_fp64": plain_rows(40, 8, 1, 6, torch.float64, FORMATS["mxfp8"]),
    "plain_index": plain_rows(128, 0, 4, 0, torch.bfloat16, FORMATS["mxfp4"]),
    "flashmla": flashmla_rows(1, 128),
    "flashmla_small": flashmla_rows(4, 0, dim=80, rope=16),
    "ascend950": ascend950_rows(128, 0),
    "ascend950_small": ascend950_rows(1, 8, dim=144, rope=16),
    "ascend950_no_rope": ascend950_rows(4, 0, dim=128, rope=0),
    "flashmla_no_rope": flashmla_rows(4, 0, dim=128, rope=0),
    "index_int8": index_int8_rows(4),
    "index_fp8": index_fp8_rows(4),
    "index_fp4": index_fp4_rows(4),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def sample(layout: RowLayout, n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, layout.dim, generator=g) * torch.exp2(torch.randint(-6, 6, (n, 1), generator=g).float())
    return x.to(layout.values)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def e4m3_bytes(values: list[float]) -> bytes:
    """Codes of exactly representable values, through the bits of fp32."""
    out = bytearray()
    for v in values:
        (word,) = struct.unpack("<I", struct.pack("<f", abs(v)))
        exponent, mantissa = (word >> 23) - 127, word >> 20 & 7
        code = 0 if v == 0 else (exponent + 7) << 3 | mantissa
        out.append(code | (0x80 if math.copysign(1, v) < 0 else 0))
    return bytes(out)


def bf16_bytes(values: list[float]) -> bytes:
    return b"".join(struct.pack("<f", v)[2:] for v in values)


def exact_row(r: int, channels: int = 448) -> tuple[list[float], list[float], bytes]:
    """A row whose quantisation is known: 64-channel blocks of amax 448 * 2^(block - r), rotary channels apart."""
    codes = [(-1.0) ** c * [448.0, 1.5, 0.25, 13.0, 0.0][(c + r) % 5] for c in range(channels)]
    kept = [v * 2.0 ** (c // 64 - r) for c, v in enumerate(codes)]
    scales = bytes(127 + b - r for b in range(channels // 64))
    rope = [r + i / 64 for i in range(64)]
    return kept, rope, e4m3_bytes(codes) + bf16_bytes(rope) + scales


def test_flashmla_block_is_37440_bytes() -> None:
    layout = flashmla_rows(1, 128)
    assert layout.row_bytes == 584 and layout.region_bytes == (576, 8)
    assert layout.block_bytes(64) == 37440 and layout.block_bytes(2) == 1728 and layout.block_bytes(256) == 149760
    assert new_pool(layout, 5, 64).shape == (5, 37440)


def test_flashmla_bytes() -> None:
    """Two blocks of two rows, written by hand: data rows, then scale rows, then what pads the block to 1728."""
    layout = flashmla_rows(1, 128)
    pool = new_pool(layout, 2, 2).fill_(0xEE)
    want = bytearray(b"\xee" * pool.numel())
    rows = []
    for r, index in enumerate((0, 1, 3)):
        kept, rope, stored = exact_row(r)
        rows.append(kept + rope)
        block, row = divmod(index, 2)
        data, scales = block * 1728 + row * 576, block * 1728 + 2 * 576 + row * 8
        want[data : data + 576] = stored[:576]
        want[scales : scales + 7] = stored[576:]
    values = torch.tensor(rows, dtype=torch.bfloat16)
    store(pool, layout, 2, torch.tensor([0, 1, 3]), values)
    assert bytes(pool.flatten().tolist()) == bytes(want)
    assert torch.equal(load(pool, layout, 2, torch.tensor([3, 0, 1])), values[[2, 0, 1]])


def test_ascend950_bytes() -> None:
    """640 bytes a row: rope, codes, scales, 57 bytes of padding."""
    layout = ascend950_rows(128, 0)
    assert layout.row_bytes == 640 and layout.block_bytes(32) == 32 * 640
    pool = new_pool(layout, 2, 3).fill_(0xEE)
    want = bytearray(b"\xee" * pool.numel())
    rows = []
    for r, index in enumerate((5, 0)):
        kept, rope, stored = exact_row(r)
        rows.append(kept + rope)
        at = index * 640
        want[at : at + 128] = stored[448:576]
        want[at + 128 : at + 576] = stored[:448]
        want[at + 576 : at + 583] = stored[576:]
    values = torch.tensor(rows, dtype=torch.bfloat16)
    store(pool, layout, 3, torch.tensor([5, 0]), values)
    assert bytes(pool.flatten().tolist()) == bytes(want)
    assert torch.equal(load(pool, layout, 3, torch.tensor([0, 5])), values[[1, 0]])


def stored_index_row(layout: RowLayout, row: list[float]) -> bytes:
    """The second of two blocks of two rows, whose first row is `row`; the rest is zero."""
    pool = new_pool(layout, 2, 2)
    store(pool, layout, 2, torch.tensor([2]), torch.tensor([row], dtype=torch.bfloat16))
    assert not pool[0].any()
    return bytes(pool[1].tolist())


def test_index_int8_bytes() -> None:
    codes = [127, -127, *range(-63, 63)]
    got = stored_index_row(index_int8_rows(4), [c / 8 for c in codes])
    assert got == struct.pack("<128b128x", *codes) + struct.pack("<e2x", 1 / 8)


def test_index_fp8_bytes() -> None:
    codes = [448.0, -448.0, 1.5, 0.25] * 32
    got = stored_index_row(index_fp8_rows(4), [c / 4 for c in codes])
    assert got == e4m3_bytes(codes) + bytes(128) + struct.pack("<f4x", 1 / 4)


def test_index_fp4_bytes() -> None:
    """0.5, -6, 1.5, 4 are codes 1, 15, 3, 6, the first of each pair in the low nibble."""
    codes = [0.5, -6.0, 1.5, 4.0] * 32
    got = stored_index_row(index_fp4_rows(4), [v * 2.0 ** (c // 32) for c, v in enumerate(codes)])
    assert got == bytes([0xF1, 0x63] * 32) + bytes(64) + bytes([127, 128, 129, 130]) + bytes(4)


def test_row_bytes() -> None:
    sizes = {
        "plain_bf16": 1024,
        "flashmla": 584,
        "ascend950": 640,
        "index_int8": 130,
        "index_fp8": 132,
        "index_fp4": 68,
    }
    for name, size in sizes.items():
        assert LAYOUTS[name].row_bytes == size
    assert flashmla_rows(4, 0, dim=80, rope=16).region_bytes == (96, 8)


@each_layout
def test_unpack_pack_is_round_rows(layout: RowLayout) -> None:
    for n in (0, 1, 9):
        rows = sample(layout, n)
        fields = pack(rows, layout)
        assert {name: (tuple(f.shape), f.dtype) for name, f in fields.items()} == {
            f.name: ((n, f.count), f.dtype) for f in layout.fields
        }
        back = unpack(fields, layout)
        assert back.dtype == layout.values and torch.equal(bits(back), bits(round_rows(rows, layout)))


@each_layout
def test_only_the_kept_channels_are_rounded(layout: RowLayout) -> None:
    rows = sample(layout, 5)
    out, kept = round_rows(rows, layout), layout.dim - layout.rope
    want = rows[:, :kept] if layout.rounding is None else simulate(rows[:, :kept], layout.rounding)
    assert torch.equal(out[:, :kept], want) and torch.equal(out[:, kept:], rows[:, kept:])
    assert layout.rounding is None or not torch.equal(out[:, :kept], rows[:, :kept])


@each_layout
def test_round_rows_passes_gradients_through(layout: RowLayout) -> None:
    rows = sample(layout, 3).requires_grad_()
    weight = sample(layout, 3, seed=1)
    (round_rows(rows, layout) * weight).sum().backward()
    assert rows.grad is not None and torch.equal(rows.grad, weight)
    pool = new_pool(layout, 1, 4)
    store(pool, layout, 4, torch.arange(3), rows)
    assert not load(pool, layout, 4, torch.arange(3)).requires_grad


@each_layout
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_store_and_load(layout: RowLayout, rows: int) -> None:
    blocks = 5
    g = torch.Generator().manual_seed(rows)
    index = torch.randperm(blocks * rows, generator=g)[: max(1, 3 * rows)]
    values = sample(layout, len(index))
    pool = new_pool(layout, blocks, rows).fill_(0xFF)  # every float of it is NaN
    store(pool, layout, rows, index, values)
    want = round_rows(values, layout)
    got = load(pool, layout, rows, index)
    assert got.dtype == layout.values and torch.equal(bits(got), bits(want))
    assert torch.equal(bits(load(pool, layout, rows, index[None, :, None])[0, :, 0]), bits(want))
    assert load(pool, layout, rows, index[:0]).shape == (0, layout.dim)


@each_layout
def test_missing_rows_are_zero_in_a_poisoned_pool(layout: RowLayout) -> None:
    pool = new_pool(layout, 3, 4).fill_(0xFF)
    store(pool, layout, 4, torch.tensor([7]), sample(layout, 1))
    out = load(pool, layout, 4, torch.tensor([[-1, 7], [7, -1]]))
    assert out.shape == (2, 2, layout.dim) and out.isfinite().all()
    assert (out[0, 0] == 0).all() and (out[1, 1] == 0).all() and (out[0, 1] != 0).any()
    assert torch.equal(out[0, 1], out[1, 0])
    assert not load(pool, layout, 4, torch.tensor([0])).isfinite().all()  # the poison is real


@each_layout
def test_storing_touches_nothing_else(layout: RowLayout) -> None:
    """Bytes of other rows, and padding, keep what they had; the bytes written are exactly those of the fields."""
    rows = 4
    pool = new_pool(layout, 3, rows)
    fields = views(pool, layout, rows)
    for view in fields.values():
        view.view(torch.uint8)[1, 2] = 1
    mask = pool.bool()
    assert int(mask.sum()) == sum(f.count * f.dtype.itemsize for f in layout.fields)
    for fill in (0x00, 0xA5):
        pool.fill_(fill)
        store(pool, layout, rows, torch.tensor([1 * rows + 2]), sample(layout, 1))
        assert (pool[~mask] == fill).all()
        assert (pool[mask] != fill).any()


@each_layout
def test_views_share_the_pool(layout: RowLayout) -> None:
    pool = new_pool(layout, 3, 4)
    for field in layout.fields:
        view = views(pool, layout, 4)[field.name]
        assert view.shape == (3, 4, field.count) and view.dtype == field.dtype
        assert view.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr()
    rows = sample(layout, 12)
    store(pool, layout, 4, torch.arange(12), rows)
    for name, view in views(pool, layout, 4).items():
        want = pack(rows, layout)[name]
        assert torch.equal(bits(view.reshape(12, -1)), bits(want))


@given(
    name=st.sampled_from(list(LAYOUTS)),
    blocks=st.integers(1, 4),
    rows=st.integers(1, 9),
    data=st.data(),
)
@settings(derandomize=True, max_examples=80, deadline=None)
def test_a_pool_is_a_list_of_rows(name: str, blocks: int, rows: int, data: st.DataObject) -> None:
    layout = LAYOUTS[name]
    pool = new_pool(layout, blocks, rows).fill_(0xFF)
    held: dict[int, Tensor] = {}
    for step in range(3):
        index = data.draw(st.lists(st.integers(0, blocks * rows - 1), unique=True, max_size=6))
        values = sample(layout, len(index), seed=step)
        store(pool, layout, rows, torch.tensor(index, dtype=torch.int64), values)
        held |= dict(zip(index, round_rows(values, layout), strict=True))
    wanted = [*held, -1]
    got = load(pool, layout, rows, torch.tensor(wanted))
    for i, row in zip(wanted, got, strict=True):
        assert torch.equal(row, held.get(i, torch.zeros(layout.dim, dtype=layout.values)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: flashmla_rows(1, 128, dim=100, rope=16),
        lambda: flashmla_rows(1, 128, dim=64, rope=64),
        lambda: ascend950_rows(1, 128, dim=500),
        lambda: index_fp4_rows(4, dim=48),
        lambda: index_int8_rows(4, dim=127),
        lambda: index_fp8_rows(4, dim=126),
        lambda: plain_rows(16, 17, 1, 8, torch.bfloat16),
        lambda: plain_rows(16, 0, 0, 0, torch.bfloat16),
        lambda: plain_rows(16, 0, 4, 8, torch.bfloat16),
        lambda: plain_rows(16, 0, 1, 0, torch.bfloat16),
        lambda: RowLayout("odd", 4, 0, 4, 0, None, (Field("values", 0, 2, 4, torch.float32),), (20,), 1, torch.float32),
        lambda: RowLayout(
            "short", 4, 0, 4, 0, None, (Field("values", 0, 0, 4, torch.float32),), (12,), 1, torch.float32
        ),
    ],
)
def test_layouts_that_do_not_fit(make: Callable[[], RowLayout]) -> None:
    with pytest.raises(ValueError):
        make()


def test_refusals() -> None:
    layout = LAYOUTS["flashmla"]
    pool = new_pool(layout, 2, 4)
    with pytest.raises(ValueError, match="rows are"):
        store(pool, layout, 4, torch.tensor([0]), torch.zeros(1, 512))
    with pytest.raises(ValueError, match="rows are"):
        round_rows(torch.zeros(1, 128, dtype=torch.bfloat16), layout)
    with pytest.raises(ValueError, match="rows a block"):
        load(pool, layout, 5, torch.tensor([0]))
    with pytest.raises(ValueError, match="rows a block"):
        views(pool.view(torch.int8), layout, 4)
