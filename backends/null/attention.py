"""Shapes of sparse attention and of the indexer."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.null.gemm import emit, empty
from dsv4_hal.batch import Batch
from dsv4_hal.ops import KV


class Attention(ops.Attention):
    def index_topk(
        self, q: Tensor, weights: Tensor, keys: KV, batch: Batch, k: int, *, with_scores: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        scores = empty(len(q), k, dtype=self.numerics.accumulate) if with_scores else None
        return empty(len(q), k, dtype=torch.int64), scores

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
        y = emit(out, *q.shape, dtype=q.dtype)
        return y, empty(*q.shape[:2], dtype=self.numerics.accumulate) if return_lse else None
