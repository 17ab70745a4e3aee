"""Sparse attention and the indexer, as masked dense products over blocks of tokens.

The plan cuts a ragged batch into tiles: blocks of consecutive tokens of one sequence (one token in decode, 64 in
prefill). A tile reads the window rows of all its tokens once, and either the entries its tokens picked or all entries
that are visible to it; masks say which token sees which row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dsv4_hal import formats, ops
from dsv4_hal.backends.reference.cache import load_rows, physical_rows
from dsv4_hal.backends.reference.gemm import emit
from dsv4_hal.batch import Batch, Tile, upload
from dsv4_hal.ops import KV

SCRATCH = 1 << 24  # elements that one product may take; longer work is cut into parts
DENSE = 4  # reading all entries of a tile is cheaper than gathering k per token while there are at most 4 k of them


@dataclass
class Part:
    """Some blocks of a tile: n blocks of c consecutive tokens of one sequence each."""

    seq: Tensor  # [n]
    first: Tensor  # [n] position of the first token
    last: Tensor  # [n] position of the last token
    tokens: Tensor  # [n, c] flat token; any where there is none
    positions: Tensor  # [n, c], -1 where there is no token
    place: Tensor | None  # which of the n * c places hold a token; None: all
    flat: Tensor  # the flat tokens at these places
    longest: int  # largest position
    shortest: int  # smallest last position of a block
    windows: dict[tuple[int, bool], tuple[Tensor, Tensor]] = field(default_factory=dict)  # the same in every layer

    def take(self, flat: Tensor) -> Tensor:
        """Rows [n, c, ...] of a flat [T, ...]; any row where there is no token."""
        return flat[self.tokens]

    def has_entry(self, ratio: int) -> bool:
        """Whether every block's sequence has an entry that its last token sees."""
        return self.shortest + 1 >= ratio

    def put(self, out: Tensor, values: Tensor) -> None:
        """Write values [n, c, ...] to the flat rows they belong to."""
        values = values.flatten(0, 1)
        out[self.flat] = values if self.place is None else values[self.place]


def make_part(tile: Tile, blocks: slice, device: torch.device) -> Part:
    tokens, first, last = tile.tokens[blocks], tile.first[blocks], tile.last[blocks]
    present = tokens >= 0
    positions = np.where(present, first[:, None] + np.arange(tile.size), -1)
    place = None if present.all() else upload(np.flatnonzero(present), device)
    return Part(
        upload(tile.seq[blocks], device),
        upload(first, device),
        upload(last, device),
        upload(np.maximum(tokens, 0), device),
        upload(positions, device),
        place,
        upload(tokens[present], device),
        int(last.max()),
        int(last.min()),
    )


def parts(batch: Batch, width: Callable[[Tile], int], single: bool = False) -> Iterable[Part]:
    """The step's tiles in parts whose products fit the scratch: width(tile) elements per token.

    single: every token is a block of its own, so that rows can be gathered per token; also where a block is too large.
    """
    plan = batch.require_plan()
    for i, whole in enumerate(plan.tiles):
        tile = singles(whole) if single or whole.size * width(whole) > SCRATCH else whole
        step = max(1, SCRATCH // (tile.size * max(1, width(tile))))
        for start in range(0, len(tile.seq), step):
            key = ("part", i, tile.size, start, step)
            part = plan.vendor.get(key) or make_part(tile, slice(start, start + step), batch.device)
            if not batch.fixed:  # else positions, which a part is made of, move on beneath the plan
                plan.vendor[key] = part
            yield part


def singles(tile: Tile) -> Tile:
    """The same tokens, each a block of its own."""
    if tile.size == 1:
        return tile
    block, offset = np.nonzero(tile.tokens >= 0)
    position = tile.first[block] + offset
    return Tile(1, tile.seq[block], position, tile.tokens[block, offset][:, None], position)


class Attention(ops.Attention):
    def index_topk(
        self, q: Tensor, weights: Tensor, keys: KV, batch: Batch, k: int, *, with_scores: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        ratio, heads = keys.layout.ratio, q.shape[1]
        picks = torch.full((len(q), k), -1, dtype=torch.int64, device=q.device)
        scores = torch.full((len(q), k), float("-inf"), dtype=self.numerics.accumulate, device=q.device)
        q = formats.round_rows(q.flatten(0, 1), keys.layout).view(q.shape)
        for part in parts(batch, lambda tile: heads * visible(tile, ratio)):
            count = (part.longest + 1) // ratio
            if count == 0:
                continue
            index, seen = visible_entries(part, ratio, count)
            rows = load_rows(keys, physical_rows(keys, batch, part.seq, index))
            score = self._index_scores(part.take(q), part.take(weights), rows).masked_fill(~seen, float("-inf"))
            best, pick = score.sort(dim=-1, descending=True, stable=True)
            best, pick = best[..., :k], pick[..., :k]
            part.put(picks[:, : pick.shape[-1]], pick.masked_fill(best == float("-inf"), -1))
            part.put(scores[:, : pick.shape[-1]], best)
        return picks, scores if with_scores else None

    def _index_scores(self, q: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """q [n, c, H, D], weights [n, c, H], keys [n, K, D] -> [n, c, K]."""
        wide, narrow, (n, c, heads, dim) = self.numerics.accumulate, self.numerics.score, q.shape
        product = torch.bmm(q.to(wide).reshape(n, c * heads, dim), rows.to(wide).transpose(1, 2)).to(narrow).relu()
        weighted = product.view(n, c, heads, -1) * weights.to(narrow)[..., None]
        return weighted.to(wide).sum(2).to(narrow).to(wide)

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
        wide = self.numerics.accumulate
        y = q.new_zeros(q.shape)
        lse = torch.full(q.shape[:2], float("-inf"), dtype=wide, device=q.device)
        ratio = 1 if entries is None else entries.layout.ratio
        gather, width = reading(q.shape[1], window_kv, entries, picks, batch)
        for part in parts(batch, width, single=gather):
            index, seen = window_rows(part, window_kv, batch)
            rows = load_rows(window_kv, index, gaps=False)
            if entries is not None:
                index, more = entry_rows(part, entries, batch, picks, gather)
                rows = torch.cat([rows, load_rows(entries, index, gaps=not part.has_entry(ratio))], 1)
                seen = torch.cat([seen, more], -1)
            values, log_sum = self._attend(part.take(q), rows, seen, sink, scale)
            part.put(y, values)
            if return_lse:
                part.put(lse, log_sum)
        return emit(y, out), lse if return_lse else None

    def _attend(self, q: Tensor, rows: Tensor, seen: Tensor, sink: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """q [n, c, H, D] over rows [n, K, D], keys and values alike; seen [n, c, K]."""
        wide, (n, c, heads, dim) = self.numerics.accumulate, q.shape
        rows = rows.to(wide)
        score = torch.bmm(q.to(wide).reshape(n, c * heads, dim), rows.transpose(1, 2)) * scale
        score = score.view(n, c, heads, -1).masked_fill(~seen[:, :, None], float("-inf"))
        peak = score.detach().amax(-1, keepdim=True)
        peak = peak.masked_fill(peak == float("-inf"), 0)  # a place without a token sees nothing
        p = (score - peak).exp()
        total = p.sum(-1, keepdim=True)
        denominator = total + (sink.to(wide)[:, None] - peak).exp()
        y = torch.bmm(p.to(self.numerics.probs).to(wide).view(n, c * heads, -1), rows).view(n, c, heads, dim)
        return (y / denominator).to(q.dtype), (total.log() + peak).squeeze(-1)


def reading(
    heads: int, window_kv: KV, entries: KV | None, picks: Tensor | None, batch: Batch
) -> tuple[bool, Callable[[Tile], int]]:
    """Whether picked entries are gathered per token, and how many elements of scratch a token of a tile takes."""
    window, k = window_kv.layout.window, 0 if picks is None else picks.shape[1]
    if entries is None:
        return False, lambda tile: heads * (tile.size + window - 1)
    ratio = entries.layout.ratio
    if k and int(batch.lengths.max(initial=0)) // ratio > DENSE * k:
        return True, lambda tile: (heads + entries.layout.dim) * (window + k)
    return False, lambda tile: heads * (tile.size + window - 1 + visible(tile, ratio))


def window_rows(part: Part, kv: KV, batch: Batch) -> tuple[Tensor, Tensor]:
    """Physical rows [n, K] that a block's tokens see through the window; who sees which [n, c, K].

    Places that nobody sees name the block's last token: a row of this step, which holds no leftover of another.
    """
    window, size = kv.layout.window, part.tokens.shape[1]
    if (window, kv.paged) not in part.windows:
        index = part.first[:, None] - window + 1 + torch.arange(size + window - 1, device=part.first.device)
        there = (index >= 0) & (index <= part.last[:, None])
        behind = part.positions[..., None] - index[:, None]
        seen = (behind >= 0) & (behind < window) & there[:, None]
        index = torch.where(there, index, part.last[:, None])
        part.windows[window, kv.paged] = physical_rows(kv, batch, part.seq, index, gaps=False), seen
    return part.windows[window, kv.paged]


def entry_rows(part: Part, kv: KV, batch: Batch, picks: Tensor | None, gather: bool) -> tuple[Tensor, Tensor]:
    """Physical rows [n, K] of the entries that a block reads; which token sees which [n, c, K].

    picks None: all visible ones. gather: blocks of one token read what it picked, in that order. A place that nobody
    sees names entry 0, or -1 in a part where some sequence has no entry yet.
    """
    ratio = kv.layout.ratio
    gaps = not part.has_entry(ratio)
    nothing = -1 if gaps else 0
    if picks is not None and gather:
        index = part.take(picks)[:, 0]
        return physical_rows(kv, batch, part.seq, index.clamp(min=nothing), gaps), (index >= 0)[:, None]
    count = (part.longest + 1) // ratio
    index, seen = visible_entries(part, ratio, count)
    if picks is not None:
        chosen = part.take(picks)  # of any token where there is none: it may name more than this tile sees
        chosen = chosen.masked_fill((chosen < 0) | (chosen > count), count)
        member = torch.zeros(*chosen.shape[:2], count + 1, dtype=torch.bool, device=index.device)
        seen = seen & member.scatter_(2, chosen, True)[..., :count]
    return physical_rows(kv, batch, part.seq, index.clamp(min=nothing), gaps), seen


def visible_entries(part: Part, ratio: int, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` entries [n, count], -1 from where the block's last token sees none; who sees which."""
    entry = torch.arange(count, device=part.seq.device)
    index = torch.where(entry < ((part.last + 1) // ratio)[:, None], entry, -1)
    return index, entry < ((part.positions + 1) // ratio)[..., None]


def visible(tile: Tile, ratio: int) -> int:
    """Entries that the tile's furthest token sees."""
    return int(tile.last.max() + 1) // ratio
