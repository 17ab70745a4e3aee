"""Sparse attention: every token over its window and its compressed entries, keys and values alike.

Probabilities are rounded relative to the largest score of all keys, so keys are walked twice: for the largest score,
then for the sums. A token's entries are cut into splits of a fixed number; each is summed on its own, the first one
with the window, and the sums are added in order. Where tokens are few, every split has a program of its own, and
another kernel adds. The additions are the same, so that no result hangs on how many tokens come together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_hal.backends.triton_kernels.numbers import exponential, logarithm
from dsv4_hal.backends.triton_kernels.rows import Rows, locate, of, read
from dsv4_hal.backends.triton_kernels.runtime import DTYPES, launch

SPLIT = 256  # entries of a split
SPREAD = 2048  # programs that a step may have for every split to have its own; bounds the memory for their sums


@triton.jit
def _reach(token, sequences, positions, RATIO: tl.constexpr, PICKS: tl.constexpr, SPLIT: tl.constexpr):
    """What a token sees: its sequence, the end of its window, visible entries, places to look for entries, splits.
    Nothing for padding tokens."""
    sequence = tl.load(sequences + token)
    stop = tl.where(sequence >= 0, tl.load(positions + token).to(tl.int32) + 1, 0)
    visible = stop // RATIO if RATIO else 0 * stop
    places = tl.where(sequence >= 0, PICKS, 0) if PICKS else visible
    return sequence, stop, visible, places, tl.maximum(tl.cdiv(places, SPLIT), 1)


@triton.jit
def _window_keys(rows, sequence, start, stop, KEYS: tl.constexpr):
    """Window rows from `start` -> values [KEYS, width], and which of them lie before `stop`."""
    index = start + tl.arange(0, KEYS)
    there = index < stop
    return read(rows, locate(rows, sequence, index, there), there), there


@triton.jit
def _entry_keys(rows, picks, sequence, start, stop, visible, KEYS: tl.constexpr):
    """Entries from `start`, or those that are picked there, likewise."""
    index = start + tl.arange(0, KEYS)
    there = index < stop
    if picks is not None:
        pick = tl.load(picks + index, mask=there, other=-1)
        there = (pick >= 0) & (pick < visible)
        index = tl.where(there, pick, 0).to(tl.int32)
    return read(rows, locate(rows, sequence, index, there), there), there


@triton.jit
def _scores(q, keys, there, scale):
    """q [HEADS, width] and keys [KEYS, width] -> scores [HEADS, KEYS] float32, -inf where a key is not there."""
    if q.dtype != keys.dtype:
        q, keys = q.to(tl.float32), keys.to(tl.float32)
    score = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    return tl.where(there[None], score, float("-inf"))


@triton.jit
def _add(acc, mass, q, keys, there, scale, peak, PROBS: tl.constexpr):
    """acc [HEADS, width] and mass [HEADS, KEYS], with one block of keys more."""
    p = tl.where(there[None], exponential(_scores(q, keys, there, scale) - peak[:, None]), 0.0)
    narrow = p.to(PROBS)
    if keys.dtype != PROBS:
        narrow, keys = narrow.to(tl.float32), keys.to(tl.float32)
    return tl.dot(narrow, keys, acc, input_precision="ieee"), mass + p


@triton.jit(do_not_specialize=["tokens"])
def _peaks(
    q,
    q_token,
    q_head,
    window,
    entries,
    picks,
    picks_token,
    sequences,
    positions,
    peaks,
    tokens,
    heads,
    scale,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    PICKS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPREAD: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The largest score over all keys of a token, or over one split: peaks [parts, T, H] float32."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    sequence, stop, visible, places, splits = _reach(token, sequences, positions, RATIO, PICKS, SPLIT)
    if part >= splits:
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, of(window.form, "width"))
    there = (head < heads)[:, None] & (column < of(window.form, "dim"))[None] & (sequence >= 0)
    query = tl.load(q + token * q_token + head[:, None] * q_head + column[None], mask=there, other=0.0)
    if picks is not None:
        picks += token * picks_token
    peak = tl.full((HEADS, KEYS), float("-inf"), tl.float32)
    for start in range(tl.where(part == 0, tl.maximum(stop - WINDOW, 0), stop), stop, KEYS):
        keys, seen = _window_keys(window, sequence, start, stop, KEYS)
        peak = tl.maximum(peak, _scores(query, keys, seen, scale))
    if RATIO:
        last = tl.minimum((part + 1) * SPLIT, places) if SPREAD else places
        for start in range(part * SPLIT, last, KEYS):
            keys, seen = _entry_keys(entries, picks, sequence, start, last, visible, KEYS)
            peak = tl.maximum(peak, _scores(query, keys, seen, scale))
    tl.store(peaks + (part.to(tl.int64) * tokens + token) * heads + head, tl.max(peak, 1), mask=head < heads)


@triton.jit
def _peak(peaks, parts, token, tokens, head, heads, HEADS: tl.constexpr):
    """The largest of the first `parts` peaks [HEADS]; 0 without any key, so that it can be subtracted."""
    peak = tl.full((HEADS,), float("-inf"), tl.float32)
    for part in range(parts):
        place = peaks + (tl.cast(part, tl.int64) * tokens + token) * heads + head
        peak = tl.maximum(peak, tl.load(place, mask=head < heads, other=float("-inf")))
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _finish(acc, total, peak, sink, out, lse, token, head, heads, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Weighted sum [HEADS, WIDTH] and sum of weights [HEADS] -> rows of the result, and the log of the sum; zeros and
    -inf without any key."""
    there = head < heads
    denominator = total + exponential(tl.load(sink + head, mask=there, other=0.0).to(tl.float32) - peak)
    none = total == 0.0
    value = tl.where(none[:, None], 0.0, acc / denominator[:, None])
    row, column = token * heads + head, tl.arange(0, WIDTH)[None]
    place = out + row[:, None] * DIM + column
    tl.store(place, value.to(out.dtype.element_ty), mask=there[:, None] & (column < DIM))
    if lse is not None:
        known = logarithm(tl.where(none, 1.0, total)) + peak
        tl.store(lse + row, tl.where(none, float("-inf"), known), mask=there)


@triton.jit(do_not_specialize=["tokens"])
def _attend(
    q,
    q_token,
    q_head,
    window,
    entries,
    picks,
    picks_token,
    sequences,
    positions,
    peaks,
    sink,
    out,
    lse,
    sums,
    totals,
    tokens,
    heads,
    scale,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    PICKS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPREAD: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    PROBS: tl.constexpr,
):
    """The result of a token; or with SPREAD, of one split, sums [parts, T, H, DIM] and totals [parts, T, H]."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    sequence, stop, visible, places, splits = _reach(token, sequences, positions, RATIO, PICKS, SPLIT)
    if part >= splits:
        return
    DIM: tl.constexpr = of(window.form, "dim")
    WIDTH: tl.constexpr = of(window.form, "width")
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, WIDTH)
    there = (head < heads)[:, None] & (column < DIM)[None]
    query = tl.load(
        q + token * q_token + head[:, None] * q_head + column[None], mask=there & (sequence >= 0), other=0.0
    )
    if picks is not None:
        picks += token * picks_token
    peak = _peak(peaks, splits if SPREAD else 1, token, tokens, head, heads, HEADS)
    total = tl.zeros((HEADS,), tl.float32)
    result = tl.zeros((HEADS, WIDTH), tl.float32)
    for split in range(part, part + 1 if SPREAD else splits):
        acc = tl.zeros((HEADS, WIDTH), tl.float32)
        mass = tl.zeros((HEADS, KEYS), tl.float32)
        for start in range(tl.where(split == 0, tl.maximum(stop - WINDOW, 0), stop), stop, KEYS):
            keys, seen = _window_keys(window, sequence, start, stop, KEYS)
            acc, mass = _add(acc, mass, query, keys, seen, scale, peak, PROBS)
        if RATIO:
            last = tl.minimum((split + 1) * SPLIT, places)
            for start in range(split * SPLIT, last, KEYS):
                keys, seen = _entry_keys(entries, picks, sequence, start, last, visible, KEYS)
                acc, mass = _add(acc, mass, query, keys, seen, scale, peak, PROBS)
        result += acc
        total += tl.sum(mass, 1)
    if SPREAD:
        row = (part.to(tl.int64) * tokens + token) * heads + head
        tl.store(sums + row[:, None] * DIM + column[None], result, mask=there)
        tl.store(totals + row, total, mask=head < heads)
    else:
        _finish(result, total, peak, sink, out, lse, token, head, heads, DIM, WIDTH)


@triton.jit(do_not_specialize=["tokens"])
def _combine(
    sequences,
    positions,
    peaks,
    sink,
    out,
    lse,
    sums,
    totals,
    tokens,
    heads,
    RATIO: tl.constexpr,
    PICKS: tl.constexpr,
    SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The result of a token from those of its splits."""
    token = tl.program_id(0).to(tl.int64)
    _, _, _, _, splits = _reach(token, sequences, positions, RATIO, PICKS, SPLIT)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, WIDTH)[None]
    there = (head < heads)[:, None] & (column < DIM)
    peak = _peak(peaks, splits, token, tokens, head, heads, HEADS)
    total = tl.zeros((HEADS,), tl.float32)
    result = tl.zeros((HEADS, WIDTH), tl.float32)
    for part in range(splits):
        row = (tl.cast(part, tl.int64) * tokens + token) * heads + head
        result += tl.load(sums + row[:, None] * DIM + column, mask=there, other=0.0)
        total += tl.load(totals + row, mask=head < heads, other=0.0)
    _finish(result, total, peak, sink, out, lse, token, head, heads, DIM, WIDTH)


def sparse_attention(
    q: Tensor,
    window: Rows,
    entries: Rows | None,
    picks: Tensor | None,
    sink: Tensor,
    sequences: Tensor,
    positions: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    scale: float,
    span: int,
    ratio: int,
    longest: int,
    probs: torch.dtype,
    tile: Mapping[str, int],
) -> Tensor:
    """One softmax over the last `span` window rows of each token and its entries -> out [T, H, D], contiguous.

    q                     [T, H, D]
    picks                 [T, K] int64, -1 for none; None: all visible entries
    sequences, positions  [T] int64; sequence -1: a padding token, whose row is zero
    lse                   None, or [T, H] float32 to write the log of the sum of exponentials to
    ratio                 tokens per entry; longest: at least as many entries as any token of the step sees
    probs                 dtype of probabilities in front of the product with the values
    tile                  heads and keys of a program; num_warps, num_stages
    """
    (tokens, heads, dim), device = q.shape, q.device
    if q.stride(-1) != 1:
        q = q.contiguous()
    if picks is not None and picks.stride(-1) != 1:
        picks = picks.contiguous()
    chosen = 0 if picks is None else picks.shape[1]
    if entries is None or (picks is not None and not chosen):
        entries, picks, ratio, longest = None, None, 0, 0
    splits = max(1, triton.cdiv(chosen or longest, SPLIT))
    blocks = triton.cdiv(heads, tile["heads"])
    spread = 1 < splits <= SPREAD // max(1, tokens * blocks)
    parts = splits if spread else 1

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    peaks, sums, totals = empty(parts, tokens, heads), None, None
    if spread:
        sums, totals = empty(parts, tokens, heads, dim), empty(parts, tokens, heads)
    keys = (q, q.stride(0), q.stride(1), window, entries, picks, 0 if picks is None else picks.stride(0))
    place, sink = (sequences, positions), sink.contiguous()
    counts = {"RATIO": ratio, "PICKS": chosen, "SPLIT": SPLIT, "HEADS": tile["heads"]}
    walk = {"WINDOW": span, "KEYS": tile["keys"], "SPREAD": spread, **counts}
    # without contraction, so that both ways of adding splits compute the same
    options = {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"], "enable_fp_fusion": False}
    grid = (tokens, blocks, parts)
    launch(_peaks, grid, *keys, *place, peaks, tokens, heads, scale, **walk, **options)
    written = (peaks, sink, out, lse, sums, totals, tokens, heads)
    launch(_attend, grid, *keys, *place, *written, scale, PROBS=DTYPES[probs], **walk, **options)
    if spread:
        width = window.form.value.width
        launch(_combine, grid[:2], *place, *written, DIM=dim, WIDTH=width, **counts, **options)
    return out
