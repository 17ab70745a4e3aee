"""Emulated products, against float64 and integers, with operands decoded here."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.ascend.devices import Soc

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(8)


def on_950(soc: Soc) -> None:
    if soc.name != "ascend950":
        pytest.skip("FP8 and MX formats are of Ascend 950")


def int8(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=draw, dtype=torch.int8)


def large(draw: torch.Generator, *shape: int) -> Tensor:
    """Positive, so that a sum over 4096 of products is beyond the integers that float32 holds."""
    return torch.randint(64, 128, shape, generator=draw, dtype=torch.int8)


def fp8(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw).to(torch.float8_e4m3fn)


def bytes_of(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)


def exponents(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(122, 133, shape, generator=draw, dtype=torch.uint8)


def fp4_values(packed: Tensor) -> Tensor:
    """[.., n] bytes -> [.., 2 n], the low half first."""
    return E2M1[torch.stack([packed % 16, packed // 16], -1).flatten(-2).long()]


def scaled(values: Tensor, scale: Tensor) -> Tensor:
    """Rows [.., K] by exponents [.., K / 64, 2]: one for 32."""
    powers = 2.0 ** (scale.double().flatten(-2) - 127)
    return values.double() * powers.repeat_interleave(32, -1)[..., : values.shape[-1]]


def close(got: Tensor, wanted: Tensor) -> None:
    """One rounding of the result, and of float32 sums in between."""
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), wanted, rtol=eps, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("turned", [False, True])
def test_int8(torch_npu: ModuleType, draw: torch.Generator, dtype: torch.dtype, turned: bool) -> None:
    x, w = int8(draw, 5, 2048), int8(draw, 24, 2048)
    scale, token = torch.rand(24, generator=draw) * 1e-4, torch.rand(5, generator=draw)
    right = w.T if turned else w.T.contiguous()
    got = torch_npu.npu_quant_matmul(x, right, scale, pertoken_scale=token, output_dtype=dtype)
    close(got, (x.double() @ w.double().T) * scale.double() * token.double()[:, None])


def test_int8_into_int32_is_exact(torch_npu: ModuleType, draw: torch.Generator) -> None:
    x, w = large(draw, 5, 4096), large(draw, 4096, 24)
    got = torch_npu.npu_quant_matmul(x, w, torch.ones(24), output_dtype=torch.int32)
    assert torch.equal(got.long(), x.long() @ w.long())


@pytest.mark.parametrize("kind", [torch.int32, BF16, torch.float32])
def test_int8_with_a_bias(torch_npu: ModuleType, draw: torch.Generator, kind: torch.dtype) -> None:
    """An integer bias is added in front of the scales, another one behind them."""
    x, w = int8(draw, 5, 64), int8(draw, 64, 24)
    scale, token = torch.rand(24, generator=draw), torch.rand(5, generator=draw)
    bias = torch.arange(-12, 12).to(kind) * 1000
    got = torch_npu.npu_quant_matmul(x, w, scale, pertoken_scale=token, bias=bias, output_dtype=BF16)
    sums, factor = x.double() @ w.double(), scale.double() * token.double()[:, None]
    close(got, (sums + bias) * factor if kind == torch.int32 else sums * factor + bias.double())


def test_int8_into_int8(torch_npu: ModuleType, draw: torch.Generator) -> None:
    x, w = int8(draw, 5, 64), int8(draw, 64, 24)
    scale, offset = torch.full((24,), 0.002), torch.arange(24) - 12.0
    wanted = ((x.double() @ w.double()) * scale.double() + offset).clamp(-128, 127)
    param = torch_npu.npu_trans_quant_param(torch.full((24,), 2.0**-9), offset)
    as_bits = ((x.double() @ w.double()) * 2.0**-9 + offset).clamp(-128, 127)
    for got, true in (
        (torch_npu.npu_quant_matmul(x, w, scale, offset=offset), wanted),
        (torch_npu.npu_quant_matmul(x, w, param), as_bits),
    ):
        assert got.dtype == torch.int8 and (got.double() - true).abs().max() <= 0.5 + 1e-5
        assert got.max() == 127 and got.min() == -128


def test_fp8_by_channel(torch_npu: ModuleType, soc: Soc, draw: torch.Generator) -> None:
    on_950(soc)
    x, w = fp8(draw, 5, 64), fp8(draw, 64, 24)
    scale, token = torch.rand(24, generator=draw), torch.rand(5, generator=draw)
    got = torch_npu.npu_quant_matmul(x, w, scale, pertoken_scale=token, output_dtype=torch.float32)
    close(got, (x.double() @ w.double()) * scale.double() * token.double()[:, None])


MX = {"output_dtype": torch.float32, "group_sizes": [1, 1, 32]}


@pytest.mark.parametrize("k", [64, 192, 96])
@pytest.mark.parametrize("turned", [False, True])
def test_mxfp8(torch_npu: ModuleType, soc: Soc, draw: torch.Generator, k: int, turned: bool) -> None:
    """96 is a block and a half of 64: the last scale is filling."""
    on_950(soc)
    x, w = fp8(draw, 5, k), fp8(draw, 24, k)
    left, right = exponents(draw, 5, -(-k // 64), 2), exponents(draw, 24, -(-k // 64), 2)
    bias = torch.randn(24, generator=draw)
    second, factor = w.T, right.transpose(0, 1)
    if not turned:
        second, factor = second.contiguous(), factor.contiguous()
    got = torch_npu.npu_quant_matmul(
        x,
        second,
        factor,
        pertoken_scale=left,
        bias=bias,
        scale_dtype=torch_npu.float8_e8m0fnu,
        pertoken_scale_dtype=torch_npu.float8_e8m0fnu,
        **MX,
    )
    close(got, scaled(x, left) @ scaled(w, right).T + bias.double())


def test_mxfp4(torch_npu: ModuleType, soc: Soc, draw: torch.Generator) -> None:
    on_950(soc)
    x, w = bytes_of(draw, 5, 64), bytes_of(draw, 24, 64)
    left, right = exponents(draw, 5, 2, 2), exponents(draw, 24, 2, 2)
    got = torch_npu.npu_quant_matmul(
        x,
        w.T,
        right.transpose(0, 1),
        pertoken_scale=left,
        x1_dtype=torch_npu.float4_e2m1fn_x2,
        x2_dtype=torch_npu.float4_e2m1fn_x2,
        scale_dtype=torch_npu.float8_e8m0fnu,
        pertoken_scale_dtype=torch_npu.float8_e8m0fnu,
        **MX,
    )
    close(got, scaled(fp4_values(x), left) @ scaled(fp4_values(w), right).T)


def test_mxfp8_by_mxfp4(torch_npu: ModuleType, soc: Soc, draw: torch.Generator) -> None:
    on_950(soc)
    x, w = fp8(draw, 5, 128), bytes_of(draw, 24, 64)
    left, right = exponents(draw, 5, 2, 2), exponents(draw, 24, 2, 2)
    got = torch_npu.npu_quant_matmul(
        x,
        w.T,
        right.transpose(0, 1),
        pertoken_scale=left,
        x2_dtype=torch_npu.float4_e2m1fn_x2,
        scale_dtype=torch_npu.float8_e8m0fnu,
        pertoken_scale_dtype=torch_npu.float8_e8m0fnu,
        output_dtype=BF16,
        group_sizes=[1, 1, 32],
    )
    close(got, scaled(x, left) @ scaled(fp4_values(w), right).T)


# Grouped: 7 rows, of which the groups have 3, none, 2 and 2 -----------------------------------------------------------

COUNTS = [3, 0, 2, 2]
OWNER = [0, 0, 0, 2, 2, 3, 3]


def grouped(torch_npu: ModuleType, x: Tensor, w: Tensor, *, counts: bool = False, **more: object) -> Tensor:
    groups = torch.tensor(COUNTS) if counts else torch.tensor(COUNTS).cumsum(0)
    (y,) = torch_npu.npu_grouped_matmul(
        [x], [w], group_list=groups, split_item=2, group_type=0, group_list_type=int(counts), **more
    )
    assert isinstance(y, Tensor)
    return y


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
def test_grouped_float(torch_npu: ModuleType, draw: torch.Generator, dtype: torch.dtype, counts: bool) -> None:
    x, w = torch.randn(7, 64, generator=draw).to(dtype), torch.randn(4, 24, 64, generator=draw).to(dtype)
    bias = torch.randn(4, 24, generator=draw).to(FP16 if dtype == FP16 else torch.float32)
    got = grouped(torch_npu, x, w.mT, counts=counts, bias=[bias])
    for row, expert in enumerate(OWNER):
        close(got[row], w[expert].double() @ x[row].double() + bias[expert].double())


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_grouped_int8(torch_npu: ModuleType, draw: torch.Generator, dtype: torch.dtype) -> None:
    x, w = int8(draw, 7, 2048), int8(draw, 4, 2048, 24)
    scale = (torch.rand(4, 24, generator=draw) * 1e-4).to(BF16 if dtype == BF16 else torch.float32)
    token = torch.rand(7, generator=draw)
    got = grouped(torch_npu, x, w, scale=[scale], per_token_scale=[token], output_dtype=dtype)
    for row, expert in enumerate(OWNER):
        sums = x[row].double() @ w[expert].double()
        close(got[row], sums * scale[expert].double() * token[row].double())


def test_grouped_int8_into_int32_is_exact(torch_npu: ModuleType, draw: torch.Generator) -> None:
    x, w = large(draw, 7, 4096), large(draw, 4, 4096, 24)
    got = grouped(torch_npu, x, w, output_dtype=torch.int32)
    for row, expert in enumerate(OWNER):
        assert torch.equal(got[row].long(), x[row].long() @ w[expert].long())


@pytest.mark.parametrize("compensated", [True, False])
def test_grouped_int4(torch_npu: ModuleType, draw: torch.Generator, compensated: bool) -> None:
    """Eight values in an int32 along N. The bias makes up for the 8 that is taken from every x: without it sums are
    wrong by 8 * sum(w * scale)."""
    x, w = int8(draw, 7, 64), torch.randint(-8, 8, (4, 64, 24), generator=draw)
    scale, token = torch.rand(4, 1, 24, generator=draw) * 1e-3, torch.rand(7, generator=draw)
    packed = torch.zeros(4, 64, 3, dtype=torch.int64)
    for place in range(8):
        packed |= (w[..., place::8] % 16) << (4 * place)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    missing = 8 * (w.double() * scale.double()).sum(1)
    bias = missing.float() if compensated else torch.zeros(4, 24)
    got = grouped(
        torch_npu,
        x,
        packed,
        counts=True,
        scale=[scale.view(torch.int32).long()],
        bias=[bias],
        per_token_scale=[token],
        output_dtype=BF16,
    )
    for row, expert in enumerate(OWNER):
        true = (x[row].double() @ w[expert].double()) * scale[expert, 0].double()
        close(got[row], (true - (0 if compensated else missing[expert])) * token[row].double())


@pytest.mark.parametrize("turned", [False, True])
def test_grouped_mxfp8(torch_npu: ModuleType, soc: Soc, draw: torch.Generator, turned: bool) -> None:
    on_950(soc)
    x, w = fp8(draw, 7, 128), fp8(draw, 4, 24, 128)
    left, right = exponents(draw, 7, 2, 2), exponents(draw, 4, 24, 2, 2)
    second, factor = w.mT, right.transpose(1, 2)
    if not turned:
        second, factor = second.contiguous(), factor.contiguous()
    got = grouped(
        torch_npu,
        x,
        second,
        scale=[factor],
        per_token_scale=[left],
        scale_dtype=torch_npu.float8_e8m0fnu,
        per_token_scale_dtype=torch_npu.float8_e8m0fnu,
        output_dtype=BF16,
    )
    for row, expert in enumerate(OWNER):
        close(got[row], scaled(w[expert], right[expert]) @ scaled(x[row], left[row]))


def test_grouped_mxfp8_by_mxfp4(torch_npu: ModuleType, soc: Soc, draw: torch.Generator) -> None:
    on_950(soc)
    x, w = fp8(draw, 7, 128), bytes_of(draw, 4, 32, 64)
    left, right = exponents(draw, 7, 2, 2), exponents(draw, 4, 32, 2, 2)
    got = grouped(
        torch_npu,
        x,
        w.mT,
        antiquant_scale=[right.transpose(1, 2)],
        per_token_scale=[left],
        weight_dtype=torch_npu.float4_e2m1fn_x2,
        per_token_scale_dtype=torch_npu.float8_e8m0fnu,
        output_dtype=BF16,
    )
    for row, expert in enumerate(OWNER):
        close(got[row], scaled(fp4_values(w[expert]), right[expert]) @ scaled(x[row], left[row]))


def test_rows_behind_the_groups_are_not_numbers(torch_npu: ModuleType, soc: Soc, draw: torch.Generator) -> None:
    """On 950 groups may end before the rows do."""
    on_950(soc)
    x, w = torch.randn(9, 16, generator=draw), torch.randn(4, 16, 8, generator=draw)
    got = grouped(torch_npu, x, w)
    assert not got[:7].isnan().any() and got[7:].isnan().all()


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
@pytest.mark.parametrize("turned", [False, True])
def test_transpose_batchmatmul(torch_npu: ModuleType, draw: torch.Generator, dtype: torch.dtype, turned: bool) -> None:
    """[B, M, K], or [M, B, K] with perm_x1: the result is [M, B, N] always."""
    x, w = torch.randn(3, 5, 64, generator=draw).to(dtype), torch.randn(3, 64, 16, generator=draw).to(dtype)
    if turned:
        got = torch_npu.npu_transpose_batchmatmul(x.transpose(0, 1).contiguous(), w, perm_x1=[1, 0, 2])
    else:
        got = torch_npu.npu_transpose_batchmatmul(x, w)
    assert got.shape == (5, 3, 16)
    for batch in range(3):
        close(got[:, batch], x[batch].double() @ w[batch].double())
