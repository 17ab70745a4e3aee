"""Sparse attention over window rows and compressed entries, and the indexer that picks entries."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.batch import Batch, CosSin
from dsv4_hal.formats import Weight
from dsv4_hal.ops.cache import KV, require_rows
from dsv4_hal.ops.cases import attention as cases
from dsv4_hal.ops.gemm import Gemm
from dsv4_hal.ops.norm_rope import NormRope
from dsv4_hal.ops.spec import Compare, ContractError, Tolerance, check_out, composite, primitive

# Twice the usual: an exponential makes a relative error of the absolute one of a score, and a row has few large ones.
_ATTENTION = Tolerance(Compare.NMSE, 4.0, "exponentials, the running maximum and the order over keys are free")
_PICKS = Tolerance(Compare.SELECTION, 4.0, "scores within their own rounding error of the k-th may change places")
_PROJECT = Tolerance(Compare.NMSE, 4.0, "the order of two long sums is free")


class Attention(Gemm, NormRope):
    @primitive(_PICKS, cases.index_topk, grad=("q", "weights", "keys"))
    def index_topk(
        self, q: Tensor, weights: Tensor, keys: KV, batch: Batch, k: int, *, with_scores: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The k entries that matter most to each token -> picks int64 [T, k], and their scores.

        with_scores  also return scores [T, k] in numerics.accumulate; otherwise None, since not every kernel keeps them

        q        [T, H, D] in storage, rotated; rounded here to the key layout's row format, as the keys were
        weights  [T, H] in storage
        keys     one row per entry, layout.ratio tokens each
        score of entry s at token t = sum over h of weights[t, h] * relu(q[t, h] . key[s]); the product, its relu
        times weight, and the sum are each rounded to numerics.score, sums run in numerics.accumulate.
        Entry s is visible at position p if s < (p + 1) // ratio. Picks come best first, equal scores lower entry
        first, whatever entries exist later; where fewer than k are visible, and for padding tokens, picks end in -1
        and scores in -inf. Scores are differentiable in q, weights and packed keys: the only way to train an indexer.
        Source: DeepSeek-V4 report, section 2.3.1, lightning indexer.
        """
        if q.dim() != 3 or q.shape[0] != batch.tokens or q.shape[-1] != keys.layout.dim:
            raise ContractError(
                f"index_topk: q {tuple(q.shape)} for {batch.tokens} tokens and keys of {keys.layout.dim}"
            )
        if weights.shape != q.shape[:2]:
            raise ContractError(f"index_topk: weights {tuple(weights.shape)}, need {tuple(q.shape[:2])}")
        if k < 1 or keys.layout.ratio < 2:
            raise ContractError(f"index_topk: k {k} must be positive and keys compressed (ratio {keys.layout.ratio})")
        require_rows("index_topk", keys, batch)

    @primitive(_ATTENTION, cases.sparse_attention, grad=("q", "window_kv", "sink", "entries"))
    def sparse_attention(
        self,
        q: Tensor,
        window_kv: KV,
        sink: Tensor,
        scale: float,
        batch: Batch,
        entries: KV | None = None,
        picks: Tensor | None = None,
        *,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One softmax over the token's window and its compressed entries; keys are values (one KV head).

        q          [T, H, D] in storage
        window_kv  a row per token; position p sees positions p - layout.window + 1 .. p
        sink       [H]; adds exp(sink) to the denominator, and nothing to the numerator
        scale      multiplies q . k
        entries    compressed rows of layout.ratio tokens, or None; entry s is visible at p if s < (p + 1) // ratio
        picks      [T, K] int64 of entries, distinct, -1 for none (never read); None: all visible entries
        returns    [T, H, D] in storage; rows of padding tokens are zero. And with return_lse (else None) the log of the
                   sum of exp(score) over keys, without the sink, [T, H] in numerics.accumulate, -inf without any key.
        Scores and exponentials in numerics.accumulate, relative to the largest score of all the token's keys (not the
        sink); probabilities so scaled are rounded to numerics.probs in front of the product with the values, the
        denominator is not. Rows that no token of the step sees are never read.
        Source: DeepSeek-V4 report, section 2.3; published inference kernel.
        """
        if q.dim() != 3 or q.shape[0] != batch.tokens or q.shape[-1] != window_kv.layout.dim:
            raise ContractError(
                f"sparse_attention: q {tuple(q.shape)} for {batch.tokens} tokens and rows of {window_kv.layout.dim}"
            )
        if window_kv.layout.ratio != 1:
            raise ContractError("sparse_attention: window_kv must hold a row per token")
        if sink.shape != q.shape[1:2]:
            raise ContractError(f"sparse_attention: sink {tuple(sink.shape)}, need [{q.shape[1]}]")
        if entries is not None and (entries.layout.ratio < 2 or entries.layout.dim != q.shape[-1]):
            raise ContractError(
                f"sparse_attention: entries of ratio {entries.layout.ratio}, width {entries.layout.dim}"
            )
        if picks is not None and (
            entries is None or picks.dim() != 2 or picks.shape[0] != q.shape[0] or picks.dtype != torch.int64
        ):
            raise ContractError(
                f"sparse_attention: picks {picks.dtype} {tuple(picks.shape)} need entries and [{q.shape[0]}, K] int64"
            )
        for kv in (window_kv, entries):
            if kv is not None:
                require_rows("sparse_attention", kv, batch)
        check_out("sparse_attention", out, q.shape, q.dtype)

    @composite(_PROJECT, cases.output_proj, grad=("x", "wo_a", "wo_b"))
    def output_proj(self, x: Tensor, cos_sin: CosSin, wo_a: Weight, wo_b: Weight) -> Tensor:
        """Attention output to the residual width: x [T, H, D] -> [T, d].

        The output is rotated back by its token's own angle (values carry the rotation of their keys), heads are split
        into G groups with a low-rank matrix each (wo_a [G, r, H * D / G]), and wo_b [d, G * r] joins them.
        Source: DeepSeek-V4 report, grouped output projection.
        """
        y = self.rope(x, cos_sin, inverse=True)
        low = self.block_diagonal_linear(y.reshape(len(y), wo_a.data.shape[0], wo_a.shape[-1]), wo_a)
        return self.linear(low.flatten(1), wo_b)
