"""Hyper-connections: n residual streams, joined in front of a sub-layer and mixed behind it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_hal.backends.triton_kernels.norm_rope import row_root
from dsv4_hal.backends.triton_kernels.numbers import exponential
from dsv4_hal.backends.triton_kernels.runtime import launch, power_of_two

CHUNK = 256  # channels of one stream that one program of the projection sums
TOKENS, DEPTH = 32, 64  # tile of the projection: tokens, channels at a time
WIDE = 1024  # channels that one program of `post` holds


@triton.jit
def _project(
    x,
    x_token,
    x_stream,
    fn,
    fn_stride,
    out,
    tokens,
    D: tl.constexpr,
    OUT: tl.constexpr,
    PARTS: tl.constexpr,
    STEPS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Part program_id(1) of the sums over u: products with the OUT rows of fn, and squares behind them."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    part = tl.program_id(1)
    stream, start = part // PARTS, part % PARTS * (STEPS * DEPTH)
    row = tl.arange(0, BLOCK)
    source = x + (token * x_token + stream * x_stream)[:, None]
    weight = fn + row[None] * fn_stride + stream * D
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    square = tl.zeros((TOKENS,), tl.float32)
    for step in range(STEPS):
        channel = start + step * DEPTH + tl.arange(0, DEPTH)
        value = tl.load(source + channel[None], mask=(token < tokens)[:, None] & (channel < D)[None], other=0.0)
        factor = tl.load(weight + channel[:, None], mask=(row < OUT)[None] & (channel < D)[:, None], other=0.0)
        factor = factor.to(tl.float32)
        if x.dtype.element_ty == tl.bfloat16:
            # a float32 is the sum of three bfloat16, and matrix units multiply those exactly
            high = factor.to(tl.bfloat16)
            factor -= high.to(tl.float32)
            middle = factor.to(tl.bfloat16)
            low = (factor - middle.to(tl.float32)).to(tl.bfloat16)
            total = tl.dot(value, low, total)
            total = tl.dot(value, middle, total)
            total = tl.dot(value, high, total)
        else:
            total = tl.dot(value.to(tl.float32), factor, total, input_precision="ieee")
        value = value.to(tl.float32)
        square += tl.sum(value * value, 1)
    target = out + (part * tokens + token) * (OUT + 1)
    tl.store(target[:, None] + row[None], total, mask=(token < tokens)[:, None] & (row < OUT)[None])
    tl.store(target + OUT, square, mask=token < tokens)


@triton.jit
def _sums(parts, stride, row, there, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """All parts of the sums `row` [M] of a token, added up in order of their number; zero where not `there`."""
    part = tl.arange(0, BLOCK)[:, None]
    return tl.sum(tl.load(parts + part * stride + row[None], mask=(part < PARTS) & there[None], other=0.0), 0)


@triton.jit
def _sigmoid(x):
    return tl.div_rn(1.0, 1.0 + exponential(-x))


@triton.jit
def _sinkhorn(logits, valid, eps, ITERS: tl.constexpr):
    """[n, n] float32 -> nearly doubly stochastic where valid, zero elsewhere. The first step over rows is a softmax."""
    logits = tl.where(valid, logits, float("-inf"))
    c = tl.where(valid, exponential(logits - tl.max(logits, 1, keep_dims=True)), 0.0)
    c = tl.where(valid, tl.div_rn(c, tl.sum(c, 1, keep_dims=True)) + eps, 0.0)
    c = tl.where(valid, tl.div_rn(c, tl.sum(c, 0, keep_dims=True) + eps), 0.0)
    for _ in range(ITERS - 1):
        c = tl.where(valid, tl.div_rn(c, tl.sum(c, 1, keep_dims=True) + eps), 0.0)
        c = tl.where(valid, tl.div_rn(c, tl.sum(c, 0, keep_dims=True) + eps), 0.0)
    return c


@triton.jit
def _join(
    parts,
    stride,
    x,
    x_token,
    x_stream,
    scale,
    base,
    weight,
    out,
    post,
    comb,
    norm_eps,
    eps,
    N: tl.constexpr,
    D: tl.constexpr,
    OUT: tl.constexpr,
    ITERS: tl.constexpr,
    NORM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token: what its streams are weighed with, their sum, and, unless ITERS is 0, how a result is mixed back."""
    token = tl.program_id(0).to(tl.int64)
    parts += token * (OUT + 1)
    square = tl.sum(_sums(parts, stride, OUT + tl.arange(0, 1), tl.arange(0, 1) == 0, PARTS, BLOCK_P), 0)
    root = tl.rsqrt(square / (N * D) + norm_eps)
    stream = tl.arange(0, BLOCK_N)
    there = stream < N
    pre = _sums(parts, stride, stream, there, PARTS, BLOCK_P) * root
    pre = _sigmoid(pre * tl.load(scale) + tl.load(base + stream, mask=there, other=0.0)) + eps
    if ITERS > 0:
        mix = _sums(parts, stride, N + stream, there, PARTS, BLOCK_P) * root
        mix = mix * tl.load(scale + 1) + tl.load(base + N + stream, mask=there, other=0.0)
        tl.store(post + token * N + stream, 2.0 * _sigmoid(mix), mask=there)
        cell = tl.arange(0, BLOCK_N * BLOCK_N)
        i, j = cell // BLOCK_N, cell % BLOCK_N
        row, there = 2 * N + i * N + j, (i < N) & (j < N)
        mix = _sums(parts, stride, row, there, PARTS, BLOCK_P) * root
        mix = mix * tl.load(scale + 2) + tl.load(base + row, mask=there, other=0.0)
        valid = tl.reshape(there, (BLOCK_N, BLOCK_N))
        mixed = _sinkhorn(tl.reshape(mix, (BLOCK_N, BLOCK_N)), valid, eps, ITERS)
        tl.store(comb + token * (N * N) + stream[:, None] * N + stream[None], mixed, mask=valid)

    channel = tl.arange(0, BLOCK)[None]
    total = tl.zeros((1, BLOCK), tl.float32)
    for s in tl.static_range(N):
        value = tl.load(x + token * x_token + s * x_stream + channel, mask=channel < D, other=0.0)
        total += tl.sum(tl.where(stream == s, pre, 0.0), 0) * value.to(tl.float32)
    total = total.to(out.dtype.element_ty)
    if NORM:
        value = total.to(tl.float32)
        gain = tl.load(weight + channel, mask=channel < D, other=0.0).to(tl.float32)
        total = (value * row_root(value, norm_eps, D, tl.float32) * gain).to(out.dtype.element_ty)
    tl.store(out + token * D + channel, total, mask=channel < D)


def join(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_eps: float,
    eps: float,
    iters: int = 0,
    weight: Tensor | None = None,
    parts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, d] of streams [T, n, d] in their dtype; post [T, n] and comb [T, n, n] float32, empty where iters is 0.

    fn      [R, n * d], base [R], scale [3] float32, R = 2 n + n^2; where iters is 0, R = n, and scale is [1]
    weight  [d]: x through an RMS norm, after its rounding
    parts   what `project` returns, if it is there already
    """
    streams = _dense(streams)
    (tokens, n, d), rows, device = streams.shape, len(fn), streams.device
    parts = project(streams, fn) if parts is None else parts
    x = torch.empty(tokens, d, dtype=streams.dtype, device=device)
    mixed = tokens if iters else 0
    post = torch.empty(mixed, n, dtype=torch.float32, device=device)
    comb = torch.empty(mixed, n, n, dtype=torch.float32, device=device)
    block = power_of_two(d)
    launch(
        _join,
        (tokens,),
        parts,
        parts.stride(0),
        streams,
        *streams.stride()[:2],
        scale.contiguous(),
        base.contiguous(),
        x if weight is None else weight.contiguous(),
        x,
        post,
        comb,
        norm_eps,
        eps,
        N=n,
        D=d,
        OUT=rows,
        ITERS=iters,
        NORM=weight is not None,
        PARTS=len(parts),
        BLOCK_P=power_of_two(len(parts)),
        BLOCK_N=power_of_two(n),
        BLOCK=block,
        num_warps=8 if block > 1024 else 4,
    )
    return x, post, comb


def project(streams: Tensor, fn: Tensor) -> Tensor:
    """Sums that make the projection of streams [T, n, d] by fn [R, n * d], float32 [P, T, R + 1]: products with fn's
    rows, and squares behind them. By chunks of channels, whose size is fixed; whoever reads them adds them in order.
    """
    streams, fn = _dense(streams), _dense(fn)
    (tokens, n, d), rows, device = streams.shape, len(fn), streams.device
    per_stream = triton.cdiv(d, CHUNK)
    parts = torch.empty(n * per_stream, tokens, rows + 1, dtype=torch.float32, device=device)
    launch(
        _project,
        (triton.cdiv(tokens, TOKENS), len(parts)),
        streams,
        *streams.stride()[:2],
        fn,
        fn.stride(0),
        parts,
        tokens,
        D=d,
        OUT=rows,
        PARTS=per_stream,
        STEPS=triton.cdiv(min(d, CHUNK), DEPTH),
        TOKENS=TOKENS,
        DEPTH=DEPTH,
        BLOCK=max(32, power_of_two(rows)),
        num_warps=4,
    )
    return parts


@triton.jit
def _spread(
    y,
    y_token,
    x,
    x_token,
    x_stream,
    post,
    post_token,
    comb,
    comb_token,
    comb_row,
    out,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token, one block of channels: stream k is post[k] y, and comb[j, k] of every stream j."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None]
    stream = tl.arange(0, BLOCK_N)[:, None]
    there = channel < D
    share = tl.load(post + token * post_token + stream, mask=stream < N, other=0.0)
    total = share * tl.load(y + token * y_token + channel, mask=there, other=0.0).to(tl.float32)
    for j in tl.static_range(N):
        share = tl.load(comb + token * comb_token + j * comb_row + stream, mask=stream < N, other=0.0)
        value = tl.load(x + token * x_token + j * x_stream + channel, mask=there, other=0.0)
        total += share * value.to(tl.float32)
    target = out + (token * N + stream) * D + channel
    tl.store(target, total.to(out.dtype.element_ty), mask=there & (stream < N))


def spread(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """out[k] = post[k] y + sum_j comb[j, k] streams[j] -> [T, n, d] in the streams' dtype, rounded once.

    y [T, d], streams [T, n, d]; post [T, n], comb [T, n, n] float32
    """
    y, streams, post, comb = _dense(y), _dense(streams), _dense(post), _dense(comb)
    tokens, n, d = streams.shape
    out = torch.empty(tokens, n, d, dtype=streams.dtype, device=streams.device)
    block = min(power_of_two(d), WIDE)
    launch(
        _spread,
        (tokens, triton.cdiv(d, block)),
        y,
        y.stride(0),
        streams,
        *streams.stride()[:2],
        post,
        post.stride(0),
        comb,
        *comb.stride()[:2],
        out,
        N=n,
        D=d,
        BLOCK_N=power_of_two(n),
        BLOCK=block,
        num_warps=4,
    )
    return out


def _dense(x: Tensor) -> Tensor:
    """x with elements of its last axis side by side: itself where they are."""
    return x if x.stride(-1) == 1 else x.contiguous()
