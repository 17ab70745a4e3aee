"""Element codes against a decoding written here with fractions and bits, never with the code under test."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from dsv4_hal.formats.elements import (
    ELEMENTS,
    decode_e2m1,
    decode_int4,
    encode_e2m1,
    encode_int4,
    pack_nibbles,
    power_of_two_ceil,
    round_e2m1,
    round_e4m3,
    round_int,
    unpack_nibbles,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BYTES = torch.arange(256, dtype=torch.uint8)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3_magnitude(code: int) -> Fraction:
    """Codes 0..126: 4 bits of exponent with bias 7, 3 of mantissa, no infinity."""
    exponent, mantissa = code >> 3, code & 7
    return Fraction(mantissa, 8) / 64 if exponent == 0 else (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


def nearest(value: float, magnitudes: list[Fraction]) -> float:
    """To nearest, ties to the even code, saturating, sign of zero kept: by exact comparison."""
    size = abs(Fraction(value))
    code = min(range(len(magnitudes)), key=lambda c: (abs(magnitudes[c] - size), c % 2))
    return math.copysign(float(magnitudes[code]), value)


def same(got: torch.Tensor, want: list[float]) -> bool:
    """Equal, signs of zero included; NaN equals NaN."""
    a, b = got.double().numpy(), np.array(want, dtype=np.float64)
    return (
        got.shape == b.shape
        and bool((np.isnan(a) == np.isnan(b)).all())
        and all(x == y and math.copysign(1, x) == math.copysign(1, y) for x, y in zip(a, b, strict=True) if x == x)
    )


MAGNITUDES = {
    "e4m3": [e4m3_magnitude(c) for c in range(127)],
    "e2m1": [Fraction(v) for v in E2M1],
    "int8": [Fraction(v) for v in range(128)],
    "int4": [Fraction(v) for v in range(8)],
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_e4m3_code(dtype: torch.dtype) -> None:
    want = [float(e4m3_magnitude(c)) for c in range(127)] + [math.nan]
    want += [-v for v in want]
    values = ELEMENTS["e4m3"].decode(BYTES.view(torch.float8_e4m3fn), dtype)
    assert values.dtype == dtype and same(values, want)
    codes = ELEMENTS["e4m3"].encode(values).view(torch.uint8)
    keep = BYTES & 127 != 127
    assert torch.equal(codes[keep], BYTES[keep]) and (codes[~keep] & 127 == 127).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_e8m0_code_survives_torch_casts(dtype: torch.dtype) -> None:
    """Code 0 is 2^-127, a subnormal of fp32 that a kernel may flush; 255 is NaN."""
    want = [2.0 ** (c - 127) for c in range(255)] + [math.nan]
    assert same(BYTES.view(torch.float8_e8m0fnu).to(dtype), want)
    for copies in (1, 64):  # the vectorised path as well as the tail
        values = torch.tensor(want, dtype=torch.float64).to(dtype).repeat(copies)
        assert torch.equal(values.to(torch.float8_e8m0fnu).view(torch.uint8), BYTES.repeat(copies))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_e2m1_code(dtype: torch.dtype) -> None:
    want = E2M1 + [-v for v in E2M1]
    codes = torch.arange(16, dtype=torch.uint8)
    assert decode_e2m1(codes, dtype).dtype == dtype and same(decode_e2m1(codes, dtype), want)
    assert torch.equal(encode_e2m1(torch.tensor(want, dtype=dtype)), codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_of_two_codes(dtype: torch.dtype) -> None:
    packed = BYTES.view(torch.int8).view(16, 16)
    e2m1 = E2M1 + [-v for v in E2M1]
    int4 = [float(c if c < 8 else c - 16) for c in range(16)]
    for element, table in (("e2m1", e2m1), ("int4", int4)):
        values = ELEMENTS[element].decode(packed, dtype)
        assert values.dtype == dtype and values.shape == (16, 32)
        assert same(values.flatten(), [table[n] for byte in range(256) for n in (byte & 15, byte >> 4)])
    assert torch.equal(ELEMENTS["e2m1"].encode(ELEMENTS["e2m1"].decode(packed, dtype)), packed)


def test_int4_codes() -> None:
    values = torch.arange(-7, 8).float()
    assert encode_int4(values).tolist() == [9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7]
    assert torch.equal(decode_int4(encode_int4(values)), values)


def test_nibbles_first_element_low() -> None:
    codes = torch.tensor([[1, 2, 15, 0], [8, 7, 0, 9]], dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.dtype == torch.int8 and packed.view(torch.uint8).tolist() == [[0x21, 0x0F], [0x78, 0x90]]
    assert torch.equal(unpack_nibbles(packed), codes)
    with pytest.raises(ValueError, match="even"):
        pack_nibbles(codes[:, :3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("element", list(MAGNITUDES))
def test_rounding_at_and_around_every_tie(element: str, dtype: torch.dtype) -> None:
    grid = MAGNITUDES[element]
    middles = [float((a + b) / 2) for a, b in itertools.pairwise(grid)]
    x = torch.tensor([*middles, *map(float, grid), float(grid[-1]) * 1.1, 1e4], dtype=dtype)
    # numpy has no bf16, and torch no nextafter for fp16: neighbours by the bits
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    positive = x[x > 0]
    x = torch.cat([x, (positive.view(bits) + 1).view(dtype), (positive.view(bits) - 1).view(dtype)])
    x = torch.cat([x, -x])
    want = [nearest(v, grid) for v in x.double().tolist()]
    if element.startswith("int"):
        want = [v + 0.0 for v in want]  # integers have no -0
    got = ELEMENTS[element].round(x)
    assert got.dtype == dtype and same(got, want)
    assert same(ELEMENTS[element].decode(ELEMENTS[element].encode(x), dtype), want)
    infinite = torch.tensor([math.inf, -math.inf], dtype=dtype)
    assert ELEMENTS[element].round(infinite).tolist() == [float(grid[-1]), -float(grid[-1])]


def test_named_e2m1_ties() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    want = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert round_e2m1(x).tolist() == want and decode_e2m1(encode_e2m1(x)).tolist() == want


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan(dtype: torch.dtype) -> None:
    x = torch.tensor([math.nan, 1.0], dtype=dtype)
    for rounded in (round_e4m3(x), round_e2m1(x), round_int(x, 127)):
        assert rounded.isnan().tolist() == [True, False]


def test_fp64_is_not_rounded_twice() -> None:
    """Just above a tie, by less than fp32 can see: PyTorch's cast goes through fp32 and takes the even neighbour."""
    x = torch.tensor([1.0625 + 1e-12], dtype=torch.float64)
    assert round_e4m3(x).item() == 1.125
    assert ELEMENTS["e4m3"].encode(x).float().item() == 1.125


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.float32, -149, 127), (torch.float64, -1074, 1023)])
def test_power_of_two_ceil(dtype: torch.dtype, low: int, high: int) -> None:
    powers = [2.0**e for e in range(low, high + 1)]
    assert power_of_two_ceil(torch.tensor(powers, dtype=dtype)).tolist() == powers
    normal = torch.tensor([p for p in powers if p >= 2.0 ** (low + 30)][:-1], dtype=dtype)
    above, below = torch.nextafter(normal, 2 * normal), torch.nextafter(normal, 0 * normal)
    assert torch.equal(power_of_two_ceil(above), 2 * normal)
    assert torch.equal(power_of_two_ceil(below), normal)
    odd = torch.tensor([3 * 2.0**low, 5 * 2.0**low], dtype=dtype)
    assert power_of_two_ceil(odd).tolist() == [2.0 ** (low + 2), 2.0 ** (low + 3)]


def test_power_of_two_ceil_outside_its_domain() -> None:
    x = torch.tensor([0.0, math.inf, math.nan])
    assert power_of_two_ceil(x).isnan().all()
    assert power_of_two_ceil(torch.tensor([1.5 * 2.0**127])).item() == math.inf
