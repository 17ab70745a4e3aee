"""The cache of a batch of sequences: window rows, compressed rows, indexer keys and compressor state of every layer.

Each sequence owns blocks of every pool for its whole life. The window pool is a ring; compressed pools are addressed
by entry number; the compressor state is a ring of the last tokens. A sequence may be cut back by at most `rollback`
tokens, since rings forget what they overwrite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv4_hal.batch import Batch, upload, whole_number, whole_numbers
from dsv4_hal.formats import RowLayout, new_pool
from dsv4_hal.model.config import ModelConfig, overlaps
from dsv4_hal.ops import KV, Ops

BLOCK_TOKENS = 256  # tokens of a block of compressed rows: 64 rows of ratio 4, 2 of ratio 128
WINDOW_BLOCK = 64  # rows of a block of the window ring


@dataclass
class LayerCache:
    """What one layer keeps; None where it has no such thing, or where there is no cache."""

    window: KV | None = None
    entries: KV | None = None
    keys: KV | None = None
    state: Tensor | None = None
    index_state: Tensor | None = None


def layouts(cfg: ModelConfig, ops: Ops, ratio: int) -> dict[str, RowLayout]:
    """Row layouts of a layer of the given ratio: "window", and "entries" and "index" where it has them."""
    dim, rope = cfg.head_dim, cfg.qk_rope_head_dim
    out = {"window": ops.row_layout("window", dim, rope, 1, cfg.sliding_window)}
    if ratio:
        out["entries"] = ops.row_layout("entries", dim, rope, ratio)
    if overlaps(ratio):
        out["index"] = ops.row_layout("index", cfg.index_head_dim, rope, ratio)
    return out


class Cache:
    """Made by `Model.new_cache`; see there for the sizes."""

    def __init__(
        self, cfg: ModelConfig, ops: Ops, batch_size: int, max_seq_len: int, max_chunk: int, rollback: int
    ) -> None:
        self.batch_size = whole_number(batch_size, "batch_size", 1)
        self.max_seq_len = whole_number(max_seq_len, "max_seq_len", 1)
        self.max_chunk = min(whole_number(max_chunk, "max_chunk", 1), self.max_seq_len)
        self.rollback = whole_number(rollback, "rollback")
        if self.max_seq_len > cfg.max_position_embeddings:
            raise ValueError(f"max_seq_len {max_seq_len} is beyond the model's {cfg.max_position_embeddings} positions")
        self.cfg, self.ops = cfg, ops
        self._lengths = np.zeros(self.batch_size, np.int64)
        self._written = np.zeros(self.batch_size, np.int64)  # furthest position ever written since the sequence began
        ring = min(self.max_seq_len, cfg.sliding_window - 1 + max(self.max_chunk, self.rollback))
        self.window_table = _deal(self.batch_size, -(-ring // WINDOW_BLOCK))
        self.token_table = _deal(self.batch_size, -(-self.max_seq_len // BLOCK_TOKENS))
        with torch.inference_mode(False):  # so that the cache can be used in and outside of inference mode
            self.layers = [self._layer(cfg, ratio) for ratio in cfg.layer_ratios]

    def _layer(self, cfg: ModelConfig, ratio: int) -> LayerCache:
        found = layouts(cfg, self.ops, ratio)
        layer = LayerCache(window=self._pool(found["window"], self.window_table.size, WINDOW_BLOCK))
        if ratio:
            rows, blocks = BLOCK_TOKENS // ratio, self.token_table.size
            layer.entries = self._pool(found["entries"], blocks, rows)
            layer.state = self._state(ratio, cfg.head_dim)
            if "index" in found:
                layer.keys = self._pool(found["index"], blocks, rows)
                layer.index_state = self._state(ratio, cfg.index_head_dim)
        return layer

    def _pool(self, layout: RowLayout, blocks: int, rows: int) -> KV:
        return KV(new_pool(layout, blocks, rows, self.ops.device), layout, rows)

    def _state(self, ratio: int, dim: int) -> Tensor:
        overlap = overlaps(ratio)
        return self.ops.state_new(self.batch_size, ratio, overlap, dim * (2 if overlap else 1), self.rollback)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each sequence holds."""
        return tuple(self._lengths.tolist())

    @property
    def nbytes(self) -> int:
        """Bytes of all pools and states: what the cache takes on its device."""
        return sum(self.breakdown().values())

    def breakdown(self) -> dict[str, int]:
        """Bytes by kind: window, entries, keys, state, index_state."""
        out = dict.fromkeys(("window", "entries", "keys", "state", "index_state"), 0)
        for layer in self.layers:
            for kind in out:
                held = getattr(layer, kind)
                out[kind] += 0 if held is None else held.data.nbytes if isinstance(held, KV) else held.nbytes
        return out

    def batch(
        self,
        q_lens: Sequence[int],
        sequences: Sequence[int] | None = None,
        padding: int = 0,
        *,
        fixed: bool = False,
    ) -> Batch:
        """A step that appends q_lens[i] tokens to sequences[i] (default: to all, in order); `fixed` as in `Batch`.

        ValueError where a sequence is named twice, overflows max_seq_len or max_chunk, or was left in the middle of a
        step that failed.
        """
        slots = np.arange(self.batch_size) if sequences is None else whole_numbers(sequences, "sequences")
        counts = whole_numbers(q_lens, "q_lens")
        if counts.shape != slots.shape or len(np.unique(slots)) != len(slots):
            raise ValueError(f"{len(counts)} lengths for sequences {slots.tolist()}: need one per sequence, named once")
        for sequence in slots[(slots < 0) | (slots >= self.batch_size)]:
            self._sequence(int(sequence))
        held = self._lengths[slots]
        for wrong, why in (
            (counts < 0, "lengths must not be negative"),
            (counts > self.max_chunk, f"more tokens in one step than the cache's max_chunk={self.max_chunk}"),
            (held + counts > self.max_seq_len, f"more tokens than the cache's max_seq_len={self.max_seq_len}"),
            (
                (held > 0) & (held < self._written[slots] - self.rollback),
                "was left in the middle of a step that failed",
            ),
        ):
            if wrong.any():
                first = int(wrong.argmax())
                hint = f"; call truncate(0, {slots[first]}) and prefill it again" if "failed" in why else ""
                raise ValueError(
                    f"sequence {slots[first]}, {held[first]} tokens and {counts[first]} new ones: {why}{hint}"
                )
        return Batch(
            counts,
            held,
            self.ops.device,
            padding,
            slots,
            self.token_table[slots],
            self.window_table[slots],
            BLOCK_TOKENS,
            WINDOW_BLOCK,
            self.rollback,
            fixed,
            owner=self,
        )

    def begin(self, batch: Batch) -> None:
        """A step is about to write. ValueError if the batch was not made by this cache as it is now."""
        if batch.owner is not self or batch.slots is None or (self._lengths[batch.slots] != batch.context).any():
            raise ValueError("this batch was not made by this cache's batch(), or the cache has moved on since")
        before = np.where(batch.context == 0, 0, self._written[batch.slots])  # a new sequence reads nothing old
        self._written[batch.slots] = np.maximum(before, batch.lengths)

    def commit(self, batch: Batch) -> None:
        """The step is done: its tokens belong to their sequences."""
        self._lengths[batch.slots] = batch.lengths

    def truncate(self, length: int, sequence: int | None = None) -> None:
        """Forget all but the first `length` tokens of one sequence (default: of every one).

        At most `rollback` tokens behind the furthest token ever written, or to 0, which is always possible; beyond
        that ValueError, and nothing changes.
        """
        length = whole_number(length, "length")
        chosen = range(self.batch_size) if sequence is None else [self._sequence(sequence)]
        for s in chosen:
            held, written = int(self._lengths[s]), int(self._written[s])
            if not 0 <= length <= held:
                raise ValueError(f"sequence {s} holds {held} tokens and cannot be cut to {length}")
            if length and length < written - self.rollback:
                raise ValueError(
                    f"sequence {s} cannot be cut to {length}: {written} tokens were written and the cache was made for "
                    f"rollback={self.rollback}, so {max(written - self.rollback, 0)} is the least besides 0"
                )
        for s in chosen:
            self._lengths[s] = length
            if length == 0:
                self._written[s] = 0
                for state in self._states():
                    self.ops.state_reset(state, s)

    def fork(self, source: int, target: int) -> None:
        """Sequence `target` becomes an independent copy of sequence `source`; what it held is lost."""
        source, target = self._sequence(source), self._sequence(target)
        if source == target:
            return
        token_blocks = -(-int(self._lengths[source]) // BLOCK_TOKENS)
        ring_blocks = -(-int(self._written[source]) // WINDOW_BLOCK)  # at most the whole ring, by slicing
        for layer in self.layers:
            for pool, table, blocks in (
                (layer.window, self.window_table, ring_blocks),
                (layer.entries, self.token_table, token_blocks),
                (layer.keys, self.token_table, token_blocks),
            ):
                if pool is not None:
                    copied, onto = (upload(table[s, :blocks], self.ops.device) for s in (source, target))
                    pool.data[onto] = pool.data[copied]
        for state in self._states():
            self.ops.state_copy(state, source, target)
        self._lengths[target], self._written[target] = self._lengths[source], self._written[source]

    def _states(self) -> list[Tensor]:
        return [s for layer in self.layers for s in (layer.state, layer.index_state) if s is not None]

    def _sequence(self, sequence: int) -> int:
        found = whole_number(sequence, "sequence")
        if found >= self.batch_size:
            raise ValueError(f"sequence {found} of a cache of {self.batch_size}")
        return found


def _deal(sequences: int, blocks: int) -> np.ndarray:
    """Block ids [sequences, blocks]: each sequence owns its own."""
    return np.arange(sequences * blocks, dtype=np.int64).reshape(sequences, blocks)
