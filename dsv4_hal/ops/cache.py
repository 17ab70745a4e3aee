"""The step's plan, cache rows, and the compressor that makes compressed rows out of token rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dsv4_hal.batch import Batch, CosSin
from dsv4_hal.formats import RowLayout, Weight
from dsv4_hal.ops.cases import cache as cases
from dsv4_hal.ops.gemm import Gemm
from dsv4_hal.ops.norm_rope import NormRope
from dsv4_hal.ops.spec import Compare, ContractError, Tolerance, composite, primitive

_ROWS = Tolerance(Compare.BITWISE, 0.0, "rows are rounded by one rule and then copied")
_NORM_ROWS = Tolerance(Compare.NMSE, 4.0, "a last bit of the norm may carry a value over the edge of its rounding")
_COPY = Tolerance(Compare.BITWISE, 0.0, "a copy")
_STATE = Tolerance(Compare.NMSE, 4.0, "a state is opaque: what compress makes of it later is compared")
_PLAN = Tolerance(Compare.NMSE, 4.0, "cosine and sine may differ in their last bit; integers may not")
_COMPRESS = Tolerance(Compare.NMSE, 4.0, "exponentials and the order of the weighted sum are free")


@dataclass(frozen=True)
class KV:
    """Cache rows of every sequence of a step.

    data    packed: values [N, dim], the rows of this step in order; paged: the pool, uint8 [blocks, block bytes]
    layout  what a row is, and how it lies in a pool
    rows    rows per block of the pool; 0: packed
    """

    data: Tensor
    layout: RowLayout
    rows: int = 0

    @property
    def paged(self) -> bool:
        return self.rows > 0


def require_rows(op: str, kv: KV, batch: Batch) -> None:
    """Packed rows are those of one step without context."""
    if not kv.paged and batch.context.any():
        raise ContractError(f"{op}: packed rows hold one step's only, and this batch has context")


class CompressorWeights(NamedTuple):
    """wkv, wgate [coff * c, d] plain; ape [ratio, coff * c]; norm [c]. coff = 2 where blocks overlap, else 1."""

    wkv: Weight
    wgate: Weight
    ape: Tensor
    norm: Tensor


class Cache(Gemm, NormRope):
    @primitive(_PLAN, cases.plan)
    def plan(self, batch: Batch, ratios: Mapping[int, bool], ropes: Mapping[str, Tensor]) -> Batch:
        """Work out, once per step, what every layer needs; sets batch.plan and returns the batch.

        ratios  compression ratio -> whether its blocks overlap
        ropes   name -> inverse frequencies [R / 2] float32
        Angles are float32(position) * float32(frequency); cosine and sine in numerics.accumulate. Host arithmetic and
        uploads only: no device sync. A backend adds its kernels' schedules under plan.vendor.
        """
        for ratio in ratios:
            if ratio < 2 or (batch.token_table is not None and batch.block_tokens % ratio):
                raise ContractError(f"plan: ratio {ratio} does not divide a block of {batch.block_tokens} tokens")

    @primitive(_ROWS, cases.kv_store, grad=("rows",))
    def kv_store(self, rows: Tensor, layout: RowLayout, batch: Batch, pool: KV | None = None) -> KV:
        """Round rows [N, dim] to the layout's row format and keep them.

        layout  ratio 1: one row per token of the step; ratio r: one row per entry that r completes in it
        pool    None: the rounded rows themselves, in order, differentiable (packed). A paged KV: rows are written to
                the blocks that the batch's tables name, in the pool's byte layout, and the pool is returned; rows of
                padding tokens are not written, nor those of entries that a fixed batch only makes room for.
        Raises ContractError if the number of rows is not the plan's, or if a window ring is too small: it must hold
        window - 1 + the longest chunk, or keys are overwritten before they are attended.
        """
        plan = batch.require_plan()
        if layout.ratio > 1 and layout.ratio not in plan.entries:
            raise ContractError(f"kv_store: ratio {layout.ratio} was not planned")
        if pool is None and batch.context.any():
            raise ContractError("kv_store: rows before this step lie in a pool, packed rows hold this step's only")
        want = batch.tokens if layout.ratio == 1 else plan.entries[layout.ratio].count
        if rows.shape != (want, layout.dim):
            raise ContractError(
                f"kv_store: rows {tuple(rows.shape)} for ratio {layout.ratio}, the step has [{want}, {layout.dim}]"
            )
        if pool is not None and (not pool.paged or layout.ratio not in plan.write):
            raise ContractError("kv_store: a pool needs rows per block, and the batch a block table")
        if pool is not None and layout.ratio == 1 and batch.window_table is not None and len(batch.q_lens):
            ring = batch.window_table.shape[1] * batch.window_block
            need = min(layout.window - 1 + int(batch.q_lens.max()), int(batch.lengths.max()))
            if ring < need:
                raise ContractError(f"kv_store: a window ring of {ring} rows cannot hold {need}: window - 1 + chunk")
        if pool is not None and layout.ratio > 1 and batch.token_table is not None and len(batch.q_lens):
            room = batch.token_table.shape[1] * batch.block_tokens
            if room < batch.lengths.max():
                raise ContractError(f"kv_store: a table of {room} tokens cannot hold {int(batch.lengths.max())}")

    @primitive(_COPY, cases.kv_load)
    def kv_load(self, kv: KV, batch: Batch, sequence: int, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 (positions, or entry numbers) of one sequence -> [stop - start, dim] in storage.

        Raises ContractError for rows that are not there: beyond the sequence, or, for ratio 1, no longer in the ring.
        """
        if not 0 <= sequence < len(batch.q_lens):
            raise ContractError(f"kv_load: sequence {sequence} of {len(batch.q_lens)}")
        held = int(batch.lengths[sequence]) // kv.layout.ratio
        if not 0 <= start <= stop <= held:
            raise ContractError(f"kv_load: rows {start}..{stop} of sequence {sequence}, which has {held}")
        require_rows("kv_load", kv, batch)
        if kv.paged and kv.layout.ratio == 1 and batch.window_table is not None and start < stop:
            ring = batch.window_table.shape[1] * kv.rows
            if start < held - ring:
                raise ContractError(f"kv_load: position {start} of {held} has left the ring of {ring} rows")

    @primitive(_STATE, cases.state_new)
    def state_new(self, slots: int, ratio: int, overlap: bool, width: int, rollback: int = 0) -> Tensor:
        """Compressor state for `slots` sequences; only the backend's own ops look inside.

        It keeps, per slot, the last ratio * (2 if overlap else 1) + rollback projected rows and their gates, `width`
        channels each, in numerics.accumulate.
        """
        if min(slots, width, rollback) < 0 or ratio < 2:
            raise ContractError(f"state_new: slots {slots}, ratio {ratio}, width {width}, rollback {rollback}")

    @primitive(_STATE, cases.state_copy)
    def state_copy(self, state: Tensor, source: int, target: int) -> None:
        """Slot `target` becomes a copy of slot `source`."""
        if not (0 <= source < state.shape[0] and 0 <= target < state.shape[0]):
            raise ContractError(f"state_copy: slots {source} -> {target} of {state.shape[0]}")

    @primitive(_STATE, cases.state_reset)
    def state_reset(self, state: Tensor, slot: int) -> None:
        """Slot `slot` is as new: nothing of the sequence that used it stays."""
        if not 0 <= slot < state.shape[0]:
            raise ContractError(f"state_reset: slot {slot} of {state.shape[0]}")

    @primitive(_COMPRESS, cases.compress, grad=("kv", "gate", "ape"))
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
        """Pool token rows into the entries that are completed in this step.

        kv, gate  [T, coff * c] in numerics.accumulate, coff = 2 with overlap, else 1
        ape       [ratio, coff * c], added to gate by position modulo ratio
        state     None, or from `state_new`: supplies the tokens before this step and takes those after the last block
        returns   [N, c] in numerics.accumulate, N entries ordered as in the plan (often none); rows of entries that
                  a fixed batch only makes room for are undefined

        Entry i is, per channel, the softmax(gate + ape)-weighted sum of kv over its block. Without overlap the block
        is its `ratio` tokens. With overlap it is 2 * ratio slots: the first c channels of the previous block's tokens,
        then the last c channels of its own; the slots before the first block have weight zero.
        Source: DeepSeek-V4 report, section 2.3.1 and equations 9 to 12 (its "a" is the second half here).
        """
        coff = 2 if overlap else 1
        if kv.shape != gate.shape or kv.dim() != 2 or kv.shape[0] != batch.tokens or kv.shape[1] % coff:
            raise ContractError(
                f"compress: kv {tuple(kv.shape)}, gate {tuple(gate.shape)} for {batch.tokens} tokens, coff {coff}"
            )
        if ape.shape != (ratio, kv.shape[1]):
            raise ContractError(f"compress: ape {tuple(ape.shape)}, need {(ratio, kv.shape[1])}")
        if ratio not in batch.require_plan().entries:
            raise ContractError(f"compress: ratio {ratio} was not planned")
        if (state is None) == batch.cached:
            raise ContractError("compress: a cached batch needs a state, and only a cached one")

    @composite(_COMPRESS, cases.compressor, grad=("x", "weights"))
    def compressor(
        self,
        x: Tensor,
        weights: CompressorWeights,
        batch: Batch,
        ratio: int,
        overlap: bool,
        state: Tensor | None,
        cos_sin: CosSin,
        eps: float,
    ) -> Tensor:
        """Compressed entries of x [T, d]: projections, `compress`, norm, RoPE at each block's first token -> [N, c].

        Projections and pooling in numerics.accumulate, rounded to numerics.storage in front of the norm.
        """
        wide = self.numerics.accumulate
        kv, gate = self.linear(x, weights.wkv, wide), self.linear(x, weights.wgate, wide)
        entries = self.compress(kv, gate, weights.ape, batch, ratio, overlap, state)
        if not len(entries):  # most decode steps complete none
            return entries.to(self.numerics.storage)
        return self.rope(self.rms_norm(entries.to(self.numerics.storage), weights.norm, eps), cos_sin)

    @composite(_COMPRESS, cases.compress_store, grad=("x", "weights"))
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
        """`compressor`, then a Hadamard rotation if `rotate` (indexer keys of a quantised profile), then `kv_store`."""
        entries = self.compressor(x, weights, batch, layout.ratio, overlap, state, cos_sin, eps)
        if pool is not None and not len(entries):
            return pool
        return self.kv_store(self.hadamard(entries) if rotate else entries, layout, batch, pool)

    @composite(_NORM_ROWS, cases.kv_norm_rope_store, grad=("kv", "weight"))
    def kv_norm_rope_store(
        self, kv: Tensor, weight: Tensor, eps: float, cos_sin: CosSin, layout: RowLayout, batch: Batch, pool: KV | None
    ) -> KV:
        """Window rows from their projection kv [T, D]: norm, RoPE, rounding, store."""
        return self.kv_store(self.rope(self.rms_norm(kv, weight, eps), cos_sin), layout, batch, pool)
