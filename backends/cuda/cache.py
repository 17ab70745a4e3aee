"""Cache rows and the compressor: rounding and store are one kernel, with norm and RoPE in front where they belong."""

from __future__ import annotations

from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.triton_kernels import cache as kernels
from dsv4_hal.batch import Batch, CosSin
from dsv4_hal.formats import RowLayout
from dsv4_hal.ops import KV, CompressorWeights


class Cache(ops.Cache):
    def kv_store(self, rows: Tensor, layout: RowLayout, batch: Batch, pool: KV | None = None) -> KV:
        if not kernels.can_store(layout):
            return super().kv_store(rows, layout, batch, pool)
        if pool is None and layout.rounding is None:
            return KV(rows, layout)
        return _store(rows, layout, batch, pool)

    def compress(
        self,
        kv: Tensor,
        gate: Tensor,
        ape: Tensor,
        batch: Batch,
        ratio: int,
        overlap: bool,
        state: Tensor | None = None,
    ) -> Tensor:
        entries = batch.require_plan().entries[ratio]
        keep = None if state is None else (entries.keep_source, entries.keep_target)
        return kernels.compress(kv, gate, ape, batch.positions, entries.source, overlap, state, keep)

    def compress_store(
        self,
        x: Tensor,
        weights: CompressorWeights,
        layout: RowLayout,
        batch: Batch,
        overlap: bool,
        state: Tensor | None,
        cos_sin: CosSin,
        eps: float,
        pool: KV | None,
        rotate: bool,
    ) -> KV:
        wide, ratio = self.numerics.accumulate, layout.ratio
        ops.Gemm.linear(self, x, weights.wkv, wide)  # the preconditions of every part, where it stands
        ops.Gemm.linear(self, x, weights.wgate, wide)
        kv, gate = self.linear(x, weights.wkv, wide), self.linear(x, weights.wgate, wide)
        ops.Cache.compress(self, kv, gate, weights.ape, batch, ratio, overlap, state)
        entries = self.compress(kv, gate, weights.ape, batch, ratio, overlap, state)
        if pool is not None and not len(entries):  # most decode steps complete none
            return pool
        return self._norm_rope_store(entries, weights.norm, eps, cos_sin, layout, batch, pool, rotate)

    def kv_norm_rope_store(
        self, kv: Tensor, weight: Tensor, eps: float, cos_sin: CosSin, layout: RowLayout, batch: Batch, pool: KV | None
    ) -> KV:
        return self._norm_rope_store(kv, weight, eps, cos_sin, layout, batch, pool)

    def _norm_rope_store(
        self,
        rows: Tensor,
        weight: Tensor,
        eps: float,
        cos_sin: CosSin,
        layout: RowLayout,
        batch: Batch,
        pool: KV | None,
        rotate: bool = False,
    ) -> KV:
        """Rows [N, dim], rounded to storage, through norm, RoPE, Hadamard rotation if `rotate`, and `kv_store`: one
        kernel, where that knows the layout."""
        ops.NormRope.rms_norm(self, rows, weight, eps)  # the preconditions of every part
        ops.NormRope.rope(self, rows, cos_sin)
        if rotate:
            ops.NormRope.hadamard(self, rows)
        ops.Cache.kv_store(self, rows, layout, batch, pool)
        if kernels.can_store(layout) and kernels.can_turn(layout.dim, 2 * cos_sin[0].shape[1]):
            return _store(rows, layout, batch, pool, weight, eps, cos_sin, rotate)
        rows = self.rope(self.rms_norm(rows.to(self.numerics.storage), weight, eps), cos_sin)
        return self.kv_store(self.hadamard(rows) if rotate else rows, layout, batch, pool)


def _store(
    rows: Tensor,
    layout: RowLayout,
    batch: Batch,
    pool: KV | None,
    weight: Tensor | None = None,
    eps: float = 0.0,
    cos_sin: CosSin | None = None,
    rotate: bool = False,
) -> KV:
    """`kernels.store` into the rows that the plan names, or into new ones."""
    steps = weight, eps, cos_sin, rotate
    if pool is None:
        return KV(kernels.store(rows, layout, None, *steps), layout)
    kernels.store(rows, layout, (pool.data, pool.rows, *batch.require_plan().write[layout.ratio]), *steps)
    return pool
