"""The largest logit of a row, or a draw from its softmax, without sorting the vocabulary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_hal.backends.triton_kernels.runtime import launch, power_of_two

TILE = 2048  # logits that a program holds at a time
ROWS = 32  # rows of a program, at most
SMALLEST = 2.0**-126  # temperature: a smaller one leaves the largest logits, too


@triton.jit
def _largest(logits, row_stride, column_stride, out, rows, V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest id of those that have the largest logit."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    source = logits + row * row_stride
    best, chosen = tl.full([ROWS, 1], -float("inf"), tl.float32), tl.zeros([ROWS, 1], tl.int32)
    for first in range(0, V, BLOCK):
        id = first + tl.arange(0, BLOCK)[None]
        there = (row < rows) & (id < V)
        x = tl.load(source + id.to(tl.int64) * column_stride, mask=there, other=-float("inf")).to(tl.float32)
        here = tl.max(x, 1, keep_dims=True)
        lowest = tl.min(tl.where((x == here) & (id < V), id, V - 1), 1, keep_dims=True)
        chosen, best = tl.where(here > best, lowest, chosen), tl.maximum(here, best)
    tl.store(out + row, chosen.to(tl.int64), mask=row < rows)


@triton.jit
def likelihood(source, column_stride, id, there, peak, temperature):
    """Probabilities of ids, times what makes the largest 1: exp((x - peak) / temperature); 0 where none is there."""
    x = tl.load(source + id.to(tl.int64) * column_stride, mask=there, other=-float("inf")).to(tl.float32)
    return tl.exp((x - peak) / temperature)


@triton.jit
def kept(p, edge, above, goal, seen):
    """p where it is among the most likely ones that reach the goal, else 0; and how many of p equal the edge.

    edge   bits of the least likely one that is kept; ids as likely as this come in turn
    above  sum of those that are more likely than the edge
    seen   how many in front were as likely as the edge
    """
    bits = p.to(tl.int32, bitcast=True)
    equal = bits == edge
    count = equal.to(tl.int32)
    in_front = (seen + tl.cumsum(count, 1) - count).to(tl.float32)
    whole = (bits > edge) | (equal & (above + in_front * p < goal))
    return tl.where(whole, p, 0.0), tl.sum(count, 1, keep_dims=True)


@triton.jit
def _draw(
    logits,
    row_stride,
    column_stride,
    uniform,
    out,
    rows,
    temperature,
    top_p,
    V: tl.constexpr,
    ALL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The id at which the sum of likelihoods, in the order of ids, passes a uniform share of the whole.

    ALL  keep every id. Otherwise the edge of those to keep is the largest likelihood so that all that are at least as
         likely reach top_p of the whole: its bits are found from the highest down, three in a pass. Likelihoods lie in
         0 .. 1, where their bits have their order and lie below 2^30.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    source, lane = logits + row * row_stride, tl.arange(0, BLOCK)[None]
    peak = tl.full([ROWS, 1], -float("inf"), tl.float32)
    for first in range(0, V, BLOCK):
        there = (row < rows) & (first + lane < V)
        place = source + (first + lane).to(tl.int64) * column_stride
        x = tl.load(place, mask=there, other=-float("inf")).to(tl.float32)
        peak = tl.maximum(peak, tl.max(x, 1, keep_dims=True))
    peak = tl.where(row < rows, peak, 0.0)

    edge = tl.full([ROWS, 1], 0 if not ALL else -1, tl.int32)
    above, goal = tl.zeros([ROWS, 1], tl.float32), tl.zeros([ROWS, 1], tl.float32)
    if not ALL:
        digit = tl.arange(0, 8)[None]
        for step in range(10):
            threshold = edge + (digit << (27 - 3 * step))
            sums = tl.zeros([ROWS, 8, BLOCK], tl.float32)
            for first in range(0, V, BLOCK):
                there = (row < rows) & (first + lane < V)
                p = likelihood(source, column_stride, first + lane, there, peak, temperature)
                reached = p.to(tl.int32, bitcast=True)[:, None] >= threshold[:, :, None]
                sums += tl.where(reached, p[:, None], 0.0)
            reach = tl.sum(sums, 2)
            goal = tl.where(step == 0, top_p * tl.max(reach, 1, keep_dims=True), goal)
            last = tl.sum((reach >= goal).to(tl.int32), 1, keep_dims=True) - 1
            edge += last << (27 - 3 * step)
            # Sums fall as thresholds rise: the largest of those that fail is the one just above the edge.
            failed = tl.max(tl.where(reach >= goal, 0.0, reach), 1, keep_dims=True)
            above = tl.maximum(above, failed)

    whole, seen = tl.zeros([ROWS, 1], tl.float32), tl.zeros([ROWS, 1], tl.int32)
    for first in range(0, V, BLOCK):
        there = (row < rows) & (first + lane < V)
        p = likelihood(source, column_stride, first + lane, there, peak, temperature)
        if not ALL:
            p, count = kept(p, edge, above, goal, seen)
            seen += count
        whole += tl.sum(p, 1, keep_dims=True)

    target = tl.load(uniform + row, mask=row < rows, other=0.0) * whole
    passed, seen = tl.zeros([ROWS, 1], tl.float32), tl.zeros([ROWS, 1], tl.int32)
    chosen = tl.zeros([ROWS, 1], tl.int32)
    for first in range(0, V, BLOCK):
        there = (row < rows) & (first + lane < V)
        p = likelihood(source, column_stride, first + lane, there, peak, temperature)
        if not ALL:
            p, count = kept(p, edge, above, goal, seen)
            seen += count
        # The last one whose share begins at or before the target: there always is one, however sums were rounded.
        begun = (p > 0.0) & (passed + (tl.cumsum(p, 1) - p) <= target)
        chosen = tl.maximum(chosen, tl.max(tl.where(begun, first + lane, 0), 1, keep_dims=True))
        passed += tl.sum(p, 1, keep_dims=True)
    tl.store(out + row, chosen.to(tl.int64), mask=row < rows)


def largest(logits: Tensor) -> Tensor:
    """Logits [R, V] -> int64 [R]: the id of the largest, the lowest one where equal."""
    rows, width = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    block = min(TILE, power_of_two(width))
    per = min(ROWS, TILE // block)
    launch(
        _largest,
        (triton.cdiv(rows, per),),
        logits,
        logits.stride(0),
        logits.stride(1),
        out,
        rows,
        V=width,
        ROWS=per,
        BLOCK=block,
        num_warps=8,
    )
    return out


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Logits [R, V], uniform numbers [R] float32 in 0 .. 1 -> int64 [R]: the id each number stands for."""
    rows, width = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    block = min(TILE, power_of_two(width))
    per = min(ROWS, TILE // block)
    launch(
        _draw,
        (triton.cdiv(rows, per),),
        logits,
        logits.stride(0),
        logits.stride(1),
        uniform,
        out,
        rows,
        max(temperature, SMALLEST),
        top_p,
        V=width,
        ALL=top_p >= 1,
        ROWS=per,
        BLOCK=block,
        num_warps=8,
    )
    return out
