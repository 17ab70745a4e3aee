"""The step's plan, cache rows, and the compressor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4_hal import formats, ops
from dsv4_hal.batch import Batch, Entries, make_plan, state_ring
from dsv4_hal.formats import RowLayout
from dsv4_hal.ops import KV


class Cache(ops.Cache):
    def plan(self, batch: Batch, ratios: Mapping[int, bool], ropes: Mapping[str, Tensor]) -> Batch:
        batch.plan = make_plan(batch, ratios, ropes, self.numerics.accumulate)
        return batch

    def kv_store(self, rows: Tensor, layout: RowLayout, batch: Batch, pool: KV | None = None) -> KV:
        if pool is None:
            return KV(formats.round_rows(rows, layout), layout)
        source, target = batch.require_plan().write[layout.ratio]
        if batch.fixed and layout.ratio > 1:
            source, target = source[target >= 0], target[target >= 0]
        chosen = rows if len(source) == len(rows) else rows[source]
        formats.store(pool.data, layout, pool.rows, target, chosen)
        return pool

    def kv_load(self, kv: KV, batch: Batch, sequence: int, start: int, stop: int) -> Tensor:
        index = torch.arange(start, stop, device=kv.data.device)[None]
        seq = torch.tensor([sequence], device=kv.data.device)
        return load_rows(kv, physical_rows(kv, batch, seq, index))[0]

    def state_new(self, slots: int, ratio: int, overlap: bool, width: int, rollback: int = 0) -> Tensor:
        """[slots, ring, 2, width]: rows, then gates, of position p at p modulo ring."""
        ring = state_ring(ratio, overlap, rollback)
        return torch.zeros(slots, ring, 2, width, dtype=self.numerics.accumulate, device=self.device)

    def state_copy(self, state: Tensor, source: int, target: int) -> None:
        state[target] = state[source]

    def state_reset(self, state: Tensor, slot: int) -> None:
        state[slot] = 0

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
        tokens = torch.stack([kv, gate + ape.to(gate.dtype)[batch.positions % ratio]], 1)  # [T, 2, coff * c]
        # Most decode steps complete nothing.
        width = ape.shape[1] // (2 if overlap else 1)
        out = pool_blocks(tokens, state, entries, overlap) if entries.count else kv.new_zeros(0, width)
        if state is not None:
            state.flatten(0, 1)[entries.keep_target] = tokens[entries.keep_source].detach()
        return out


def pool_blocks(tokens: Tensor, state: Tensor | None, entries: Entries, overlap: bool) -> Tensor:
    """Entries [N, c] from this step's rows and gates, tokens [T, 2, coff * c], and those of the state before it."""
    source, count = entries.source, len(tokens)
    block = tokens[source.clamp(0, count - 1)]  # [N, span, 2, coff * c]
    if state is not None:
        before = state.flatten(0, 1)[(source - count).clamp(min=0)]
        block = torch.where((source < count)[..., None, None], block, before)
    if overlap:  # the first channels of the block before, the last channels of its own
        own, c = block.shape[1] // 2, block.shape[3] // 2
        block = torch.cat([block[:, :own, :, :c], block[:, own:, :, c:]], 1)
    missing = (source < 0)[..., None]
    value = block[:, :, 0].masked_fill(missing, 0)
    weight = block[:, :, 1].masked_fill(missing, float("-inf")).softmax(1)  # NaN where an entry is only room for one
    return (value * weight).sum(1)


def physical_rows(kv: KV, batch: Batch, seq: Tensor, index: Tensor, gaps: bool = True) -> Tensor:
    """Rows that hold logical rows index [n, k] of sequences seq [n]; -1 stays -1. gaps: whether there may be a -1."""
    plan, ratio = batch.require_plan(), kv.layout.ratio
    known = index.clamp(min=0) if gaps else index
    if kv.paged:
        table = plan.tables[ratio]
        rows = table[seq[:, None], (known // kv.rows) % table.shape[1]] * kv.rows + known % kv.rows
    else:
        rows = plan.base[ratio][seq, None] + known
    return rows.masked_fill(index < 0, -1) if gaps else rows


def load_rows(kv: KV, physical: Tensor, gaps: bool = True) -> Tensor:
    """Rows [n, k] -> [n, k, dim]; zeros where -1, which is never read: what lies there may be NaN, and zero times NaN
    would poison a sum. gaps: whether there may be a -1."""
    if kv.paged:
        return formats.load(kv.data, kv.layout, kv.rows, physical, gaps)
    if not len(kv.data):
        return kv.data.new_zeros(*physical.shape, kv.layout.dim)
    if not gaps:
        return kv.data[physical]
    return kv.data[physical.clamp(min=0)].masked_fill((physical < 0)[..., None], 0)
