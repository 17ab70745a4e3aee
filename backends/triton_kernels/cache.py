"""Cache rows: rounded to a layout's format and stored, on their own or behind norm, RoPE and Hadamard rotation; and the
compressor: blocks of token rows pooled into entries, and the state that carries unfinished blocks to the next step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_hal import formats
from dsv4_hal.backends.triton_kernels.norm_rope import hadamard_rows, rotate, row_root
from dsv4_hal.backends.triton_kernels.numbers import (
    encode_e2m1,
    encode_e4m3,
    encode_e8m0,
    exponential,
    nearest,
    round_e2m1,
    round_e4m3,
)
from dsv4_hal.backends.triton_kernels.runtime import DTYPES, as_rows, launch, power_of_two
from dsv4_hal.formats import RowLayout

TILE = 2048  # elements of rows that a program of the store holds
SPAN = 4096  # elements of token rows that a program of the compressor holds


@triton.jit
def block_scale(x, TOP: tl.constexpr, FLOOR: tl.constexpr, SCALE: tl.constexpr):
    """Scales of blocks x [R, N, B] float32 -> [R, N, 1] float32, rounded to `SCALE`; NaN where one is not finite."""
    size = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2, keep_dims=True)  # NaN is above infinity
    amax = size.to(tl.float32, bitcast=True)
    amax = tl.where(amax < FLOOR, FLOOR, amax)
    if SCALE == "e8m0":
        # The power of two at or above amax / TOP: exponents subtract, and what is left of a mantissa adds one. That of
        # the quotient rounded to float32 is the same: the least above a power of two does not round down to it.
        top = tl.full((1, 1, 1), TOP, tl.float32).to(tl.int32, bitcast=True)
        bits = amax.to(tl.int32, bitcast=True) - top + 0x3F800000
        power = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        return tl.where(amax < float("inf"), power, float("nan"))
    scale = tl.div_rn(amax, TOP)
    return scale.to(tl.float16).to(tl.float32) if SCALE == "fp16" else scale


@triton.jit
def over_scale(x, scale, SCALE: tl.constexpr):
    """x / scale to nearest; for a power of two, by its inverse, which is exact."""
    if SCALE == "e8m0":
        inverse = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        return x * tl.where(scale == scale, inverse, scale)
    return tl.div_rn(x, scale)


@triton.jit
def round_element(x, ELEMENT: tl.constexpr):
    """float32 -> the nearest values that ELEMENT has a code for."""
    if ELEMENT == "e4m3":
        return round_e4m3(x)
    if ELEMENT == "e2m1":
        return round_e2m1(x)
    return nearest(tl.where(x > 127.0, 127.0, tl.where(x < -127.0, -127.0, x))) + 0.0  # integers have no -0


@triton.jit
def encode_element(x, ELEMENT: tl.constexpr):
    """float32 -> codes of the nearest values, uint8."""
    if ELEMENT == "e4m3":
        return encode_e4m3(x)
    if ELEMENT == "e2m1":
        return encode_e2m1(x)
    return tl.where(x == x, round_element(x, ELEMENT), 0.0).to(tl.int32).to(tl.uint8)


@triton.jit
def _store(
    x,
    x_stride,
    weight,
    cos,
    cos_stride,
    sin,
    sin_stride,
    source,
    target,
    first,
    first_block,
    first_row,
    scales,
    scales_block,
    scales_row,
    rest,
    rest_block,
    rest_row,
    count,
    block_rows,
    eps,
    D: tl.constexpr,
    KEPT: tl.constexpr,
    R: tl.constexpr,
    PAGED: tl.constexpr,
    NORM: tl.constexpr,
    HADAMARD: tl.constexpr,
    STORAGE: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    TOP: tl.constexpr,
    FLOOR: tl.constexpr,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows source[i] of x [*, D] to rows target[i] of a pool, or row i to row i; see `store`."""
    item = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None]
    there = item < count
    row, block, within = item, 0, item
    if PAGED:
        row = tl.load(source + item, mask=there, other=0)
        physical = tl.load(target + item, mask=there, other=-1).to(tl.int32)  # no device holds 2^31 rows
        there = physical >= 0
        block, within = (physical // block_rows).to(tl.int64), physical % block_rows
    value = tl.load(x + row * x_stride + column, mask=there & (column < D), other=0.0).to(STORAGE).to(tl.float32)
    if NORM:
        gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        value = (value * row_root(value, eps, D, tl.float32) * gain).to(STORAGE).to(tl.float32)
    if R > 0:
        pair = tl.arange(0, BLOCK // 2)[None] - (D - R) // 2
        turned = (pair >= 0) & (pair < R // 2)
        c = tl.load(cos + row * cos_stride + pair, mask=there & turned, other=0.0)
        s = tl.load(sin + row * sin_stride + pair, mask=there & turned, other=0.0)
        a, b = tl.split(tl.reshape(value, (ROWS, BLOCK // 2, 2)))
        p, q = rotate(a, b, c, s, False)
        value = tl.reshape(tl.join(tl.where(turned, p, a), tl.where(turned, q, b)), (ROWS, BLOCK))
        value = value.to(STORAGE).to(tl.float32)
    if HADAMARD:
        value = hadamard_rows(value.to(STORAGE), D, BLOCK).to(STORAGE).to(tl.float32)

    first += block * first_block + within * first_row
    if ELEMENT != "none":
        groups = tl.reshape(tl.where(column < KEPT, value, 0.0), (ROWS, BLOCK // GROUP, GROUP))
        scale = block_scale(groups, TOP, FLOOR, SCALE)
        groups = over_scale(groups, scale, SCALE)
        if CODES:
            codes = tl.reshape(encode_element(groups, ELEMENT), (ROWS, BLOCK))
            if ELEMENT == "e2m1":
                low, high = tl.split(tl.reshape(codes, (ROWS, BLOCK // 2, 2)))
                byte = tl.arange(0, BLOCK // 2)[None]
                tl.store(first + byte, low | (high << 4), mask=there & (byte < KEPT // 2))
            else:
                tl.store(first + column, codes, mask=there & (column < KEPT))
            group = tl.arange(0, BLOCK // GROUP)[None]
            at = scales + block * scales_block + within * scales_row + group
            scale = tl.reshape(scale, (ROWS, BLOCK // GROUP))
            stored = encode_e8m0(scale) if SCALE == "e8m0" else scale.to(scales.dtype.element_ty)
            tl.store(at, stored, mask=there & (group * GROUP < KEPT))
        else:
            rounded = tl.reshape(round_element(groups, ELEMENT) * scale, (ROWS, BLOCK))
            value = tl.where(column < KEPT, rounded, value)
    if CODES:
        at = rest + block * rest_block + within * rest_row + column - KEPT
        tl.store(at, value.to(STORAGE), mask=there & (column >= KEPT) & (column < D))
    else:
        tl.store(first + column, value.to(STORAGE), mask=there & (column < D))


def can_store(layout: RowLayout) -> bool:
    """Whether `store` knows how to round to this layout."""
    fmt = layout.rounding
    if fmt is None:
        return True
    if fmt.element not in ("e4m3", "e2m1", "int8") or fmt.block is None or fmt.block[0] != 1:
        return False
    return fmt.block[1] == power_of_two(fmt.block[1]) or fmt.block[1] == 0


def can_turn(dim: int, rotary: int) -> bool:
    """Whether `store` can rotate the last `rotary` channels of rows of `dim`: it holds them as pairs from the first."""
    return (dim - rotary) % 2 == 0


def store(
    x: Tensor,
    layout: RowLayout,
    into: tuple[Tensor, int, Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
    cos_sin: tuple[Tensor, Tensor] | None = None,
    rotate: bool = False,
) -> Tensor:
    """Rows x [N, dim], as the layout rounds them: in new rows [N, dim] of layout.values, or in a pool; returns either.

    into     pool uint8 [blocks, block bytes], rows per block, and int64 [M] both: which rows of x go to which physical
             rows, -1 for nowhere. Bytes of padding stay as they are.
    weight   [dim]: an RMS norm first
    cos_sin  tables [N, R / 2] float32: then RoPE; see `can_turn`
    rotate   then the Hadamard rotation; dim is a power of two
    Rounded to layout.values in front of every one of these steps, and then to the layout's format; see `can_store`.
    """
    width, rows, fmt = layout.dim, as_rows(x), layout.rounding
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in cos_sin) if cos_sin else (rows, rows)
    if into is None:
        made = torch.empty(len(rows), width, dtype=layout.values, device=x.device)
        per_block, source, target = 1, rows, rows
        fields, codes, count = {"values": made[None]}, False, len(rows)
    else:
        made, per_block, source, target = into
        views = formats.views(made, layout, per_block)
        fields, codes, count = {n: _storable(v) for n, v in views.items()}, not layout.plain, len(target)
    first = fields["codes" if codes else "values"]
    scales, rest = fields.get("scales", first), fields.get("rope", first)
    group = 0 if fmt is None or fmt.block is None else fmt.block[1]
    block = max(2, power_of_two(width), group, 16 if rotate else 0)
    per = 16 if rotate else max(1, TILE // block)
    launch(
        _store,
        (triton.cdiv(count, per),),
        rows,
        rows.stride(0),
        rows if weight is None else weight.contiguous(),
        cos,
        cos.stride(0),
        sin,
        sin.stride(0),
        source,
        target,
        first,
        *first.stride()[:2],
        scales,
        *scales.stride()[:2],
        rest,
        *rest.stride()[:2],
        count,
        per_block,
        eps,
        D=width,
        KEPT=width - layout.rope,
        R=2 * cos.shape[1] if cos_sin else 0,
        PAGED=into is not None,
        NORM=weight is not None,
        HADAMARD=rotate,
        STORAGE=DTYPES[layout.values],
        ELEMENT="none" if fmt is None else fmt.element,
        SCALE="none" if fmt is None else fmt.scale,
        TOP=1.0 if fmt is None else fmt.top,
        FLOOR=1.0 if fmt is None else fmt.floor,
        GROUP=group or block,
        CODES=codes,
        ROWS=per,
        BLOCK=block,
        num_warps=8 if rotate else 4,  # the Hadamard matrix is held as well
        enable_fp_fusion=False,
    )
    return made


def _storable(field: Tensor) -> Tensor:
    """A field of a pool as a kernel writes it: codes, and scales that are powers of two, as bytes."""
    return field.view(torch.uint8) if field.dtype.itemsize == 1 else field


@triton.jit
def _compress(
    kv,
    kv_stride,
    gate,
    gate_stride,
    ape,
    ape_stride,
    state,
    state_stride,
    source,
    out,
    tokens,
    C: tl.constexpr,
    RATIO: tl.constexpr,
    OVERLAP: tl.constexpr,
    STATE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Entry program_id(0), one block of its channels: the softmax of its tokens' gates weighs their rows."""
    entry = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)[None]
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    span: tl.constexpr = 2 * RATIO if OVERLAP else RATIO
    width: tl.constexpr = 2 * C if OVERLAP else C
    # the block before gives its first channels, the entry's own block its last
    column = channel + tl.where(slot >= span - RATIO, width - C, 0)
    at = tl.load(source + entry * span + slot, mask=slot < span, other=-1)
    now = (at >= 0) & (at < tokens) & (channel < C)
    value = tl.load(kv + at * kv_stride + column, mask=now, other=0.0)
    logit = tl.load(gate + at * gate_stride + column, mask=now, other=0.0)
    logit += tl.load(ape + slot % RATIO * ape_stride + column, mask=now, other=0.0).to(tl.float32)
    if STATE:
        before = (at >= tokens) & (channel < C)
        kept = state + (at - tokens) * state_stride + column
        value = tl.where(before, tl.load(kept, mask=before, other=0.0), value)
        logit = tl.where(before, tl.load(kept + width, mask=before, other=0.0), logit)
    logit = tl.where(at >= 0, logit, float("-inf"))
    weight = tl.where(at >= 0, exponential(logit - tl.max(logit, 1, keep_dims=True)), 0.0)
    pooled = tl.div_rn(tl.sum(weight * value, 1, keep_dims=True), tl.sum(weight, 1, keep_dims=True))
    tl.store(out + entry * C + channel, pooled, mask=channel < C)


@triton.jit
def _keep(
    kv,
    kv_stride,
    gate,
    gate_stride,
    ape,
    ape_stride,
    positions,
    state,
    state_stride,
    source,
    target,
    WIDTH: tl.constexpr,
    RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row and gate of token source[i] into row target[i] of the state."""
    item = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    token, row = tl.load(source + item), tl.load(target + item)
    value = tl.load(kv + token * kv_stride + column, mask=there)
    logit = tl.load(gate + token * gate_stride + column, mask=there)
    logit += tl.load(ape + tl.load(positions + token) % RATIO * ape_stride + column, mask=there).to(tl.float32)
    tl.store(state + row * state_stride + column, value, mask=there)
    tl.store(state + row * state_stride + WIDTH + column, logit, mask=there)


def compress(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    positions: Tensor,
    source: Tensor,
    overlap: bool,
    state: Tensor | None = None,
    keep: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Entries [N, c] float32 of rows and gates kv, gate [T, coff * c] float32; coff = 2 with overlap, else 1.

    ape        [ratio, coff * c], added to gates by position modulo ratio
    positions  [T] int64
    source     [N, coff * ratio] int64: row of this step's tokens followed by the state's rows; -1: none
    state      [slots, ring, 2, coff * c] float32: rows, and gates with ape
    keep       tokens [M] of this step, and the rows of the flattened state that they go to, once all entries are made
    """
    kv, gate, ape = as_rows(kv), as_rows(gate), as_rows(ape)
    (ratio, width), (count, span) = ape.shape, source.shape
    c = width // (2 if overlap else 1)
    out = torch.empty(count, c, dtype=kv.dtype, device=kv.device)
    rows = kv if state is None else state.flatten(0, 1)  # [slots * ring, 2, coff * c]
    tokens = (kv, kv.stride(0), gate, gate.stride(0), ape, ape.stride(0))
    slots = power_of_two(span)
    block = min(power_of_two(c), max(16, SPAN // slots))
    launch(
        _compress,
        (count, triton.cdiv(c, block)),
        *tokens,
        rows,
        rows.stride(0),
        source,
        out,
        len(kv),
        C=c,
        RATIO=ratio,
        OVERLAP=overlap,
        STATE=state is not None,
        SLOTS=slots,
        BLOCK=block,
        num_warps=4,
    )
    if keep is not None:
        block = min(power_of_two(width), 1024)
        launch(
            _keep,
            (len(keep[0]), triton.cdiv(width, block)),
            *tokens,
            positions,
            rows,
            rows.stride(0),
            *keep,
            WIDTH=width,
            RATIO=ratio,
            BLOCK=block,
            num_warps=4,
        )
    return out
