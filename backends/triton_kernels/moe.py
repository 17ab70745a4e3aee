"""Mixture of experts: routing, expert order and back, the clamped SwiGLU and its derivative."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_hal.backends.triton_kernels.numbers import area_tangent, exponential
from dsv4_hal.backends.triton_kernels.runtime import launch, power_of_two

FEW = 4096  # ids that are ordered by comparing each with each: one launch, where counting takes three
BLOCK = 128  # ids of a program
COLUMNS = 1024  # channels of a program
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element -> what is copied


@triton.jit
def softplus_root(x):
    """sqrt(log(1 + exp(x))) of float32 x to a few units in the last place: linear where x hides the logarithm."""
    e = exponential(-tl.abs(x))
    z = tl.div_rn(e, e + 2.0)  # log(1 + e) = 2 atanh(z), and z <= 1/3
    return tl.sqrt_rn(tl.where(x > 0.0, x, 0.0) + 2.0 * area_tangent(z))


@triton.jit
def _route(
    logits,
    row_stride,
    column_stride,
    bias,
    picks,
    pick_stride,
    slot_stride,
    ids,
    weights,
    scale,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    BIASED: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token: the K best experts, or the given ones, and their weights."""
    token = tl.program_id(0).to(tl.int64)
    source, slot = logits + token * row_stride, tl.arange(0, BLOCK_K)
    if GIVEN:
        chosen = tl.load(picks + token * pick_stride + slot * slot_stride, mask=slot < K, other=0)
        score = softplus_root(tl.load(source + chosen * column_stride, mask=slot < K, other=0.0))
        score = tl.where(slot < K, score, 0.0)
    else:
        expert = tl.arange(0, BLOCK_E)
        every = softplus_root(tl.load(source + expert * column_stride, mask=expert < EXPERTS, other=0.0))
        choice = every
        if BIASED:
            choice += tl.load(bias + expert, mask=expert < EXPERTS, other=0.0).to(tl.float32)
        choice = tl.where(choice == choice, choice, -float("inf"))  # a padding token, too, picks experts that there are
        left = expert < EXPERTS
        chosen, score = tl.zeros([BLOCK_K], tl.int32), tl.zeros([BLOCK_K], tl.float32)
        for n in range(K):
            best = tl.max(tl.where(left, choice, -float("inf")), 0)
            pick = tl.min(tl.where(left & (choice == best), expert, EXPERTS), 0)
            chosen = tl.where(slot == n, pick, chosen)
            score = tl.where(slot == n, tl.sum(tl.where(expert == pick, every, 0.0), 0), score)
            left = left & (expert != pick)
    weight = tl.div_rn(score, tl.sum(score, 0)) * scale
    tl.store(ids + token * K + slot, chosen.to(tl.int64), mask=slot < K)
    tl.store(weights + token * K + slot, weight, mask=slot < K)


def route(
    logits: Tensor, k: int, scale: float, bias: Tensor | None = None, picks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [T, E] float32, bias [E], picks [T, k] int64 -> ids [T, k] int64, weights [T, k] float32."""
    tokens, experts = logits.shape
    ids = torch.empty(tokens, k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, k, dtype=torch.float32, device=logits.device)
    given = ids if picks is None else picks
    launch(
        _route,
        (tokens,),
        logits,
        logits.stride(0),
        logits.stride(1),
        logits if bias is None else bias.contiguous(),
        given,
        given.stride(0),
        given.stride(1),
        ids,
        weights,
        scale,
        EXPERTS=experts,
        K=k,
        BIASED=bias is not None,
        GIVEN=picks is not None,
        BLOCK_E=power_of_two(experts),
        BLOCK_K=power_of_two(k),
        num_warps=1,
    )
    return ids, weights


@triton.jit
def _order_few(ids, count, offsets, order, experts, BLOCK: tl.constexpr):
    """Where every element lies, and where every expert begins: behind all that have a lower id, or the same id and a
    lower place. An expert e counts as (e, 0)."""
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    element = query < count
    id = tl.load(ids + query, mask=element, other=0).to(tl.int32)
    id = tl.where(element, id, query - count)
    at = tl.where(element, query, 0)
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)[None]
        other = tl.load(ids + place, mask=place < count, other=0).to(tl.int32)
        before = (other < id[:, None]) | ((other == id[:, None]) & (place < at[:, None]))
        found += tl.sum((before & (place < count)).to(tl.int32), 1)
    tl.store(order + found, query.to(tl.int64), mask=element)
    tl.store(offsets + (query - count), found.to(tl.int64), mask=(query >= count) & (query - count <= experts))


@triton.jit
def _count(ids, count, blocks, counts, experts, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """How often every expert comes in a block of ids, to counts [E, blocks]."""
    block, expert = tl.program_id(0), tl.arange(0, BLOCK_E)
    at = block * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids + at, mask=at < count, other=0).to(tl.int32)
    tl.store(counts + expert * blocks + block, tl.histogram(id, BLOCK_E, mask=at < count), mask=expert < experts)


@triton.jit
def _scan(counts, blocks, totals, BLOCK: tl.constexpr):
    """Counts of an expert become the sums over all blocks in front; its total goes to totals [E]."""
    expert = tl.program_id(0)
    total = tl.full([], 0, tl.int32)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        place = counts + expert * blocks + block
        here = tl.load(place, mask=block < blocks, other=0)
        tl.store(place, total + tl.cumsum(here, 0) - here, mask=block < blocks)
        total += tl.sum(here, 0)
    tl.store(totals + expert, total)


@triton.jit
def _place(ids, count, blocks, counts, totals, offsets, order, experts, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Where the elements of a block lie: behind all of lower experts, and those of their own in front of them."""
    block, expert, lane = tl.program_id(0), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK)
    total = tl.load(totals + expert, mask=expert < experts, other=0)
    begin = tl.cumsum(total, 0) - total
    tl.store(offsets + expert, begin.to(tl.int64), mask=(expert < experts) & (block == 0))
    tl.store(offsets + experts, tl.sum(total, 0).to(tl.int64), mask=block == 0)
    at = block * BLOCK + lane
    id = tl.load(ids + at, mask=at < count, other=0).to(tl.int32)
    same = tl.load(ids + (block * BLOCK + lane[None]), mask=block * BLOCK + lane[None] < count, other=0) == id[:, None]
    rank = tl.sum((same & (lane[None] < lane[:, None])).to(tl.int32), 1)
    place = tl.gather(begin, id, 0) + tl.load(counts + id * blocks + block, mask=at < count, other=0) + rank
    tl.store(order + place, at.to(tl.int64), mask=at < count)


def expert_order(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Ids [...] int64 below `experts` -> offsets [E + 1], order [N] int64: flat places by expert, then by place.

    Those of expert e are order[offsets[e] : offsets[e + 1]].
    """
    flat, device = ids.reshape(-1).contiguous(), ids.device
    count, blocks = len(flat), triton.cdiv(len(flat), BLOCK)
    offsets = torch.empty(experts + 1, dtype=torch.int64, device=device)
    order = torch.empty(count, dtype=torch.int64, device=device)
    if count <= FEW:
        grid = (triton.cdiv(count + experts + 1, BLOCK),)
        launch(_order_few, grid, flat, count, offsets, order, experts, BLOCK=BLOCK, num_warps=8)
        return offsets, order
    counts = torch.empty(experts, blocks, dtype=torch.int32, device=device)
    totals = torch.empty(experts, dtype=torch.int32, device=device)
    sizes = {"BLOCK": BLOCK, "BLOCK_E": power_of_two(experts), "num_warps": 4}
    launch(_count, (blocks,), flat, count, blocks, counts, experts, **sizes)
    launch(_scan, (experts,), counts, blocks, totals, BLOCK=1024, num_warps=4)
    launch(_place, (blocks,), flat, count, blocks, counts, totals, offsets, order, experts, **sizes)
    return offsets, order


@triton.jit
def _take_rows(x, row_stride, column_stride, order, out, K, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Row j of the result is row order[j] // K of x."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = x + tl.load(order + row) // K * row_stride
    tl.store(out + row * WIDTH + column, tl.load(source + column * column_stride, mask=column < WIDTH), column < WIDTH)


def take_rows(x: Tensor, order: Tensor, k: int) -> Tensor:
    """Copies rows of x [T, d], any dtype, into an order of (token, slot): order [T * k] int64 -> [T * k, d]."""
    out = torch.empty(len(order), x.shape[1], dtype=x.dtype, device=x.device)
    bits = BITS[x.itemsize]
    launch(
        _take_rows,
        (len(order), triton.cdiv(x.shape[1], COLUMNS)),
        x.view(bits),
        x.stride(0),
        x.stride(1),
        order,
        out.view(bits),
        k,
        WIDTH=x.shape[1],
        COLUMNS=min(COLUMNS, power_of_two(x.shape[1])),
        num_warps=4,
    )
    return out


@triton.jit
def _invert(order, inverse, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(order + at, mask=at < count, other=0)
    tl.store(inverse + place, at.to(tl.int64), mask=at < count)


def inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation [N] int64."""
    made = torch.empty(order.shape, dtype=torch.int64, device=order.device)
    launch(_invert, (triton.cdiv(len(order), 1024),), order.contiguous(), made, len(order), BLOCK=1024, num_warps=4)
    return made


@triton.jit
def _sum_rows(rows, row_stride, column_stride, places, out, K, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Token t: the sum over slots, in their order, of the rows at places[t, slot]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for slot in range(K):
        source = rows + tl.load(places + token * K + slot) * row_stride
        total += tl.load(source + column * column_stride, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + token * WIDTH + column, total, mask=column < WIDTH)


def sum_rows(rows: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows [T * k, d], places [T * k] int64 of the rows of every (token, slot), shape (T, k) -> [T, d] float32."""
    out = torch.empty(shape[0], rows.shape[1], dtype=torch.float32, device=rows.device)
    launch(
        _sum_rows,
        (shape[0], triton.cdiv(rows.shape[1], COLUMNS)),
        rows,
        rows.stride(0),
        rows.stride(1),
        places,
        out,
        shape[1],
        WIDTH=rows.shape[1],
        COLUMNS=min(COLUMNS, power_of_two(rows.shape[1])),
        num_warps=4,
    )
    return out


@triton.jit
def gated(gate, up, limit, LIMITED: tl.constexpr):
    """Gate, clamped from above, its sigmoid to a few units in the last place, and up, clamped on both sides; NaN
    stays."""
    if LIMITED:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    e = exponential(-tl.abs(gate))
    return gate, tl.div_rn(tl.where(gate > 0.0, 1.0, e), 1.0 + e), up


@triton.jit
def _swiglu(
    gate_up,
    row_stride,
    column_stride,
    row_weight,
    weight_stride,
    out,
    limit,
    WIDTH: tl.constexpr,
    LIMITED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source, there = gate_up + row * row_stride, column < WIDTH
    gate = tl.load(source + column * column_stride, mask=there, other=0.0).to(tl.float32)
    up = tl.load(source + (column + WIDTH) * column_stride, mask=there, other=0.0).to(tl.float32)
    gate, sigmoid, up = gated(gate, up, limit, LIMITED)
    hidden = gate * sigmoid * up
    if WEIGHTED:
        hidden *= tl.load(row_weight + row * weight_stride).to(tl.float32)
    tl.store(out + row * WIDTH + column, hidden.to(out.dtype.element_ty), mask=there)


def swiglu(gate_up: Tensor, out: Tensor, limit: float | None, row_weight: Tensor | None = None) -> Tensor:
    """Gate and up [M, 2 * I], row_weight [M] -> out [M, I], contiguous: silu(gate) * up * row_weight in float32."""
    rows, width = out.shape
    weight = gate_up if row_weight is None else row_weight
    launch(
        _swiglu,
        (rows, triton.cdiv(width, COLUMNS)),
        gate_up,
        gate_up.stride(0),
        gate_up.stride(1),
        weight,
        weight.stride(0),
        out,
        limit or 0.0,
        WIDTH=width,
        LIMITED=limit is not None,
        WEIGHTED=row_weight is not None,
        COLUMNS=min(COLUMNS, power_of_two(width)),
        num_warps=4,
    )
    return out
