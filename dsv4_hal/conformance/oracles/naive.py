"""A second reading of the contract, to check the reference against.

`Naive` walks tokens, entries, streams and experts one by one in float64. It shares the number formats with the
reference (they have tests of their own), the lengths of a batch and the composites of the contract, and nothing else:
it finds rows by the addressing rule, keeps whole histories in place of compressor states, and never looks into the
indices of a plan. Run it in a widened profile (`widen`): it keeps the rounding points of that profile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4_hal import formats
from dsv4_hal.backend import Backend
from dsv4_hal.batch import Batch, make_plan
from dsv4_hal.formats import Format, QTensor, RowLayout, Weight
from dsv4_hal.ops import KV

F64 = torch.float64


class History:
    """Compressor state that forgets nothing: (slot, position) -> projected row and gate."""

    def __init__(self, slots: int) -> None:
        self.shape = (slots,)
        self.rows: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


class Naive(Backend):
    """Every primitive op, as slowly as its definition reads."""

    name = "naive"

    # gemm

    def quantize(self, x: Tensor, fmt: Format) -> QTensor:
        return formats.quantize(x.contiguous(), fmt)

    def dequantize(self, w: QTensor, dtype: torch.dtype) -> Tensor:
        return formats.dequantize(w, F64 if dtype == F64 else torch.float32).to(dtype)

    def linear(
        self, x: Tensor | QTensor, w: Weight, out_dtype: torch.dtype | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        matrix, rows = formats.dequantize(w, F64), self._seen(x, w)
        y = torch.zeros(len(rows), len(matrix), dtype=F64)
        for t, row in enumerate(rows):
            y[t] = matrix @ row
        return self._emit(y, out_dtype, out)

    def grouped_linear(
        self,
        rows: Tensor,
        w: Weight,
        offsets: Tensor,
        out_dtype: torch.dtype | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        seen, y = self._seen(rows, w), torch.zeros(len(rows), w.shape[1], dtype=F64)
        for expert in range(w.shape[0]):
            matrix = formats.dequantize(w[expert], F64)
            for row in range(int(offsets[expert]), int(offsets[expert + 1])):
                y[row] = matrix @ seen[row]
        return self._emit(y, out_dtype, out)

    def block_diagonal_linear(self, x: Tensor, w: Weight, *, out: Tensor | None = None) -> Tensor:
        y = torch.zeros(*x.shape[:2], w.shape[1], dtype=F64)
        for group in range(x.shape[1]):
            matrix = formats.dequantize(w[group], self.numerics.storage).to(F64)
            for t in range(len(x)):
                y[t, group] = matrix @ x[t, group].to(F64)
        return self._emit(y, None, out)

    def embedding(self, ids: Tensor, w: Weight) -> Tensor:
        y = torch.zeros(len(ids), w.shape[1], dtype=F64)
        for t, i in enumerate(ids.tolist()):
            y[t] = w.data[i].to(F64)
        return y.to(self.numerics.storage)

    def _seen(self, x: Tensor | QTensor, w: Weight) -> Tensor:
        if isinstance(x, QTensor):
            return formats.dequantize(x, F64)
        rounding = self.numerics.activation if w.format.scale is not None else None
        return x.to(F64) if rounding is None else formats.dequantize(formats.encode(x, rounding), F64)

    def _emit(self, y: Tensor, dtype: torch.dtype | None, out: Tensor | None) -> Tensor:
        y = y.to(dtype or self.numerics.storage)
        if out is None:
            return y
        out[...] = y
        return out

    # norm_rope

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float, *, out: Tensor | None = None) -> Tensor:
        narrow = self.numerics.q_norm
        rows = x.reshape(-1, x.shape[-1])
        y = torch.zeros(rows.shape, dtype=F64)
        for i, row in enumerate(rows.to(F64)):
            if weight is not None:
                y[i] = row / ((row * row).sum() / len(row) + eps).sqrt() * weight.to(F64)
                continue
            mean = rounded(rounded(row * row, narrow).sum() / len(row), narrow)
            y[i] = row * rounded(1 / rounded(mean + eps, narrow).sqrt(), narrow)
        return self._emit(y.view(x.shape), x.dtype, out)

    def rope(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor], inverse: bool = False, *, out: Tensor | None = None
    ) -> Tensor:
        turn = torch.complex(cos_sin[0].to(F64), cos_sin[1].to(F64))
        first, y = x.shape[-1] - 2 * turn.shape[1], x.to(F64).contiguous().clone()
        for row, angle in zip(y, turn.conj() if inverse else turn, strict=True):
            turned = torch.complex(row[..., first::2], row[..., first + 1 :: 2]) * angle
            row[..., first::2], row[..., first + 1 :: 2] = turned.real, turned.imag
        return self._emit(y, x.dtype, out)

    def hadamard(self, x: Tensor) -> Tensor:
        matrix = torch.ones(1, 1, dtype=F64)
        while len(matrix) < x.shape[-1]:
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64), matrix)
        return (x.to(F64) @ matrix / len(matrix) ** 0.5).to(x.dtype)

    # cache

    def plan(self, batch: Batch, ratios: Mapping[int, bool], ropes: Mapping[str, Tensor]) -> Batch:
        batch.plan = make_plan(batch, ratios, ropes, self.numerics.accumulate)
        return batch

    def kv_store(self, rows: Tensor, layout: RowLayout, batch: Batch, pool: KV | None = None) -> KV:
        if pool is None:
            return KV(formats.round_rows(rows, layout), layout)
        # Of rows at the same place the last one stays.
        rows_of = enumerate(new_rows(batch, layout.ratio))
        where = {place(pool, batch, sequence, i): row for row, (sequence, i) in rows_of if i >= 0}
        if where:
            formats.store(pool.data, layout, pool.rows, torch.tensor(list(where)), rows[list(where.values())])
        return pool

    def kv_load(self, kv: KV, batch: Batch, sequence: int, start: int, stop: int) -> Tensor:
        if stop == start:
            return torch.zeros(0, kv.layout.dim, dtype=self.numerics.storage)
        if not kv.paged:
            mine = [n for n, (s, _) in enumerate(new_rows(batch, kv.layout.ratio)) if s == sequence]
            return torch.stack([kv.data[n] for n in mine[start:stop]])
        where = torch.tensor([[place(kv, batch, sequence, i) for i in range(start, stop)]])
        return formats.load(kv.data, kv.layout, kv.rows, where)[0]

    def state_new(self, slots: int, ratio: int, overlap: bool, width: int, rollback: int = 0) -> Any:
        return History(slots)

    def state_copy(self, state: Any, source: int, target: int) -> None:
        state.rows |= {(target, p): row for (slot, p), row in state.rows.items() if slot == source}

    def state_reset(self, state: Any, slot: int) -> None:
        state.rows = {key: row for key, row in state.rows.items() if key[0] != slot}

    def compress(
        self, kv: Tensor, gate: Tensor, ape: Tensor, batch: Batch, ratio: int, overlap: bool, state: Any = None
    ) -> Tensor:
        slots = np.arange(len(batch.q_lens)) if batch.slots is None else batch.slots
        rows = {} if state is None else state.rows
        for t, (sequence, p) in enumerate(new_rows(batch, 1)):
            rows[int(slots[sequence]), p] = kv[t].to(F64), gate[t].to(F64) + ape[p % ratio].to(F64)
        c = kv.shape[1] // (2 if overlap else 1)
        out = []
        for sequence, i in new_rows(batch, ratio):
            slot = int(slots[sequence])
            if i < 0:
                out.append(torch.zeros(c, dtype=F64))
                continue
            own = [rows[slot, p] for p in range(i * ratio, (i + 1) * ratio)]
            block = [(value[-c:], weight[-c:]) for value, weight in own]
            if overlap and i > 0:
                before = [rows[slot, p] for p in range((i - 1) * ratio, i * ratio)]
                block += [(value[:c], weight[:c]) for value, weight in before]
            total = torch.stack([weight for _, weight in block]).logsumexp(0)
            out.append(sum(value * (weight - total).exp() for value, weight in block))
        return torch.stack(out) if out else torch.zeros(0, c, dtype=F64)

    # attention

    def index_topk(
        self, q: Tensor, weights: Tensor, keys: KV, batch: Batch, k: int, *, with_scores: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        narrow, ratio = self.numerics.score, keys.layout.ratio
        q = formats.round_rows(q.flatten(0, 1), keys.layout).view(q.shape).to(F64)
        picks, scores = torch.full((len(q), k), -1), torch.full((len(q), k), float("-inf"), dtype=F64)
        for t, (sequence, p) in enumerate(new_rows(batch, 1)):
            rows = self.kv_load(keys, batch, sequence, 0, (p + 1) // ratio).to(F64)
            product = rounded(rows @ q[t].T, narrow).clamp(min=0)  # [entries, heads]
            score = rounded(rounded(product * weights[t].to(F64), narrow).sum(1), narrow)
            ranked = sorted((-value, s) for s, value in enumerate(score.tolist()))
            for n, (negative, s) in enumerate(ranked[:k]):
                picks[t, n], scores[t, n] = s, -negative
        return picks, scores if with_scores else None

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
        y, lse = torch.zeros(q.shape, dtype=F64), torch.full(q.shape[:2], float("-inf"), dtype=F64)
        for t, keys in enumerate(self.visible(window_kv, batch, entries, picks)):
            score = q[t].to(F64) @ keys.T * scale  # [heads, keys]
            peak = score.max(1, keepdim=True).values
            p_key = (score - peak).exp()
            denominator = p_key.sum(1, keepdim=True) + (sink[:, None].to(F64) - peak).exp()
            y[t] = rounded(p_key, self.numerics.probs) @ keys / denominator
            lse[t] = p_key.sum(1).log() + peak[:, 0]
        y = self._emit(y, q.dtype, out)
        return y, lse if return_lse else None

    def visible(
        self, window_kv: KV, batch: Batch, entries: KV | None = None, picks: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Keys [n, D] of each token: those of its window, then entries."""
        for t, (sequence, p) in enumerate(new_rows(batch, 1)):
            keys = self.kv_load(window_kv, batch, sequence, max(0, p - window_kv.layout.window + 1), p + 1)
            if entries is not None:
                more = self.kv_load(entries, batch, sequence, 0, (p + 1) // entries.layout.ratio)
                keys = torch.cat([keys, more if picks is None else more[picks[t][picks[t] >= 0]]])
            yield keys.to(F64)

    # moe

    def route(
        self, logits: Tensor, k: int, scale: float, bias: Tensor | None = None, picks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        score = (1 + logits.to(F64).exp()).log().sqrt()
        ids, weights = torch.zeros(len(logits), k, dtype=torch.int64), torch.zeros(len(logits), k, dtype=F64)
        for t, row in enumerate(score):
            added = row if bias is None else row + bias.to(F64)
            best = [e for _, e in sorted((-float(value), e) for e, value in enumerate(added))]
            ids[t] = torch.tensor(best[:k]) if picks is None else picks[t]
            weights[t] = torch.stack([row[e] for e in ids[t]])
            weights[t] *= scale / weights[t].sum()
        return ids, weights

    def permute(self, x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        k, flat = ids.shape[1], ids.flatten().tolist()
        order = sorted(range(len(flat)), key=lambda j: (flat[j], j))
        offsets = [sum(1 for e in flat if e < bound) for bound in range(experts + 1)]
        rows = torch.stack([x[j // k] for j in order]) if order else x[:0]
        return rows, torch.tensor(offsets), torch.tensor(order, dtype=torch.int64)

    def unpermute(self, rows: Tensor, order: Tensor, shape: tuple[int, int]) -> Tensor:
        y = torch.zeros(shape[0], rows.shape[1], dtype=F64)
        for j, place in enumerate(order.tolist()):
            y[place // shape[1]] += rows[j].to(F64)
        return y

    def swiglu(
        self, gate_up: Tensor, limit: float | None, row_weight: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        half = gate_up.shape[1] // 2
        y = torch.zeros(len(gate_up), half, dtype=F64)
        for row, values in enumerate(gate_up.to(F64)):
            gate, up = values[:half], values[half:]
            if limit is not None:
                gate, up = torch.where(gate > limit, limit, gate), torch.where(up.abs() > limit, limit * up.sign(), up)
            y[row] = gate / (1 + (-gate).exp()) * up
            if row_weight is not None:
                y[row] *= row_weight[row].to(F64)
        return self._emit(y, None, out)

    # hyper_connection

    def hc_pre(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        t, n, d = streams.shape
        x, post, comb = (torch.zeros(shape, dtype=F64) for shape in ((t, d), (t, n), (t, n, n)))
        base, scale = base.to(F64), scale.to(F64)
        for token, stream in enumerate(streams.to(F64)):
            mix = mixed(stream, fn, norm_eps, self.numerics.hf32)
            for j in range(n):
                x[token] += (sigmoid(mix[j] * scale[0] + base[j]) + eps) * stream[j]
                post[token, j] = 2 * sigmoid(mix[n + j] * scale[1] + base[n + j])
                for k in range(n):
                    at = 2 * n + n * j + k
                    comb[token, j, k] = mix[at] * scale[2] + base[at]
            comb[token] = naive_sinkhorn(comb[token], iters, eps)
        return x.to(self.numerics.storage), post, comb

    def hc_post(self, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        out = torch.zeros(streams.shape, dtype=F64)
        for t, n, _ in np.ndindex(*streams.shape[:2], 1):
            out[t, n] = post[t, n].to(F64) * y[t].to(F64)
            for j in range(streams.shape[1]):
                out[t, n] += comb[t, j, n].to(F64) * streams[t, j].to(F64)
        return out.to(self.numerics.storage)

    def hc_head(self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
        out = torch.zeros(streams.shape[0], streams.shape[2], dtype=F64)
        for t, stream in enumerate(streams.to(F64)):
            mix = mixed(stream, fn, norm_eps)
            for j in range(len(stream)):
                out[t] += (sigmoid(mix[j] * scale[0].to(F64) + base[j].to(F64)) + eps) * stream[j]
        return out.to(self.numerics.storage)

    # sampling

    def sample(
        self, logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        seed = int(torch.randint(1 << 31, (), generator=generator))
        rng, out = np.random.default_rng(seed), list[int]()
        known: dict[bytes, np.ndarray] = {}
        for row in logits.to(F64).numpy():
            if temperature == 0:
                out.append(int(np.argmax(row)))
                continue
            if row.tobytes() not in known:
                p = np.exp((row - row.max()) / temperature)
                p, kept, reached = p / p.sum(), np.zeros_like(p), 0.0
                for _, token in sorted((-value, token) for token, value in enumerate(p)):
                    if reached >= top_p:
                        break
                    kept[token], reached = p[token], reached + p[token]
                known[row.tobytes()] = np.cumsum(kept / kept.sum())
            out.append(int(np.searchsorted(known[row.tobytes()], rng.random(), side="right")))
        return torch.tensor(out, dtype=torch.int64)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(F64)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def mixed(stream: Tensor, fn: Tensor, norm_eps: float, hf32: bool = False) -> Tensor:
    u, w = torch.cat(list(stream)), fn.to(F64)
    products = short(w) * short(u) if hf32 else w * u
    return products.sum(1) / ((u * u).sum() / len(u) + norm_eps).sqrt()


def short(x: Tensor) -> Tensor:
    """Cut to 11 significant bits, the first one included."""
    fraction, exponent = torch.frexp(x)
    return torch.ldexp((fraction * 2048).trunc() / 2048, exponent)


def naive_sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    c = torch.stack([(row - row.logsumexp(0)).exp() + eps for row in logits])
    for step in range(iters):
        if step:
            c = torch.stack([row / (row.sum() + eps) for row in c])
        c = torch.stack([column / (column.sum() + eps) for column in c.T]).T
    return c


def new_rows(batch: Batch, ratio: int) -> list[tuple[int, int]]:
    """(sequence, position or entry) of every row that a step adds, in order; -1 for one that there is only room for."""
    out = []
    for r, (q, context) in enumerate(zip(batch.q_lens.tolist(), batch.context.tolist(), strict=True)):
        new = list(range(context // ratio, (context + q) // ratio))
        room = -(-q // ratio) if batch.fixed else 0
        out += [(r, i) for i in new + [-1] * (room - len(new))]
    return out


def place(kv: KV, batch: Batch, sequence: int, index: int) -> int:
    """The addressing rule of paged rows."""
    table = batch.window_table if kv.layout.ratio == 1 else batch.token_table
    assert table is not None
    return int(table[sequence, index // kv.rows % table.shape[1]]) * kv.rows + index % kv.rows
