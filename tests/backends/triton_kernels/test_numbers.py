"""The arithmetic of formats inside kernels, against `dsv4_hal.formats` bit for bit. Interpreted."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

import triton
import triton.language as tl

from dsv4_hal import formats
from dsv4_hal.backends.triton_kernels import numbers
from dsv4_hal.backends.triton_kernels.runtime import launch


@triton.jit
def apply(source, target, FUNCTION: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(target + at, FUNCTION(tl.load(source + at)))


def applied(function: object, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    size = 1 << (len(x) - 1).bit_length()
    source, out = torch.cat([x, x[:1].expand(size - len(x))]), torch.zeros(size, dtype=dtype)
    launch(apply, (1,), source, out, FUNCTION=function, COUNT=size)
    return out[: len(x)]


CODES = torch.arange(256, dtype=torch.uint8)


def every_bf16() -> torch.Tensor:
    """Every bfloat16 value as float32, and values just beside each: all ties of small formats, and their neighbours."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = values[values.isfinite()]
    return torch.cat([values, torch.nextafter(values, values * 2), torch.nextafter(values, values / 2)])


def test_e4m3_codes():
    want = CODES.view(torch.float8_e4m3fn).float()
    got = applied(numbers.decode_e4m3, CODES, torch.float32)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[128:].signbit(), torch.ones(128, dtype=torch.bool))  # of zero, too


def test_e8m0_codes():
    want = CODES.view(torch.float8_e8m0fnu).float()
    torch.testing.assert_close(applied(numbers.decode_e8m0, CODES, torch.float32), want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(applied(numbers.encode_e8m0, want[:255], torch.uint8), CODES[:255])


def test_e2m1_codes():
    codes = CODES[:16]
    assert torch.equal(applied(numbers.decode_e2m1, codes, torch.float32), formats.decode_e2m1(codes))


@pytest.mark.parametrize("bits", ["e4m3", "e2m1"])
def test_rounding(bits):
    x = every_bf16()
    rounded, known = {
        "e4m3": (numbers.round_e4m3, formats.round_e4m3),
        "e2m1": (numbers.round_e2m1, formats.round_e2m1),
    }[bits]
    assert torch.equal(applied(rounded, x, torch.float32).view(torch.int32), known(x).view(torch.int32))


def test_encoding():
    x = every_bf16()
    assert torch.equal(
        applied(numbers.encode_e4m3, x, torch.uint8), formats.round_e4m3(x).to(torch.float8_e4m3fn).view(torch.uint8)
    )
    assert torch.equal(applied(numbers.encode_e2m1, x, torch.uint8), formats.encode_e2m1(x))
    nan = torch.tensor([float("nan")])
    assert applied(numbers.encode_e4m3, nan, torch.uint8).item() == 0x7F


def test_power_of_two_ceil():
    x = every_bf16()
    x = x[(x >= 2.0**-126) & (x <= 2.0**126)]
    assert torch.equal(applied(numbers.power_of_two_ceil, x, torch.float32), formats.power_of_two_ceil(x))


def test_exponentials_and_logarithms():
    x = torch.tensor([0.0, -0.5, 1e-6, 17.25, -86.0, 88.0, -1e4, 1e4, float("inf"), float("nan")])
    want = x.clamp(min=-87).double().exp().float()
    torch.testing.assert_close(applied(numbers.exponential, x, torch.float32), want, rtol=3e-7, atol=0, equal_nan=True)
    x = torch.tensor([1.0, 1 + 2**-20, 1 - 2**-20, 0.5, 2.0, 1.4142135, 1e-30, 3e38, float("inf"), float("nan")])
    got, want = applied(numbers.logarithm, x, torch.float32), x.double().log().float()
    torch.testing.assert_close(got, want, rtol=3e-7, atol=0, equal_nan=True)
