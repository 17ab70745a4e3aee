"""A tensor into a stored format and back, bit for bit as `dsv4_hal.formats` does."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_hal import formats
from dsv4_hal.backends.triton_kernels import numbers
from dsv4_hal.backends.triton_kernels.runtime import launch, power_of_two
from dsv4_hal.formats import Format, QTensor

TILE = 4096  # elements that a program holds, unless one block is larger


@triton.jit
def magnitude(x):
    """|x| of float32 x as int32 bits, which rise with it: a maximum of them keeps NaN, one of floats would not."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def block_scale(largest, FLOOR: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr):
    """Largest `magnitude` of blocks -> their scales, rounded to what is stored, as float32."""
    amax = largest.to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.where(amax < FLOOR, FLOOR, amax), TOP)
    if SCALE == "e8m0":
        scale = tl.where(amax < float("inf"), numbers.power_of_two_ceil(scale), float("nan"))
    if SCALE == "fp16":
        scale = scale.to(tl.float16).to(tl.float32)
    return scale


@triton.jit
def encoded(x, scale, ELEMENT: tl.constexpr, SCALE: tl.constexpr):
    """x / scale -> codes: uint8, int8 for int8; one code a byte."""
    # the inverse of a power of two is exact
    x = x * tl.div_rn(1.0, scale) if SCALE == "e8m0" else tl.div_rn(x, scale)
    if ELEMENT == "e4m3":
        code = numbers.encode_e4m3(x)
    elif ELEMENT == "e2m1":
        code = numbers.encode_e2m1(x)
    else:
        top: tl.constexpr = 127.0 if ELEMENT == "int8" else 7.0
        whole = numbers.nearest(tl.minimum(tl.maximum(x, -top), top)).to(tl.int32)
        code = whole.to(tl.int8) if ELEMENT == "int8" else (whole & 15).to(tl.uint8)
    return code


@triton.jit
def decoded(code, ELEMENT: tl.constexpr):
    """Stored codes -> float32; where two share a byte, the last axis doubles."""
    if ELEMENT == "e4m3":
        value = numbers.decode_e4m3(code)
    elif ELEMENT == "e2m1":
        value = tl.interleave(numbers.decode_e2m1(code & 15), numbers.decode_e2m1(code >> 4))
    elif ELEMENT == "int4":
        wide = code.to(tl.int32)  # two's complement of four bits: what is above 7 is 16 less
        value = tl.interleave(((wide & 15) ^ 8) - 8, ((wide >> 4) ^ 8) - 8).to(tl.float32)
    else:
        value = code.to(tl.float32)
    return value


@triton.jit
def stored_scale(scale):
    """Scales as loaded (e8m0 as uint8) -> float32."""
    return numbers.decode_e8m0(scale) if scale.dtype == tl.uint8 else scale.to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _encode(
    x,
    x_batch,
    x_stride,
    codes,
    scales,
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENT: tl.constexpr,
    PACK: tl.constexpr,
    SCALE: tl.constexpr,
    FLOOR: tl.constexpr,
    TOP: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """x [batch, rows, columns]: a program takes ROWS rows of COUNT blocks of BLOCK columns, padded to WIDTH."""
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    block = tl.program_id(1) * COUNT + tl.arange(0, COUNT)[None, :, None]
    inner = tl.arange(0, WIDTH)[None, None]
    column = block * BLOCK + inner
    there = (row < rows) & (inner < BLOCK) & (column < columns)
    value = tl.load(x + batch * x_batch + row * x_stride + column, mask=there, other=0.0).to(tl.float32)
    largest = tl.max(magnitude(value), 2, keep_dims=True)
    if BLOCK_ROWS > 1:
        largest = tl.max(largest, 0, keep_dims=True)
    scale = block_scale(largest, FLOOR, TOP, SCALE)
    code = encoded(value, scale, ELEMENT, SCALE)
    if PACK == 2:
        low, high = tl.split(tl.reshape(code, (ROWS, COUNT, WIDTH // 2, 2)))
        code = low | (high << 4)
        inner = tl.arange(0, WIDTH // 2)[None, None]
        column = block * (BLOCK // 2) + inner
        there = (row < rows) & (inner < BLOCK // 2) & (column < columns // 2)
    at = (batch * rows + row) * (columns // PACK) + column
    tl.store(codes + at, code.to(codes.dtype.element_ty, bitcast=True), mask=there)
    line, lines = row, rows
    if BLOCK_ROWS > 1:
        line, lines = tl.program_id(0).to(tl.int64), tl.cdiv(rows, BLOCK_ROWS)
    across = tl.cdiv(columns, BLOCK)
    at = (batch * lines + line) * across + block
    scale = numbers.encode_e8m0(scale) if SCALE == "e8m0" else scale.to(scales.dtype.element_ty)
    tl.store(scales + at, scale, mask=(line < lines) & (block < across))


@triton.jit(do_not_specialize=["rows"])
def _decode(
    codes,
    codes_batch,
    codes_stride,
    scales,
    scales_batch,
    scales_stride,
    out,
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENT: tl.constexpr,
    PACK: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    block = tl.program_id(1) * COUNT + tl.arange(0, COUNT)[None, :, None]
    inner = tl.arange(0, WIDTH // PACK)[None, None]
    byte = block * (BLOCK // PACK) + inner
    there = (row < rows) & (inner < BLOCK // PACK) & (byte < columns // PACK)
    code = tl.load(codes + batch * codes_batch + row * codes_stride + byte, mask=there, other=0)
    there = (row < rows) & (block * BLOCK < columns)
    at = batch * scales_batch + row // BLOCK_ROWS * scales_stride + block
    value = decoded(code, ELEMENT) * stored_scale(tl.load(scales + at, mask=there, other=0))
    inner = tl.arange(0, WIDTH)[None, None]
    column = block * BLOCK + inner
    there = (row < rows) & (inner < BLOCK) & (column < columns)
    tl.store(out + (batch * rows + row) * columns + column, value.to(out.dtype.element_ty), mask=there)


def stacked(x: Tensor) -> Tensor:
    """x [..., R, C] as [B, R, C] whose columns lie side by side: a view where its strides allow it, else a copy."""
    leading = x.shape[:-2].numel() if x.dim() > 2 else 1
    x = x.reshape(leading, *x.shape[-2:])
    return x if x.stride(-1) == 1 else x.contiguous()


def as_bytes(x: Tensor) -> Tensor:
    """Codes and scales as dtypes that a kernel on any target knows: e4m3, e8m0 and packed pairs as uint8."""
    return x.view(torch.uint8) if x.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu) else x


def code_bytes(data: Tensor, fmt: Format) -> Tensor:
    """Codes as kernels take them: int8 as such, all others as uint8."""
    return data.view(torch.uint8) if fmt.element in ("e4m3", "e2m1", "int4") else data


def _shape(rows: int, columns: int, batch: int, fmt: Format) -> tuple[tuple[int, int, int], dict[str, int | str]]:
    """Grid and constants of a tensor [batch, rows, columns]."""
    assert fmt.block is not None
    block = fmt.block[1] or columns
    width = power_of_two(block)
    per = fmt.block[0] if fmt.block[0] > 1 else max(1, min(4, TILE // width))
    count = max(1, min(TILE // (width * per), power_of_two(triton.cdiv(columns, block))))
    grid = (triton.cdiv(rows, per), triton.cdiv(columns, block * count), batch)
    return grid, {
        "BLOCK_ROWS": fmt.block[0],
        "BLOCK": block,
        "ELEMENT": fmt.element,
        "PACK": fmt.pack,
        "ROWS": per,
        "COUNT": count,
        "WIDTH": width,
        "num_warps": 4 if per * count * width <= TILE else 16,
    }


def encode(x: Tensor, fmt: Format) -> QTensor:
    """x [..., K] -> its codes and scales, as `formats.encode`.

    Plain formats are casts; they, float64 and what cannot be stored (a ValueError) are left to `formats`.
    """
    regular = x.dim() > (fmt.block is not None and fmt.block[0] > 1) and x.shape[-1] and not x.shape[-1] % fmt.pack
    if fmt.plain or x.dtype == torch.float64 or not regular:
        return formats.encode(x, fmt)
    x = x.detach()
    codes = torch.empty(fmt.data_shape(tuple(x.shape)), dtype=fmt.storage, device=x.device)
    scales = torch.empty(fmt.scale_shape(tuple(x.shape)) or (), dtype=fmt.scale_dtype, device=x.device)
    assert fmt.block is not None
    matrix = stacked(x if fmt.block[0] > 1 else x.reshape(-1, x.shape[-1]))
    grid, constants = _shape(matrix.shape[1], matrix.shape[2], matrix.shape[0], fmt)
    launch(
        _encode,
        grid,
        matrix,
        matrix.stride(0),
        matrix.stride(1),
        code_bytes(codes, fmt),
        as_bytes(scales),
        matrix.shape[1],
        matrix.shape[2],
        SCALE=fmt.scale,
        FLOOR=fmt.floor,
        TOP=fmt.top,
        enable_fp_fusion=False,
        **constants,
    )
    return QTensor(codes, scales, fmt)


def decode(q: QTensor, dtype: torch.dtype) -> Tensor:
    """Values [..., K] in `dtype`, contiguous, as `formats.dequantize`; plain formats and float64 are left to it."""
    fmt = q.format
    if q.scale is None or fmt.block is None or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return formats.dequantize(q, dtype)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    flat = fmt.block[0] == 1
    codes, scales = (
        stacked(t.reshape(-1, t.shape[-1]) if flat else t) for t in (code_bytes(q.data, fmt), as_bytes(q.scale))
    )
    grid, constants = _shape(codes.shape[1], q.shape[-1], codes.shape[0], fmt)
    launch(
        _decode,
        grid,
        codes,
        codes.stride(0),
        codes.stride(1),
        scales,
        scales.stride(0),
        scales.stride(1),
        out,
        codes.shape[1],
        q.shape[-1],
        enable_fp_fusion=False,
        **constants,
    )
    return out
