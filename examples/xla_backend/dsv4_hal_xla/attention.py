"""Sparse attention and the indexer: every token gathers the rows that it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.reference.gemm import emit
from dsv4_hal.batch import Batch
from dsv4_hal.formats import RowLayout
from dsv4_hal.numerics import Numerics
from dsv4_hal.ops import KV
from dsv4_hal_xla.bridge import bucket, dtype, einsum, jax, jnp, kernel, lax, long_sum, padded, rounded
from dsv4_hal_xla.cache import load, rows_of, tokens
from dsv4_hal_xla.formats import round_rows

SCRATCH = 1 << 22  # elements that the gathered rows of a block of tokens may take


def in_blocks(run: Callable[..., Any], width: int, *arrays: Any) -> Any:
    """run(*arrays) on as many tokens at a time as fit SCRATCH, `width` elements each. Powers of two."""
    count, fit = len(arrays[0]), max(1, SCRATCH // width)
    size = min(count, 1 << fit.bit_length() - 1)
    cut = jax.tree.map(lambda a: a.reshape(count // size, size, *a.shape[1:]), arrays)
    return jax.tree.map(lambda a: a.reshape(count, *a.shape[2:]), lax.map(lambda block: run(*block), cut))


def entries_seen(index: Any, seq: Any, positions: Any, ratio: int) -> Any:
    """Which entries [c or 1, k] each token [c] sees; a padding token sees none."""
    visible = jnp.where(seq < 0, 0, (positions + 1) // ratio)
    return (index >= 0) & (index < visible[:, None])


@kernel("layout", "rows", "count", "k", "numerics")
def best_entries(
    q: Any,
    weights: Any,
    seq: Any,
    positions: Any,
    source: Any,
    *,
    layout: RowLayout,
    rows: int,
    count: int,
    k: int,
    numerics: Numerics,
) -> Any:
    wide, narrow = dtype(numerics.accumulate), numerics.score
    q = round_rows(q.astype(wide), layout.rounding, layout.rope)
    weights = rounded(weights.astype(wide), narrow)

    def block(q: Any, weights: Any, seq: Any, positions: Any) -> Any:
        index = jnp.arange(count)[None]
        seen = entries_seen(index, seq, positions, layout.ratio)
        keys = load(*source, rows, seq, index, seen).astype(wide)
        product = jax.nn.relu(rounded(long_sum("chd,cnd->chn", q, keys), narrow))
        score = rounded(rounded(product * weights[..., None], narrow).sum(1), narrow)
        score = jnp.where(score == 0, 0, score)  # top_k takes -0 for less than 0
        score, pick = lax.top_k(jnp.where(seen, score, -jnp.inf), min(k, count))
        return jnp.where(score == -jnp.inf, -1, pick), score

    picks, scores = in_blocks(block, count * (q.shape[1] + q.shape[2]), q, weights, seq, positions)
    missing = ((0, 0), (0, k - picks.shape[1]))
    return jnp.pad(picks, missing, constant_values=-1), jnp.pad(scores, missing, constant_values=-jnp.inf)


@kernel("window", "window_rows", "ratio", "entry_rows", "count", "numerics")
def attend(
    q: Any,
    picks: Any,
    sink: Any,
    scale: float,
    seq: Any,
    positions: Any,
    window_source: Any,
    entry_source: Any,
    *,
    window: int,
    window_rows: int,
    ratio: int,
    entry_rows: int,
    count: int,
    numerics: Numerics,
) -> Any:
    """count: entries that some token may see, where there are no picks; 0 without entries."""
    wide = dtype(numerics.accumulate)
    sink = sink.astype(wide)[:, None]

    def block(q: Any, picks: Any, seq: Any, positions: Any) -> Any:
        index = positions[:, None] + jnp.arange(1 - window, 1)
        seen = (index >= 0) & (seq >= 0)[:, None]
        keys = load(*window_source, window_rows, seq, index, seen)
        if entry_source is not None:
            index = jnp.arange(count)[None] if picks is None else picks
            more = entries_seen(index, seq, positions, ratio)
            keys = jnp.concatenate([keys, load(*entry_source, entry_rows, seq, index, more)], 1)
            seen = jnp.concatenate([seen, more], 1)
        keys = keys.astype(wide)
        score = long_sum("chd,ckd->chk", q.astype(wide), keys) * scale
        score = jnp.where(seen[:, None], score, -jnp.inf)
        peak = score.max(-1, keepdims=True)
        peak = jnp.where(peak == -jnp.inf, 0, peak)  # a padding token sees nothing
        p = jnp.exp(score - peak)
        total = p.sum(-1, keepdims=True)
        y = einsum("chk,ckd->chd", rounded(p, numerics.probs), keys) / (total + jnp.exp(sink - peak))
        return y.astype(q.dtype), (jnp.log(total) + peak)[..., 0]

    width = (window + (count if picks is None else picks.shape[1])) * (q.shape[1] + q.shape[2])
    return in_blocks(block, width, q, picks, seq, positions)


class Attention(ops.Attention):
    def index_topk(
        self, q: Tensor, weights: Tensor, keys: KV, batch: Batch, k: int, *, with_scores: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        seq, positions = tokens(batch)
        picks, scores = best_entries(
            padded(q, len(seq)),
            padded(weights, len(seq)),
            seq,
            positions,
            rows_of(keys, batch),
            layout=keys.layout,
            rows=keys.rows,
            count=bucket(entries_of(batch, keys)),
            k=k,
            numerics=self.numerics,
        )
        return picks[: len(q)].long(), scores[: len(q)] if with_scores else None

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
        seq, positions = tokens(batch)
        y, lse = attend(
            padded(q, len(seq)),
            None if picks is None else padded(picks.int(), len(seq), -1),
            sink,
            scale,
            seq,
            positions,
            rows_of(window_kv, batch),
            None if entries is None else rows_of(entries, batch),
            window=window_kv.layout.window,
            window_rows=window_kv.rows,
            ratio=0 if entries is None else entries.layout.ratio,
            entry_rows=0 if entries is None else entries.rows,
            count=0 if entries is None or picks is not None else bucket(entries_of(batch, entries)),
            numerics=self.numerics,
        )
        return emit(y[: len(q)], out), lse[: len(q)] if return_lse else None


def entries_of(batch: Batch, kv: KV) -> int:
    """Entries that the longest sequence has after this step."""
    return int(batch.lengths.max(initial=0)) // kv.layout.ratio
