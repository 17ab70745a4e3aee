"""vllm-ascend's compressor: projections, pooling, norm and RoPE of the entries that a step completes.

Schema: vllm-ascend csrc/torch_binding.cpp, commit 182b75ea. Arithmetic: csrc/attention/compressor/README.md, which
names no rounding between pooling and norm. None of it was run on a device.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dsv4_hal.backends.ascend.emulator import custom_rules
from dsv4_hal.backends.ascend.emulator.call import NO_META, emulated


@emulated(
    "_C_ascend::compressor",
    schema="(Tensor x, Tensor wkv, Tensor wgate, Tensor(a!) state_cache, Tensor ape, Tensor norm_weight, "
    "Tensor rope_sin, Tensor rope_cos, Tensor? state_block_table, Tensor? cu_seqlens, Tensor? seqused, "
    "Tensor? start_pos, int rope_head_dim, int cmp_ratio, int coff, float norm_eps, int rotary_mode, int cache_mode) "
    "-> Tensor",
    meta=NO_META,
    rules=custom_rules.of("_C_ascend::compressor"),
)
def compressor(**given: Any) -> Tensor:
    """x [T, H] -> entries [min(T, T // ratio + B), D], those of one sequence after another; what is behind them holds
    NaN, as memory may.

    state_cache [blocks, rows, 2 coff D]: projections, then gates with their bias, of the position that the block table
    gives a place; block 0 is no place. rope_sin and rope_cos [entries, 64] hold every angle twice.
    """
    x, ratio, coff = given["x"], given["cmp_ratio"], given["coff"]
    kv, gate = (x.to(torch.float32) @ given[w].to(torch.float32).T for w in ("wkv", "wgate"))
    width, made = kv.shape[1] // coff, []
    bounds = given["cu_seqlens"].tolist()
    for sequence, (start, stop) in enumerate(pairwise(bounds)):
        first = int(given["start_pos"][sequence])
        last = first + stop - start
        positions = torch.arange(first, last)
        rows = torch.cat([kv[start:stop], gate[start:stop] + given["ape"][positions % ratio]], 1)
        held = _held(given["state_cache"], given["state_block_table"][sequence], first)
        history = torch.cat([held, rows])
        for entry in range(first // ratio, last // ratio):
            made.append(_pooled(history, entry, ratio, coff, width))
        _keep(given["state_cache"], given["state_block_table"][sequence], positions, rows)
    out = x.new_full((min(len(x), len(x) // ratio + len(bounds) - 1), width), float("nan"))
    if made:
        out[: len(made)] = _finished(torch.stack(made), given).to(x.dtype)
    return out


def _held(cache: Tensor, table: Tensor, count: int) -> Tensor:
    """Rows of positions 0 .. count - 1, NaN where there is no place for them."""
    index = torch.arange(count)
    block = table[index // cache.shape[1]].long()
    return cache[block, index % cache.shape[1]].masked_fill((block == 0)[:, None], float("nan"))


def _keep(cache: Tensor, table: Tensor, positions: Tensor, rows: Tensor) -> None:
    block = table[positions // cache.shape[1]].long()
    there = block > 0
    cache[block[there], positions[there] % cache.shape[1]] = rows[there]


def _pooled(history: Tensor, entry: int, ratio: int, coff: int, width: int) -> Tensor:
    """The first channels of the block before, where blocks overlap and there is one; the last channels of its own."""
    parts = []
    for part in range(coff):
        begin = (entry + 1 - coff + part) * ratio
        if begin >= 0:
            block = history[begin : begin + ratio].unflatten(1, (2, coff, width))
            parts.append(block[:, :, part])
    value, score = torch.cat(parts).unbind(1)
    return (value * score.softmax(0)).sum(0)


def _finished(entries: Tensor, given: Any) -> Tensor:
    """Norm, and RoPE of neighbouring channels, in float32."""
    normed = entries * (entries.square().mean(-1, keepdim=True) + given["norm_eps"]).rsqrt()
    normed = normed * given["norm_weight"].to(torch.float32)
    kept, turned = normed.split((normed.shape[1] - given["rope_head_dim"], given["rope_head_dim"]), -1)
    cos, sin = (given[name][: len(entries)].to(torch.float32) for name in ("rope_cos", "rope_sin"))
    pair = turned.unflatten(1, (-1, 2))
    crossed = torch.stack([-pair[..., 1], pair[..., 0]], -1).flatten(1)
    return torch.cat([kept, turned * cos + crossed * sin], 1)
