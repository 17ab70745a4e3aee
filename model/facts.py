"""What a model weighs and costs: parameters, bytes of a checkpoint, bytes of cache and FLOPs per token at a context.

Weights are counted by walking the table that loading uses (`weights`), cache bytes by the row layouts of
`dsv4_hal.formats`; no shape stands here a second time. Bytes and FLOPs at a context are those of the published
deployment, whatever this checkpoint's weights are stored as: FlashMLA's FP8 rows and FP4 indexer keys where the
model's widths admit them, plain bf16 rows where they do not. The conventions are those that reproduce the technical
report's comparison with DeepSeek-V3.2 (figure 1), which does not state its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsv4_hal.formats.kv_rows import RowLayout, flashmla_rows, index_fp4_rows, plain_rows
from dsv4_hal.formats.types import FORMATS
from dsv4_hal.model.config import ModelConfig, overlaps
from dsv4_hal.model.weights import WeightSpec, checkpoint_tensors, parameter_count, stored_bytes, weight_table

# FLOPs of one multiply-add (two operations) in FP8 equivalents: FP4 runs at twice the rate of FP8, BF16 at half of it.
_FP4, _FP8, _BF16 = 1, 2, 4


@dataclass(frozen=True)
class LatentAttentionModel:
    """Dimensions of a DeepSeek-V3.2: latent attention behind an indexer. Names as in its config.json."""

    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int  # first layers, whose feed-forward is one dense MLP
    intermediate_size: int  # its inner width
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    max_position_embeddings: int


# Source: the published config.json of DeepSeek-V3.2.
V32 = LatentAttentionModel(
    hidden_size=7168,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    intermediate_size=18432,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=2048,
    max_position_embeddings=163840,
)


def facts(cfg: ModelConfig, context: int) -> dict[str, Any]:
    """Everything below about one model at `context` tokens (at least 1), beside DeepSeek-V3.2: what JSON can hold,
    counts and bytes as exact integers. `dsv4-hal info` prints it."""
    table = weight_table(cfg)
    names = checkpoint_tensors(table, cfg)
    rows = {kind: row for ratio in sorted(set(cfg.layer_ratios)) for kind, row in cache_rows(cfg, ratio).items()}
    here = _at_context(kv_bytes(cfg, context), flops_per_token(table, cfg, context))
    there = _at_context(v32_kv_bytes(context), v32_flops_per_token(context))
    return {
        "context_tokens": context,
        "max_context_tokens": cfg.max_position_embeddings,
        "parameters": {
            "without_mtp": parameter_count(table, mtp=False),
            "with_mtp": parameter_count(table),
            "activated": activated_parameters(table, cfg),
            "activated_with_embedding": activated_parameters(table, cfg, embedding=True),
        },
        "tensors": {"without_mtp": sum(not name.startswith("mtp.") for name in names), "with_mtp": len(names)},
        "checkpoint_bytes": {"without_mtp": stored_bytes(table, mtp=False), "with_mtp": stored_bytes(table)},
        "cache_rows": {kind: {"layout": row.name, "bytes": row.row_bytes} for kind, row in rows.items()},
        **here,
        "deepseek_v3_2": {"max_context_tokens": V32.max_position_embeddings, **there},
        "ratios_v3_2_over_model": {key: there[key]["total"] / here[key]["total"] for key in here},
        "kv_cache_share_of_bf16_gqa8": here["kv_cache_bytes"]["total"] / gqa8_kv_bytes(cfg, context),
    }


def activated_parameters(table: Mapping[str, WeightSpec], cfg: ModelConfig, embedding: bool = False) -> int:
    """Parameters that one token passes through: num_experts_per_tok of every stack of experts, all of everything else
    outside the MTP stage, with the output head, and with the input embedding if asked for (the report leaves it out).
    """
    return sum(count for spec, count in _activated(table, cfg) if embedding or spec.name != "embed")


def cache_rows(cfg: ModelConfig, ratio: int) -> dict[str, RowLayout]:
    """Rows that a layer of the given ratio keeps: "window", and "entries" and "index" where it has them.

    FlashMLA's FP8 rows and FP4 indexer keys; plain bf16 rows where the widths do not fill their blocks.
    """
    out = {"window": _entry_rows(cfg, 1, cfg.sliding_window)}
    if ratio:
        out["entries"] = _entry_rows(cfg, ratio, 0)
    if overlaps(ratio):
        out["index"] = _index_rows(cfg, ratio)
    return out


def kv_bytes(cfg: ModelConfig, context: int) -> dict[str, int]:
    """Bytes that the cache of one sequence of `context` tokens (at least 1) holds, by kind: window, entries, index.

    A layer keeps the last sliding_window tokens, and one entry (and indexer key) per `ratio` tokens that are complete:
    context // ratio. Padding of blocks and the compressors' state, both bounded, are not counted. MTP has no part.
    """
    out = dict.fromkeys(("window", "entries", "index"), 0)
    for ratio in cfg.layer_ratios:
        rows = cache_rows(cfg, ratio)
        for kind, count in _held(rows, context).items():
            out[kind] += count * rows[kind].row_bytes
    return out


def gqa8_kv_bytes(cfg: ModelConfig, context: int) -> int:
    """Bytes of keys and values in BF16 with 8 heads of 128 channels in as many layers: the report's baseline."""
    return cfg.num_hidden_layers * 2 * 8 * 128 * 2 * context


def flops_per_token(table: Mapping[str, WeightSpec], cfg: ModelConfig, context: int) -> dict[str, int]:
    """FLOPs of one decoded token, the last of `context` (at least 1), in FP8 equivalents, by part.

    linear     every activated matrix but embedding and output head: FP8 and FP4 count once (FP4 weights meet FP8
               activations), BF16 and fp32 twice, and so does wo_a, which is dequantised to BF16. By the stored format:
               in a plain checkpoint everything counts twice
    indexer    scores against every indexer key, in FP4, which counts half (twice where keys are plain rows)
    attention  scores and sums over window and entries (at most index_topk of them behind an indexer), in BF16
    Vectors, softmax and the MTP stage are not counted.
    """
    linear = sum(count * _weight_cost(spec) for spec, count in _activated(table, cfg) if _is_linear(spec))
    indexer = attention = 0
    for i, ratio in enumerate(cfg.layer_ratios):
        rows = cache_rows(cfg, ratio)
        held = _held(rows, context)
        seen = held.get("entries", 0)
        if "index" in rows:
            seen = min(seen, cfg.index_topk)
            cost = _BF16 if rows["index"].plain else _FP4
            indexer += cost * table[f"layers.{i}.attn.indexer.wq_b"].shape[0] * held["index"]
        attention += 2 * _BF16 * table[f"layers.{i}.attn.wq_b"].shape[0] * (held["window"] + seen)
    return {"linear": linear, "indexer": indexer, "attention": attention}


def v32_kv_bytes(context: int, v32: LatentAttentionModel = V32) -> dict[str, int]:
    """`kv_bytes` of DeepSeek-V3.2: 656-byte FP8 entries and 132-byte FP8 indexer keys (FlashMLA, DeepGEMM)."""
    entry = v32.kv_lora_rank + v32.kv_lora_rank // 128 * 4 + v32.qk_rope_head_dim * 2  # e4m3, fp32 scales, bf16
    key = v32.index_head_dim + 4  # e4m3, one fp32 scale
    return {kind: v32.num_hidden_layers * context * size for kind, size in (("entries", entry), ("index", key))}


def v32_flops_per_token(context: int, v32: LatentAttentionModel = V32) -> dict[str, int]:
    """`flops_per_token` of DeepSeek-V3.2 in the same units: FP8 weights but the absorbed kv_b, router gate and index
    weights, which are BF16; FP8 index scores; BF16 attention over at most index_topk tokens."""
    d, heads, latent, rope = v32.hidden_size, v32.num_attention_heads, v32.kv_lora_rank, v32.qk_rope_head_dim
    index_width = v32.index_n_heads * v32.index_head_dim
    fp8 = d * v32.q_lora_rank + v32.q_lora_rank * heads * (v32.qk_nope_head_dim + rope)
    fp8 += d * (latent + rope) + heads * v32.v_head_dim * d
    fp8 += index_width * v32.q_lora_rank + v32.index_head_dim * d
    bf16 = heads * (v32.qk_nope_head_dim + v32.v_head_dim) * latent + v32.index_n_heads * d
    dense = 3 * d * v32.intermediate_size
    experts = 3 * d * v32.moe_intermediate_size * (v32.num_experts_per_tok + v32.n_shared_experts)
    layers, sparse = v32.num_hidden_layers, v32.num_hidden_layers - v32.first_k_dense_replace
    linear = layers * (_FP8 * fp8 + _BF16 * bf16) + _FP8 * v32.first_k_dense_replace * dense
    linear += sparse * (_FP8 * experts + _BF16 * v32.n_routed_experts * d)
    return {
        "linear": linear,
        "indexer": _FP8 * layers * index_width * context,
        "attention": _BF16 * layers * heads * (2 * latent + rope) * min(context, v32.index_topk),
    }


def _at_context(cache: dict[str, int], flops: dict[str, int]) -> dict[str, dict[str, int]]:
    parts = {"kv_cache_bytes": cache, "fp8_equivalent_flops_per_token": flops}
    return {key: {"total": sum(part.values()), **part} for key, part in parts.items()}


def _activated(table: Mapping[str, WeightSpec], cfg: ModelConfig) -> Iterator[tuple[WeightSpec, int]]:
    """The weights that a token passes through, and how many of their parameters."""
    for spec in table.values():
        if not spec.name.startswith("mtp.") and spec.format != "int64":
            stacked = spec.is_stack
            yield spec, math.prod(spec.shape[1:]) * cfg.num_experts_per_tok if stacked else math.prod(spec.shape)


def _is_linear(spec: WeightSpec) -> bool:
    """Whether a token is multiplied by it; `ape` is two-dimensional too, but is added."""
    return spec.name not in ("embed", "head") and (spec.is_matrix or spec.name.endswith("_fn"))


def _weight_cost(spec: WeightSpec) -> int:
    quantised = not FORMATS[spec.format].plain
    return _FP8 if quantised and not spec.name.endswith("attn.wo_a") else _BF16


def _held(rows: Mapping[str, RowLayout], context: int) -> dict[str, int]:
    """How many rows of each kind a sequence of `context` tokens has."""
    return {kind: min(context, row.window) if row.window else context // row.ratio for kind, row in rows.items()}


def _entry_rows(cfg: ModelConfig, ratio: int, window: int) -> RowLayout:
    try:
        return flashmla_rows(ratio, window, cfg.head_dim, cfg.qk_rope_head_dim)
    except ValueError:
        return plain_rows(cfg.head_dim, cfg.qk_rope_head_dim, ratio, window, torch.bfloat16)


def _index_rows(cfg: ModelConfig, ratio: int) -> RowLayout:
    try:
        return index_fp4_rows(ratio, cfg.index_head_dim)
    except ValueError:
        return plain_rows(cfg.index_head_dim, cfg.qk_rope_head_dim, ratio, 0, torch.bfloat16)
