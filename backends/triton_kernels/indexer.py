"""The indexer: a score for every entry that a token sees, and the k best of them.

Scores of some tokens at a time go to memory of a bounded size. The k-th largest is found by its bits, eight at a time
from the top: counting is exact, so that neither order nor ties hang on how the work is divided. What is picked is then
gathered in order of entries, and put in order of scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from dsv4_hal.backends.triton_kernels.rows import Rows, locate, of, read
from dsv4_hal.backends.triton_kernels.runtime import DTYPES, launch, power_of_two

BLOCK = 64  # tokens that read a block of entries together
SCRATCH = 1 << 24  # scores that are held at a time
SCAN = 2048  # scores of a row that are looked at together
RANK = 64  # picks that are ranked against each other together


class Chunk(NamedTuple):
    """Tokens that are scored together: flat tokens first .. stop - 1, and the most entries that one of them sees.

    blocks  [n, 3] int64: sequence, first flat token, tokens: at most BLOCK of one sequence
    """

    first: int
    stop: int
    longest: int
    blocks: NDArray[np.int64]


def chunks(q_lens: NDArray[np.int64], context: NDArray[np.int64], ratio: int, k: int) -> Iterator[Chunk]:
    """Cut a step's tokens into chunks, whole blocks of tokens each, whose scores fit the scratch."""
    count = -(-q_lens // BLOCK)
    sequence = np.repeat(np.arange(len(count)), count)
    within = (np.arange(len(sequence)) - np.repeat(np.cumsum(count) - count, count)) * BLOCK
    first = (np.cumsum(q_lens) - q_lens)[sequence] + within
    tokens = np.minimum(q_lens[sequence] - within, BLOCK)
    visible = (context[sequence] + within + tokens) // ratio
    room = max(1, SCRATCH // max(k, int(visible.max(initial=1))))
    start = 0
    while start < len(sequence):
        stop = max(start + 1, int(np.searchsorted(first + tokens, first[start] + room, "right")))
        part = slice(start, stop)
        blocks = np.stack([sequence[part], first[part], tokens[part]], 1)
        yield Chunk(int(first[start]), int(first[stop - 1] + tokens[stop - 1]), int(visible[part].max()), blocks)
        start = stop


@triton.jit(do_not_specialize=["first", "longest"])
def _score(
    q,
    q_token,
    q_head,
    weights,
    weights_token,
    weights_head,
    keys,
    blocks,
    positions,
    scores,
    first,
    longest,
    heads,
    RATIO: tl.constexpr,
    NARROW: tl.constexpr,
    HEADS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Scores of ENTRIES entries at up to BLOCK tokens of one sequence, [tokens of the chunk, longest] float32."""
    block = blocks + tl.program_id(0) * 3
    sequence, token, count = tl.load(block), tl.load(block + 1), tl.load(block + 2).to(tl.int32)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    visible = (tl.load(positions + token + count - 1).to(tl.int32) + 1) // RATIO
    if tl.program_id(1) * ENTRIES >= visible:
        return
    there = entry < visible
    rows = tl.trans(read(keys, locate(keys, sequence, entry, there), there))
    head, column = tl.arange(0, HEADS), tl.arange(0, of(keys.form, "width"))[None]
    known = (head < heads)[:, None] & (column < of(keys.form, "dim"))
    for i in range(count):
        query = tl.load(q + (token + i) * q_token + head[:, None] * q_head + column, mask=known, other=0.0)
        weight = tl.load(weights + (token + i) * weights_token + head * weights_head, mask=head < heads, other=0.0)
        product = tl.dot(query, rows, input_precision="ieee").to(NARROW).to(tl.float32)
        weighted = (tl.maximum(product, 0.0) * weight.to(NARROW).to(tl.float32)[:, None]).to(NARROW).to(tl.float32)
        score = tl.sum(weighted, 0).to(NARROW).to(tl.float32)
        seen = entry < (tl.load(positions + token + i).to(tl.int32) + 1) // RATIO
        tl.store(scores + (token + i - first) * longest + entry, score, mask=seen)


@triton.jit
def _ordered(score):
    """float32 -> uint32 in the same order; zeros of both signs are equal."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000).to(tl.uint32)


@triton.jit(do_not_specialize=["first", "longest"])
def _select(
    scores,
    longest,
    positions,
    found_score,
    found_entry,
    first,
    k,
    RATIO: tl.constexpr,
    DIGITS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """The k best of a token's scores, or all, in order of entries: found_* [tokens of the chunk, k]."""
    row = tl.program_id(0).to(tl.int64)
    visible = (tl.load(positions + first + row).to(tl.int32) + 1) // RATIO
    scores += row * longest
    found_score += row * k
    found_entry += row * k
    at = tl.arange(0, SCAN)
    digit = tl.arange(0, 256)

    threshold = tl.full((), 0, tl.uint32)  # the k-th best, as far as it is known: its upper digits
    ties = tl.minimum(k, visible)  # how many of those with these upper digits are picked
    if visible > k:
        for i in tl.static_range(DIGITS):
            shift = 24 - 8 * i
            counts = tl.zeros((256,), tl.int32)
            for start in range(0, visible, SCAN):
                there = start + at < visible
                key = _ordered(tl.load(scores + start + at, mask=there, other=0.0))
                if i > 0:
                    there = there & (key >> (shift + 8) == threshold >> (shift + 8))
                counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=there)
            above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # with a larger digit
            chosen = (above < ties) & (above + counts >= ties)
            threshold = threshold | (tl.sum(tl.where(chosen, digit, 0), 0).to(tl.uint32) << shift)
            ties -= tl.sum(tl.where(chosen, above, 0), 0)

    LOW: tl.constexpr = 32 - 8 * DIGITS  # lower digits, which follow from the upper ones
    taken, equals = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, visible, SCAN):
        there = start + at < visible
        score = tl.load(scores + start + at, mask=there, other=0.0)
        key = _ordered(score) >> LOW
        equal = (there & (key == threshold >> LOW)).to(tl.int32)
        rank = equals + tl.cumsum(equal, 0)
        take = (there & ((key > threshold >> LOW) | ((equal == 1) & (rank <= ties)))).to(tl.int32)
        place = taken + tl.cumsum(take, 0) - 1
        tl.store(found_score + place, score, mask=take == 1)
        tl.store(found_entry + place, start + at, mask=take == 1)
        taken += tl.sum(take, 0)
        equals += tl.sum(equal, 0)


@triton.jit(do_not_specialize=["first"])
def _order(
    found_score,
    found_entry,
    positions,
    picks,
    best,
    first,
    k,
    RATIO: tl.constexpr,
    RANK: tl.constexpr,
):
    """Picks in order of entries -> best first, equal ones in the order they come in."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * RANK + tl.arange(0, RANK)
    count = tl.minimum((tl.load(positions + first + row).to(tl.int32) + 1) // RATIO, k)
    if tl.program_id(1) * RANK >= count:
        return
    score = tl.load(found_score + row * k + at, mask=at < count, other=0.0)
    key = _ordered(score)[:, None]
    rank = tl.zeros((RANK,), tl.int32)
    for start in range(0, count, RANK):
        other = start + tl.arange(0, RANK)
        rival = _ordered(tl.load(found_score + row * k + other, mask=other < count, other=0.0))[None]
        ahead = (rival > key) | ((rival == key) & (other[None] < at[:, None]))
        rank += tl.sum((ahead & (other < count)[None]).to(tl.int32), 1)
    place = (first + row) * k + rank
    entry = tl.load(found_entry + row * k + at, mask=at < count, other=0)
    tl.store(picks + place, entry.to(tl.int64), mask=at < count)
    if best is not None:
        tl.store(best + place, score, mask=at < count)


def index_topk(
    q: Tensor,
    weights: Tensor,
    keys: Rows,
    parts: list[tuple[Chunk, Tensor]],
    positions: Tensor,
    k: int,
    *,
    ratio: int,
    narrow: torch.dtype,
    with_scores: bool,
    tile: Mapping[str, int],
) -> tuple[Tensor, Tensor | None]:
    """The k best entries of every token -> picks [T, k] int64, best first, then -1; scores [T, k] float32, or None.

    q          [T, H, D], rounded as the keys are; weights [T, H]
    parts      the step's chunks, with their blocks on the device
    positions  [T] int64
    ratio      tokens per entry
    narrow     dtype that scores are rounded to at every step
    tile       entries of a program; num_warps, num_stages
    """
    heads, device = q.shape[1], q.device
    if q.stride(-1) != 1:
        q = q.contiguous()
    picks = torch.full((len(q), k), -1, dtype=torch.int64, device=device)
    best = torch.full((len(q), k), float("-inf"), dtype=torch.float32, device=device) if with_scores else None
    options = {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"]}
    for chunk, blocks in parts:
        tokens, longest = chunk.stop - chunk.first, chunk.longest
        scores = torch.empty(tokens, longest, dtype=torch.float32, device=device)
        found_score = torch.empty(tokens, k, dtype=torch.float32, device=device)
        found_entry = torch.empty(tokens, k, dtype=torch.int32, device=device)
        launch(
            _score,
            (len(blocks), triton.cdiv(longest, tile["entries"])),
            q,
            q.stride(0),
            q.stride(1),
            weights,
            weights.stride(0),
            weights.stride(1),
            keys,
            blocks,
            positions,
            scores,
            chunk.first,
            longest,
            heads,
            RATIO=ratio,
            NARROW=DTYPES[narrow],
            HEADS=max(16, power_of_two(heads)),
            ENTRIES=tile["entries"],
            enable_fp_fusion=False,
            **options,
        )
        found = (found_score, found_entry)
        digits = 2 if narrow == torch.bfloat16 else 4  # of bfloat16 the lower half is zero
        launch(
            _select,
            (tokens,),
            scores,
            longest,
            positions,
            *found,
            chunk.first,
            k,
            RATIO=ratio,
            DIGITS=digits,
            SCAN=SCAN,
            num_warps=8,
        )
        launch(
            _order,
            (tokens, triton.cdiv(k, RANK)),
            *found,
            positions,
            picks,
            best,
            chunk.first,
            k,
            RATIO=ratio,
            RANK=RANK,
            num_warps=4,
        )
    return picks, best
