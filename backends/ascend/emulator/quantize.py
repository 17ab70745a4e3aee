"""Activations into INT8, FP8 and MX formats, and the parameters of quantised products.

Read from documents and kernels, not run: what they leave open stands with each operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.backends.ascend.emulator.call import emulated
from dsv4_hal.backends.ascend.emulator.numbers import E2M1, E4M3, E5M2, FP4, dtype_of, in_pairs, power_of_two

TOP = {torch.int8: 127.0, E4M3: 448.0, E5M2: 57344.0}  # largest magnitude
EXPONENT = {E4M3: 8, E5M2: 15, FP4: 2}  # of the largest normal number


@emulated("npu::npu_dynamic_quant")
def npu_dynamic_quant(
    input: Tensor,
    smooth_scales: Tensor | None,
    group_index: Tensor | None,
    dst_type: int | None,
    quant_mode: str,
    dst_type_max: float,
) -> tuple[Tensor, Tensor]:
    """Codes of a token and its float32 scale: scale = max(|x|) / top, code = round(x / scale), ties to even.

    A token of zeros has scale 0; its quotients are NaN, which the documents do not follow further: here FP8 codes are
    NaN, INT8 codes 0. The 950's kernel (ops-nn, dynamic_quant_regbase_full_load.h, commit 6a826002) multiplies by
    float32(1 / top) where the document divides: the last bit of a scale may differ.
    """
    dtype = dtype_of(dst_type) or torch.int8
    x = input.to(torch.float32)
    if smooth_scales is not None:
        x = x * smooth_scales.to(torch.float32)
    scale = x.abs().amax(-1) / TOP[dtype]
    return _code(x / scale.unsqueeze(-1), dtype), scale


@emulated("npu::npu_dynamic_mx_quant")
def npu_dynamic_mx_quant(
    input: Tensor,
    axis: int,
    round_mode: str,
    dst_type: int,
    block_size: int,
    scale_alg: int | None,
    dst_type_max: float,
    max_low_bound: float,
) -> tuple[Tensor, Tensor]:
    """Codes, and a power of two for `block_size` of them along `axis`: [.., blocks / 2, .., 2] bytes, see `numbers`.

    scale_alg 0 (OCP)     exponent of the largest magnitude, less that of the format's largest number: codes saturate
    scale_alg 1 (cuBLAS)  largest magnitude / largest number of the format, rounded up to a power of two

    Formulas: ops-nn, aclnnDynamicMxQuantV3.md, commit 0c8fd4c8. Exponents below -127 become -127; a block with NaN or
    infinity has scale NaN. The kernel of that commit's FP8 (dynamic_mx_quant_tail_axis_fp8.h) writes exponent -127
    for a block of zeros whatever max_low_bound says; here the document's formula holds. Both mean zeros.
    """
    dtype = dtype_of(dst_type)
    assert dtype is not None  # a rule
    axis = axis % input.dim()
    x = input.to(torch.float32)
    missing = -x.shape[axis] % block_size
    if missing:
        shape = list(x.shape)
        shape[axis] = missing
        x = torch.cat([x, x.new_zeros(shape)], axis)
    blocks = x.unflatten(axis, (-1, block_size))
    largest = blocks.abs().amax(axis + 1)
    exponent = _exponent(largest.clamp(min=max_low_bound), dtype, scale_alg == 1)
    byte = torch.where(largest.isfinite(), exponent.clamp(-127, 127) + 127, 255).to(torch.uint8)
    quotients = (blocks / power_of_two(byte).unsqueeze(axis + 1)).flatten(axis, axis + 1)
    quotients = quotients.narrow(axis, 0, input.shape[axis])
    codes = _e2m1(quotients, round_mode) if dtype == FP4 else _code(quotients, dtype)
    return codes, in_pairs(byte, axis)


def _exponent(largest: Tensor, dtype: torch.dtype, upwards: bool) -> Tensor:
    """Of the scale of blocks with these largest magnitudes; of zero it is the lowest one."""
    mantissa, exponent = torch.frexp(largest / TOP[dtype] if upwards else largest)  # mantissa in [0.5, 1)
    moved = exponent - (mantissa == 0.5).int() if upwards else exponent - 1 - EXPONENT[dtype]
    return torch.where(largest == 0, -127, moved)


@emulated("npu::npu_trans_quant_param")
def npu_trans_quant_param(scale: Tensor, offset: Tensor | None, round_mode: int | None) -> Tensor:
    """float32 -> int64 as the matrix unit reads it: the upper 19 bits of the float, bit 46, and in bits 37 to 45 the
    offset as a signed integer. ops-nn, trans_quant_param_v2/README.md, commit 3605f5c0.

    round_mode 0 cuts the float; 1 rounds it to nearest, of which the document does not say how ties go: here to even.
    """
    bits = scale.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if round_mode == 1:
        bits = (bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFFFFF
    out = (bits & 0xFFFFE000) | (1 << 46)
    if offset is None:
        return out
    return out | ((offset.round().clamp(-256, 255).to(torch.int64) & 0x1FF) << 37)


def quant_param(param: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse: float32 scale, and offset."""
    scale = (param & 0xFFFFFFFF).to(torch.uint32).view(torch.float32)
    offset = (param >> 37) & 0x1FF
    return scale, (offset - 512 * (offset > 255).to(offset.dtype)).to(torch.float32)


def _code(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To nearest, ties to even, saturating; NaN stays where the format has one, else becomes 0."""
    top = TOP[dtype]
    if dtype == torch.int8:
        return x.nan_to_num(0.0, top, -top).round().clamp(-top, top).to(dtype)
    return x.clamp(-top, top).to(dtype)


def _e2m1(x: Tensor, round_mode: str) -> Tensor:
    """Two codes a byte along the last axis; saturating. `rint` is to nearest, ties to even codes; `round` takes ties
    away from zero; `floor` goes down. NaN has no code: 0."""
    grid = torch.tensor(E2M1)
    size = x.abs().nan_to_num(0.0).clamp(max=grid[-1])
    low = (torch.searchsorted(grid, size, right=True) - 1).clamp(max=len(E2M1) - 2)
    down, up = size - grid[low], grid[low + 1] - size
    if round_mode == "rint":
        upper = (up < down) | ((up == down) & (low % 2 == 1))
    elif round_mode == "round":
        upper = up <= down
    else:
        upper = (up == 0) | ((down > 0) & (x < 0))
    code = (low + upper + 8 * x.signbit()).to(torch.uint8).unflatten(-1, (-1, 2))
    return code[..., 0] | (code[..., 1] << 4)
