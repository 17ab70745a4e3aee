"""Quantised, grouped and transposed matrix products.

Read from documents, not run. Integers are multiplied and summed exactly, all else in float32, in no given order; scales
and biases are applied in float32 in the order of the formulas, and the result is rounded once. What a unit rounds in
between, the documents do not say. Formulas and shapes: torch_npu's documents; ops-nn, aclnnQuantMatmulV5.md (commit
060fbfdd); ops-transformer, aclnnGroupedMatmulV5.md (0dd10d2d); op-plugin, torch_npu-npu_grouped_matmul.md (02ea4757).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_hal.backends.ascend.emulator.call import emulated
from dsv4_hal.backends.ascend.emulator.numbers import (
    E8M0,
    FP4,
    dtype_of,
    power_of_two,
    spread,
    transposed,
    undefined,
    unpack_fp4,
    unpack_int4,
)
from dsv4_hal.backends.ascend.emulator.quantize import quant_param

FP32 = torch.float32


@emulated("npu::npu_quant_matmul")
def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output_dtype: int | None,
    x1_dtype: int | None,
    x2_dtype: int | None,
    pertoken_scale_dtype: int | None,
    scale_dtype: int | None,
    group_sizes: Sequence[int] | None,
    y_scale: Tensor | None,
) -> Tensor:
    """x1 [.., M, K] @ x2 [K, N] with a scale a column (and a scale a token), or MX scales of 32 along K.

    INT8          (x1 @ x2 + bias of int32) * scale * pertoken_scale + other bias + offset; INT8 results are rounded,
                  and saturate
    FP8           (x1 @ x2 + bias) * scale * pertoken_scale
    MXFP8, MXFP4  x1 * pertoken_scale [M, K / 64, 2] @ x2 * scale [K / 64, N, 2] + bias; FP4 is bytes, two values along
                  K where x2 is transposed, else along N

    Without output_dtype the result is INT8. An int64 scale comes from npu_trans_quant_param.
    """
    out = dtype_of(output_dtype) or torch.int8
    left, right = _values(x1, x1_dtype), _values(x2, x2_dtype)
    if dtype_of(scale_dtype) == E8M0:
        assert pertoken_scale is not None  # a rule
        y = _mx(left, pertoken_scale, right, scale)
        return (y if bias is None else y + bias.to(FP32)).to(out)
    inside = bias is not None and (bias.dtype == torch.int32 or x1.dtype != torch.int8)
    y = _exact(left, right) if x1.dtype == torch.int8 else left @ right
    if bias is not None and inside:
        y = y + bias
    if out == torch.int32:  # scales take no part
        return y.to(out)
    y = y.to(FP32)
    if scale.dtype == torch.int64:
        factor, moved = quant_param(scale)
        y = y * factor + (moved if out == torch.int8 and offset is None else 0)
    else:
        y = y * scale.to(FP32)
    if pertoken_scale is not None:
        y = y * pertoken_scale.unsqueeze(-1)
    if bias is not None and not inside:
        y = y + bias.to(FP32)
    if offset is not None:
        y = y + offset
    return y.round().clamp(-128, 127).to(out) if out == torch.int8 else y.to(out)


@emulated("npu::npu_grouped_matmul")
def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    scale: Sequence[Tensor] | None,
    offset: Sequence[Tensor] | None,
    antiquant_scale: Sequence[Tensor] | None,
    antiquant_offset: Sequence[Tensor] | None,
    per_token_scale: Sequence[Tensor] | None,
    group_list: Tensor | None,
    activation_input: Sequence[Tensor] | None,
    activation_quant_scale: Sequence[Tensor] | None,
    activation_quant_offset: Sequence[Tensor] | None,
    split_item: int | None,
    group_type: int | None,
    group_list_type: int | None,
    act_type: int | None,
    tuning_config: Sequence[int] | None,
    output_dtype: int | None,
    x_dtype: int | None,
    weight_dtype: int | None,
    scale_dtype: int | None,
    per_token_scale_dtype: int | None,
) -> list[Tensor]:
    """Rows x[0] [M, K], grouped, each group times its matrix of weight[0] [E, K, N]: one result [M, N].

    group_list is where groups end (group_list_type 0) or how long they are (1). Rows behind the last are undefined.

    float          x @ w + bias
    INT8           (x @ w + bias) * scale [E, N] * per_token_scale [M]; into int32 without scales
    INT8 x INT4    ((x - 8) @ w * scale [E, G, N] + bias) * per_token_scale: bias [E, N] must be 8 * sum(w * scale) over
                   K, which makes up for the 8; w is int32 [E, K, N / 8], scale int64 with the bits of a float32, one
                   for K / G rows of w
    MXFP8          x * per_token_scale [M, K / 64, 2] @ w * scale [E, K / 64, N, 2]
    MXFP8 x MXFP4  the same with antiquant_scale in the place of scale; w is bytes [E, K / 2, N], transposed
    """
    rows, matrices = x[0], weight[0]
    assert group_list is not None  # a rule
    ends = (group_list if group_list_type == 0 else group_list.cumsum(0)).tolist()
    out = dtype_of(output_dtype) or rows.dtype
    y = undefined((rows.shape[0], _width(matrices, weight_dtype)), out)
    start = 0
    for expert, end in enumerate(ends):
        part = slice(start, end)
        made = _group(
            rows[part],
            matrices[expert],
            None if bias is None else bias[0][expert],
            None if scale is None else scale[0][expert],
            None if antiquant_scale is None else antiquant_scale[0][expert],
            None if per_token_scale is None else per_token_scale[0][part],
            weight_dtype,
        )
        y[part] = made.to(out)
        start = end
    return [y]


@emulated("npu::npu_transpose_batchmatmul")
def npu_transpose_batchmatmul(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    perm_x1: Sequence[int] | None,
    perm_x2: Sequence[int] | None,
    perm_y: Sequence[int] | None,
    batch_split_factor: int | None,
) -> Tensor:
    """input, permuted to [B, M, K], @ weight, permuted to [B, K, N] -> [M, B, N] of input's dtype.

    ops-nn, transpose_batch_mat_mul/README.md, commit 305dad69. Rules refuse bias, scale and batch_split_factor.
    """
    left = input.permute(*(perm_x1 or (0, 1, 2))).to(FP32)
    right = weight.permute(*(perm_x2 or (0, 1, 2))).to(FP32)
    return (left @ right).permute(1, 0, 2).to(input.dtype).contiguous()


def _group(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    antiquant: Tensor | None,
    token: Tensor | None,
    weight_dtype: int | None,
) -> Tensor:
    """One group of a grouped product."""
    if x.dtype == torch.int8 and w.dtype == torch.int32:
        assert bias is not None and scale is not None and token is not None  # rules
        return _int4(x, w, bias, scale, token)
    if x.dtype == torch.int8:
        y = _exact(_values(x, None), _values(w, None))
        y = y if bias is None else y + bias
        if scale is None:
            return y
        y = y.to(FP32) * scale.to(FP32)
        return y if token is None else y * token.unsqueeze(-1)
    factor = antiquant if scale is None else scale
    if factor is not None:
        assert token is not None  # a rule
        return _mx(_values(x, None), token, _values(w, weight_dtype), factor)
    y = x.to(FP32) @ w.to(FP32)
    return y if bias is None else y + bias.to(FP32)


def _int4(x: Tensor, w: Tensor, bias: Tensor, scale: Tensor, token: Tensor) -> Tensor:
    codes, factors = unpack_int4(w, -1), quant_param(scale)[0]
    size = codes.shape[0] // factors.shape[0]
    y = torch.zeros(x.shape[0], codes.shape[1])
    for group, factor in enumerate(factors):
        part = slice(group * size, (group + 1) * size)
        y += _exact(x[:, part].to(FP32) - 8, codes[part].to(FP32)).to(FP32) * factor
    return (y + bias) * token.unsqueeze(-1)


def _mx(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor) -> Tensor:
    """Values [.., M, K] and [K, N], with MX scales [.., M, K / 64, 2] and [K / 64, N, 2]."""
    k = left.shape[-1]
    return (left * spread(power_of_two(left_scale), -1, k)) @ (right * spread(power_of_two(right_scale), -2, k))


def _exact(left: Tensor, right: Tensor) -> Tensor:
    """Sums of products of integers below 2 ** 31: float64 holds them."""
    return left.to(torch.float64) @ right.to(torch.float64)


def _values(t: Tensor, code: int | None) -> Tensor:
    """float32, unpacked."""
    return unpack_fp4(t, -2 if transposed(t) else -1) if _fp4(t, code) else t.to(FP32)


def _fp4(t: Tensor, code: int | None) -> bool:
    return FP4 in (dtype_of(code), t.dtype)


def _width(matrices: Tensor, code: int | None) -> int:
    if matrices.dtype == torch.int32:
        return matrices.shape[-1] * 8
    return matrices.shape[-1] * (2 if _fp4(matrices, code) and not transposed(matrices) else 1)
