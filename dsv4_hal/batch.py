"""One ragged step: which sequences, how many tokens each, where their rows live, and the plan made from it.

Tokens of a step are one flat axis [T]; prefill, chunked prefill, decode and any mix of them are the same thing with
other lengths. Lengths and block tables live on the host (numpy), so that every shape is known without asking a device.
Indices are logical: positions in a sequence, numbers of compressed entries, -1 for none. `plan` turns them into rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.int64]
CosSin = tuple[Tensor, Tensor]


@dataclass
class Batch:
    """The ragged step.

    q_lens        [R] tokens of each sequence in this step (0 allowed)
    context       [R] tokens of each sequence already in the cache
    padding       tokens at the end of the flat axis that belong to no sequence
    slots         [R] compressor-state slot of each sequence; None: no cache, every sequence starts in this step
    token_table   [R, n] ids of token blocks, shared by all pools of compressed rows: entry i of ratio r lies in block
                  table[i // rows], row i % rows, with rows = block_tokens // r
    window_table  [R, n] ids of window blocks; position p lies in block table[(p // window_block) % n]: a ring is a
                  table shorter than the sequence
    rollback      tokens that a sequence may be cut back by; the compressor state keeps that many more
    fixed         whether shapes may hang on q_lens only, and not on how far sequences are, so that a step can be
                  captured once and run again: entries that a step may complete and does not are there, as -1
    plan          set by `Ops.plan`
    owner         the cache that made it; None: made by hand
    """

    q_lens: Array
    context: Array
    device: torch.device
    padding: int = 0
    slots: Array | None = None
    token_table: Array | None = None
    window_table: Array | None = None
    block_tokens: int = 256
    window_block: int = 16
    rollback: int = 0
    fixed: bool = False
    plan: Plan | None = None
    owner: object | None = field(default=None, repr=False)
    # derived
    starts: Array = field(init=False)  # [R] first flat token of each sequence
    seq_host: Array = field(init=False)  # [T] sequence of each token, -1 for padding
    positions_host: Array = field(init=False)  # [T] position in its sequence, 0 for padding
    seq: Tensor = field(init=False)
    positions: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.q_lens, self.context = whole_numbers(self.q_lens, "q_lens"), whole_numbers(self.context, "context")
        if self.q_lens.shape != self.context.shape or self.q_lens.ndim != 1:
            raise ValueError(f"q_lens {self.q_lens.shape} and context {self.context.shape} must be equally long lists")
        self.padding = whole_number(self.padding, "padding")
        if (self.q_lens < 0).any() or (self.context < 0).any():
            raise ValueError(f"lengths must not be negative: q_lens {self.q_lens}, context {self.context}")
        if self.fixed and not self.cached:
            raise ValueError("only a batch with cache slots has a fixed shape: make it with Cache.batch")
        if not self.cached and self.context.any():
            raise ValueError("a batch without cache slots cannot have context: make it with Cache.batch")
        count = len(self.q_lens)
        self.starts = np.cumsum(self.q_lens) - self.q_lens
        self.seq_host = np.concatenate([np.repeat(np.arange(count), self.q_lens), np.full(self.padding, -1)])
        within = np.arange(len(self.seq_host) - self.padding) - np.repeat(self.starts - self.context, self.q_lens)
        self.positions_host = np.concatenate([within, np.zeros(self.padding, np.int64)])
        self.seq = upload(self.seq_host, self.device)
        self.positions = upload(self.positions_host, self.device)

    @classmethod
    def packed(cls, q_lens: Sequence[int], device: torch.device | str = "cpu", padding: int = 0) -> Batch:
        """Whole sequences side by side, without a cache (one-shot inference, packed training)."""
        q = whole_numbers(q_lens, "q_lens")
        return cls(q, np.zeros_like(q), torch.device(device), padding)

    @property
    def cached(self) -> bool:
        return self.slots is not None

    @property
    def tokens(self) -> int:
        """T, padding included."""
        return len(self.seq_host)

    @property
    def lengths(self) -> Array:
        """[R] tokens of each sequence after this step."""
        return self.context + self.q_lens

    def require_plan(self) -> Plan:
        if self.plan is None:
            raise ValueError("this batch has no plan: call ops.plan(batch, ...) first")
        return self.plan

    @property
    def reach(self) -> Array:
        """[R] tokens that each sequence may have: those after this step, or in a fixed batch those it has blocks for.
        Sizes of work space and bounds of loops hang on it."""
        if not self.fixed or self.token_table is None:
            return self.lengths
        return np.full_like(self.lengths, self.token_table.shape[1] * self.block_tokens)


@dataclass
class Entries:
    """Compressed entries that one ratio completes in this step: N rows, ordered by sequence, then by entry.

    In a fixed batch also those that a step of these q_lens may complete and this one does not, behind the others of
    their sequence: no backend stores them, and what `compress` makes of them is undefined.
    """

    count: int  # N
    seq: Tensor  # [N] sequence
    index: Tensor  # [N] logical entry number, -1 for one that is not completed
    positions: Tensor  # [N] RoPE position: index * ratio, the first token of the block; 0 for -1
    source: Tensor  # [N, span] row of cat(tokens of this step, flattened state), -1 before the start of the sequence
    keep_source: Tensor  # [M] tokens of this step that the state keeps
    keep_target: Tensor  # [M] flattened state rows they go to
    ring: int  # state rows per slot


@dataclass
class Tile:
    """Blocks of consecutive tokens of one sequence each, all of one size: how attention walks a ragged batch.

    A block at the end of its sequence may be shorter: its tokens beyond the end are -1.
    """

    size: int
    seq: Array  # [n] sequence of each block
    first: Array  # [n] position of its first token
    tokens: Array  # [n, size] flat token, -1 none
    last: Array  # [n] position of its last token


@dataclass
class Plan:
    """What a step needs more than once. `vendor` is the backend's own; that of a fixed batch is there in the next step,
    and hangs on nothing that changes from step to step."""

    tiles: tuple[Tile, ...]
    entries: dict[int, Entries]  # ratio -> entries completed now
    rope: dict[tuple[str, int], CosSin]  # (rope name, 1 | ratio) -> tables of tokens | of completed entries
    base: dict[int, Tensor]  # 1 | ratio -> [R] first packed row of each sequence (no cache)
    write: dict[int, tuple[Tensor, Tensor]]  # 1 | ratio -> (rows of this step, physical rows they go to, -1: nowhere)
    tables: dict[int, Tensor] = field(default_factory=dict)  # 1 | ratio -> block table on the device
    vendor: dict[Any, Any] = field(default_factory=dict)
    owner: object | None = field(default=None, repr=False)  # the model it was made for


TILE_SIZES = (1, 8, 64)


def tiles(batch: Batch) -> tuple[Tile, ...]:
    """Cut every sequence's tokens into blocks: single tokens for decode, eights for drafts, 64 for prefill."""
    sizes = np.asarray(TILE_SIZES)
    size_of = sizes[np.minimum(np.searchsorted(sizes, batch.q_lens), len(sizes) - 1)]
    out = []
    for size in TILE_SIZES:
        chosen = np.flatnonzero((size_of == size) & (batch.q_lens > 0))
        if not len(chosen):
            continue
        blocks = -(-batch.q_lens[chosen] // size)
        seq = np.repeat(chosen, blocks)
        offset = (np.arange(len(seq)) - np.repeat(np.cumsum(blocks) - blocks, blocks)) * size
        within = offset[:, None] + np.arange(size)
        tokens = np.where(within < batch.q_lens[seq, None], batch.starts[seq, None] + within, -1)
        first = batch.context[seq] + offset
        out.append(Tile(size, seq, first, tokens, np.minimum(first + size, batch.lengths[seq]) - 1))
    return tuple(out)


def state_ring(ratio: int, overlap: bool, rollback: int) -> int:
    """Tokens that a compressor state keeps per slot: those of one entry, and as many more as may be taken back."""
    return ratio * (2 if overlap else 1) + rollback


def completed(batch: Batch, ratio: int, overlap: bool) -> tuple[Entries, Array, Array]:
    """Entries that `ratio` completes in this step, with their (seq, index) on the host.

    Entry i covers tokens i*ratio .. i*ratio + ratio - 1, with overlap also the `ratio` tokens before. Index -1 stands
    for one that a fixed batch makes room for and that is not completed.
    """
    span = ratio * (2 if overlap else 1)
    ring = state_ring(ratio, overlap, batch.rollback)
    first = batch.context // ratio
    done = batch.lengths // ratio - first
    counts = (batch.q_lens + ratio - 1) // ratio if batch.fixed else done
    seq = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(seq)) - np.repeat(np.cumsum(counts) - counts, counts)
    index = np.where(number < done[seq], number + first[seq], -1)
    position = (index[:, None] + 1) * ratio - span + np.arange(span)
    position[index < 0] = -1
    in_step = batch.starts[seq, None] + position - batch.context[seq, None]
    keep_source = keep_target = np.zeros(0, np.int64)
    if batch.slots is not None:
        in_state = batch.tokens + batch.slots[seq, None] * ring + position % ring
        in_step = np.where(position >= batch.context[seq, None], in_step, in_state)
        kept = np.minimum(batch.q_lens, ring)
        keep_seq = np.repeat(np.arange(len(kept)), kept)
        back = np.arange(len(keep_seq)) - np.repeat(np.cumsum(kept), kept)  # -kept .. -1
        keep_source = batch.starts[keep_seq] + batch.q_lens[keep_seq] + back
        keep_target = batch.slots[keep_seq] * ring + (batch.lengths[keep_seq] + back) % ring
    source = np.where(position < 0, -1, in_step)
    send = lambda a: upload(a, batch.device)  # noqa: E731
    entries = Entries(
        len(seq),
        send(seq),
        send(index),
        send(index.clip(0) * ratio),
        send(source),
        send(keep_source),
        send(keep_target),
        ring,
    )
    return entries, seq, index


def make_plan(batch: Batch, ratios: Mapping[int, bool], ropes: Mapping[str, Tensor], angle_dtype: torch.dtype) -> Plan:
    """The part of a plan that every backend shares; vectorised host arithmetic, no device sync.

    ratios       ratio -> whether its blocks overlap
    ropes        name -> inverse frequencies [rope / 2] float32
    angle_dtype  dtype of cosine and sine; the angle itself is float32(position) * float32(frequency)
    """
    plan = Plan(tiles(batch), {}, {}, {1: upload(batch.starts, batch.device)}, {})
    for name, frequency in ropes.items():
        plan.rope[name, 1] = cos_sin(batch.positions, frequency, angle_dtype)
    real = np.flatnonzero(batch.seq_host >= 0)
    if batch.window_table is not None:
        rows = physical(batch.window_table, batch.window_block, batch.seq_host[real], batch.positions_host[real])
        plan.write[1] = upload(real, batch.device), upload(rows, batch.device)
        plan.tables[1] = upload(batch.window_table, batch.device)
    table = None if batch.token_table is None else upload(batch.token_table, batch.device)
    for ratio, overlap in ratios.items():
        entries, seq, index = completed(batch, ratio, overlap)
        plan.entries[ratio] = entries
        plan.base[ratio] = upload(np.searchsorted(seq, np.arange(len(batch.q_lens))), batch.device)
        for name, frequency in ropes.items():
            plan.rope[name, ratio] = cos_sin(entries.positions, frequency, angle_dtype)
        if batch.token_table is not None and table is not None:
            rows = physical(batch.token_table, batch.block_tokens // ratio, seq, index.clip(0))
            rows = np.where(index < 0, -1, rows)
            plan.write[ratio] = upload(np.arange(len(seq)), batch.device), upload(rows, batch.device)
            plan.tables[ratio] = table
    return plan


def physical(table: Array, rows: int, seq: Array, index: Array) -> Array:
    """Row of the pool that holds logical row `index` of sequence `seq`: the one addressing rule of paged pools."""
    return table[seq, (index // rows) % table.shape[1]] * rows + index % rows


def cos_sin(positions: Tensor, frequency: Tensor, dtype: torch.dtype) -> CosSin:
    """Tables [N, rope / 2] for positions [N]. The angle is a float32 product by contract: float64 angles differ from
    it by up to 0.03 rad near a million tokens, and the published model uses float32."""
    if not len(positions):  # most decode steps complete no entry
        empty = torch.empty(0, len(frequency), dtype=dtype, device=positions.device)
        return empty, empty
    angle = positions.to(torch.float32)[:, None] * frequency.to(positions.device)
    angle = angle.to(dtype)
    return angle.cos(), angle.sin()


def upload(array: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)


def whole_numbers(values: Sequence[int] | Array, name: str) -> Array:
    """values as int64; TypeError where one is not a whole number."""
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must be whole numbers, got {array.dtype}")
    return array.astype(np.int64)


def whole_number(value: Any, name: str, least: int = 0) -> int:
    """value as int; ValueError where it is not a whole number (a bool is none) of at least `least`."""
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__") or int(value) < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)
