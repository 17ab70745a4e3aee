"""Reading cache rows inside a kernel, whatever their layout, and rounding rows to one without storing them.

What a kernel needs to know of the cache rows of a step is one argument, `Rows`: where rows lie, and how they are made
up. A kernel asks `locate` for the rows that hold logical rows of a sequence, and `read` for their values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_hal.backends.triton_kernels.numbers import (
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    nearest,
    power_of_two_ceil,
    round_e2m1,
    round_e4m3,
)
from dsv4_hal.backends.triton_kernels.runtime import DTYPES, as_rows, launch, power_of_two
from dsv4_hal.formats import RowLayout

TILE = 4096  # elements of rows that a program rounds


@dataclass(frozen=True)
class Form:
    """How a row is made up: constants of a kernel. Offsets and steps are in bytes.

    dim          channels
    width        dim, padded to a power of two
    rows         rows per block of a pool; 0: packed
    block_bytes  bytes of a block
    plain        whether a row is its values; if so, nothing below is used
    element      e4m3, e2m1 or int8: what the first dim - rope channels are coded in
    codes        (where the first row's codes lie in a block, bytes from one row's to the next's)
    scale        e8m0, fp32 or fp16
    scales       likewise
    block        channels that share a scale, a power of two
    groups       scales of a row
    rope         plain channels at the end
    ropes        likewise
    value        dtype of a value that has been read
    fp8          whether the target converts e4m3 by itself
    """

    dim: int
    rows: int
    plain: bool
    value: tl.dtype
    block_bytes: int = 0
    element: str = ""
    codes: tuple[int, int] = (0, 0)
    scale: str = ""
    scales: tuple[int, int] = (0, 0)
    block: int = 1
    groups: int = 0
    rope: int = 0
    ropes: tuple[int, int] = (0, 0)
    fp8: bool = False

    @property
    def width(self) -> int:
        return max(16, power_of_two(self.dim))

    @property
    def kept(self) -> int:
        return self.dim - self.rope


class Rows(NamedTuple):
    """The cache rows of a step, as an argument of a kernel.

    data    plain: values [N, dim], of a pool too; else the pool [blocks, block bytes] uint8
    words   the pool seen in the dtype of what is wider than a byte: rotary channels, or scales
    where   paged: block table [R, n] int64; packed: the first row of every sequence, [R] int64
    blocks  n
    step    elements between plain rows
    form    how a row is made up
    """

    data: Tensor
    words: Tensor
    where: Tensor
    blocks: int
    step: int
    form: Any


def rows_of(data: Tensor, layout: RowLayout, rows: int, where: Tensor, fp8: bool) -> Rows:
    """Cache rows for a kernel.

    data   packed: values [N, dim], whatever the layout; paged: the pool, uint8 [blocks, block bytes]
    rows   rows per block; 0: packed
    where  block table [R, n], or first rows [R]; int64
    fp8    whether the target has instructions that convert e4m3
    """
    blocks = where.shape[1] if rows else 0
    if layout.plain or not rows:
        values = data.view(layout.values).view(-1, layout.dim) if rows else as_rows(data)
        form = Form(layout.dim, rows, True, DTYPES[values.dtype])
        return Rows(values, values, where, blocks, values.stride(0), tl.constexpr(form))
    assert layout.rounding is not None and layout.rounding.block is not None
    fields = {field.name: field for field in layout.fields}
    at = {
        name: (rows * sum(layout.region_bytes[: field.region]) + field.offset, layout.region_bytes[field.region])
        for name, field in fields.items()
    }
    wide = "rope" if layout.rope else "scales"
    form = Form(
        layout.dim,
        rows,
        False,
        DTYPES[layout.values],
        layout.block_bytes(rows),
        layout.rounding.element,
        at["codes"],
        str(layout.rounding.scale),
        at["scales"],
        layout.rounding.block[1] or max(16, power_of_two(layout.dim)),
        fields["scales"].count,
        layout.rope,
        at["rope"] if layout.rope else (0, 0),
        fp8,
    )
    words = data if fields[wide].dtype.itemsize == 1 else data.view(fields[wide].dtype)
    return Rows(data, words, where, blocks, 0, tl.constexpr(form))


@triton.constexpr_function
def of(form, name):
    """A constant of a form; `of(form, name)` is what both compiler and interpreter understand."""
    return getattr(form, name)


@triton.jit
def locate(rows, sequence, index, there):
    """Rows that hold logical rows `index` [N] int32 of a sequence -> [N] int64; anything where not `there` [N]."""
    COUNT: tl.constexpr = of(rows.form, "rows")
    if COUNT == 0:
        return tl.load(rows.where + sequence, mask=sequence >= 0, other=0) + index
    known = tl.where(there, index, 0)
    block = tl.load(rows.where + sequence * rows.blocks + known // COUNT % rows.blocks, mask=there, other=0)
    return block * COUNT + known % COUNT


@triton.jit
def read(rows, row, there):
    """Values of rows `row` [N] int64 -> [N, width] in the layout's dtype; zeros where not `there` [N], and beyond the
    last channel: those are not read."""
    DIM: tl.constexpr = of(rows.form, "dim")
    WIDTH: tl.constexpr = of(rows.form, "width")
    VALUE: tl.constexpr = of(rows.form, "value")
    column = tl.arange(0, WIDTH)[None]
    there = there[:, None]
    if of(rows.form, "plain"):
        return tl.load(rows.data + row[:, None] * rows.step + column, mask=there & (column < DIM), other=0.0)

    COUNT: tl.constexpr = of(rows.form, "rows")
    KEPT: tl.constexpr = of(rows.form, "kept")
    CODES: tl.constexpr = of(rows.form, "codes")
    SCALES: tl.constexpr = of(rows.form, "scales")
    BLOCK: tl.constexpr = of(rows.form, "block")
    GROUPS: tl.constexpr = WIDTH // BLOCK
    start = (row // COUNT * of(rows.form, "block_bytes"))[:, None]
    place = (row % COUNT)[:, None]

    codes = rows.data + start + CODES[0] + place * CODES[1]
    if of(rows.form, "element") == "e2m1":
        pair = tl.arange(0, WIDTH // 2)[None]
        both = tl.load(codes + pair, mask=there & (pair < KEPT // 2), other=0)
        value = tl.interleave(decode_e2m1(both & 15), decode_e2m1(both >> 4))
    else:
        code = tl.load(codes + column, mask=there & (column < KEPT), other=0)
        if of(rows.form, "element") == "int8":
            value = code.to(tl.int8, bitcast=True).to(tl.float32)
        elif of(rows.form, "fp8"):
            value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            value = decode_e4m3(code)

    group = tl.arange(0, GROUPS)[None]
    known = there & (group < of(rows.form, "groups"))
    if of(rows.form, "scale") == "e8m0":
        code = tl.load(rows.data + start + SCALES[0] + place * SCALES[1] + group, mask=known, other=0)
        scale = decode_e8m0(code)
    else:
        SIZE: tl.constexpr = rows.words.dtype.element_ty.primitive_bitwidth // 8
        address = (start + SCALES[0] + place * SCALES[1]) // SIZE + group
        scale = tl.load(rows.words + address, mask=known, other=0.0).to(tl.float32)
    if GROUPS > 1:
        COUNT_READ: tl.constexpr = row.shape[0]
        scale = tl.broadcast_to(scale[:, :, None], (COUNT_READ, GROUPS, BLOCK)).reshape(COUNT_READ, WIDTH)
    value = (value * scale).to(VALUE)

    if KEPT < DIM:
        ROPES: tl.constexpr = of(rows.form, "ropes")
        address = (start + ROPES[0] + place * ROPES[1]) // 2 + (column - KEPT)
        turned = tl.load(rows.words + address, mask=there & (column >= KEPT) & (column < DIM), other=0.0)
        value = tl.where(column < KEPT, value, turned)
    return value


@triton.jit
def _round_rows(
    x,
    x_stride,
    out,
    blocks,
    DIM: tl.constexpr,
    KEPT: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    TOP: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Blocks of BLOCK channels of rows [N, DIM], as many a row as cover it: each rounded with a scale of its own."""
    PER_ROW: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    offset = tl.arange(0, WIDTH)[None]
    row, column = at // PER_ROW, (at % PER_ROW).to(tl.int32) * BLOCK + offset
    there = (at < blocks) & (offset < BLOCK) & (column < DIM)
    given = tl.load(x + row * x_stride + column, mask=there, other=0.0)
    value = given.to(tl.float32)
    size = tl.where(value == value, tl.abs(value), float("inf"))  # a block with NaN becomes NaN
    amax = tl.max(tl.where(column < KEPT, size, 0.0), 1, keep_dims=True)
    scale = tl.div_rn(tl.maximum(amax, FLOOR), tl.full(amax.shape, TOP, tl.float32))
    if SCALE == "e8m0":
        scale = power_of_two_ceil(scale)
    elif SCALE == "fp16":
        scale = scale.to(tl.float16).to(tl.float32)
    quotient = tl.div_rn(value, tl.broadcast_to(scale, value.shape))
    if ELEMENT == "e2m1":
        code = round_e2m1(quotient)
    elif ELEMENT == "e4m3":
        code = round_e4m3(quotient)
    else:
        code = nearest(tl.minimum(tl.maximum(quotient, -TOP), TOP))
    rounded = (code * scale).to(out.dtype.element_ty)
    tl.store(out + row * DIM + column, tl.where(column < KEPT, rounded, given), mask=there)


def round_rows(x: Tensor, layout: RowLayout) -> Tensor:
    """Rows x [..., dim] -> what reading them back from a cache of this layout would give: `formats.round_rows`."""
    fmt = layout.rounding
    if fmt is None:
        return x
    assert fmt.block is not None
    rows, out = as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = fmt.block[1] or layout.dim - layout.rope
    width = power_of_two(block)
    blocks = len(rows) * -(-layout.dim // block)
    per = max(1, TILE // width)
    launch(
        _round_rows,
        (triton.cdiv(blocks, per),),
        rows,
        rows.stride(0),
        out,
        blocks,
        DIM=layout.dim,
        KEPT=layout.dim - layout.rope,
        ELEMENT=fmt.element,
        SCALE=fmt.scale,
        TOP=fmt.top,
        FLOOR=fmt.floor,
        BLOCK=block,
        WIDTH=width,
        ROWS=per,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out
