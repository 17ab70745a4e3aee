"""One element: rounding a value to what a code can hold, and the codes themselves.

Every rounding is to nearest, ties to even, and saturates at the largest magnitude. It is computed in the dtype of the
values and is exact in fp16, bf16, fp32 and fp64: PyTorch's own casts from fp64 to a narrow type round twice (through
fp32), and are slow on a CPU. NaN stays NaN in values; only e4m3 has a code for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType

import torch
from torch import Tensor

# dtype -> the integer dtype of its width, and the mask of its exponent bits
_EXPONENT = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


def _round_float(values: Tensor, top: float, smallest_normal: float, mantissa_bits: int) -> Tensor:
    """Nearest value of a small floating format, ties to even, saturating at +-top; sign of zero kept."""
    clamped = values.clamp(-top, top)
    bits, mask = _EXPONENT[values.dtype]
    power = (clamped.view(bits) & mask).view(values.dtype)  # the power of two at or below the magnitude
    step = power.clamp_(smallest_normal, top).mul_(2.0**-mantissa_bits)  # subnormals share the smallest normal's step
    return clamped.div_(step).round_().mul_(step)


def round_e4m3(values: Tensor) -> Tensor:
    """Nearest e4m3 value (OCP FP8, no infinities), ties to even, saturating at +-448; same dtype and shape."""
    return _round_float(values, 448.0, 2.0**-6, 3)


def round_e2m1(values: Tensor) -> Tensor:
    """Nearest e2m1 value (OCP MX spec), ties to even, saturating at +-6; same dtype and shape.

    Ties: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4.
    """
    return _round_float(values, 6.0, 1.0, 1)


def round_int(values: Tensor, top: int) -> Tensor:
    """Nearest integer, ties to even, saturating at +-top; same dtype and shape. Integers have no negative zero."""
    return values.round().clamp_(-top, top).add_(0.0)


def cut_hf32(values: Tensor) -> Tensor:
    """float32 or float64 values cut to Ascend's HF32: 10 bits of mantissa, towards zero; same dtype and shape.

    NaN may become infinity. The gradient is zero: only profiles without gradients multiply in HF32.
    """
    bits, kept = {torch.float32: (torch.int32, -1 << 13), torch.float64: (torch.int64, -1 << 42)}[values.dtype]
    return (values.contiguous().view(bits) & kept).view(values.dtype)


def encode_e2m1(values: Tensor) -> Tensor:
    """Values rounded as in `round_e2m1` -> codes 0..15, uint8: 3 bits of magnitude, sign above (-0 is 8).

    NaN has no code: what it becomes is undefined.
    """
    rounded = round_e2m1(values)
    size = rounded.abs()
    # codes 0..4 stand for steps of 0.5 up to 2, then two steps of 1 up to 4, then one of 2 up to 6
    code = size.clamp(max=2) * 2 + (size - 2).clamp(0, 2) + (size - 4).clamp(0, 2) / 2
    return code.to(torch.uint8) | (rounded.signbit().to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes 0..15 -> 0, .5, 1, 1.5, 2, 3, 4, 6, -0, -.5, ..., -6 in `dtype`."""
    size = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = torch.tensor(size + [-s for s in size], dtype=dtype, device=codes.device)
    return table[codes.int()]


def encode_int4(values: Tensor) -> Tensor:
    """Values rounded to -7..7 -> two's complement codes 0..15, uint8."""
    return round_int(values, 7).to(torch.int8).view(torch.uint8) & 15


def decode_int4(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes 0..15 -> 0..7, -8..-1 in `dtype`."""
    return ((codes.to(torch.int8) ^ 8) - 8).to(dtype)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0..15 [..., 2n] uint8 -> [..., n] int8; the even (first) element goes to the low nibble.

    ValueError for an odd number of elements.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"two codes share a byte: the last axis must be even, shape is {tuple(codes.shape)}")
    return (codes[..., 0::2] | codes[..., 1::2] << 4).view(torch.int8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Packed [..., n] int8 -> codes 0..15 [..., 2n] uint8: low nibble first."""
    both = packed.view(torch.uint8)
    return torch.stack([both & 15, both >> 4], -1).flatten(-2)


def power_of_two_ceil(x: Tensor) -> Tensor:
    """2^ceil(log2 x) of x > 0, exactly, subnormals included; same dtype.

    Infinity where the power exceeds the dtype; NaN for zero, infinity and NaN; negative x is not looked for.
    """
    mantissa, _ = torch.frexp(x)  # x = mantissa * 2^e with mantissa in [0.5, 1): the quotient is 2^e without error
    return torch.where(mantissa == 0.5, x, x / mantissa)


Decode = Callable[[Tensor, torch.dtype], Tensor]

_PAIR = {2: torch.int32, 4: torch.int64, 8: torch.complex128}  # bytes of a value -> a dtype as wide as two of them


@cache
def _pair_table(decode: Decode, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256] items of two values each: what every packed byte stands for."""
    every_byte = torch.arange(256, dtype=torch.uint8, device=device).view(torch.int8)
    return decode(unpack_nibbles(every_byte), dtype).view(_PAIR[dtype.itemsize])


def _decode_pairs(packed: Tensor, dtype: torch.dtype, decode: Decode) -> Tensor:
    """Packed [..., n] -> values [..., 2n]: one look-up a byte, nothing of the output's size beside it but the index."""
    table = _pair_table(decode, dtype, packed.device)
    index = packed.view(torch.uint8).to(torch.int32).flatten()
    return table.index_select(0, index).view(dtype).view(*packed.shape[:-1], 2 * packed.shape[-1])


@dataclass(frozen=True)
class Element:
    """The arithmetic of one element code.

    round   values -> nearest values that have a code, same dtype
    encode  values -> stored codes of the nearest values, packed along the last axis where two share a byte
    decode  stored codes, dtype -> values in a new tensor
    """

    round: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    decode: Decode


ELEMENTS: Mapping[str, Element] = MappingProxyType(
    {
        "e4m3": Element(
            round_e4m3,
            lambda v: round_e4m3(v).to(torch.float8_e4m3fn),
            lambda codes, dtype: codes.to(dtype),
        ),
        "e2m1": Element(
            round_e2m1,
            lambda v: pack_nibbles(encode_e2m1(v)),
            partial(_decode_pairs, decode=decode_e2m1),
        ),
        "int8": Element(
            partial(round_int, top=127),
            lambda v: round_int(v, 127).to(torch.int8),
            lambda codes, dtype: codes.to(dtype),
        ),
        "int4": Element(
            partial(round_int, top=7),
            lambda v: pack_nibbles(encode_int4(v)),
            partial(_decode_pairs, decode=decode_int4),
        ),
    }
)
