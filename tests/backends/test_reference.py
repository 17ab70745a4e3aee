"""The reference against a second, naive reading of the contract, on every case and in both modes.

`Naive` walks tokens, entries, heads and experts one by one in float64. It shares the number formats with the reference
(they have tests of their own), the lengths of a batch and the contract's composites, and nothing else: it finds rows
by the addressing rule, keeps whole histories in place of compressor states, and never looks into a plan's indices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4_hal import formats
from dsv4_hal.backend import Backend
from dsv4_hal.backends.reference import Reference
from dsv4_hal.batch import Batch, cos_sin, make_plan
from dsv4_hal.conformance import Budget, bitwise, budget, compare, run_case, widen
from dsv4_hal.dispatch import Resolved, resolve
from dsv4_hal.formats import FORMATS, Format, QTensor, RowLayout, Weight, plain_format
from dsv4_hal.numerics import Numerics, deployed, exact
from dsv4_hal.ops import KV, OPS, Case, ContractError, OpSpec

F64 = torch.float64


class History:
    """Compressor state that forgets nothing: (slot, position) -> projected row and gate."""

    def __init__(self, slots: int) -> None:
        self.shape = (slots,)
        self.rows: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


class Naive(Backend):
    name = "naive"

    def row_layout(self, kind: str, dim: int, rope: int, ratio: int, window: int = 0) -> RowLayout:
        return Reference(self.numerics).row_layout(kind, dim, rope, ratio, window)

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
            y[t] = (matrix * row).sum(1)
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
        for row in range(len(rows)):
            expert = max(e for e in range(w.shape[0]) if offsets[e] <= row)
            y[row] = (formats.dequantize(w[expert], F64) * seen[row]).sum(1)
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
        quantised = self.numerics.activation is not None and w.format.scale is not None
        return (formats.simulate(x, self.numerics.activation) if quantised else x).to(F64)

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
        width, y = 2 * turn.shape[1], x.to(F64).clone()
        for i in range(len(x)):
            pairs = torch.view_as_complex(y[i, ..., x.shape[-1] - width :].reshape(-1, width // 2, 2).contiguous())
            turned = torch.view_as_real(pairs * (turn[i].conj() if inverse else turn[i]))
            y[i, ..., x.shape[-1] - width :] = turned.reshape(*x.shape[1:-1], width)
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
        for row, (sequence, index) in zip(rows, new_rows(batch, layout.ratio), strict=False):
            where = torch.tensor([place(pool, batch, sequence, index)])
            formats.store(pool.data, layout, pool.rows, where, row[None])
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
            ranked = []
            for s, row in enumerate(rows):
                product = rounded((q[t] * row).sum(-1), narrow).clamp(min=0)
                score = rounded(rounded(product * weights[t].to(F64), narrow).sum(), narrow)
                ranked.append((-float(score), s))
            for n, (score, s) in enumerate(sorted(ranked)[:k]):
                picks[t, n], scores[t, n] = s, -score
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
        for t, (sequence, p) in enumerate(new_rows(batch, 1)):
            keys = self.kv_load(window_kv, batch, sequence, max(0, p - window_kv.layout.window + 1), p + 1)
            if entries is not None:
                more = self.kv_load(entries, batch, sequence, 0, (p + 1) // entries.layout.ratio)
                keys = torch.cat([keys, more if picks is None else more[picks[t][picks[t] >= 0]]])
            keys = keys.to(F64)
            for head in range(q.shape[1]):
                score = (keys * q[t, head].to(F64)).sum(-1) * scale
                p_key = (score - score.max()).exp()
                denominator = p_key.sum() + (sink[head].to(F64) - score.max()).exp()
                y[t, head] = (rounded(p_key, self.numerics.probs)[:, None] * keys).sum(0) / denominator
                lse[t, head] = p_key.sum().log() + score.max()
        y = self._emit(y, q.dtype, out)
        return y, lse if return_lse else None

    # moe

    def route(
        self, logits: Tensor, k: int, scale: float, bias: Tensor | None = None, picks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        score = (1 + logits.to(F64).exp()).log().sqrt()
        ids, weights = torch.zeros(len(logits), k, dtype=torch.int64), torch.zeros(len(logits), k, dtype=F64)
        for t, row in enumerate(score):
            added = row if bias is None else row + bias.to(F64)
            best = sorted(range(len(row)), key=lambda e, added=added: (-float(added[e]), e))
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
            mix = mixed(stream, fn, norm_eps)
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
        rng, out = np.random.default_rng(seed), []
        known: dict[bytes, np.ndarray] = {}
        for row in logits.to(F64).numpy():
            if temperature == 0:
                out.append(min(np.flatnonzero(row == row.max())))
                continue
            if row.tobytes() not in known:
                p = np.exp((row - row.max()) / temperature)
                p, kept, reached = p / p.sum(), np.zeros_like(p), 0.0
                for token in sorted(range(len(p)), key=lambda i, p=p: (-p[i], i)):
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


def mixed(stream: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    u = torch.cat(list(stream))
    return (fn.to(F64) * u).sum(1) / ((u * u).sum() / len(u) + norm_eps).sqrt()


def naive_sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    c = torch.stack([(row - row.logsumexp(0)).exp() + eps for row in logits])
    for step in range(iters):
        if step:
            c = torch.stack([row / (row.sum() + eps) for row in c])
        c = torch.stack([column / (column.sum() + eps) for column in c.T]).T
    return c


def new_rows(batch: Batch, ratio: int) -> list[tuple[int, int]]:
    """(sequence, position or entry) of every row that a step adds, in order."""
    return [
        (r, i)
        for r, (context, length) in enumerate(zip(batch.context.tolist(), batch.lengths.tolist(), strict=True))
        for i in range(context // ratio, length // ratio)
    ]


def place(kv: KV, batch: Batch, sequence: int, index: int) -> int:
    """The addressing rule of paged rows."""
    table = batch.window_table if kv.layout.ratio == 1 else batch.token_table
    assert table is not None
    return int(table[sequence, index // kv.rows % table.shape[1]]) * kv.rows + index % kv.rows


# Every case, in both modes.

MODES: dict[str, Callable[[], Numerics]] = {"exact": exact, "deployed": deployed}
CASES = [(spec, case) for spec in OPS.values() for case in spec.cases()]
TIGHT = Budget(1e-9, 1e-9)


@cache
def backends(mode: str) -> tuple[Resolved, Resolved, Resolved]:
    """The reference, the reference widened to float64, and the naive backend likewise."""
    numerics = MODES[mode]()
    wide = widen(numerics)
    return resolve([Reference(numerics)]), resolve([Reference(wide)]), resolve([Naive(wide)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("spec", "case"), CASES, ids=[case.id for _, case in CASES])
def test_reference_is_what_the_contract_says(spec: OpSpec, case: Case, mode: str) -> None:
    narrow, wide, naive = backends(mode)
    got, again, exactly, want = (run_case(case, ops) for ops in (narrow, narrow, wide, naive))
    for name in got:  # two runs are equal to the bit
        assert bitwise(again[name], got[name]).ok, name
        assert not got[name].double().isnan().any(), f"{name}: poison leaked"
    tolerance, tight = spec.tolerance, dict.fromkeys(want, TIGHT)
    failed = {name: c.message for name, c in compare(exactly, want, tolerance, tight).items() if not c.ok}
    assert not failed, "in float64"
    want = {name: value.to(got[name].dtype) for name, value in want.items()}
    budgets = budget(case, tolerance, narrow, wide)
    failed = {name: c.message for name, c in compare(got, want, tolerance, budgets).items() if not c.ok}
    assert not failed, "in float32"
    if "same" in got and "written" in got:  # out= is what is returned, and all of it is written
        assert bool(got["same"]) and torch.equal(got["y"], got["written"])


# Batches: how a step is cut must not matter.


def one_sequence(mode: str, cuts: tuple[int, ...], company: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attention, picks and entries of one sequence, its tokens cut into steps, `company` other sequences beside it."""
    ops, generator = backends(mode)[0], torch.Generator().manual_seed(5)
    length, dim, heads, window = sum(cuts), 96, 3, 8
    width, storage = 2 * dim, ops.numerics.storage
    draw = {
        name: torch.randn(length, *shape, generator=generator)
        for name, shape in (("q", (heads, dim)), ("kv", (dim,)), ("c", (width,)), ("g", (width,)), ("w", (heads,)))
    }
    noise = torch.Generator().manual_seed(6)
    ape, sink = torch.randn(4, width, generator=generator), torch.randn(heads, generator=generator)
    window_layout = ops.row_layout("window", dim, 32, 1, window)
    entry_layout = ops.row_layout("entries", dim, 32, 4)
    count = company + 1
    tables = np.arange(count * 12)[::-1].reshape(count, 12)
    pools = [
        KV(formats.new_pool(layout, count * 12, rows, torch.device("cpu")).fill_(255), layout, rows)
        for layout, rows in ((window_layout, 16), (entry_layout, 64))
    ]
    state = ops.state_new(count, 4, True, width)
    out: list[tuple[Tensor, Tensor, Tensor]] = []
    done = 0
    for n in cuts:
        others = np.full(company, 2)
        batch = Batch(
            np.array([*others, n]),
            np.array([*(others * len(out)), done]),
            torch.device("cpu"),
            slots=np.arange(count),
            token_table=tables,
            window_table=tables,
        )
        ops.plan(batch, {4: True}, {})

        def tokens(name: str, extra: int = company * 2, done: int = done, n: int = n) -> Tensor:
            mine = draw[name][done : done + n]
            return torch.cat([torch.randn(extra, *mine.shape[1:], generator=noise), mine]).to(storage)

        ops.kv_store(tokens("kv"), window_layout, batch, pools[0])
        wide = ops.numerics.accumulate
        entries = ops.compress(tokens("c").to(wide), tokens("g").to(wide), ape, batch, 4, True, state)
        ops.kv_store(entries.to(storage), entry_layout, batch, pools[1])
        picks, scores = ops.index_topk(tokens("q"), tokens("w"), pools[1], batch, 3, with_scores=True)
        y, _ = ops.sparse_attention(tokens("q"), pools[0], sink, dim**-0.5, batch, pools[1], picks)
        assert scores is not None
        out.append((y[-n:], scores[-n:], entries[entries.shape[0] - (done + n) // 4 + done // 4 :]))
        done += n
    y, scores, entries = (torch.cat(parts) for parts in zip(*out, strict=True))
    return y, scores, entries


@pytest.mark.parametrize(("cuts", "company"), [((37,), 2), ((1,) * 37, 0), ((5, 20, 1, 11), 1), ((30, 7), 3)])
@pytest.mark.parametrize("mode", MODES)
def test_cuts_and_company_do_not_matter(mode: str, cuts: tuple[int, ...], company: int) -> None:
    unit = torch.finfo(backends(mode)[0].numerics.storage).eps
    for got, want in zip(one_sequence(mode, cuts, company), one_sequence(mode, (37,), 0), strict=True):
        assert got.shape == want.shape
        seen = want.isfinite()
        assert torch.equal(got.isfinite(), seen)
        assert ((got - want)[seen].norm() / want[seen].norm()).item() <= 4 * unit


@pytest.mark.parametrize("mode", MODES)
def test_rows_do_not_depend_on_their_neighbours(mode: str) -> None:
    ops, generator = backends(mode)[0], torch.Generator().manual_seed(1)
    x = torch.randn(40, 256, generator=generator).to(ops.numerics.storage)
    q = formats.quantize(torch.randn(128, 256, generator=generator), FORMATS["e4m3_128x128"])
    w, unit = Weight(q.data, q.scale, q.format), torch.finfo(ops.numerics.storage).eps
    for run in (lambda v: ops.linear(v, w), lambda v: ops.rms_norm(v, None, 1e-6), ops.hadamard):
        alone = torch.cat([run(row[None]) for row in x])
        assert (alone - run(x)).abs().max() <= 4 * unit * alone.abs().max()


# Gradients, in float64.

EXACT64 = resolve([Reference(exact(F64))])
PACKED = EXACT64.plan(Batch.packed([7, 0, 5], padding=1), {4: True}, {})


def leaf(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=F64, generator=generator).requires_grad_()


def tables(tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    return cos_sin(torch.arange(tokens), torch.rand(channels // 2, generator=torch.Generator().manual_seed(0)), F64)


def plain(data: Tensor) -> Weight:
    return Weight(data, None, plain_format(data.dtype))


def packed_attention(q: Tensor, kv: Tensor, entries: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    window, compressed = EXACT64.row_layout("window", 8, 4, 1, 3), EXACT64.row_layout("entries", 8, 4, 4)
    picks = torch.tensor([[-1, -1]] * 3 + [[0, -1]] * 4 + [[-1, -1]] * 3 + [[-1, 0]] * 2 + [[-1, -1]])
    window_kv = EXACT64.kv_store(kv, window, PACKED)
    stored = EXACT64.kv_store(entries, compressed, PACKED)
    y, lse = EXACT64.sparse_attention(q, window_kv, sink, 0.5, PACKED, stored, picks, return_lse=True)
    assert lse is not None
    return y, lse[:-1]  # the padding token has none


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    stored = EXACT64.kv_store(keys, EXACT64.row_layout("index", 8, 0, 4), PACKED)
    _, scores = EXACT64.index_topk(q, weights, stored, PACKED, 1, with_scores=True)
    assert scores is not None
    return scores[scores.isfinite()]


MIXING = (leaf(8, 12), leaf(8), leaf(3))
GRADIENTS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "linear": (lambda x, w: EXACT64.linear(x, plain(w)), (leaf(3, 4), leaf(5, 4))),
    "grouped_linear": (
        lambda x, w: EXACT64.grouped_linear(x, plain(w), torch.tensor([0, 2, 2, 3])),
        (leaf(3, 4), leaf(3, 5, 4)),
    ),
    "block_diagonal_linear": (lambda x, w: EXACT64.block_diagonal_linear(x, plain(w)), (leaf(3, 2, 4), leaf(2, 5, 4))),
    "embedding": (lambda w: EXACT64.embedding(torch.tensor([1, 0, 1]), plain(w)), (leaf(3, 4),)),
    "rms_norm": (lambda x, w: EXACT64.rms_norm(x, w, 1e-6), (leaf(3, 6), leaf(6))),
    "rms_norm without weight": (lambda x: EXACT64.rms_norm(x, None, 1e-6), (leaf(3, 2, 6),)),
    "rope": (lambda x: EXACT64.rope(x, tables(3, 4)), (leaf(3, 2, 6),)),
    "rope inverse": (lambda x: EXACT64.rope(x, tables(3, 4), True), (leaf(3, 6),)),
    "hadamard": (EXACT64.hadamard, (leaf(3, 8),)),
    "swiglu": (lambda x, w: EXACT64.swiglu(x, 1.0, w), (leaf(3, 8), leaf(3))),
    "route": (lambda x: EXACT64.route(x, 2, 1.5)[1], (leaf(3, 6),)),
    "unpermute": (lambda x: EXACT64.unpermute(x, torch.tensor([3, 0, 2, 1]), (2, 2)), (leaf(4, 3),)),
    "permute": (lambda x: EXACT64.permute(x, torch.tensor([[1, 0], [2, 1]]), 3)[0], (leaf(2, 3),)),
    "hc_pre": (lambda x, *mixing: EXACT64.hc_pre(x, *mixing, 3, 1e-6, 1e-6), (leaf(2, 2, 6), *MIXING)),
    "hc_post": (EXACT64.hc_post, (leaf(2, 5), leaf(2, 3, 5), leaf(2, 3), leaf(2, 3, 3))),
    "hc_head": (
        lambda x, *mixing: EXACT64.hc_head(x, *mixing, 1e-6, 1e-6),
        (leaf(2, 2, 6), leaf(2, 12), leaf(2), leaf(1)),
    ),
    "compress": (
        lambda kv, gate, ape: EXACT64.compress(kv, gate, ape, PACKED, 4, True),
        (leaf(13, 6), leaf(13, 6, seed=1), leaf(4, 6)),
    ),
    "sparse_attention": (packed_attention, (leaf(13, 2, 8), leaf(13, 8), leaf(2, 8), leaf(2))),
    "index_topk": (index_scores, (leaf(13, 2, 8), leaf(13, 2), leaf(2, 8))),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str) -> None:
    run, inputs = GRADIENTS[name]
    assert torch.autograd.gradcheck(run, inputs)


def test_caches_hold_no_graph() -> None:
    """A state or a pool that kept its graph would keep every step alive."""
    batch = Batch(np.array([5]), np.array([0]), torch.device("cpu"), slots=np.array([0]), token_table=np.array([[0]]))
    EXACT64.plan(batch, {4: True}, {})
    state = EXACT64.state_new(1, 4, True, 16)
    entries = EXACT64.compress(leaf(5, 16), leaf(5, 16), leaf(4, 16), batch, 4, True, state)
    layout = EXACT64.row_layout("entries", 8, 4, 4)
    pool = EXACT64.kv_store(
        entries, layout, batch, KV(formats.new_pool(layout, 1, 64, torch.device("cpu")), layout, 64)
    )
    assert entries.requires_grad and not state.requires_grad and not pool.data.requires_grad
    assert not EXACT64.kv_load(pool, batch, 0, 0, 1).requires_grad


@pytest.mark.parametrize("op", ["linear", "grouped_linear", "block_diagonal_linear", "embedding"])
def test_a_weight_that_another_backend_rearranged_is_refused(op: str) -> None:
    shape = (5, 4) if op in ("linear", "embedding") else (2, 5, 4)
    moved = replace(plain(torch.zeros(shape, dtype=F64)), layout="tiled", name="w")
    given = {
        "linear": (torch.zeros(3, 4, dtype=F64), moved),
        "grouped_linear": (torch.zeros(3, 4, dtype=F64), moved, torch.tensor([0, 1, 3])),
        "block_diagonal_linear": (torch.zeros(3, 2, 4, dtype=F64), moved),
        "embedding": (torch.zeros(3, dtype=torch.int64), moved),
    }
    with pytest.raises(ContractError, match="w is arranged as tiled"):
        getattr(EXACT64, op)(*given[op])
