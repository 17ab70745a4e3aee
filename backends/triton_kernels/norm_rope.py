"""RMS norms and rotary embedding, alone and one after the other in one pass over a row; Hadamard rotation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_hal.backends.triton_kernels.runtime import DTYPES, as_rows, launch, power_of_two

TILE = 4096  # elements of rows that a program holds


@triton.jit
def row_root(x, eps, D: tl.constexpr, NARROW: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of rows x [R, BLOCK] float32, zero beyond column D -> [R, 1].

    NARROW rounds squares, mean, mean + eps and root, as the per-head query norm does; float32 rounds nothing.
    """
    square = (x * x).to(NARROW).to(tl.float32)
    mean = tl.sum(square, 1, keep_dims=True) / D
    return tl.rsqrt((mean.to(NARROW).to(tl.float32) + eps).to(NARROW).to(tl.float32)).to(NARROW).to(tl.float32)


@triton.jit
def rotate(a, b, cos, sin, INVERSE: tl.constexpr):
    """(a, b) turned by the angle of cos and sin, or back."""
    if INVERSE:
        return a * cos + b * sin, b * cos - a * sin
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def _norm_rope(
    x,
    x_stride,
    weight,
    cos,
    cos_stride,
    sin,
    sin_stride,
    out,
    rows,
    eps,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
    INVERSE: tl.constexpr,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Rows [rows, D]: norm ("weight", "head" or none), rounded to their dtype, then the last R channels rotated by the
    angles of row // HEADS."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None]
    there = row < rows
    source, target = x + row * x_stride, out + row * D
    value = tl.load(source + column, mask=there & (column < D), other=0.0).to(tl.float32)
    root = 1.0
    if NORM != "none":
        root = row_root(value, eps, D, NARROW)
        value = value * root
    if NORM == "weight":
        value = value * tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(target + column, value.to(out.dtype.element_ty), mask=there & (column < D - R))
    if R > 0:
        pair = tl.arange(0, BLOCK_R)[None]
        there = there & (pair < R // 2)
        even = D - R + 2 * pair
        a = tl.load(source + even, mask=there, other=0.0).to(tl.float32)
        b = tl.load(source + even + 1, mask=there, other=0.0).to(tl.float32)
        if NORM != "none":
            a, b = a * root, b * root
        if NORM == "weight":
            a = a * tl.load(weight + even, mask=pair < R // 2, other=0.0).to(tl.float32)
            b = b * tl.load(weight + even + 1, mask=pair < R // 2, other=0.0).to(tl.float32)
        a, b = a.to(out.dtype.element_ty).to(tl.float32), b.to(out.dtype.element_ty).to(tl.float32)
        c = tl.load(cos + row // HEADS * cos_stride + pair, mask=there, other=0.0)
        s = tl.load(sin + row // HEADS * sin_stride + pair, mask=there, other=0.0)
        a, b = rotate(a, b, c, s, INVERSE)
        tl.store(target + even, a.to(out.dtype.element_ty), mask=there)
        tl.store(target + even + 1, b.to(out.dtype.element_ty), mask=there)


def norm_rope(
    x: Tensor,
    out: Tensor,
    *,
    norm: str = "none",
    weight: Tensor | None = None,
    eps: float = 0.0,
    narrow: torch.dtype = torch.float32,
    cos_sin: tuple[Tensor, Tensor] | None = None,
    inverse: bool = False,
) -> Tensor:
    """x [..., D] -> out [..., D], contiguous, in x's dtype: norm, rounding, RoPE; each may be left out.

    norm     "weight": by weight [D], in float32; "head": without one, rounded to `narrow` at every step; "none"
    cos_sin  tables [N, R / 2] float32 for x [N, ..., D]; None: nothing is rotated
    """
    width, rows = x.shape[-1], as_rows(x)
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in cos_sin) if cos_sin else (rows, rows)
    rotary = 2 * cos.shape[1] if cos_sin else 0
    block = power_of_two(width)
    per = max(1, TILE // block)
    launch(
        _norm_rope,
        (triton.cdiv(len(rows), per),),
        rows,
        rows.stride(0),
        rows if weight is None else weight.contiguous(),
        cos,
        cos.stride(0),
        sin,
        sin.stride(0),
        out,
        len(rows),
        eps,
        HEADS=max(1, len(rows) // max(1, len(x))),
        D=width,
        R=rotary,
        NORM=norm,
        INVERSE=inverse,
        NARROW=DTYPES[narrow],
        ROWS=per,
        BLOCK=block,
        BLOCK_R=power_of_two(max(1, rotary // 2)),
        num_warps=8 if block > 1024 else 4,
    )
    return out


@triton.jit
def hadamard_rows(value, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [ROWS, BLOCK], zero beyond column D, times the Sylvester matrix over sqrt(D) -> float32, likewise.

    Entry (i, j) of the matrix is -1 where i & j has an odd number of ones.
    """
    column = tl.arange(0, BLOCK)
    odd = column[:, None] & column[None]
    odd = odd ^ (odd >> 8)
    odd = odd ^ (odd >> 4)
    odd = odd ^ (odd >> 2)
    odd = (odd ^ (odd >> 1)) & 1
    sign = (1.0 - 2.0 * odd.to(tl.float32)).to(value.dtype)
    return tl.dot(value, sign, input_precision="ieee") * (1.0 / tl.sqrt_rn(D + 0.0))


@triton.jit
def _hadamard(x, x_stride, out, rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None]
    there = (row < rows) & (column < D)
    turned = hadamard_rows(tl.load(x + row * x_stride + column, mask=there, other=0.0), D, BLOCK)
    tl.store(out + row * D + column, turned.to(out.dtype.element_ty), mask=there)


def hadamard(x: Tensor) -> Tensor:
    """x [..., D] times the Hadamard matrix over sqrt(D), D a power of two: products are exact, sums in float32."""
    rows, out = as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = x.shape[-1]
    launch(
        _hadamard,
        (triton.cdiv(len(rows), 16),),
        rows,
        rows.stride(0),
        out,
        len(rows),
        D=width,
        ROWS=16,
        BLOCK=max(16, width),
        num_warps=4,
    )
    return out
