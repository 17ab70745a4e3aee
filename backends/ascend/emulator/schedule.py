"""The int32[1024] that metadata operators hand to the operators whose work they divide among cores.

Nothing documents its words. The emulator writes a digest of what the schedule was made for, so that one of another
batch, ratio or number of heads is found out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

WORDS = 1024  # vllm-ascend csrc/torch_binding.cpp, commit 182b75ea: OUTPUT_SIZE of every metadata operator
_DIGEST = 8  # words that the emulator uses


def schedule(facts: Mapping[str, Any]) -> Tensor:
    """A schedule for work with these facts: numbers, strings, and tensors of whole numbers."""
    plain = {name: v.tolist() if isinstance(v, Tensor) else v for name, v in facts.items()}
    digest = hashlib.sha256(repr(sorted(plain.items())).encode()).digest()
    out = torch.zeros(WORDS, dtype=torch.int32)
    out[:_DIGEST] = torch.frombuffer(bytearray(digest), dtype=torch.int32)
    return out


def is_for(metadata: Tensor, facts: Mapping[str, Any]) -> bool:
    """Whether a schedule was made for these facts."""
    return torch.equal(metadata, schedule(facts))


_ATTENTION = ("cu_seqlens_q", "seqused_kv", "cmp_ratio", "ori_win_left", "ori_win_right", "layout_q", "layout_kv")
_FP8 = ("kv_quant_mode", "tile_size", "rope_head_dim")  # of the operator on FP8 rows
_PICKS = (
    "actual_seq_lengths_query",
    "actual_seq_lengths_key",
    "layout_query",
    "layout_key",
    "sparse_count",
    "sparse_mode",
    "cmp_ratio",
)


def attention_asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a metadata operator of sparse attention is asked to divide, by its arguments."""
    return {name: given[name] for name in (*_ATTENTION, *_FP8) if name in given} | {
        "heads": (given["num_heads_q"], given["num_heads_kv"], given["head_dim"]),
        "picks": given["cmp_topk"],
        "entries": given["has_cmp_kv"],
    }


def attention_done(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same, of what sparse attention is asked to do."""
    q, picks = given["q"], given["cmp_sparse_indices"]
    return {name: given[name] for name in (*_ATTENTION, *_FP8) if name in given} | {
        "heads": (q.shape[-2], 1, q.shape[-1]),
        "picks": 0 if picks is None else picks.shape[-1],
        "entries": given["cmp_kv"] is not None,
    }


def picks_asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the metadata operator of the indexer is asked to divide."""
    heads = (given["num_heads_q"], given["num_heads_k"], given["head_dim"])
    return {name: given[name] for name in _PICKS} | {"heads": heads}


def picks_done(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same, of what the indexer is asked to do."""
    query, key = given["query"], given["key"]
    heads = (query.shape[-2], key.shape[-2], query.shape[-1])
    return {name: given[name] for name in _PICKS} | {"heads": heads}
