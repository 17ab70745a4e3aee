"""How Ascend operators write dtypes, packed values and block scales.

Dtypes of a call are integers: torch's own (`torch.int8` arrives as 1), or those of torch_npu, which are 256 more than
CANN's. Two FP4 values lie in a byte and eight INT4 values in 32 bits, the first in the lowest bits (ops-nn,
convert_weight_to_int4_pack, commit 5657d0a9). MX scales are bytes with the exponent of a power of two, of which
neighbours along K lie in pairs: [.., K / 64, .., 2].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

E8M0, E4M3, E5M2, FP4 = torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2
CODES: Mapping[int, torch.dtype] = MappingProxyType(
    {
        0: torch.uint8,
        1: torch.int8,
        3: torch.int32,
        4: torch.int64,
        5: torch.float16,
        6: torch.float32,
        15: torch.bfloat16,
        16: torch.quint4x2,
        23: E5M2,
        24: E4M3,
        44: E8M0,
        45: FP4,
        291: E5M2,
        292: E4M3,
        293: E8M0,
        296: FP4,
    }
)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes, by the lower three bits of the code


def dtype_of(code: int | None) -> torch.dtype | None:
    """What an integer argument means; None where it is not given, or means a dtype that torch lacks."""
    return None if code is None else CODES.get(code)


def transposed(t: Tensor) -> bool:
    """Whether a matrix, or a batch of them, is the transposed view of one that lies in memory row by row.

    How op-plugin tells it, too: of a matrix with a row or a column of one element, nobody can."""
    return t.dim() >= 2 and t.stride(-2) == 1 and t.stride(-1) == t.shape[-2]


def unpack_fp4(packed: Tensor, axis: int) -> Tensor:
    """Bytes with two E2M1 codes each along `axis` -> their values, float32."""
    codes = _fields(packed.view(torch.uint8).to(torch.int32), axis, bits=4, count=2)
    values = torch.tensor([*E2M1, *(-v for v in E2M1)])
    return values[codes]


def unpack_int4(packed: Tensor, axis: int) -> Tensor:
    """int32 with eight signed values each along `axis` -> int32 between -8 and 7."""
    codes = _fields(packed, axis, bits=4, count=8)
    return codes - 16 * (codes > 7).to(codes.dtype)


def pack_int4(values: Tensor) -> Tensor:
    """int32 between -8 and 7 -> int32, eight of the last axis in one."""
    fields = (values.to(torch.int64) & 0xF).unflatten(-1, (-1, 8))
    whole = (fields << (4 * torch.arange(8))).sum(-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def power_of_two(scale: Tensor) -> Tensor:
    """Exponent bytes -> 2 ** (byte - 127), float32; 255 is NaN."""
    return scale.view(torch.uint8).view(E8M0).to(torch.float32)


def to_hf32(values: Tensor) -> Tensor:
    """float32 values with their lowest 13 bits of mantissa dropped."""
    return (values.contiguous().view(torch.int32) >> 13 << 13).view(torch.float32)


def spread(scale: Tensor, axis: int, count: int, block: int = 32) -> Tensor:
    """Scales in pairs [.., blocks / 2, .., 2] -> one for each of `count` elements along `axis`, pairs left out."""
    axis = axis % (scale.dim() - 1)
    whole = scale.movedim(-1, axis + 1).flatten(axis, axis + 1)
    return whole.repeat_interleave(block, axis).narrow(axis, 0, count)


def in_pairs(scale: Tensor, axis: int) -> Tensor:
    """The inverse for scales that are one a block: filled with zeros to an even number, neighbours as a last axis."""
    axis = axis % scale.dim()
    if scale.shape[axis] % 2:
        shape = list(scale.shape)
        shape[axis] = 1
        scale = torch.cat([scale, scale.new_zeros(shape)], axis)
    return scale.unflatten(axis, (-1, 2)).movedim(axis + 1, -1).contiguous()


def undefined(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What no document promises a value of: NaN, or the lowest integer, so that nobody reads it unnoticed."""
    low = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(tuple(shape), low, dtype=torch.float32 if dtype.is_floating_point else dtype).to(dtype)


def _fields(packed: Tensor, axis: int, bits: int, count: int) -> Tensor:
    axis = axis % packed.dim()
    shifts = (bits * torch.arange(count, dtype=packed.dtype)).reshape(-1, *[1] * (packed.dim() - 1 - axis))
    return ((packed.unsqueeze(axis + 1) >> shifts) & ((1 << bits) - 1)).flatten(axis, axis + 1)
