"""Emulated quantisation, against float64 and against tables of the formats that are written down here."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.ascend.devices import Soc
from dsv4_hal.backends.ascend.emulator.quantize import quant_param

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E4M3 = [(m / 8) * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
E4M3.pop()  # the last code is NaN
NEEDS_950 = "MX formats are of Ascend 950"


def nearest(value: float, grid: list[float]) -> float:
    """The nearest magnitude, of two the one with the even code, with value's sign."""
    size = min(abs(value), grid[-1])
    code = min(range(len(grid)), key=lambda i: (abs(grid[i] - size), i % 2))
    return math.copysign(grid[code], value)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    g = torch.Generator().manual_seed(4)
    return (torch.randn(*shape, generator=g) * torch.logspace(-4, 3, shape[-1]).flip(0)).to(dtype)


def values_fp4(packed: Tensor) -> Tensor:
    codes = torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2).long()
    return torch.tensor([*E2M1, *[-v for v in E2M1]], dtype=torch.float64)[codes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dynamic_quant_to_int8(torch_npu: ModuleType, dtype: torch.dtype) -> None:
    x = numbers(6, 40, dtype=dtype)
    codes, scale = torch_npu.npu_dynamic_quant(x)
    true = x.double().abs().amax(-1) / 127
    torch.testing.assert_close(scale.double(), true, rtol=1e-7, atol=0)
    exact = x.double() / true[:, None]
    assert codes.dtype == torch.int8 and codes.abs().max() == 127
    assert (codes.double() - exact).abs().max() <= 0.5 + 1e-4


def test_dynamic_quant_rounds_ties_to_even(torch_npu: ModuleType) -> None:
    codes, scale = torch_npu.npu_dynamic_quant(torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5]]).bfloat16())
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2]] and scale.tolist() == [1]


def test_dynamic_quant_of_zeros(torch_npu: ModuleType) -> None:
    codes, scale = torch_npu.npu_dynamic_quant(torch.zeros(2, 8, dtype=torch.bfloat16))
    assert not codes.any() and not scale.any()


def test_dynamic_quant_is_smoothed(torch_npu: ModuleType) -> None:
    x, smooth = numbers(3, 16), torch.linspace(0.5, 2, 16).bfloat16()
    codes, scale = torch_npu.npu_dynamic_quant(x, smooth_scales=smooth)
    smoothed = x.double() * smooth.double()
    torch.testing.assert_close(
        codes.double() * scale[:, None].double(), smoothed, rtol=0, atol=float(scale.max()) / 1.9
    )


def test_dynamic_quant_to_fp8(torch_npu: ModuleType, soc: Soc) -> None:
    if soc.name != "ascend950":
        pytest.skip("FP8 is of Ascend 950")
    x = numbers(4, 32)
    codes, scale = torch_npu.npu_dynamic_quant(x, dst_type=torch_npu.float8_e4m3fn)
    for row in range(4):
        top = float(x[row].double().abs().max()) / 448
        assert math.isclose(float(scale[row]), top, rel_tol=1e-6)
        for code, value in zip(codes[row].double().tolist(), x[row].double().tolist(), strict=True):
            assert code == nearest(value / float(scale[row]), E4M3)


@pytest.mark.parametrize("scale_alg", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [128, 96, 40])
def test_mx_quant_to_fp8(torch_npu: ModuleType, soc: Soc, scale_alg: int, dtype: torch.dtype, columns: int) -> None:
    """Blocks of 32, the last one ragged; scales in pairs, filled with zeros."""
    if soc.name != "ascend950":
        pytest.skip(NEEDS_950)
    x = numbers(5, columns, dtype=dtype)
    codes, scale = torch_npu.npu_dynamic_mx_quant(x, dst_type=torch_npu.float8_e4m3fn, scale_alg=scale_alg)
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (5, -(-columns // 64), 2)
    flat = scale.flatten(1).tolist()
    for row in range(5):
        for block in range(-(-columns // 32)):
            part = x[row, block * 32 : block * 32 + 32].double().tolist()
            largest = max(map(abs, part))
            exponent = math.floor(math.log2(largest)) - 8 if scale_alg == 0 else math.ceil(math.log2(largest / 448))
            assert flat[row][block] == exponent + 127
            got = codes[row, block * 32 : block * 32 + 32].double().tolist()
            assert got == [nearest(v / 2.0**exponent, E4M3) for v in part]
        assert not any(flat[row][-(-columns // 32) :])


def test_mx_quant_of_ocp_saturates_where_the_other_does_not(torch_npu: ModuleType, soc: Soc) -> None:
    if soc.name != "ascend950":
        pytest.skip(NEEDS_950)
    x = torch.full((1, 32), 500.0).bfloat16()  # 500 = 1.95 * 2 ** 8
    got = {}
    for alg in (0, 1):
        codes, scale = torch_npu.npu_dynamic_mx_quant(x, dst_type=torch_npu.float8_e4m3fn, scale_alg=alg)
        got[alg] = float(codes[0, 0].double() * 2.0 ** (int(scale[0, 0, 0]) - 127))
    assert got == {0: 448.0, 1: 512.0}


def test_mx_quant_scale_at_a_power_of_two(torch_npu: ModuleType, soc: Soc) -> None:
    """448 * 2 ** k needs 2 ** k, the next number above needs twice that."""
    if soc.name != "ascend950":
        pytest.skip(NEEDS_950)
    x = torch.tensor([[448.0] * 32 + [450.0] * 32 + [7.0] * 32 + [0.0] * 32])
    _, scale = torch_npu.npu_dynamic_mx_quant(x, dst_type=torch_npu.float8_e4m3fn, scale_alg=1)
    assert scale.flatten().tolist() == [127, 128, 121, 0]


def test_mx_quant_with_a_lower_bound(torch_npu: ModuleType, soc: Soc) -> None:
    if soc.name != "ascend950":
        pytest.skip(NEEDS_950)
    x = torch.full((1, 64), 1e-6).bfloat16()
    for bound, exponent in (
        (0.0, math.ceil(math.log2(float(x[0, 0]) / 448))),
        (1e-4, math.ceil(math.log2(1e-4 / 448))),
    ):
        _, scale = torch_npu.npu_dynamic_mx_quant(x, dst_type=torch_npu.float8_e4m3fn, scale_alg=1, max_low_bound=bound)
        assert scale.flatten().tolist() == [exponent + 127] * 2


def test_mx_quant_of_what_is_not_finite(torch_npu: ModuleType, soc: Soc) -> None:
    if soc.name != "ascend950":
        pytest.skip(NEEDS_950)
    x = torch.ones(1, 64).bfloat16()
    x[0, 3] = float("inf")
    codes, scale = torch_npu.npu_dynamic_mx_quant(x, dst_type=torch_npu.float8_e4m3fn)
    assert scale.flatten().tolist() == [255, 119] and codes[0, :32].isnan().all() and not codes[0, 32:].isnan().any()


@pytest.mark.parametrize("mode", ["rint", "round", "floor"])
def test_mx_quant_to_fp4(torch_npu: ModuleType, soc: Soc, mode: str) -> None:
    """With a scale of one: every quarter between -7 and 7, in the three roundings."""
    if soc.name != "ascend950":
        pytest.skip(NEEDS_950)
    values = [i / 4 for i in range(-28, 29)]
    for start in range(0, len(values), 31):
        part = [6.0, *values[start : start + 31]]
        part += [0.0] * (32 - len(part))
        packed, scale = torch_npu.npu_dynamic_mx_quant(
            torch.tensor([part]), dst_type=torch_npu.float4_e2m1fn_x2, round_mode=mode
        )
        assert packed.dtype == torch.uint8 and scale[0, 0, 0] == 127
        signed = sorted({s * v for v in E2M1 for s in (1.0, -1.0)})
        for got, value in zip(values_fp4(packed)[0].tolist(), part, strict=True):
            if mode == "floor":
                wanted = max([v for v in signed if v <= value], default=-6.0)
            elif mode == "round":
                wanted = min(signed, key=lambda v: (abs(v - value), -abs(v)))
            else:
                wanted = nearest(value, E2M1)
            assert got == wanted, (value, mode)


def test_mx_quant_along_another_axis(torch_npu: ModuleType, soc: Soc) -> None:
    """Two neighbouring scales of a column lie together: [K / 64, columns, 2]."""
    if soc.name != "ascend950":
        pytest.skip(NEEDS_950)
    x = numbers(128, 24)
    codes, scale = torch_npu.npu_dynamic_mx_quant(x, axis=0, dst_type=torch_npu.float8_e4m3fn)
    turned, flat = torch_npu.npu_dynamic_mx_quant(x.T.contiguous(), dst_type=torch_npu.float8_e4m3fn)
    assert scale.shape == (2, 24, 2)
    assert torch.equal(codes.view(torch.uint8), turned.view(torch.uint8).T)
    for column in range(24):
        for block in range(4):
            assert scale[block // 2, column, block % 2] == flat[column, block // 2, block % 2]


def test_trans_quant_param(torch_npu: ModuleType) -> None:
    scale = torch.tensor([1.0, 0.1, 3e-5, 7.3])
    cut = torch_npu.npu_trans_quant_param(scale)
    for got, value in zip(cut.tolist(), scale.tolist(), strict=True):
        bits = int(torch.tensor(value).view(torch.int32))
        assert got == (bits & 0xFFFFE000) | 1 << 46
    rounded, _ = quant_param(torch_npu.npu_trans_quant_param(scale, round_mode=1))
    assert ((rounded - scale) / scale).abs().max() <= 2.0**-11
    ties = torch.tensor([0x3F801000, 0x3F803000], dtype=torch.int32).view(torch.float32)
    even = quant_param(torch_npu.npu_trans_quant_param(ties, round_mode=1))[0].view(torch.int32)
    assert even.tolist() == [0x3F800000, 0x3F804000]
    back, offset = quant_param(torch_npu.npu_trans_quant_param(scale, torch.tensor([-3.0, 300, -300, 2.4])))
    assert torch.equal(back, quant_param(cut)[0]) and offset.tolist() == [-3, 255, -256, 2]
