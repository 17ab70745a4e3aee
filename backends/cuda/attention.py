"""Sparse attention and the indexer."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.cuda import tiles
from dsv4_hal.backends.cuda.devices import Arch
from dsv4_hal.backends.triton_kernels import attention, indexer
from dsv4_hal.backends.triton_kernels.rows import Rows, round_rows, rows_of
from dsv4_hal.backends.triton_kernels.runtime import emit, result
from dsv4_hal.batch import Batch, upload
from dsv4_hal.ops import KV


class Attention(ops.Attention):
    arch: Arch

    def index_topk(
        self, q: Tensor, weights: Tensor, keys: KV, batch: Batch, k: int, *, with_scores: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        ratio, plan = keys.layout.ratio, batch.require_plan()
        name = ("index chunks", ratio, k)
        if name not in plan.vendor:
            plan.vendor[name] = [
                (chunk, upload(chunk.blocks, batch.device))
                for chunk in indexer.chunks(batch.q_lens, batch.reach - batch.q_lens, ratio, k)
                if chunk.longest
            ]
        return indexer.index_topk(
            round_rows(q, keys.layout),
            weights,
            self._rows(keys, batch),
            plan.vendor[name],
            batch.positions,
            k,
            ratio=ratio,
            narrow=self.numerics.score,
            with_scores=with_scores,
            tile=(tiles.INDEX_FLOAT32 if self._wide else tiles.INDEX)[self.arch.name],
        )

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
        made = result(q.shape, q.dtype, q.device, out)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
        ratio = entries.layout.ratio if entries is not None else 1
        attention.sparse_attention(
            q,
            self._rows(window_kv, batch),
            None if entries is None else self._rows(entries, batch),
            picks,
            sink,
            batch.seq,
            batch.positions,
            made,
            lse,
            scale=scale,
            span=window_kv.layout.window,
            ratio=ratio,
            longest=int(batch.reach.max(initial=0)) // ratio,
            probs=self.numerics.probs,
            tile=(tiles.ATTENTION_FLOAT32 if self._wide else tiles.ATTENTION)[self.arch.name],
        )
        return emit(made, out), lse

    @property
    def _wide(self) -> bool:
        """Whether products are of float32 operands."""
        return torch.float32 in (self.numerics.storage, self.numerics.probs)

    def _rows(self, kv: KV, batch: Batch) -> Rows:
        """Cache rows of the step, as kernels read them."""
        plan, ratio = batch.require_plan(), kv.layout.ratio
        where = plan.tables[ratio] if kv.paged else plan.base[ratio]
        return rows_of(kv.data, kv.layout, kv.rows, where, self.arch.fp8)
