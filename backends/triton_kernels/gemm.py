"""Matrix products over stored formats: one kernel for one matrix, one per group of channels, or one per expert.

Codes become operands of the matrix units without a rounding, and sums are float32. Where scales go hangs on how many
columns of K share one:
  block  128 columns, of a weight or of activations: the product of these columns is scaled, and added in float32;
         "tile" where all rows of a weight's tile have one scale
  row    all columns: the sum is scaled, at its end
  fold   fewer, powers of two: the operand is scaled, which bfloat16 and float32 hold exactly
  mx     the same, left to matrix units that take such scales
A row's sum runs over K in steps of a fixed size, and where a matrix has few tiles, over splits of K that are added in
order: it does not hang on the rows beside it. Where rows are few, every split has a program of its own, and another
kernel adds; the additions are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_hal.backends.triton_kernels.quantize import as_bytes, code_bytes, decode, decoded, stacked, stored_scale
from dsv4_hal.backends.triton_kernels.runtime import DTYPES, launch, power_of_two
from dsv4_hal.formats import FORMATS, QTensor

ACTIVATION = FORMATS["e4m3_1x128"]  # the one quantised format that x is multiplied in as it is
PROGRAMS = 128  # that keep a device busy: about its multiprocessors
SHORTEST = 512  # columns of a split
BAND = tl.constexpr(8)  # row tiles that are worked through together, so that tiles of a weight are found in the cache


@triton.jit
def tile_of(TILES_N: tl.constexpr):
    """Tile of this program -> (row tile, column tile): bands of row tiles, in a band column by column."""
    program, tiles = tl.program_id(0), tl.num_programs(0) // TILES_N
    first = program // (BAND * TILES_N) * BAND
    height = tl.minimum(tiles - first, BAND)
    within = program % (BAND * TILES_N)
    return first + within % height, within // height


@triton.jit
def rows_of(tile, offsets, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BM: tl.constexpr):
    """Row tile -> (its expert, its first row, the row behind the expert's last), int64; expert EXPERTS: no such tile.

    Experts have as many tiles as their rows fill, one after the other.
    """
    expert = tl.arange(0, BLOCK_E)
    there = expert < EXPERTS
    start = tl.load(offsets + expert, mask=there, other=0)
    count = tl.load(offsets + expert + 1, mask=there, other=0) - start
    tiles = ((count + BM - 1) // BM).to(tl.int32)
    found = tl.sum((there & (tl.cumsum(tiles, 0) <= tile)).to(tl.int32), 0)
    before = tl.sum(tl.where(expert < found, tiles, 0), 0)
    mine = expert == found
    first = tl.sum(tl.where(mine, start, 0), 0)
    stop = first + tl.sum(tl.where(mine, count, 0), 0)
    return found.to(tl.int64), first + (tile - before) * BM, stop


@triton.jit
def operand(code, ELEMENT: tl.constexpr, OPERAND: tl.constexpr, FP8: tl.constexpr):
    """Codes as loaded -> what matrix units multiply, exactly."""
    if ELEMENT == "plain":
        return code.to(OPERAND)
    if ELEMENT == "e4m3" and FP8:
        return code.to(tl.float8e4nv, bitcast=True).to(OPERAND)
    return decoded(code, ELEMENT).to(OPERAND)


@triton.jit
def folded(
    w,
    scale,
    inside,
    start,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    PACK: tl.constexpr,
    PART: tl.constexpr,
    OPERAND: tl.constexpr,
    FP8: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Values of a weight's tile, scales included, rounded to OPERAND: w points to the start of BN rows, and scale
    [BN, BK / PART] are theirs, as stored."""
    k = start + tl.arange(0, BK // PART) * PART
    byte = (k // PACK)[None, :, None] + tl.arange(0, PART // PACK)[None, None]
    code = tl.load(w[:, None, None] + byte, mask=inside[:, None, None] & (byte < K // PACK), other=0)
    value = operand(code, ELEMENT, tl.float32, FP8) * stored_scale(scale)[:, :, None]
    return tl.reshape(value.to(OPERAND), (BN, BK))


@triton.jit
def scales_of(
    x_scale,
    there,
    w_scale,
    inside,
    start,
    K: tl.constexpr,
    X: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART: tl.constexpr,
    BK: tl.constexpr,
):
    """Scales as stored of a step's columns, from `start`: of rows of x, and of w; 0 where a step reads none."""
    of_x, of_w = 0, 0
    if X != "plain" and SCALES != "mx":
        of_x = tl.load(x_scale + start // 128, mask=there & (start < K), other=0)
    if SCALES == "tile":
        of_w = tl.load(w_scale + start // BLOCK_K, mask=start < K, other=0)
    elif SCALES == "block":
        of_w = tl.load(w_scale + start // BLOCK_K, mask=inside & (start < K), other=0)
    elif SCALES == "fold":
        k = start + tl.arange(0, BK // PART) * PART
        place = k // BLOCK_K if BLOCK_K > 0 else k * 0
        of_w = tl.load(w_scale[:, None] + place[None], mask=inside[:, None] & (k < K)[None], other=0)
    return of_x, of_w


@triton.jit
def product(
    x,
    x_scale,
    there,
    w,
    w_stride,
    w_scale,
    w_scale_stride,
    first,
    inside,
    begin,
    end,
    K: tl.constexpr,
    X: tl.constexpr,
    W: tl.constexpr,
    PACK: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr,
    FP8: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows of x times rows first .. first + BN - 1 of w, over columns begin .. end - 1 -> [BM, BN] float32.

    x, x_scale     pointers to the start of BM rows and of their scales; `there` says which of the rows exist
    w, w_scale     pointers to matrices; `inside` says which of the BN rows exist
    X, W           elements: "plain", or the code; PACK codes of w in a byte
    SCALES         of w: "none", "tile" (block, and one for all BN rows), "block", "row", "fold", "mx": see above
    BLOCK_N, _K    rows and columns of w that share a scale; 0: all
    """
    row = (first + tl.arange(0, BN)).to(tl.int64)
    w += row * w_stride
    w_scale += (first // BLOCK_N if SCALES == "tile" else row // BLOCK_N) * w_scale_stride
    acc = tl.zeros((BM, BN), tl.float32)
    k = tl.arange(0, BK)
    byte = tl.arange(0, BK // PACK)
    PART: tl.constexpr = BLOCK_K if BLOCK_K > 0 and BLOCK_K < BK else BK  # columns that share a scale, of a step's
    next_x, next_w = scales_of(x_scale, there, w_scale, inside, begin, K, X, SCALES, BLOCK_K, PART, BK)
    for start in range(begin, end, BK):
        of_x, of_w = next_x, next_w
        # asked for a step ahead, so that none waits for them: only what matrix units read is fetched ahead by itself
        next_x, next_w = scales_of(x_scale, there, w_scale, inside, start + BK, K, X, SCALES, BLOCK_K, PART, BK)
        left = tl.load(x[:, None] + (start + k)[None], mask=there[:, None] & (start + k < K)[None], other=0)
        if SCALES == "fold":
            right = folded(w, of_w, inside, start, K, W, PACK, PART, OPERAND, FP8, BN, BK)
        else:
            at = start // PACK + byte
            right = tl.load(w[:, None] + at[None], mask=inside[:, None] & (at < K // PACK)[None], other=0)
        if SCALES == "mx":
            part = start + tl.arange(0, BK // 32) * 32
            within = (part < K)[None]
            left_scale = tl.load(x_scale[:, None] + (part // 128)[None], mask=there[:, None] & within, other=0)
            right_scale = tl.load(w_scale[:, None] + (part // 32)[None], mask=inside[:, None] & within, other=0)
            acc = tl.dot_scaled(left, left_scale, "e4m3", tl.trans(right), right_scale, W, acc)
        else:
            left = operand(left, X, OPERAND, FP8)
            if SCALES != "fold":
                right = operand(right, W, OPERAND, FP8)
            if X == "plain" and SCALES != "tile" and SCALES != "block":
                acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
            else:
                part = tl.dot(left, tl.trans(right), input_precision="ieee")
                scale = tl.full((BM,), 1.0, tl.float32)
                if X != "plain":
                    scale = stored_scale(of_x)
                if SCALES == "tile":
                    scale *= stored_scale(of_w)
                elif SCALES == "block":
                    part *= stored_scale(of_w)[None]
                acc += part * scale[:, None]
    if SCALES == "row":
        acc *= stored_scale(tl.load(w_scale, mask=inside, other=0))[None]
    return acc


@triton.jit(do_not_specialize=["rows"])
def _matmul(
    x,
    x_batch,
    x_stride,
    x_scale,
    x_scale_batch,
    x_scale_stride,
    w,
    w_batch,
    w_stride,
    w_scale,
    w_scale_batch,
    w_scale_stride,
    out,
    out_batch,
    out_stride,
    offsets,
    rows,
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
    SPLIT: tl.constexpr,
    SPREAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Matrix `batch` of x times that of w; or, with EXPERTS, rows of every expert times its own matrix.

    SPLIT columns of K are summed apart, and the sums added in order. SPREAD: a program sums one split, of several, to
    its place in out [splits, batch, rows, N] float32, and `_add` adds.
    """
    tile, across = tile_of(tl.cdiv(N, BN))
    batch = tl.program_id(1).to(tl.int64)
    top, stop, matrix = tile.to(tl.int64) * BM, rows, batch
    if EXPERTS > 0:
        matrix, top, stop = rows_of(tile, offsets, EXPERTS, BLOCK_E, BM)
        if matrix >= EXPERTS:
            return
    row, first = top + tl.arange(0, BM), across * BN
    column = first + tl.arange(0, BN)
    there, inside = row < stop, column < N
    operands = (
        x + batch * x_batch + row * x_stride,
        x_scale + batch * x_scale_batch + row * x_scale_stride,
        there,
        w + matrix * w_batch,
        w_stride,
        w_scale + matrix * w_scale_batch,
        w_scale_stride,
        first,
        inside,
    )
    part = tl.program_id(2)
    if SPREAD:
        begin, end = part * SPLIT, tl.minimum((part + 1) * SPLIT, K)
        total = product(*operands, begin, end, K, X, W, PACK, SCALES, BLOCK_N, BLOCK_K, OPERAND, FP8, BM, BN, BK)
    elif SPLIT >= K:
        total = product(*operands, 0, K, K, X, W, PACK, SCALES, BLOCK_N, BLOCK_K, OPERAND, FP8, BM, BN, BK)
    else:
        total = tl.zeros((BM, BN), tl.float32)
        for split in range(tl.cdiv(K, SPLIT)):
            begin, end = split * SPLIT, tl.minimum((split + 1) * SPLIT, K)
            total += product(*operands, begin, end, K, X, W, PACK, SCALES, BLOCK_N, BLOCK_K, OPERAND, FP8, BM, BN, BK)
    if SPREAD:
        out += part.to(tl.int64) * tl.num_programs(1) * out_batch
    target = out + batch * out_batch + row[:, None] * out_stride + column[None]
    tl.store(target, total.to(out.dtype.element_ty), mask=there[:, None] & inside[None])


@triton.jit(do_not_specialize=["rows"])
def _add(parts, out, out_batch, out_stride, rows, N: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of splits, parts [splits, batch, rows, N], in order -> a row of out."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    parts += (batch * rows + row) * N + column
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        place = parts + tl.cast(split, tl.int64) * tl.num_programs(2) * rows * N
        total += tl.load(place, mask=column < N, other=0.0)
    tl.store(out + batch * out_batch + row * out_stride + column, total.to(out.dtype.element_ty), mask=column < N)


@dataclass(frozen=True)
class Units:
    """Matrix units of a device.

    fp8          whether the device converts float8
    products     whether units multiply float8 and keep float32 sums; elsewhere codes are widened
    scaled       whether units take block scales
    tiles        constants by kind of operand: "plain" (two bytes), "float8", "widened" (codes to two bytes), "scaled",
                 "float32": BM, BN, BK, num_warps, num_stages. BK divides 128
    """

    fp8: bool
    products: bool
    scaled: bool
    tiles: Mapping[str, Mapping[str, int]]


def accepted(x: Tensor | QTensor) -> Tensor | QTensor:
    """x as kernels take it: plain, or codes and scales of ACTIVATION; other formats become float32, exactly."""
    if isinstance(x, Tensor) or x.format == ACTIVATION:
        return x
    return x.data if x.format.plain else decode(x, torch.float32)


def constants(x: Tensor | QTensor, w: QTensor, units: Units, fold: bool = False, parts: int = 1) -> dict[str, Any]:
    """Constants of a kernel for x, as `accepted`, in front of w: formats, operands, and tiles.

    fold   the weight is dequantised and rounded to x's dtype, and that is multiplied
    parts  what w's rows are cut into: tiles begin with each
    """
    fmt, coded = w.format, isinstance(x, QTensor)
    block_n, block_k = fmt.block or (1, 0)
    few = 0 < block_k < 128
    if fmt.plain:
        scales = "none"
    elif fold or few:
        scales = "fold"
    else:
        scales = "block" if block_k else "row"

    # codes are exact in any dtype; float16 holds not every scale
    wide = x.dtype if isinstance(x, Tensor) else fmt.storage if fmt.plain else torch.bfloat16
    if not fold and ((fmt.plain and fmt.storage != wide) or (few and wide == torch.float16)):
        wide = torch.float32
    operand = DTYPES[wide]
    float8 = units.products and coded and fmt.element == "e4m3" and scales != "fold"
    if wide == torch.float32:
        kind = "float32"
    elif fmt.plain and not coded:
        kind = "plain"
    elif float8:
        kind, operand = "float8", tl.float8e4nv
    elif units.scaled and coded and block_k == 32:
        kind, scales = "scaled", "mx"
    else:
        kind = "widened"
    tile, height = units.tiles[kind], w.shape[-2] // parts
    if scales == "block" and block_n % tile["BN"] == 0 and (parts == 1 or height % block_n == 0):
        scales = "tile"
    return {
        "N": height,
        "K": w.shape[-1],
        "X": ACTIVATION.element if coded else "plain",
        "W": "plain" if fmt.plain else fmt.element,
        "PACK": fmt.pack,
        "SCALES": scales,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "OPERAND": operand,
        "FP8": units.fp8,
        **tile,
    }


def strided(q: Tensor | QTensor) -> tuple[Any, ...]:
    """Arguments of a kernel for one matrix [R, K] or many [B, R, K]: a tensor and its strides of matrices and of rows,
    for values or codes, and then for scales. Plain values stand in for theirs."""
    data = stacked(q if isinstance(q, Tensor) else code_bytes(q.data, q.format))
    scale = data if isinstance(q, Tensor) or q.scale is None else stacked(as_bytes(q.scale))
    return *steps(data), *steps(scale)


def steps(x: Tensor) -> tuple[Tensor, int, int]:
    """x [B, R, K], and its strides of matrices and of rows. That of a single matrix is 0: it hangs on the number of
    rows, and no kernel should be compiled anew for each."""
    return x, x.stride(0) if len(x) > 1 else 0, x.stride(1)


def row_tiles(rows: int, experts: int, size: int) -> int:
    """How many row tiles `rows` fill at most, where each of `experts` begins its own."""
    return (rows + min(rows, experts) * (size - 1)) // size


def matmul(
    x: Tensor | QTensor,
    w: QTensor,
    out: Tensor,
    units: Units,
    offsets: Tensor | None = None,
    fold: bool = False,
) -> Tensor:
    """x times w transposed -> out, rounded once from float32 sums; out's columns lie side by side.

    x [T, K], w [N, K], out [T, N]; or for every g x [T, G, K], w [G, N, K], out [T, G, N].
    offsets  [E + 1] int64 on the device: x [M, K] holds rows of expert e of w [E, N, K] at offsets[e] .. offsets[e + 1]
    fold     as in `constants`
    """
    x = accepted(x)
    chosen = constants(x, w, units, fold)
    experts = 0 if offsets is None else w.shape[0]
    target = out.transpose(0, 1) if out.dim() == 3 else out[None]
    (batch, rows, n), tiles = target.shape, row_tiles(target.shape[1], experts or 1, chosen["BM"])
    columns = triton.cdiv(n, chosen["BN"])
    split = _split(chosen, columns * batch, bool(experts))
    splits = triton.cdiv(chosen["K"], split)
    spread = not experts and splits > 1 and tiles * columns * batch < PROGRAMS
    made = target
    if spread:
        made = torch.empty(splits * batch, rows, n, dtype=torch.float32, device=out.device)
    left = strided(x.transpose(0, 1) if isinstance(x, Tensor) and x.dim() == 3 else x)
    launch(
        _matmul,
        (tiles * columns, 1 if experts else batch, splits if spread else 1),
        *left,
        *strided(w if w.scale is not None else w.data),
        *steps(made),
        target if offsets is None else offsets,
        rows,
        EXPERTS=experts,
        BLOCK_E=max(16, power_of_two(experts)),
        SPLIT=split,
        SPREAD=spread,
        **chosen,
    )
    if spread:
        block = min(1024, power_of_two(n))
        launch(_add, (rows, triton.cdiv(n, block), batch), made, *steps(target), rows, N=n, SPLITS=splits, BLOCK=block)
    return out


def _split(chosen: Mapping[str, Any], tiles: int, experts: bool) -> int:
    """Columns of K that are summed apart, where one row tile makes `tiles` tiles: whole blocks of 128, at least
    SHORTEST, and so few that PROGRAMS have work. It hangs on the matrix alone, not on how many rows are multiplied.

    Ordinary units add float32 in one chain, whose error grows with its length: splits are as short as they may be.
    """
    k = max(1, chosen["K"])
    if chosen["SCALES"] == "row" or not tiles:  # those are scales of the whole sum
        return k
    if chosen["OPERAND"] == tl.float32:
        return min(k, SHORTEST)
    parts = 1 if experts else min(triton.cdiv(PROGRAMS, tiles), k // SHORTEST)
    return k if parts < 2 else triton.cdiv(triton.cdiv(k, parts), 128) * 128
