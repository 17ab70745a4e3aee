"""vllm-ascend's sparse attention over rows that are key and value at once, for plain rows and for the 950's FP8 rows.

Schemas: vllm-ascend csrc/torch_binding.cpp, commit 182b75ea. Arithmetic: the README.md of csrc/attention/
sparse_attn_sharedkv and kv_quant_sparse_attn_sharedkv. They do not say how the softmax is computed; that it runs over
512 rows at a time, starts from the sink, and rounds probabilities to the query's dtype, is read in a published model of
the kernel (`sparse_attn_sharedkv_golden_bnsd`). None of it was run on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dsv4_hal.backends.ascend.emulator import custom_rules
from dsv4_hal.backends.ascend.emulator.call import NO_META, emulated
from dsv4_hal.backends.ascend.emulator.schedule import attention_asked, schedule

ROPE, NOPE, GROUP = 64, 448, 64  # of an FP8 row: rotary channels, quantised channels, channels that share a scale
TILE = 512  # rows that one step of the softmax takes

Rows = Callable[[int, Tensor], Tensor]
"""Sequence, logical rows [...] -> values [..., D]."""


@emulated(
    "_C_ascend::npu_sparse_attn_sharedkv",
    schema="(Tensor q, *, Tensor? ori_kv=None, Tensor? cmp_kv=None, Tensor? ori_sparse_indices=None, "
    "Tensor? cmp_sparse_indices=None, Tensor? ori_block_table=None, Tensor? cmp_block_table=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_ori_kv=None, Tensor? cu_seqlens_cmp_kv=None, "
    "Tensor? seqused_q=None, Tensor? seqused_kv=None, Tensor? sinks=None, Tensor? metadata=None, "
    "float softmax_scale=0, int cmp_ratio=0, int ori_mask_mode=4, int cmp_mask_mode=3, int ori_win_left=128, "
    'int ori_win_right=0, str layout_q="BSND", str layout_kv="PA_ND", bool return_softmax_lse=False) '
    "-> (Tensor out, Tensor softmax_lse)",
    meta=NO_META,
    rules=custom_rules.of("_C_ascend::npu_sparse_attn_sharedkv"),
)
def npu_sparse_attn_sharedkv(**given: Any) -> tuple[Tensor, Tensor]:
    """Rows [blocks, rows, 1, 512] of the query's dtype."""
    return _attention(given, lambda rows: rows)


@emulated(
    "_C_ascend::npu_kv_quant_sparse_attn_sharedkv",
    schema="(Tensor q, int kv_quant_mode, Tensor? ori_kv=None, Tensor? cmp_kv=None, "
    "Tensor? ori_sparse_indices=None, Tensor? cmp_sparse_indices=None, Tensor? ori_block_table=None, "
    "Tensor? cmp_block_table=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_ori_kv=None, "
    "Tensor? cu_seqlens_cmp_kv=None, Tensor? seqused_q=None, Tensor? seqused_kv=None, Tensor? sinks=None, "
    "Tensor? metadata=None, int tile_size=0, int rope_head_dim=0, float softmax_scale=0.0, int cmp_ratio=0, "
    "int ori_mask_mode=4, int cmp_mask_mode=3, int ori_win_left=127, int ori_win_right=0, str layout_q='BSND', "
    "str layout_kv='PA_ND', bool return_softmax_lse=False) -> (Tensor out, Tensor softmax_lse)",
    meta=NO_META,
    rules=custom_rules.of("_C_ascend::npu_kv_quant_sparse_attn_sharedkv"),
)
def npu_kv_quant_sparse_attn_sharedkv(**given: Any) -> tuple[Tensor, Tensor]:
    """Rows [blocks, rows, 1, 640] float8_e4m3fn: 64 bfloat16, 448 e4m3, 7 e8m0, padding."""
    return _attention(given, fp8_rows)


@emulated(
    "_C_ascend::npu_sparse_attn_sharedkv_metadata",
    schema="(int num_heads_q, int num_heads_kv, int head_dim, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_ori_kv=None, Tensor? cu_seqlens_cmp_kv=None, Tensor? seqused_q=None, "
    "Tensor? seqused_kv=None, int batch_size=0, int max_seqlen_q=0, int max_seqlen_kv=0, int ori_topk=0, "
    "int cmp_topk=0, int cmp_ratio=4, int ori_mask_mode=4, int cmp_mask_mode=3, int ori_win_left=128, "
    'int ori_win_right=0, str layout_q="BSND", str layout_kv="PA_ND", bool has_ori_kv=True, bool has_cmp_kv=True, '
    'str device="npu") -> (Tensor metadata)',
    meta=NO_META,
    rules=custom_rules.of("_C_ascend::npu_sparse_attn_sharedkv_metadata"),
)
def npu_sparse_attn_sharedkv_metadata(**given: Any) -> Tensor:
    return schedule(attention_asked(given))


@emulated(
    "_C_ascend::npu_kv_quant_sparse_attn_sharedkv_metadata",
    schema="(int num_heads_q, int num_heads_kv, int head_dim, int kv_quant_mode, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_ori_kv=None, Tensor? cu_seqlens_cmp_kv=None, Tensor? seqused_q=None, "
    "Tensor? seqused_kv=None, int batch_size=0, int max_seqlen_q=0, int max_seqlen_kv=0, int ori_topk=0, "
    "int cmp_topk=0, int tile_size=0, int rope_head_dim=0, int cmp_ratio=-1, int ori_mask_mode=4, "
    "int cmp_mask_mode=3, int ori_win_left=127, int ori_win_right=0, str layout_q='BSND', str layout_kv='PA_ND', "
    "bool has_ori_kv=True, bool has_cmp_kv=True, str device='npu') -> Tensor",
    meta=NO_META,
    rules=custom_rules.of("_C_ascend::npu_kv_quant_sparse_attn_sharedkv_metadata"),
)
def npu_kv_quant_sparse_attn_sharedkv_metadata(**given: Any) -> Tensor:
    return schedule(attention_asked(given))


def fp8_rows(rows: Tensor) -> Tensor:
    """Rows [..., 640] of the 950's cache -> values [..., 512] bfloat16, rotary channels last."""
    bytes = rows.view(torch.uint8)
    rope, codes, scales = bytes[..., : 2 * ROPE + NOPE + NOPE // GROUP].split((2 * ROPE, NOPE, NOPE // GROUP), -1)
    values = codes.view(torch.float8_e4m3fn).to(torch.float32).unflatten(-1, (-1, GROUP))
    values = values * scales.view(torch.float8_e8m0fnu).to(torch.float32)[..., None]
    return torch.cat([values.flatten(-2).to(torch.bfloat16), rope.contiguous().view(torch.bfloat16)], -1)


def paged(kv: Tensor, table: Tensor, decode: Callable[[Tensor], Tensor]) -> Rows:
    """Rows of a cache [blocks, rows, 1, ...]; IndexError for a block that is not there."""
    size, flat = kv.shape[1], kv.flatten(0, 2).view(torch.uint8)  # bytes: 8-bit floats cannot be indexed

    def rows(sequence: int, index: Tensor) -> Tensor:
        block = table[sequence, index // size]
        if bool(((block < 0) | (block >= len(kv))).any()):
            raise IndexError(f"a block table names block {int(block.min())} or {int(block.max())} of {len(kv)}")
        return decode(flat[block * size + index % size].view(kv.dtype))

    return rows


def _attention(given: Any, decode: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Query [T, N, 512], tokens of a sequence side by side -> the same. Rows behind the last sequence are never
    written: they hold NaN, as memory may."""
    q, picks, ratio = given["q"], given["cmp_sparse_indices"], given["cmp_ratio"]
    window = paged(given["ori_kv"], given["ori_block_table"], decode)
    entries = None if given["cmp_kv"] is None else paged(given["cmp_kv"], given["cmp_block_table"], decode)
    out = torch.full_like(q, float("nan"))
    for sequence, (start, stop) in enumerate(pairwise(given["cu_seqlens_q"].tolist())):
        if start == stop:
            continue
        length = int(given["seqused_kv"][sequence])
        positions = torch.arange(length - (stop - start), length)
        tiles = [_window_tile(window, sequence, positions, given["ori_win_left"])]
        if entries is not None and picks is None:
            tiles += _all_tiles(entries, sequence, (positions + 1) // ratio)
        elif entries is not None:
            tiles += _picked_tiles(entries, sequence, (positions + 1) // ratio, picks[start:stop, 0])
        out[start:stop] = _softmax(q[start:stop], tiles, given["sinks"], given["softmax_scale"])
    return out, torch.empty(0)


Tile = tuple[Tensor, Tensor]
"""Rows [n or 1, k, D], and which token sees which [n, k]."""


def _window_tile(window: Rows, sequence: int, positions: Tensor, left: int) -> Tile:
    """The `left` positions before a token, and its own."""
    index = torch.arange(max(0, int(positions[0]) - left), int(positions[-1]) + 1)
    behind = positions[:, None] - index
    return window(sequence, index)[None], (behind >= 0) & (behind <= left)


def _all_tiles(entries: Rows, sequence: int, visible: Tensor) -> Iterator[Tile]:
    """Every entry that lies wholly before a token or ends with it: visible [n] of them."""
    for index in torch.arange(int(visible[-1])).split(TILE):
        if len(index):
            yield entries(sequence, index)[None], index < visible[:, None]


def _picked_tiles(entries: Rows, sequence: int, visible: Tensor, picks: Tensor) -> Iterator[Tile]:
    """Entries that a token picked [n, K]: at most as many slots as it sees entries are read, and none behind a -1."""
    read = (picks >= 0).long().cumprod(-1).bool() & (torch.arange(picks.shape[1]) < visible[:, None])
    seen = read & (picks < visible[:, None])
    for chosen, known in zip(picks.split(TILE, -1), seen.split(TILE, -1), strict=True):
        if bool(known.any()):
            rows = entries(sequence, torch.where(known, chosen, chosen[known][0]).long())
            yield rows.masked_fill(~known[..., None], 0), known


def _softmax(q: Tensor, tiles: list[Tile], sinks: Tensor, scale: float) -> Tensor:
    """q [n, N, D] over tiles of rows, one after the other, in float32; the sink is a key of its own, without value."""
    wide = q.to(torch.float32)
    peak = sinks.expand(q.shape[:2])
    total, sums = torch.ones_like(peak), torch.zeros_like(wide)
    for rows, seen in tiles:
        keys = rows.to(torch.float32)
        score = (wide @ keys.transpose(1, 2) * scale).masked_fill(~seen[:, None], float("-inf"))
        higher = torch.maximum(peak, score.amax(-1))
        shrink, p = (peak - higher).exp(), (score - higher[..., None]).exp()
        total = total * shrink + p.sum(-1)
        sums = sums * shrink[..., None] + p.to(q.dtype).to(torch.float32) @ keys
        peak = higher
    return (sums / total[..., None]).to(q.dtype)
