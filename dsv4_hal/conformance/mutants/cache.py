"""Wrong plans, cache rows and compressors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsv4_hal import formats
from dsv4_hal.conformance.mutants.hunt import mutant
from dsv4_hal.ops import KV


@mutant("RoPE: tables are kept in bf16", "plan")
def tables_in_bf16(right: Any, self: Any, *args: Any) -> Any:
    batch = right.plan(self, *args)
    for key, (cos, sin) in batch.plan.rope.items():
        batch.plan.rope[key] = tuple(t.to(torch.bfloat16).to(t.dtype) for t in (cos, sin))
    return batch


@mutant("RoPE: every layer has the base of the window layers", "plan")
def one_base_for_all(right: Any, self: Any, batch: Any, ratios: Any, ropes: Any) -> Any:
    first = next(iter(ropes.values()), None)
    return right.plan(self, batch, ratios, dict.fromkeys(ropes, first) if first is not None else ropes)


@mutant("RoPE: angles are computed in float64", "plan")
def angles_in_float64(right: Any, self: Any, *args: Any) -> Any:
    batch = right.plan(self, *args)
    for (name, ratio), (cos, sin) in batch.plan.rope.items():
        positions = batch.positions if ratio == 1 else batch.plan.entries[ratio].positions
        angle = positions.double()[:, None] * args[2][name].double()
        batch.plan.rope[name, ratio] = angle.cos().to(cos.dtype), angle.sin().to(sin.dtype)
    return batch


@mutant("RoPE: compressed keys are not rotated", "compressor")
def entries_not_rotated(
    right: Any, self: Any, x: Tensor, weights: Any, batch: Any, ratio: int, overlap: bool, state: Any, cs: Any, eps: Any
) -> Tensor:
    still = torch.ones_like(cs[0]), torch.zeros_like(cs[1])
    return super(right, self).compressor(x, weights, batch, ratio, overlap, state, still, eps)


@mutant("RoPE: compressed keys are rotated by the angle of another block", "compressor")
def entries_at_the_wrong_position(
    right: Any, self: Any, x: Tensor, weights: Any, batch: Any, ratio: int, overlap: bool, state: Any, cs: Any, eps: Any
) -> Tensor:
    return super(right, self).compressor(
        x, weights, batch, ratio, overlap, state, (cs[0].roll(-1, 0), cs[1].roll(-1, 0)), eps
    )


@mutant("compressor: the halves of overlapping blocks are swapped", "compress")
def overlap_swapped(right: Any, self: Any, kv: Tensor, gate: Tensor, ape: Tensor, *args: Any) -> Tensor:
    if not args[2]:
        return right.compress(self, kv, gate, ape, *args)
    swap = lambda t: torch.cat(t.chunk(2, -1)[::-1], -1)  # noqa: E731
    return right.compress(self, swap(kv), swap(gate), swap(ape), *args)


@mutant("compressor: the position bias is forgotten", "compress")
def ape_forgotten(right: Any, self: Any, kv: Tensor, gate: Tensor, ape: Tensor, *args: Any) -> Tensor:
    return right.compress(self, kv, gate, torch.zeros_like(ape), *args)


@mutant("compressor: the state is not carried over the edge of a chunk", "compress")
def state_not_carried(
    right: Any,
    self: Any,
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    batch: Any,
    ratio: int,
    overlap: bool,
    state: Any = None,
) -> Tensor:  # fmt: skip
    if state is None:
        return right.compress(self, kv, gate, ape, batch, ratio, overlap, state)
    out = right.compress(self, kv, gate, ape, batch, ratio, overlap, torch.zeros_like(state))
    right.compress(self, kv, gate, ape, batch, ratio, overlap, state)
    return out


@mutant("compressor: a new sequence reads what its slot held before", "compress")
def stale_state_read(
    right: Any,
    self: Any,
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    batch: Any,
    ratio: int,
    overlap: bool,
    state: Any = None,
) -> Tensor:  # fmt: skip
    planned = batch.plan.entries[ratio]
    if state is not None:
        source = planned.source.masked_fill(planned.source < 0, len(kv))
        batch.plan.entries[ratio] = replace(planned, source=source)
    out = right.compress(self, kv, gate, ape, batch, ratio, overlap, state)
    batch.plan.entries[ratio] = planned
    return out


@mutant("compressor: a forked sequence starts with what its slot held", "state_copy")
def state_not_copied(right: Any, self: Any, state: Tensor, source: int, target: int) -> None:
    return None


@mutant("compressor: a block's plain mean is taken", "compress")
def mean_instead_of_softmax(right: Any, self: Any, kv: Tensor, gate: Tensor, ape: Tensor, *args: Any) -> Tensor:
    return right.compress(self, kv, torch.zeros_like(gate), torch.zeros_like(ape), *args)


@mutant("compressor: the state of other sequences is overwritten", "compress")
def other_slots_written(right: Any, self: Any, kv: Tensor, gate: Tensor, ape: Tensor, batch: Any, *args: Any) -> Tensor:
    out = right.compress(self, kv, gate, ape, batch, *args)
    if len(args) > 2 and args[2] is not None and batch.slots is not None:
        args[2][[s for s in range(len(args[2])) if s not in batch.slots]] = 0
    return out


@mutant("cache: blocks of other sequences are overwritten", "kv_store")
def other_blocks_written(right: Any, self: Any, rows: Tensor, layout: Any, batch: Any, pool: KV | None = None) -> KV:
    kept = right.kv_store(self, rows, layout, batch, pool)
    if pool is not None:
        table = batch.window_table if layout.ratio == 1 else batch.token_table
        pool.data[[block for block in range(len(pool.data)) if block not in table]] = 0
    return kept


@mutant("cache: an entry that there is only room for is stored, as entry 0", "kv_store")
def room_is_stored(right: Any, self: Any, rows: Tensor, layout: Any, batch: Any, pool: KV | None = None) -> KV:
    kept = right.kv_store(self, rows, layout, batch, pool)
    if pool is not None and batch.fixed and layout.ratio > 1:
        entries = batch.require_plan().entries[layout.ratio]
        room, first = entries.index < 0, torch.from_numpy(batch.token_table[:, 0] * pool.rows)[entries.seq]
        formats.store(pool.data, layout, pool.rows, first[room], rows[room])
    return kept


@mutant("KV rows: they are not rounded to FP8", "kv_store")
def rows_unrounded(right: Any, self: Any, rows: Tensor, layout: Any, batch: Any, pool: KV | None = None) -> KV:
    if pool is not None or layout.rounding is None:
        bare = replace(layout, rounding=None)
        return replace(right.kv_store(self, rows, bare, batch, pool), layout=layout)
    return replace(right.kv_store(self, rows, replace(layout, rounding=None), batch), layout=layout)
