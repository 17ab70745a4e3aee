"""Every layout against the documented one, written out index by index."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

from dsv4_hal import formats
from dsv4_hal.backends.cuda.vendor import deep_gemm, layouts
from dsv4_hal.formats import FORMATS, QTensor, Weight, flashmla_rows, index_fp4_rows, index_fp8_rows


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) + 1).view(shape).to(dtype)


def memory(x: torch.Tensor) -> list[float]:
    """All of the storage, in order."""
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).tolist()


@pytest.mark.parametrize("shape", [(5, 3), (8, 1), (2, 6, 2), (0, 4)])
def test_scales_are_mn_major_and_aligned(shape: tuple[int, ...]) -> None:
    scales = numbered(*shape)
    made = layouts.mn_major(scales)
    assert torch.equal(made, scales)
    *_, mn, count = shape
    aligned = (mn + 3) // 4 * 4
    batches = scales.view(-1, mn, count) if scales.numel() else scales.view(1, mn, count)
    want = [0.0] * (batches.shape[0] * count * aligned)
    for b in range(batches.shape[0]):
        for k in range(count):
            for m in range(mn):
                want[(b * count + k) * aligned + m] = float(batches[b, m, k])
    assert memory(made) == want


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_four_e8m0_make_a_word(count: int) -> None:
    codes = (numbered(2, 3, count, dtype=torch.int64) * 37 % 255).to(torch.uint8)
    made = layouts.packed_e8m0(codes.view(torch.float8_e8m0fnu))
    assert made.dtype == torch.int32 and made.shape == (2, 3, -(-count // 4))
    for e in range(2):
        for m in range(3):
            for word in range(made.shape[2]):
                want = 0
                for j in range(4):
                    if 4 * word + j < count:
                        want += int(codes[e, m, 4 * word + j]) << (8 * j)
                assert int(made[e, m, word]) & 0xFFFFFFFF == want


def test_a_scale_for_every_row() -> None:
    codes = numbered(2, 3, 2, dtype=torch.uint8)
    made = layouts.a_row_each(codes.view(torch.float8_e8m0fnu), 300, 128).view(torch.uint8)
    assert made.shape == (2, 300, 2)
    for row in (0, 127, 128, 255, 256, 299):
        assert torch.equal(made[:, row], codes[:, row // 128])


@pytest.mark.parametrize("name", ["e4m3_128x128", "e4m3_128x128_fp32", "mxfp4"])
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_scales_of_weights(name: str, arch: str) -> None:
    if name not in deep_gemm.ABLE[arch].weights:
        return
    fmt = FORMATS[name]
    values = torch.randn(2, 192, 640, generator=torch.Generator().manual_seed(1)) * numbered(2, 192, 640).sqrt()
    q = formats.quantize(values, fmt)
    made = deep_gemm.weight_scales(Weight(q.data, q.scale, fmt, "w"), arch)
    assert q.scale is not None
    scale = q.scale.float()
    if arch == "sm_90":
        assert made.dtype == torch.float32 and made.is_contiguous() and torch.equal(made, scale)
        return
    rows, columns = (1, 32) if name == "mxfp4" else (128, 128)
    blocks = 640 // columns
    assert made.shape == (2, 192, -(-blocks // 4)) and made.stride() == (192 * made.shape[2], 1, 192)
    for e in range(2):
        for n in (0, 1, 127, 128, 191):
            for block in range(blocks):
                code = (int(made[e, n, block // 4]) >> (8 * (block % 4))) & 255
                assert 2.0 ** (code - 127) == float(scale[e, n // rows, block])


@pytest.mark.parametrize("counts", [(3, 0, 5, 1), (0, 0), (4, 4), (0, 9), (1,)])
@pytest.mark.parametrize("align", [1, 4])
def test_groups_are_padded(counts: tuple[int, ...], align: int) -> None:
    rows = sum(counts)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    made = layouts.padded_groups(offsets, rows, align)
    assert made.group.dtype == torch.int32 and len(made.group) == len(made.source)
    group, source, place, row = [], [], [], 0
    for g, count in enumerate(counts):
        for _ in range(count):
            place.append(len(group))
            group.append(g)
            source.append(row)
            row += 1
        while len(group) % align:
            group.append(-1)
            source.append(None)
    assert len(made.group) >= len(group) and len(made.group) % align == 0
    group += [-1] * (len(made.group) - len(group))
    assert made.group.tolist() == group and made.place.tolist() == place
    assert [s for s, g in zip(made.source.tolist(), group, strict=True) if g >= 0] == list(range(rows))
    assert all(0 <= s < max(1, rows) for s in made.source.tolist())


def test_their_number_is_the_hosts() -> None:
    """As many padded rows however the rows are spread: a shape cannot wait for the device."""
    sizes = {
        len(layouts.padded_groups(torch.tensor(offsets), 6, 4).group)
        for offsets in ([0, 6, 6, 6], [0, 2, 4, 6], [0, 1, 2, 6], [0, 0, 0, 6])
    }
    assert len(sizes) == 1


def test_three_tf32_values_make_a_float32() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 64)
    x[0, :4] = torch.tensor([0.0, -0.0, 1 + 2.0**-23, -(2.0**-10)])
    parts = layouts.tf32_parts(x)
    assert torch.equal(parts.view(3, 5, 64).double().sum(0), x.double())
    assert not (parts.view(torch.int32) & 0x1FFF).any()  # 10 bits of significand behind the first
    matrix = deep_gemm.hc_matrix(x)
    assert matrix.shape == (16, 64) and torch.equal(matrix[:15], parts) and not matrix[15].any()


def test_gate_and_up_rows_in_turns_of_eight() -> None:
    rows = 32  # I; gate rows 0 .. 31, up rows 32 .. 63
    w = numbered(2, 2 * rows, 3)
    made = layouts.interleaved(w)
    for e in range(2):
        for r in range(2 * rows):
            turn, within = r // 16, r % 16
            source = turn * 8 + within if within < 8 else rows + turn * 8 + within - 8
            assert torch.equal(made[e, r], w[e, source])


def test_scales_in_the_order_of_a_tensor_core() -> None:
    w = numbered(2, 256, 3, dtype=torch.int32)
    made = layouts.utccp(w)
    for m in range(256):
        place = m // 128 * 128 + m % 32 * 4 + m % 128 // 32
        assert torch.equal(made[:, place], w[:, m])


@pytest.mark.parametrize("rows", [32, 64])
def test_pools_of_indexer_keys(rows: int) -> None:
    values = torch.randn(2 * rows, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    for layout, code_bytes in ((index_fp8_rows(4), 128), (index_fp4_rows(4), 64)):
        pool = formats.new_pool(layout, 2, rows)
        formats.store(pool, layout, rows, torch.arange(2 * rows), values)
        cache = layouts.index_cache(pool, rows)
        assert cache.shape == (2, rows, 1, code_bytes + 4) and cache.data_ptr() == pool.data_ptr()
        assert layout.rounding is not None
        q = formats.quantize(values, layout.rounding)
        assert q.scale is not None
        for row in (0, 1, rows - 1, rows, 2 * rows - 1):
            block, r = cache[row // rows].flatten(), row % rows
            assert torch.equal(block[r * code_bytes : (r + 1) * code_bytes], q.data[row].view(torch.uint8))
            scale = block[rows * code_bytes + 4 * r : rows * code_bytes + 4 * r + 4]
            assert torch.equal(scale, q.scale[row].view(torch.uint8))


@pytest.mark.parametrize("rows", [2, 16, 64])
def test_pools_of_attention_rows(rows: int) -> None:
    layout = flashmla_rows(1, 128)
    values = torch.randn(3 * rows, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    pool = formats.new_pool(layout, 3, rows).fill_(255)
    formats.store(pool, layout, rows, torch.arange(3 * rows), values)
    cache = layouts.attention_cache(pool, rows)
    bytes_of_block = -(-rows * 584 // 576) * 576
    assert cache.shape == (3, rows, 1, 584) and cache.stride() == (bytes_of_block, 584, 584, 1)
    assert cache.data_ptr() == pool.data_ptr()
    q = formats.quantize(values[:, :448], FORMATS["e4m3_1x64"])
    assert q.scale is not None
    for row in (0, 1, rows, 3 * rows - 1):
        block, r = cache[row // rows].flatten(), row % rows
        assert torch.equal(block[576 * r : 576 * r + 448], q.data[row].view(torch.uint8))
        assert torch.equal(block[576 * r + 448 : 576 * r + 576].view(torch.bfloat16), values[row, 448:])
        assert torch.equal(block[576 * rows + 8 * r : 576 * rows + 8 * r + 7], q.scale[row].view(torch.uint8))


def test_indices_and_heads_are_filled_up() -> None:
    index = torch.tensor([[3, -1, 5]])
    made = layouts.padded(index, 4)
    assert made.dtype == torch.int32 and made.tolist() == [[3, -1, 5, -1]]
    assert layouts.padded(index[:, :0], 4).tolist() == [[-1] * 4]
    assert layouts.padded(torch.zeros(2, 8, dtype=torch.int64), 4).shape == (2, 8)
    q = numbered(2, 3, 4)
    more = layouts.more_heads(q, 1, (2, 8, 16))
    assert more.shape == (2, 8, 4) and torch.equal(more[:, :3], q) and not more[:, 3:].any()
    assert layouts.more_heads(q, 1, (3,)) is q


def test_weights_of_the_fused_experts() -> None:
    generator = torch.Generator().manual_seed(2)
    experts, inner, hidden = 2, 128, 256
    made = []
    for shape in ((experts, 2 * inner, hidden), (experts, hidden, inner)):
        size = torch.exp2(torch.randint(-4, 4, shape[:2], generator=generator))[..., None]
        q = formats.quantize(torch.randn(*shape, generator=generator) * size, FORMATS["mxfp4"])
        made.append(Weight(q.data, q.scale, q.format))
    w13, w2 = made
    (first, first_scale), (second, second_scale) = deep_gemm.mega_weights(w13, w2)
    assert torch.equal(second, w2.data)
    for w, scale, interleaved in ((w13, first_scale, True), (w2, second_scale, False)):
        rows = w.shape[1]
        assert scale.shape == (experts, rows, w.shape[2] // 128) and scale.stride()[1:] == (1, rows)
        assert w.scale is not None
        for r in (0, 7, 8, 15, 16, 31, 32, 100, rows - 1):
            turn, within = r // 16, r % 16
            source = r if not interleaved else (turn * 8 + within if within < 8 else inner + turn * 8 + within - 8)
            place = r // 128 * 128 + r % 32 * 4 + r % 128 // 32
            for word in range(scale.shape[2]):
                codes = [(int(scale[1, place, word]) >> (8 * j)) & 255 for j in range(4)]
                assert codes == w.scale[1, source, 4 * word : 4 * word + 4].view(torch.uint8).tolist()
            if interleaved:
                assert torch.equal(first[1, r], w13.data[1, source])


def test_scales_of_rows() -> None:
    q: QTensor = formats.quantize(torch.randn(3, 640) * numbered(3, 1), FORMATS["e4m3_1x128"])
    assert q.scale is not None
    hopper, blackwell = deep_gemm.row_scales(q.scale, "sm_90"), deep_gemm.row_scales(q.scale, "sm_103")
    assert hopper.dtype == torch.float32 and hopper.stride() == (1, 4) and torch.equal(hopper, q.scale.float())
    assert blackwell.shape == (3, 2) and blackwell.stride() == (1, 4)
    for m in range(3):
        for block in range(5):
            code = (int(blackwell[m, block // 4]) >> (8 * (block % 4))) & 255
            assert 2.0 ** (code - 127) == float(q.scale[m, block].float())
