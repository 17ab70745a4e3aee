"""Emulated writes into caches, against float64, byte for byte."""

from __future__ import annotations

from types import ModuleType

import custom_calls as calls
import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.ascend.devices import Soc

UNTOUCHED = 0xFF


def nearest_e4m3(values: Tensor) -> Tensor:
    """The nearest of all e4m3 values, the even code among two, by looking at each."""
    codes = torch.arange(256, dtype=torch.uint8)
    table = codes.view(torch.float8_e4m3fn).double()
    known = ~table.isnan()
    table, codes = table[known], codes[known]
    distance = (values.double()[..., None] - table).abs()
    odd = codes.int() & 1
    best = distance.amin(-1, keepdim=True)
    return table[(torch.where(distance == best, odd, 2)).argmin(-1)]


@pytest.fixture
def only(request: pytest.FixtureRequest, soc: Soc) -> None:
    if soc.mode != request.param:
        pytest.skip(f"an operator of mode {request.param}")


@pytest.mark.parametrize("only", ["a3"], indirect=True)
def test_scatter(torch_npu: ModuleType, only: None) -> None:
    made = calls.scatter()
    block = torch.full((4, 20, 8), UNTOUCHED, dtype=torch.uint8).view(torch.int8)
    made.arguments["var"] = block[:, :16]  # blocks that are apart
    torch.ops._C_ascend.npu_scatter_nd_update_v2(**made.arguments)
    assert (block[3, 15] == 1).all() and (block[0, 0] == 1).all() and int((block == 1).sum()) == 16


@pytest.mark.parametrize("only", ["a5"], indirect=True)
def test_kv_compress_epilog(torch_npu: ModuleType, only: None) -> None:
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(4, 512, generator=generator) * torch.tensor([[1.0], [1e-6], [300.0], [1.0]])).bfloat16()
    x[0, 64:128] = 0
    x[2, 0] = 448  # a power of two times 448
    made = calls.kv_epilog(x, [6, 2, 0, -1])
    torch.ops._C_ascend.kv_compress_epilog(**made.arguments)
    bytes = made.arguments["kv_compress_cache"].view(torch.uint8)[:, 0]
    assert (bytes[[1, 3, 4, 5, 7]] == UNTOUCHED).all()
    for row, slot in ((0, 6), (1, 2), (2, 0)):
        assert torch.equal(bytes[slot, :128].view(torch.bfloat16), x[row, 448:])
        assert not bytes[slot, 583:].any()
        for group in range(7):
            values = x[row, 64 * group : 64 * group + 64].double()
            want = max(float(values.abs().max()), 1e-4) / 448
            scale = 2.0 ** (int(bytes[slot, 576 + group]) - 127)
            assert want < scale <= 2 * want  # above, also where `want` is a power of two itself
            codes = bytes[slot, 128 + 64 * group : 192 + 64 * group].view(torch.float8_e4m3fn).double()
            assert torch.equal(codes, nearest_e4m3(values / scale))


@pytest.mark.parametrize("only", ["a5"], indirect=True)
def test_indexer_compress_epilog(torch_npu: ModuleType, only: None) -> None:
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(4)).bfloat16()
    x[1] = 0
    made = calls.index_epilog(x, [17, 3, -1, 31])
    torch.ops._C_ascend.indexer_compress_epilog_v2(**made.arguments)
    blocks = made.arguments["indexer_compress_cache"].view(2, -1)
    codes, scales = blocks[:, : 16 * 128].reshape(32, 128), blocks[:, 16 * 128 :].reshape(32, 4)
    written = [17, 3, 31]
    others = [slot for slot in range(32) if slot not in written]
    assert (codes[others] == UNTOUCHED).all() and (scales[others] == UNTOUCHED).all()
    for row, slot in ((0, 17), (3, 31)):
        scale = scales[slot].view(torch.float32)
        torch.testing.assert_close(scale.double()[0], x[row].double().abs().max() / 448, rtol=2e-7, atol=0)
        quotient = (x[row].float() / scale).double()
        assert torch.equal(codes[slot].view(torch.float8_e4m3fn).double(), nearest_e4m3(quotient))
    assert not codes[3].any() and not scales[3].any()
