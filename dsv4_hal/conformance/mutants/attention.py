"""Wrong indexer and sparse attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsv4_hal.conformance.mutants.hunt import mutant
from dsv4_hal.ops import KV


@mutant("indexer: no causal mask, the last entry is picked by every token", "index_topk")
def no_causal_mask(right: Any, self: Any, q: Tensor, weights: Tensor, keys: KV, batch: Any, k: int, **kw: Any) -> Any:
    picks, scores = right.index_topk(self, q, weights, keys, batch, k, **kw)
    last = torch.from_numpy(batch.lengths // keys.layout.ratio - 1).to(picks.device)[batch.seq.clamp(min=0)]
    missing = ~(picks == last[:, None]).any(-1) & (last >= 0) & (batch.seq >= 0)
    picks = picks.clone()
    picks[missing, 0] = last[missing]
    return picks, scores


@mutant("indexer: of equal scores the later entry comes first", "index_topk")
def index_ties_reversed(right: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    picks, scores = right.index_topk(self, *args, **{**kwargs, "with_scores": True})
    flip = (scores[:, :-1] == scores[:, 1:]) & (picks[:, 1:] >= 0)
    picks = picks.clone()
    for t, j in flip.nonzero().tolist():
        picks[t, j], picks[t, j + 1] = picks[t, j + 1].clone(), picks[t, j].clone()
    return picks, scores if kwargs.get("with_scores") else None


@mutant("indexer: k beyond what is visible is filled with entry 0", "index_topk")
def k_overrun(right: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    picks, scores = right.index_topk(self, *args, **kwargs)
    return picks.clamp(min=0), scores


@mutant("indexer: head weights lose their sign", "index_topk")
def weights_made_positive(right: Any, self: Any, q: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Any:
    return right.index_topk(self, q, weights.abs(), *args, **kwargs)


@mutant("indexer: queries are not rounded to the keys' format", "index_topk")
def index_query_unrounded(
    right: Any, self: Any, q: Tensor, weights: Tensor, keys: KV, *args: Any, **kwargs: Any
) -> Any:
    bare = replace(keys, layout=replace(keys.layout, rounding=None))
    return right.index_topk(self, q, weights, bare, *args, **kwargs)


@mutant("indexer: scores are rounded to bf16 before the best are chosen", "index_topk")
def index_scores_rounded(
    right: Any, self: Any, q: Tensor, weights: Tensor, keys: KV, batch: Any, k: int, *, with_scores: bool = False
) -> Any:
    longest = max(k, int(batch.lengths.max(initial=0)))
    picks, scores = right.index_topk(self, q, weights, keys, batch, longest, with_scores=True)
    by_id = picks.where(picks >= 0, longest).argsort(-1)
    best = scores.gather(-1, by_id).bfloat16().argsort(dim=-1, descending=True, stable=True)
    order = by_id.gather(-1, best)[:, :k]
    return picks.gather(-1, order), scores.gather(-1, order) if with_scores else None


@mutant("RoPE: the output is not rotated back", "output_proj")
def output_not_rotated_back(right: Any, self: Any, x: Tensor, cos_sin: Any, wo_a: Any, wo_b: Any) -> Tensor:
    low = self.block_diagonal_linear(x.reshape(len(x), wo_a.data.shape[0], wo_a.shape[-1]), wo_a)
    return self.linear(low.flatten(1), wo_b)


@mutant("attention: the sink is missing", "sparse_attention")
def sink_missing(right: Any, self: Any, q: Tensor, kv: KV, sink: Tensor, *args: Any, **kwargs: Any) -> Any:
    return right.sparse_attention(self, q, kv, torch.full_like(sink, float("-inf")), *args, **kwargs)


@mutant("attention: the sink is part of the values", "sparse_attention")
def sink_in_values(
    right: Any, self: Any, q: Tensor, kv: KV, sink: Tensor, scale: float, *args: Any, **kwargs: Any
) -> Any:
    y, lse = right.sparse_attention(self, q, kv, sink, scale, *args, **{**kwargs, "return_lse": True})
    share = (sink.to(lse.dtype) - torch.logaddexp(lse, sink.to(lse.dtype))).exp()
    y += torch.where(lse.isfinite(), share, torch.zeros_like(share))[..., None].to(y.dtype)
    return y, lse if kwargs.get("return_lse") else None


def _window(kv: KV, change: int) -> KV:
    return replace(kv, layout=replace(kv.layout, window=max(1, kv.layout.window + change)))


@mutant("attention: the window lacks one key", "sparse_attention")
def window_too_small(right: Any, self: Any, q: Tensor, kv: KV, *args: Any, **kwargs: Any) -> Any:
    return right.sparse_attention(self, q, _window(kv, -1), *args, **kwargs)


@mutant("attention: the window has one key too many", "sparse_attention")
def window_too_large(right: Any, self: Any, q: Tensor, kv: KV, *args: Any, **kwargs: Any) -> Any:
    return right.sparse_attention(self, q, _window(kv, 1), *args, **kwargs)


@mutant("attention: a pick of -1 reads entry 0", "sparse_attention")
def minus_one_read(
    right: Any, self: Any, q: Tensor, kv: KV, sink: Tensor, scale: float, batch: Any, entries: Any = None,
    picks: Tensor | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    if picks is not None:
        ratio = entries.layout.ratio
        seen = (batch.positions + 1 >= ratio) & (batch.seq >= 0)
        picks = torch.where(seen[:, None] & (picks < 0), 0, picks)
    return right.sparse_attention(self, q, kv, sink, scale, batch, entries, picks, **kwargs)


@mutant("attention: the scale is forgotten", "sparse_attention")
def scale_forgotten(right: Any, self: Any, q: Tensor, kv: KV, sink: Tensor, scale: float, *args: Any, **kw: Any) -> Any:
    return right.sparse_attention(self, q, kv, sink, 1.0, *args, **kw)
