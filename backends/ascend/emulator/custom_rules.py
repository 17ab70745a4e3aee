"""The contract table's rows for vllm-ascend's operators on caches and attention, in `custom_*.py`.

Every row names the document that it is read from, all of vllm-ascend, commit 182b75ea. Where document and host code of
an operator disagree, the stricter one stands here; but which SoC has it is what the build lists say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.backends.ascend.emulator.rules import (
    Call,
    Rule,
    absent,
    between,
    dtype,
    given,
    is_plain,
    multiple,
    rank,
    rules,
    same_dtype,
    same_size,
    scattered,
    size,
    soc,
    value,
)
from dsv4_hal.backends.ascend.emulator.schedule import WORDS, attention_done, is_for, picks_done

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, INT32, INT64, E4M3, UINT8 = torch.int8, torch.int32, torch.int64, torch.float8_e4m3fn, torch.uint8
A3, A5 = ("ascend910b", "ascend910_93"), ("ascend950",)
HERE = "the emulator: documented, but not computed here"
BUILD = "csrc/build_aclnn.sh"
BINDING = "csrc/torch_binding.cpp"
SHAREDKV = "csrc/attention/sparse_attn_sharedkv/README.md"
KV_QUANT = "csrc/attention/kv_quant_sparse_attn_sharedkv/README.md"
INDEXER = "csrc/attention/vllm_quant_lightning_indexer/README.md"
COMPRESSOR = "csrc/attention/compressor/README.md"
EPILOG = "csrc/attention/indexer_compress_epilog_v2/op_kernel"
FOREVER = 9223372036854775807


# Kinds ----------------------------------------------------------------------------------------------------------------


def no_gaps(call: Call, name: str) -> str:
    """In every row of indices, -1 comes last."""
    for tensor in call.tensors(name):
        known = tensor >= 0
        if bool((known[..., 1:] & ~known[..., :-1]).any()):
            return f"{name} must hold its -1 behind everything else"
    return ""


def sums(call: Call, name: str) -> str:
    """Sums of lengths never decrease."""
    return "" if all(bool((t.diff() >= 0).all()) for t in call.tensors(name)) else f"{name} must not decrease"


def starts_at_zero(call: Call, name: str) -> str:
    return "" if all(int(t[0]) == 0 for t in call.tensors(name)) else f"{name} must begin with 0"


def rows_of(call: Call, name: str, low: int, target: str) -> str:
    """Every index names a row of the flattened leading dimensions of another tensor, or is at least `low`."""
    for index in call.tensors(name):
        rows = max(t[..., 0].numel() for t in call.tensors(target))
        if index.numel() and not low <= int(index.min()) <= int(index.max()) < rows:
            return f"{name} must lie between {low} and {rows - 1}"
    return ""


def covers(call: Call, name: str, cache: str, lengths: str, per: str = "") -> str:
    """A block table is wide enough for the longest sequence, whose rows count `per` tokens each."""
    ratio = max(1, call.arguments[per]) if per else 1
    for table, rows in zip(call.tensors(name), call.tensors(cache), strict=False):  # `given` asks for both
        longest = max((int(t.max()) // ratio for t in call.tensors(lengths)), default=0)
        need = -(-longest // rows.shape[1])
        if table.shape[1] < need:
            return f"{name} must have at least {need} columns, not {table.shape[1]}"
    return ""


def not_empty(call: Call, *names: str) -> str:
    empty = [name for name in names for t in call.tensors(name) if not t.numel()]
    return f"{empty[0]} must not be empty" if empty else ""


def at_most(call: Call, name: str, most: int) -> str:
    got = call.arguments[name]
    return "" if 1 <= got <= most else f"{name} must lie between 1 and {most}, not be {got}"


def scheduled_attention(call: Call) -> str:
    return _scheduled(call.arguments["metadata"], is_for(call.arguments["metadata"], attention_done(call.arguments)))


def scheduled_picks(call: Call) -> str:
    return _scheduled(call.arguments["metadata"], is_for(call.arguments["metadata"], picks_done(call.arguments)))


def _scheduled(metadata: Tensor, fits: bool) -> str:
    return "" if fits else "metadata was made for other lengths, heads, ratio or number of picks"


def one_of(call: Call, names: tuple[str, ...], *allowed: tuple[int, ...]) -> str:
    """Several sizes or numbers go together. A name is an argument, or "tensor.axis"."""
    found = []
    for name in names:
        tensor, _, axis = name.partition(".")
        found.append(call.tensors(tensor)[0].shape[int(axis)] if axis else call.arguments[name])
    listed = ", ".join(map(str, allowed))
    return "" if tuple(found) in allowed else f"{', '.join(names)} must be one of {listed}, not {tuple(found)}"


# Table ----------------------------------------------------------------------------------------------------------------

_LENGTHS = (
    (given, "cu_seqlens_q"),
    (given, "seqused_kv"),
    (dtype, "cu_seqlens_q", INT32),
    (dtype, "seqused_kv", INT32),
    (rank, "cu_seqlens_q", 1),
    (rank, "seqused_kv", 1),
    (sums, "cu_seqlens_q"),
)
_MASKS = (
    (value, "ori_mask_mode", 4),
    (value, "cmp_mask_mode", 3),
    (value, "ori_win_left", 127),
    (value, "ori_win_right", 0),
    (value, "layout_kv", "PA_ND"),
)
_ATTENTION = (
    *_LENGTHS,
    *_MASKS,
    (value, "return_softmax_lse", False),
    (absent, "ori_sparse_indices"),
    (absent, "seqused_q"),
    (given, "ori_kv"),
    (given, "ori_block_table"),
    (given, "sinks"),
    (given, "metadata"),
    (dtype, "sinks", FP32),
    (dtype, "ori_block_table", INT32),
    (dtype, "cmp_block_table", INT32),
    (dtype, "cmp_sparse_indices", INT32),
    (dtype, "metadata", INT32),
    (rank, "q", 3),
    (rank, "ori_kv", 4),
    (rank, "cmp_kv", 4),
    (rank, "cmp_sparse_indices", 3),
    (rank, "ori_block_table", 2),
    (rank, "cmp_block_table", 2),
    (size, "q", -1, 512),
    (size, "ori_kv", 2, 1),
    (size, "cmp_kv", 2, 1),
    (size, "cmp_sparse_indices", 1, 1),
    (multiple, "ori_kv", 1, 16),
    (multiple, "cmp_kv", 1, 16),
    (between, "ori_kv", 1, 16, 1024),
    (between, "cmp_kv", 1, 16, 1024),
    (same_dtype, "ori_kv", "cmp_kv"),
    (same_size, "sinks", 0, "q", 1),
    (same_size, "cmp_sparse_indices", 0, "q", 0),
    (same_size, "ori_block_table", 0, "seqused_kv", 0),
    (same_size, "cmp_block_table", 0, "seqused_kv", 0),
    (size, "metadata", 0, WORDS),
    (no_gaps, "cmp_sparse_indices"),
    (covers, "ori_block_table", "ori_kv", "seqused_kv"),
    (covers, "cmp_block_table", "cmp_kv", "seqused_kv", "cmp_ratio"),
    (not_empty, "q", "ori_kv", "cmp_kv", "cmp_sparse_indices", "ori_block_table", "cmp_block_table"),
    (scheduled_attention,),
)
_COMPRESSED = (given, "cmp_kv")
_PICKED = (given, "cmp_sparse_indices")
_PLANNED = (
    *_LENGTHS,
    *_MASKS,
    (value, "num_heads_kv", 1),
    (value, "head_dim", 512),
)

RULES = (
    *rules("_C_ascend::npu_sparse_attn_sharedkv", BUILD, (soc, *A3)),
    *rules("_C_ascend::npu_sparse_attn_sharedkv", HERE, (value, "layout_q", "TND")),
    *rules(
        "_C_ascend::npu_sparse_attn_sharedkv",
        SHAREDKV,
        (dtype, "q", BF16, FP16),
        (same_dtype, "q", "ori_kv"),
        (size, "q", 1, 64),
        (size, "ori_kv", 3, 512),
        (size, "cmp_kv", 3, 512),
        (size, "cmp_sparse_indices", 2, 512),
        *_ATTENTION,
    ),
    *rules(
        "_C_ascend::npu_sparse_attn_sharedkv",
        SHAREDKV,
        (value, "cmp_ratio", 4, 128),
        (given, "cmp_block_table"),
        when=(_COMPRESSED,),
    ),
    *rules("_C_ascend::npu_sparse_attn_sharedkv", SHAREDKV, _COMPRESSED, when=(_PICKED,)),
    *rules("_C_ascend::npu_sparse_attn_sharedkv_metadata", BUILD, (soc, *A3)),
    *rules(
        "_C_ascend::npu_sparse_attn_sharedkv_metadata",
        "csrc/attention/sparse_attn_sharedkv_metadata/README.md",
        (value, "num_heads_q", 64),
        (value, "cmp_topk", 0, 512),
        *_PLANNED,
    ),
    *rules("_C_ascend::npu_kv_quant_sparse_attn_sharedkv", BUILD, (soc, *A5)),
    *rules("_C_ascend::npu_kv_quant_sparse_attn_sharedkv", HERE, (value, "layout_q", "TND")),
    *rules(
        "_C_ascend::npu_kv_quant_sparse_attn_sharedkv",
        KV_QUANT,
        (dtype, "q", BF16),
        (dtype, "ori_kv", E4M3),
        (dtype, "cmp_kv", E4M3),
        (value, "kv_quant_mode", 1),
        (value, "tile_size", 64),
        (value, "rope_head_dim", 64),
        (size, "q", 1, 64, 128),
        (size, "ori_kv", 3, 640),
        (size, "cmp_kv", 3, 640),
        (size, "cmp_sparse_indices", 2, 512, 1024),
        (is_plain, "q"),
        (is_plain, "ori_kv"),
        (is_plain, "cmp_kv"),
        *_ATTENTION,
    ),
    *rules(
        "_C_ascend::npu_kv_quant_sparse_attn_sharedkv",
        KV_QUANT,
        (value, "cmp_ratio", 4, 128),
        (given, "cmp_block_table"),
        when=(_COMPRESSED,),
    ),
    *rules("_C_ascend::npu_kv_quant_sparse_attn_sharedkv", KV_QUANT, _COMPRESSED, when=(_PICKED,)),
    *rules(
        "_C_ascend::npu_kv_quant_sparse_attn_sharedkv",
        KV_QUANT,
        (value, "cmp_ratio", 1),
        when=((absent, "cmp_kv"),),
    ),
    *rules("_C_ascend::npu_kv_quant_sparse_attn_sharedkv_metadata", BUILD, (soc, *A5)),
    *rules(
        "_C_ascend::npu_kv_quant_sparse_attn_sharedkv_metadata",
        KV_QUANT,
        (value, "num_heads_q", 64, 128),
        (value, "cmp_topk", 0, 512, 1024),
        (value, "kv_quant_mode", 1),
        (value, "tile_size", 64),
        (value, "rope_head_dim", 64),
        *_PLANNED,
    ),
    *rules("_C_ascend::npu_vllm_quant_lightning_indexer", HERE, (value, "layout_query", "TND")),
    *rules(
        "_C_ascend::npu_vllm_quant_lightning_indexer",
        INDEXER,
        (value, "query_quant_mode", 0),
        (value, "key_quant_mode", 0),
        (value, "layout_key", "PA_BSND"),
        (value, "sparse_mode", 0, 3),
        (value, "pre_tokens", FOREVER),
        (value, "next_tokens", FOREVER),
        (value, "return_value", False),
        (given, "actual_seq_lengths_query"),
        (given, "actual_seq_lengths_key"),
        (given, "block_table"),
        (given, "metadata"),
        (dtype, "actual_seq_lengths_query", INT32),
        (dtype, "actual_seq_lengths_key", INT32),
        (dtype, "block_table", INT32),
        (dtype, "metadata", INT32),
        (size, "query", 1, 64),
        (size, "query", 2, 128),
        (size, "key", 2, 1),
        (size, "key", 3, 128),
        (multiple, "key", 1, 16),
        (between, "key", 1, 16, 1024),
        (is_plain, "weights"),
        (is_plain, "query_dequant_scale"),
        (sums, "actual_seq_lengths_query"),
        (same_size, "block_table", 0, "actual_seq_lengths_key", 0),
        (covers, "block_table", "key", "actual_seq_lengths_key", "cmp_ratio"),
        (scheduled_picks,),
    ),
    *rules(
        "_C_ascend::npu_vllm_quant_lightning_indexer",
        INDEXER,
        (dtype, "query", INT8),
        (dtype, "key", INT8),
        (dtype, "weights", FP16),
        (dtype, "query_dequant_scale", FP16),
        (dtype, "key_dequant_scale", FP16),
        (at_most, "sparse_count", 2048),
        (value, "cmp_ratio", 1, 2, 4, 8, 16, 32, 64, 128),
        when=((soc, *A3),),
    ),
    *rules(
        "_C_ascend::npu_vllm_quant_lightning_indexer",
        INDEXER,
        (dtype, "query", E4M3),
        (dtype, "key", E4M3),
        (dtype, "weights", FP32),
        (dtype, "query_dequant_scale", FP32),
        (dtype, "key_dequant_scale", FP32),
        (value, "sparse_count", 512),
        (value, "cmp_ratio", 1, 4, 128),
        when=((soc, *A5),),
    ),
    *rules(
        "_C_ascend::npu_vllm_quant_lightning_indexer_metadata",
        INDEXER,
        (value, "num_heads_q", 64),
        (value, "num_heads_k", 1),
        (value, "head_dim", 128),
    ),
    *rules("_C_ascend::npu_scatter_nd_update_v2", BUILD, (soc, *A3)),
    *rules(
        "_C_ascend::npu_scatter_nd_update_v2",
        "vllm_ascend/device/device_op.py",
        (dtype, "indices", INT32),
        (same_dtype, "var", "update"),
        (rank, "indices", 2),
        (scattered, "update", "indices", "var"),
    ),
    *rules("_C_ascend::kv_compress_epilog", BUILD, (soc, *A5)),
    *rules(
        "_C_ascend::kv_compress_epilog",
        BINDING,
        (rank, "x", 2),
        (rank, "slot_mapping", 1),
        (dtype, "x", BF16),
        (dtype, "slot_mapping", INT32, INT64),
        (dtype, "kv_compress_cache", E4M3),
        (same_size, "slot_mapping", 0, "x", 0),
        (not_empty, "x"),
    ),
    *rules(
        "_C_ascend::kv_compress_epilog",
        "vllm_ascend/device/device_op.py",
        (rank, "kv_compress_cache", 3),
        (size, "kv_compress_cache", 1, 1),
        (value, "quant_group_size", 64),
        (value, "quant_mode", 2),
        (value, "round_scale_flag", True),
        (value, "layout", 1),
        (rows_of, "slot_mapping", -1, "kv_compress_cache"),
    ),
    *rules("_C_ascend::indexer_compress_epilog_v2", BUILD, (soc, *A5)),
    *rules(
        "_C_ascend::indexer_compress_epilog_v2",
        EPILOG,
        (dtype, "indexer_compress_cache", UINT8),
        (dtype, "x", BF16, FP16),
        (dtype, "slot_mapping", INT32),
        (value, "layout", 2),
        (rank, "indexer_compress_cache", 4),
        (size, "indexer_compress_cache", 3, 132),
        (size, "x", 1, 128),
        (same_size, "slot_mapping", 0, "x", 0),
        (rows_of, "slot_mapping", -1, "indexer_compress_cache"),
    ),
    *rules("_C_ascend::compressor", HERE, (absent, "seqused")),
    *rules(
        "_C_ascend::compressor",
        COMPRESSOR,
        (dtype, "x", BF16, FP16),
        (same_dtype, "x", "wkv"),
        (same_dtype, "x", "wgate"),
        (same_dtype, "x", "norm_weight"),
        (dtype, "state_cache", FP32),
        (dtype, "ape", FP32),
        (dtype, "state_block_table", INT32),
        (dtype, "cu_seqlens", INT32),
        (dtype, "start_pos", INT32),
        (given, "state_block_table"),
        (given, "cu_seqlens"),
        (given, "start_pos"),
        (rank, "x", 2),
        (multiple, "x", 1, 512),
        (between, "x", 1, 1024, 10240),
        (same_size, "wkv", 1, "x", 1),
        (same_size, "wgate", 1, "x", 1),
        (same_size, "wgate", 0, "wkv", 0),
        (same_size, "ape", 1, "wkv", 0),
        (same_size, "state_cache", 2, "wkv", 0, 2),
        (multiple, "state_cache", 1, 16),
        (between, "state_cache", 1, 16, 1024),
        (starts_at_zero, "cu_seqlens"),
        (sums, "cu_seqlens"),
        (value, "rope_head_dim", 64),
        (size, "rope_sin", -1, 64),
        (size, "rope_cos", -1, 64),
        (value, "rotary_mode", 2),
        (one_of, ("norm_weight.0", "coff", "cmp_ratio"), (512, 2, 4), (128, 2, 4), (512, 1, 128)),
    ),
    *rules(
        "_C_ascend::compressor",
        "csrc/attention/compressor/op_host/compressor_def.cpp",
        (dtype, "rope_sin", BF16, FP16, FP32),
        (same_dtype, "rope_sin", "rope_cos"),
    ),
    *rules("_C_ascend::compressor", "vllm_ascend/attention/dsa_v1.py", (value, "cache_mode", 1)),
)


def of(op: str) -> tuple[Rule, ...]:
    """The rules of one operator."""
    return tuple(rule for rule in RULES if rule.op == op)
