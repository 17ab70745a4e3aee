"""Sparse attention by FlashMLA.

What it does otherwise than the contract: probabilities are rounded to bfloat16 relative to the largest score so far,
or to one a little smaller, not to the largest of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.backend import Facts, Verdict
from dsv4_hal.backends.cuda.vendor import flash_mla
from dsv4_hal.backends.cuda.vendor.common import Base, once_a_step, own_kernel, visible
from dsv4_hal.backends.cuda.vendor.layouts import padded
from dsv4_hal.backends.reference.cache import physical_rows
from dsv4_hal.backends.triton_kernels.runtime import emit
from dsv4_hal.batch import Batch
from dsv4_hal.formats import FORMATS
from dsv4_hal.ops import KV


class Attention(Base):
    def supports(self, op: str, facts: Facts) -> Verdict:
        verdict = super().supports(op, facts)
        if op != "sparse_attention":
            return verdict
        dim, rope = facts.get("head_dim", flash_mla.DIM), facts.get("qk_rope_head_dim", flash_mla.ROPE)
        return verdict and self._attends(facts.get("num_attention_heads", flash_mla.HEADS[0]), dim, rope)

    def _attends(self, heads: int, dim: int, rope: int, tokens: int = 1) -> Verdict:
        """Whether the library computes what this profile says, for these queries."""
        told = (self.numerics.kv, self.numerics.storage, self.numerics.probs)
        if told != (FORMATS["e4m3_1x64"], torch.bfloat16, torch.bfloat16):
            return Verdict(False, "FlashMLA attends in bfloat16 to rows in e4m3_1x64")
        return flash_mla.able(self.arch.name) and flash_mla.verdict(heads, dim, rope, tokens)

    def _attends_rows(self, q: Tensor, window: KV, entries: KV | None, lse: bool) -> Verdict:
        """The same, for rows that lie there."""
        for kv in (window, window if entries is None else entries):
            if kv.paged != window.paged or (kv.paged and kv.layout.plain):
                return Verdict(False, "FlashMLA reads pools of its own rows, not of another backend's")
        if lse and not window.paged:
            return Verdict(False, "FlashMLA's versions differ in the base of the lse over rows side by side")
        return self._attends(q.shape[1], window.layout.dim, window.layout.rope, len(q))

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
        verdict = self._attends_rows(q, window_kv, entries, return_lse)
        if not verdict or not batch.q_lens.any():
            if not verdict:
                own_kernel("sparse_attention", verdict)
            return super().sparse_attention(
                q, window_kv, sink, scale, batch, entries, picks, return_lse=return_lse, out=out
            )
        window = self._window(window_kv, batch)
        chosen = None if entries is None else self._chosen(entries, batch, picks)
        if not window_kv.paged:
            rows = window_kv.data
            if entries is not None and chosen is not None:
                window = torch.cat([window, torch.where(chosen < 0, -1, chosen + len(rows))], 1)
                rows = torch.cat([rows, entries.data])
            y = flash_mla.packed_attention(q, rows, padded(window, flash_mla.STEP), sink, scale)
            return emit(y.contiguous(), out), None
        scopes = [flash_mla.Scope(window_kv.data, window_kv.rows, padded(window, flash_mla.STEP))]
        if entries is not None and chosen is not None:
            scopes.append(flash_mla.Scope(entries.data, entries.rows, padded(chosen, flash_mla.STEP)))
        plan = batch.require_plan().vendor
        key = ("flash_mla", q.shape[1], *((scope.rows, scope.index.shape) for scope in scopes))
        if key not in plan:
            plan[key] = flash_mla.schedule()
        y, lse = flash_mla.paged_attention(q, scopes, sink, scale, plan[key])
        return emit(y.contiguous(), out), lse if return_lse else None

    def _window(self, kv: KV, batch: Batch) -> Tensor:
        """Physical rows [T, window] that a token sees, -1 where there is none. The same in every layer."""

        def make() -> Tensor:
            index = batch.positions[:, None] - torch.arange(kv.layout.window - 1, -1, -1, device=batch.seq.device)
            index = torch.where((index >= 0) & (batch.seq >= 0)[:, None], index, -1)
            return physical_rows(kv, batch, batch.seq.clamp(min=0), index)

        return once_a_step(batch, ("flash_mla", "window", kv.layout.window, kv.rows), make)

    def _chosen(self, kv: KV, batch: Batch, picks: Tensor | None) -> Tensor | None:
        """Physical rows [T, K] of the entries that a token picked, or of all it sees, -1 where there is none. None
        where no token sees any. All that are visible are the same in every layer of a ratio."""
        count = int(batch.reach.max()) // kv.layout.ratio
        if not count:
            return None
        seq, seen = batch.seq.clamp(min=0), visible(batch, kv.layout.ratio)[:, None]
        if picks is not None:
            return physical_rows(kv, batch, seq, torch.where(picks < seen, picks, -1))

        def make() -> Tensor:
            entry = torch.arange(count, device=batch.seq.device)
            return physical_rows(kv, batch, seq, torch.where(entry < seen, entry, -1))

        return once_a_step(batch, ("flash_mla", "entries", kv.layout.ratio, kv.rows), make)
