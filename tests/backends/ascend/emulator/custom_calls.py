"""Calls of vllm-ascend's operators that a device would take, with the values that their coded arguments stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4_hal.backends.ascend.emulator.schedule import attention_done, picks_done, schedule

NAN = float("nan")
FP8 = {"kv_quant_mode": 1, "tile_size": 64, "rope_head_dim": 64}


@dataclass
class Made:
    """A call's arguments, and the values [length, width] float64 of every sequence's window rows, entries or keys."""

    arguments: dict[str, Any]
    values: dict[str, list[Tensor]] = field(default_factory=dict)


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def paged(rows: list[Tensor], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows [n, width] of sequences, spread over blocks of `size` in random order -> [blocks, size, 1, width], and the
    table. What belongs to nobody is NaN (0xFF in every byte)."""
    counts = [-(-len(r) // size) for r in rows]
    order = torch.randperm(sum(counts) + 2, generator=generator)
    cache = rows[0].new_empty(len(order), size, 1, rows[0].shape[1])
    cache.view(torch.uint8).fill_(0xFF)
    table = torch.full((len(rows), max(1, *counts)), int(order[-1]), dtype=torch.int32)
    start = 0
    for sequence, (mine, count) in enumerate(zip(rows, counts, strict=True)):
        table[sequence, :count] = order[start : start + count]
        for row in range(len(mine)):
            cache.view(torch.uint8)[table[sequence, row // size], row % size, 0] = mine[row].view(torch.uint8)
        start += count
    return cache, table


def plain_rows(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rows = torch.randn(count, 512, generator=generator).bfloat16()
    return rows, rows.double()


def fp8_rows(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of 640 bytes, by hand: [64 bfloat16 | 448 e4m3 | 7 e8m0 | padding], the bfloat16 channels come last."""
    codes = (torch.randn(count, 448, generator=generator) * 50).to(torch.float8_e4m3fn)
    exponents = torch.randint(-8, -3, (count, 7), generator=generator)
    rope = torch.randn(count, 64, generator=generator).bfloat16()
    rows = torch.full((count, 640), 0xFF, dtype=torch.uint8)
    rows[:, :128], rows[:, 128:576] = rope.view(torch.uint8), codes.view(torch.uint8)
    rows[:, 576:583] = (exponents + 127).to(torch.uint8)
    values = codes.double().view(count, 7, 64) * (2.0 ** exponents.double())[..., None]
    return rows.view(torch.float8_e4m3fn), torch.cat([values.flatten(1), rope.double()], 1)


def attention(
    fp8: bool, entries: str = "none", ratio: int = 4, tokens: Sequence[int] = (3, 0, 1), seed: int = 0, heads: int = 64
) -> Made:
    """Sequences of 140, 4 and 261 tokens, the last `tokens` of which are asked about. entries: none, all or picks."""
    generator, lengths = torch.Generator().manual_seed(seed), (140, 4, 261)
    rows = fp8_rows if fp8 else plain_rows
    total = sum(tokens)
    made = Made(
        {
            "q": torch.randn(total, heads, 512, generator=generator).bfloat16(),
            "cu_seqlens_q": int32([0, *torch.tensor(tokens).cumsum(0).tolist()]),
            "seqused_kv": int32(lengths),
            "sinks": torch.randn(heads, generator=generator),
            "softmax_scale": 512**-0.5,
            "cmp_ratio": 1,
            "ori_win_left": 127,
            "layout_q": "TND",
            "layout_kv": "PA_ND",
            **(FP8 if fp8 else {}),
        }
    )
    caches = {"ori": [rows(n, generator) for n in lengths]}
    if entries != "none":
        made.arguments["cmp_ratio"] = ratio
        caches["cmp"] = [rows(n // ratio, generator) for n in lengths]
    for name, held in caches.items():
        cache, table = paged([stored for stored, _ in held], 16, generator)
        made.arguments |= {f"{name}_kv": cache, f"{name}_block_table": table}
        made.values[name] = [values for _, values in held]
    if entries == "picks":
        picks = torch.full((total, 1, 512), -1, dtype=torch.int32)
        ends = torch.tensor(tokens).cumsum(0)
        for token in range(total):
            sequence = int((ends <= token).sum())
            seen = (lengths[sequence] - int(ends[sequence]) + token + 1) // ratio
            chosen = torch.randperm(seen, generator=generator)[: max(1, seen - 3)]
            picks[token, 0, : len(chosen)] = chosen
        made.arguments["cmp_sparse_indices"] = picks
    return scheduled(made)


def scheduled(made: Made) -> Made:
    """With the schedule that the call needs, for the arguments as they now are."""
    defaults = {"cmp_sparse_indices": None, "cmp_kv": None, "ori_win_right": 0}
    made.arguments["metadata"] = schedule(attention_done(defaults | made.arguments))
    return made


def planned(made: Made) -> dict[str, Any]:
    """The call of the metadata operator for an attention call."""
    given = made.arguments
    same = ("cu_seqlens_q", "seqused_kv", "cmp_ratio", "ori_win_left", "layout_q", "layout_kv", *FP8)
    picks = given.get("cmp_sparse_indices")
    return {name: given[name] for name in same if name in given} | {
        "num_heads_q": given["q"].shape[1],
        "num_heads_kv": 1,
        "head_dim": 512,
        "batch_size": len(given["seqused_kv"]),
        "max_seqlen_q": int(given["cu_seqlens_q"].diff().max()),
        "max_seqlen_kv": int(given["seqused_kv"].max()),
        "cmp_topk": 0 if picks is None else picks.shape[-1],
        "has_cmp_kv": "cmp_kv" in given,
    }


def indexer(fp8: bool, tokens: Sequence[int] = (2, 1), seed: int = 0) -> Made:
    """Sequences of 140 and 61 tokens, keys of four tokens each. values: "query" [T, 64, 128] and "key" by sequence."""
    generator, lengths, ratio = torch.Generator().manual_seed(seed), (140, 61), 4
    codes, wide = (torch.float8_e4m3fn, torch.float32) if fp8 else (torch.int8, torch.float16)

    def coded(*shape: int) -> tuple[Tensor, Tensor]:
        values = torch.randn(*shape, 128, generator=generator) * 30
        scale = (torch.rand(shape, generator=generator) * 0.01 + 0.001).to(wide)
        return (values if fp8 else values.round().clamp(-127, 127)).to(codes), scale

    query, query_scale = coded(sum(tokens), 64)
    keys = [coded(n // ratio) for n in lengths]
    cache, table = paged([k for k, _ in keys], 16, generator)
    scales = torch.full(cache.shape[:3], NAN, dtype=wide)
    for sequence, (_, scale) in enumerate(keys):
        for row in range(len(scale)):
            scales[table[sequence, row // 16], row % 16, 0] = scale[row]
    made = Made(
        {
            "query": query,
            "key": cache,
            "weights": torch.randn(sum(tokens), 64, generator=generator).to(wide),
            "query_dequant_scale": query_scale,
            "key_dequant_scale": scales,
            "actual_seq_lengths_query": int32(torch.tensor(tokens).cumsum(0).tolist()),
            "actual_seq_lengths_key": int32(lengths),
            "block_table": table,
            "layout_query": "TND",
            "layout_key": "PA_BSND",
            "sparse_count": 512,
            "cmp_ratio": ratio,
        },
        {
            "query": [query.double() * query_scale.double()[..., None]],
            "key": [k.double() * s.double()[:, None] for k, s in keys],
        },
    )
    made.arguments["metadata"] = schedule(picks_done({"sparse_mode": 3} | made.arguments))
    return made


def planned_picks(made: Made) -> dict[str, Any]:
    """The call of the metadata operator for an indexer call."""
    same = (
        "actual_seq_lengths_query",
        "actual_seq_lengths_key",
        "layout_query",
        "layout_key",
        "sparse_count",
        "cmp_ratio",
    )
    widths = {"num_heads_q": 64, "num_heads_k": 1, "head_dim": 128, "query_quant_mode": 0, "key_quant_mode": 0}
    return {name: made.arguments[name] for name in same} | widths


def compressor(
    width: int = 128, coff: int = 2, ratio: int = 4, start: Sequence[int] = (0, 0), tokens: Sequence[int] = (9, 6)
) -> Made:
    """Two sequences in one step; the state's places are given out from block 1 on, for 272 positions each."""
    generator, hidden = torch.Generator().manual_seed(width + ratio), 1024
    total, channels, blocks = sum(tokens), coff * width, 17
    entries = min(total, total // ratio + len(tokens))
    angles = torch.randn(entries, 32, generator=generator).repeat_interleave(2, -1)
    return Made(
        {
            "x": torch.randn(total, hidden, generator=generator).bfloat16(),
            "wkv": (torch.randn(channels, hidden, generator=generator) / 32).bfloat16(),
            "wgate": (torch.randn(channels, hidden, generator=generator) / 32).bfloat16(),
            "state_cache": torch.full((1 + len(tokens) * blocks, 16, 2 * channels), NAN),
            "ape": torch.randn(ratio, channels, generator=generator),
            "norm_weight": torch.randn(width, generator=generator).bfloat16(),
            "rope_sin": angles.sin(),
            "rope_cos": angles.cos(),
            "state_block_table": torch.arange(1, 1 + len(tokens) * blocks, dtype=torch.int32).view(len(tokens), -1),
            "cu_seqlens": int32([0, *torch.tensor(tokens).cumsum(0).tolist()]),
            "seqused": None,
            "start_pos": int32(start),
            "rope_head_dim": 64,
            "cmp_ratio": ratio,
            "coff": coff,
            "norm_eps": 1e-6,
            "rotary_mode": 2,
            "cache_mode": 1,
        }
    )


def scatter() -> Made:
    return Made(
        {
            "var": torch.zeros(4, 16, 8, dtype=torch.int8),
            "indices": int32([3, 15, 0, 0]).view(2, 2),
            "update": torch.ones(2, 8, dtype=torch.int8),
        }
    )


def kv_epilog(x: Tensor, slots: Sequence[int], rows: int = 8) -> Made:
    return Made(
        {
            "kv_compress_cache": torch.full((rows, 1, 640), 0xFF, dtype=torch.uint8).view(torch.float8_e4m3fn),
            "x": x,
            "slot_mapping": int32(slots),
            "quant_group_size": 64,
            "quant_mode": 2,
            "round_scale_flag": True,
            "layout": 1,
        }
    )


def index_epilog(x: Tensor, slots: Sequence[int], blocks: int = 2, rows: int = 16) -> Made:
    return Made(
        {
            "indexer_compress_cache": torch.full((blocks, rows, 1, 132), 0xFF, dtype=torch.uint8),
            "x": x,
            "slot_mapping": int32(slots),
            "layout": 2,
        }
    )


def streams() -> dict[str, dict[str, Any]]:
    """Of the operators around streams and rotary embedding, by name."""
    bf16 = torch.bfloat16
    return {
        "npu_hc_pre_v2": {
            "x": torch.ones(1, 2, 4, 4096, dtype=bf16),
            "hc_fn": torch.ones(24, 4 * 4096),
            "hc_scale": torch.ones(3),
            "hc_base": torch.ones(24),
            "hc_mult": 4,
            "hc_sinkhorn_iters": 20,
            "norm_eps": 1e-6,
            "hc_eps": 1e-6,
        },
        "npu_hc_post": {
            "x": torch.ones(1, 3, 256, dtype=bf16),
            "residual": torch.ones(1, 3, 4, 256, dtype=bf16),
            "post": torch.ones(1, 3, 4),
            "comb": torch.ones(1, 3, 4, 4),
        },
        "inplace_partial_rotary_mul": {
            "x": torch.ones(2, 1, 3, 96),
            "r1": torch.ones(2, 1, 1, 64),
            "r2": torch.ones(2, 1, 1, 64),
            "rotary_mode": "interleave",
            "partial_slice": [32, 96],
        },
    }
