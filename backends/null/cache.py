"""The step's plan, which is real, and shapes of cache rows and compressed entries."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.null.gemm import empty
from dsv4_hal.batch import Batch, make_plan, state_ring
from dsv4_hal.formats import RowLayout
from dsv4_hal.ops import KV


class Cache(ops.Cache):
    def plan(self, batch: Batch, ratios: Mapping[int, bool], ropes: Mapping[str, Tensor]) -> Batch:
        batch.plan = make_plan(batch, ratios, ropes, self.numerics.accumulate)
        return batch

    def kv_store(self, rows: Tensor, layout: RowLayout, batch: Batch, pool: KV | None = None) -> KV:
        return KV(empty(*rows.shape, dtype=rows.dtype), layout) if pool is None else pool

    def kv_load(self, kv: KV, batch: Batch, sequence: int, start: int, stop: int) -> Tensor:
        return empty(stop - start, kv.layout.dim, dtype=self.numerics.storage)

    def state_new(self, slots: int, ratio: int, overlap: bool, width: int, rollback: int = 0) -> Tensor:
        ring = state_ring(ratio, overlap, rollback)
        return empty(slots, ring, 2, width, dtype=self.numerics.accumulate)

    def state_copy(self, state: Tensor, source: int, target: int) -> None:
        """Nothing to copy."""

    def state_reset(self, state: Tensor, slot: int) -> None:
        """Nothing to reset."""

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
        channels = kv.shape[1] // (2 if overlap else 1)
        return empty(batch.require_plan().entries[ratio].count, channels, dtype=self.numerics.accumulate)
