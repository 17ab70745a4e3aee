"""Experts: the product with gate and up, the clamped SwiGLU and the rounding of hidden rows in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_hal.backends.triton_kernels.gemm import (
    ACTIVATION,
    Units,
    accepted,
    constants,
    product,
    row_tiles,
    rows_of,
    strided,
    tile_of,
)
from dsv4_hal.backends.triton_kernels.moe import gated
from dsv4_hal.backends.triton_kernels.numbers import encode_e8m0
from dsv4_hal.backends.triton_kernels.quantize import as_bytes, block_scale, code_bytes, encoded, magnitude
from dsv4_hal.backends.triton_kernels.runtime import DTYPES, launch, power_of_two
from dsv4_hal.formats import QTensor


@triton.jit
def _hidden(
    x,
    _x_batch,
    x_stride,
    x_scale,
    _x_scale_batch,
    x_scale_stride,
    w,
    w_batch,
    w_stride,
    w_scale,
    w_scale_batch,
    w_scale_stride,
    out,
    out_scale,
    offsets,
    order,
    row_weight,
    slots,
    limit,
    N: tl.constexpr,
    K: tl.constexpr,
    X: tl.constexpr,
    W: tl.constexpr,
    PACK: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr,
    FP8: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    LIMITED: tl.constexpr,
    STORAGE: tl.constexpr,
    CODED: tl.constexpr,
    FLOOR: tl.constexpr,
    TOP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Hidden rows [rows, N]: N rows of w are gate, the N below are up.

    Rows are in expert order: row i is token order[i] // slots, and its hidden row is weighted by row_weight.
    CODED: hidden rows are stored as codes and scales of blocks of BN columns.
    """
    tile, across = tile_of(tl.cdiv(N, BN))
    matrix, begin, stop = rows_of(tile, offsets, EXPERTS, BLOCK_E, BM)
    if matrix >= EXPERTS:
        return
    w += matrix * w_batch
    w_scale += matrix * w_scale_batch
    row, first = begin + tl.arange(0, BM), across * BN
    column = first + tl.arange(0, BN)
    there, inside = row < stop, column < N
    place = tl.load(order + row, mask=there, other=0)
    source = place // slots
    x_rows, x_scales = x + source * x_stride, x_scale + source * x_scale_stride
    gate = product(
        x_rows,
        x_scales,
        there,
        w,
        w_stride,
        w_scale,
        w_scale_stride,
        first,
        inside,
        0,
        K,
        K,
        X,
        W,
        PACK,
        SCALES,
        BLOCK_N,
        BLOCK_K,
        OPERAND,
        FP8,
        BM,
        BN,
        BK,
    )
    up = product(
        x_rows,
        x_scales,
        there,
        w,
        w_stride,
        w_scale,
        w_scale_stride,
        first + N,
        inside,
        0,
        K,
        K,
        X,
        W,
        PACK,
        SCALES,
        BLOCK_N,
        BLOCK_K,
        OPERAND,
        FP8,
        BM,
        BN,
        BK,
    )
    gate, sigmoid, up = gated(gate.to(STORAGE).to(tl.float32), up.to(STORAGE).to(tl.float32), limit, LIMITED)
    hidden = gate * sigmoid * up * tl.load(row_weight + place, mask=there, other=0.0).to(tl.float32)[:, None]
    hidden = hidden.to(STORAGE)
    target = out + row[:, None] * N + column[None]
    if CODED:
        hidden = hidden.to(tl.float32)
        scale = block_scale(tl.max(magnitude(hidden), 1, keep_dims=True), FLOOR, TOP, "e8m0")
        tl.store(target, encoded(hidden, scale, "e4m3", "e8m0"), mask=there[:, None] & inside[None])
        tl.store(out_scale + row[:, None] * tl.cdiv(N, BN) + across, encode_e8m0(scale), mask=there[:, None])
    else:
        tl.store(target, hidden, mask=there[:, None] & inside[None])


def hidden_rows(
    x: Tensor | QTensor,
    w13: QTensor,
    storage: torch.dtype,
    limit: float | None,
    units: Units,
    coded: bool,
    routed: tuple[Tensor, Tensor, Tensor],
) -> Tensor | QTensor:
    """Rounded hidden rows [T * k, I], contiguous and in expert order, of x [T, d] and every expert's w13 [E, 2 * I, d].

    storage  what gate and up, and then hidden rows, are rounded to
    coded    hidden rows are rounded to ACTIVATION as well, where tiles are as wide as its blocks, and come as codes
    routed   offsets [E + 1] and order [T * k] of `expert_order`, weights [T, k]
    """
    x = accepted(x)
    chosen = constants(x, w13, units, parts=2)
    offsets, order, weights = routed
    shape, experts = (len(order), chosen["N"]), w13.shape[0]
    fused = coded and ACTIVATION.block == (1, chosen["BN"])
    assert ACTIVATION.scale_dtype is not None
    scales = torch.empty(ACTIVATION.scale_shape(shape) or (), dtype=ACTIVATION.scale_dtype, device=x.device)
    out = torch.empty(shape, dtype=ACTIVATION.storage if fused else storage, device=x.device)
    target = code_bytes(out, ACTIVATION) if fused else out
    launch(
        _hidden,
        (row_tiles(len(order), experts, chosen["BM"]) * triton.cdiv(shape[1], chosen["BN"]),),
        *strided(x),
        *strided(w13 if w13.scale is not None else w13.data),
        target,
        as_bytes(scales),
        offsets,
        order,
        weights.contiguous(),
        weights.shape[1],
        limit or 0.0,
        EXPERTS=experts,
        BLOCK_E=max(16, power_of_two(experts)),
        LIMITED=limit is not None,
        STORAGE=DTYPES[storage],
        CODED=fused,
        FLOOR=ACTIVATION.floor,
        TOP=ACTIVATION.top,
        **chosen,
    )
    return QTensor(out, scales, ACTIVATION) if fused else out
