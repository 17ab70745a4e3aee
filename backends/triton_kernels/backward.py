"""Derivatives of the kernels that a training step calls most: RMS norm and SwiGLU. Rotary embedding needs none of its
own: it is turned back by the same kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_hal.backends.triton_kernels.moe import gated
from dsv4_hal.backends.triton_kernels.norm_rope import TILE, row_root
from dsv4_hal.backends.triton_kernels.runtime import as_rows, launch, power_of_two

STEPS = 16  # tiles of rows whose share of a weight's gradient one program sums
COLUMNS = 1024  # channels that a program holds at a time


@triton.jit
def _rms_norm(
    given,
    given_stride,
    x,
    x_stride,
    weight,
    to_x,
    to_weight,
    rows,
    eps,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = n * weight, n = x * root; n's own gradient is root * (g - n * mean(g * n)), where g is that of n."""
    program, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)[None]
    w, share = 1.0, tl.zeros([1, BLOCK], tl.float32)
    if WEIGHTED:
        w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    for step in range(STEPS):
        row = (program * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        there = (row < rows) & (column < D)
        value = tl.load(x + row * x_stride + column, mask=there, other=0.0).to(tl.float32)
        g = tl.load(given + row * given_stride + column, mask=there, other=0.0).to(tl.float32)
        root = row_root(value, eps, D, tl.float32)
        n = value * root
        gradient = root * (g * w - n * (tl.sum(g * w * n, 1, keep_dims=True) / D))
        tl.store(to_x + row * D + column, gradient.to(to_x.dtype.element_ty), mask=there)
        if WEIGHTED:
            share += tl.sum(tl.where(there, g * n, 0.0), 0, keep_dims=True)
    if WEIGHTED:
        tl.store(to_weight + program * D + column, share, mask=column < D)


def rms_norm(given: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """Gradient of rms_norm(x, weight) [..., D] -> gradients of x [..., D] in x's dtype, and of weight [D] float32."""
    width, rows, given = x.shape[-1], as_rows(x), as_rows(given)
    block = power_of_two(width)
    per = max(1, TILE // block)
    programs = triton.cdiv(len(rows), per * STEPS)
    to_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shares = torch.empty(programs if weight is not None else 0, width, dtype=torch.float32, device=x.device)
    launch(
        _rms_norm,
        (programs,),
        given,
        given.stride(0),
        rows,
        rows.stride(0),
        rows if weight is None else weight.contiguous(),
        to_x,
        shares,
        len(rows),
        eps,
        D=width,
        WEIGHTED=weight is not None,
        ROWS=per,
        STEPS=STEPS,
        BLOCK=block,
        num_warps=8,
    )
    return to_x, None if weight is None else shares.sum(0)


@triton.jit
def _swiglu(
    given,
    given_row,
    given_column,
    gate_up,
    row_stride,
    column_stride,
    row_weight,
    weight_stride,
    to_gate_up,
    to_weight,
    limit,
    WIDTH: tl.constexpr,
    LIMITED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row. A clamp passes the gradient of what it leaves as it is."""
    row = tl.program_id(0).to(tl.int64)
    source, target, lane = gate_up + row * row_stride, to_gate_up + row * 2 * WIDTH, tl.arange(0, COLUMNS)
    weight = 1.0
    share = tl.zeros([COLUMNS], tl.float64)  # a row becomes one number, and much of it cancels
    if WEIGHTED:
        weight = tl.load(row_weight + row * weight_stride).to(tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        column = first + lane
        there = column < WIDTH
        g = tl.load(given + row * given_row + column * given_column, mask=there, other=0.0).to(tl.float32)
        raw_gate = tl.load(source + column * column_stride, mask=there, other=0.0).to(tl.float32)
        raw_up = tl.load(source + (column + WIDTH) * column_stride, mask=there, other=0.0).to(tl.float32)
        gate, sigmoid, up = gated(raw_gate, raw_up, limit, LIMITED)
        silu = gate * sigmoid
        share += silu.to(tl.float64) * up * g
        g *= weight
        by_gate, by_up = g * up * (sigmoid + silu * (1.0 - sigmoid)), g * silu
        if LIMITED:
            by_gate = tl.where(raw_gate > limit, 0.0, by_gate)
            by_up = tl.where(tl.abs(raw_up) > limit, 0.0, by_up)
        tl.store(target + column, by_gate.to(to_gate_up.dtype.element_ty), mask=there)
        tl.store(target + WIDTH + column, by_up.to(to_gate_up.dtype.element_ty), mask=there)
    if WEIGHTED:
        tl.store(to_weight + row, tl.sum(share, 0).to(tl.float32))


def swiglu(
    given: Tensor, gate_up: Tensor, limit: float | None, row_weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradient of swiglu(gate_up, limit, row_weight) [M, I] -> gradients of gate_up [M, 2 * I] in its dtype, and of
    row_weight [M] float32."""
    rows, width = given.shape
    to_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    to_weight = torch.empty(rows if row_weight is not None else 0, dtype=torch.float32, device=gate_up.device)
    weight = gate_up if row_weight is None else row_weight
    launch(
        _swiglu,
        (rows,),
        given,
        given.stride(0),
        given.stride(1),
        gate_up,
        gate_up.stride(0),
        gate_up.stride(1),
        weight,
        weight.stride(0),
        to_gate_up,
        to_weight,
        limit or 0.0,
        WIDTH=width,
        LIMITED=limit is not None,
        WEIGHTED=row_weight is not None,
        COLUMNS=min(COLUMNS, power_of_two(width)),
        num_warps=4,
    )
    return to_gate_up, None if row_weight is None else to_weight
