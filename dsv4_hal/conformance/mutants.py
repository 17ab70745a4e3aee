"""Deliberately wrong backends: the faults that real ports of DeepSeek-V4 had, each of which the cases must catch.

A mutant is the reference with one op done wrong. To add one, write the wrong op as a function of (right, self, ...):
`right` is the reference's class, so that `right.swiglu(self, ...)` is the correct result.

    @mutant("SwiGLU: the limit is lost", "swiglu")
    def limit_lost(right, self, gate_up, limit, *args, **kwargs):
        return right.swiglu(self, gate_up, None, *args, **kwargs)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv4_hal import formats
from dsv4_hal.backend import Backend
from dsv4_hal.conformance.runner import GRAD, Outcome, jobs, run
from dsv4_hal.formats import QTensor
from dsv4_hal.numerics import MODES
from dsv4_hal.ops import KV
from dsv4_hal.registry import FALLBACK, backend_class

ENOUGH = 10.0  # a fault must miss its budget by so much, or fail an exact check: what is caught barely is not caught


@dataclass(frozen=True)
class Mutant:
    """fault: what is wrong, in words; op: the op that is wrong; backward: its gradients are, and its results right."""

    name: str
    fault: str
    op: str
    wrong: Callable[..., Any]
    backward: bool = False


@dataclass(frozen=True)
class Catch:
    """What caught a mutant. outcome: the clearest failure, None: nothing did."""

    mutant: Mutant
    outcome: Outcome | None

    @property
    def ok(self) -> bool:
        """Caught clearly: by an exact check, or by an error of at least ENOUGH budgets, or by the watch that is kept.

        One that merely raises is a mutant that does not fit its op's signature, and is not caught.
        """
        return self.outcome is not None and _clarity(self.outcome) >= ENOUGH


_ALL: list[Mutant] = []


def mutants() -> tuple[Mutant, ...]:
    return tuple(_ALL)


def hunt(mutant: Mutant) -> Catch:
    """Run the cases of the mutant's op until one catches it clearly."""
    right = backend_class(FALLBACK)
    cls = _class(mutant, right)
    best: Outcome | None = None
    for job in jobs([mutant.op], modes=[GRAD] if mutant.backward else reversed(MODES)):
        outcome = run(cls, job)
        if not outcome.ok and (best is None or _clarity(outcome) > _clarity(best)):
            best = outcome
        if best is not None and _clarity(best) >= ENOUGH:
            break
    return Catch(mutant, best)


def _clarity(outcome: Outcome) -> float:
    """How far beyond its budget."""
    if outcome.verdict == "misconduct":
        return math.inf
    return outcome.of_budget or 0.0 if outcome.verdict == "disagrees" else 0.0


def _class(mutant: Mutant, right: type[Backend]) -> type[Backend]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mutant.wrong(right, self, *args, **kwargs)

    return type(mutant.name, (right,), {"name": mutant.name, mutant.op: method})


def mutant(fault: str, op: str, backward: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a mutant; its name is the function's."""

    def declare(wrong: Callable[..., Any]) -> Callable[..., Any]:
        _ALL.append(Mutant(wrong.__name__, fault, op, wrong, backward))
        return wrong

    return declare


def with_profile(self: Any, **changes: Any) -> Any:
    """The backend in another numeric profile: a rounding point that is missed."""
    other = copy.copy(self)
    other.numerics = replace(self.numerics, **changes)
    return other


# --- clamped SwiGLU -------------------------------------------------------------------------------------------------


@mutant("SwiGLU: the limit is lost", "swiglu")
def limit_lost(right: Any, self: Any, gate_up: Tensor, limit: float | None, *args: Any, **kwargs: Any) -> Tensor:
    return right.swiglu(self, gate_up, None, *args, **kwargs)


@mutant("SwiGLU: clamped after the product instead of before", "swiglu")
def clamp_after(right: Any, self: Any, gate_up: Tensor, limit: float | None, *args: Any, **kwargs: Any) -> Tensor:
    y = right.swiglu(self, gate_up, None, *args, **kwargs)
    return y if limit is None else y.clamp_(-limit, limit)


@mutant("SwiGLU: the gate is clamped below as well", "swiglu")
def gate_clamped_below(
    right: Any, self: Any, gate_up: Tensor, limit: float | None, *args: Any, **kwargs: Any
) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    low = gate if limit is None else gate.clamp(min=-limit)
    return right.swiglu(self, torch.cat([low, up], -1), limit, *args, **kwargs)


@mutant("SwiGLU: gate and up change places", "swiglu")
def gate_and_up_swapped(right: Any, self: Any, gate_up: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return right.swiglu(self, torch.cat(gate_up.chunk(2, -1)[::-1], -1), *args, **kwargs)


@mutant("SwiGLU: the routing weight is forgotten", "swiglu")
def row_weight_forgotten(
    right: Any, self: Any, gate_up: Tensor, limit: float | None, row_weight: Tensor | None = None, **kwargs: Any
) -> Tensor:
    return right.swiglu(self, gate_up, limit, None, **kwargs)


@mutant("shared expert: it is not clamped", "mlp")
def shared_expert_unclamped(right: Any, self: Any, x: Tensor, w13: Any, w2: Any, limit: float | None) -> Tensor:
    return self.linear(self.swiglu(self.linear(x, w13), None), w2)


# --- routing --------------------------------------------------------------------------------------------------------


@mutant("routing: weights are not normalised", "route")
def never_normalised(right: Any, self: Any, logits: Tensor, k: int, scale: float, *args: Any, **kwargs: Any) -> Any:
    ids, _ = right.route(self, logits, k, scale, *args, **kwargs)
    return ids, torch.nn.functional.softplus(logits).sqrt().gather(1, ids) * scale


@mutant("routing: the scale is applied twice", "route")
def scaled_twice(right: Any, self: Any, logits: Tensor, k: int, scale: float, *args: Any, **kwargs: Any) -> Any:
    return right.route(self, logits, k, scale * scale, *args, **kwargs)


@mutant("routing: the scale is forgotten", "route")
def never_scaled(right: Any, self: Any, logits: Tensor, k: int, scale: float, *args: Any, **kwargs: Any) -> Any:
    return right.route(self, logits, k, 1.0, *args, **kwargs)


@mutant("routing: the bias leaks into the weights", "route")
def bias_in_weights(
    right: Any, self: Any, logits: Tensor, k: int, scale: float, bias: Tensor | None = None, picks: Tensor | None = None
) -> Any:
    ids, weights = right.route(self, logits, k, scale, bias, picks)
    if bias is not None:
        score = (torch.nn.functional.softplus(logits).sqrt() + bias).gather(1, ids)
        weights = (score / score.sum(-1, keepdim=True) * scale).to(weights.dtype)
    return ids, weights


@mutant("routing: logits are rounded to bf16", "route")
def router_in_bf16(right: Any, self: Any, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
    return right.route(self, logits.to(torch.bfloat16).to(logits.dtype), *args, **kwargs)


@mutant("routing: of equal scores the higher id comes first", "route")
def route_ties_reversed(right: Any, self: Any, logits: Tensor, k: int, scale: float, *args: Any, **kwargs: Any) -> Any:
    ids, weights = right.route(self, logits, k, scale, *args, **kwargs)
    flip = weights[:, :-1] == weights[:, 1:]
    ids = ids.clone()
    for t, j in flip.nonzero().tolist():
        ids[t, j], ids[t, j + 1] = ids[t, j + 1].clone(), ids[t, j].clone()
    return ids, weights


@mutant("routing: ids and rows part company by one row", "permute")
def rows_shifted(right: Any, self: Any, x: Tensor, ids: Tensor, experts: int) -> Any:
    rows, offsets, order = right.permute(self, x, ids, experts)
    return rows.roll(1, 0), offsets, order


# --- hyper-connections ----------------------------------------------------------------------------------------------


@mutant("mHC: comb is transposed", "hc_post")
def comb_transposed(right: Any, self: Any, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return right.hc_post(self, y, streams, post, comb.transpose(1, 2))


@mutant("mHC: Sinkhorn stops one iteration short", "hc_pre")
def sinkhorn_short(
    right: Any, self: Any, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, *args: Any
) -> Any:
    return right.hc_pre(self, streams, fn, base, scale, max(1, iters - 1), *args)


@mutant("mHC: post lacks its factor 2", "hc_pre")
def post_without_two(right: Any, self: Any, *args: Any) -> Any:
    x, post, comb = right.hc_pre(self, *args)
    return x, post / 2, comb


@mutant("mHC: the scale of the head's logits is forgotten", "hc_head")
def head_scale_forgotten(
    right: Any, self: Any, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *args: Any
) -> Tensor:
    return right.hc_head(self, streams, fn, base, torch.ones_like(scale), *args)


# --- indexer --------------------------------------------------------------------------------------------------------


@mutant("indexer: no causal mask, the last entry is picked by every token", "index_topk")
def no_causal_mask(right: Any, self: Any, q: Tensor, weights: Tensor, keys: KV, batch: Any, k: int, **kw: Any) -> Any:
    picks, scores = right.index_topk(self, q, weights, keys, batch, k, **kw)
    last = torch.from_numpy(batch.lengths // keys.layout.ratio - 1).to(picks.device)[batch.seq.clamp(min=0)]
    missing = ~(picks == last[:, None]).any(-1) & (last >= 0) & (batch.seq >= 0)
    picks = picks.clone()
    picks[missing, 0] = last[missing]
    return picks, scores


@mutant("indexer: of equal scores the later entry comes first", "index_topk")
def index_ties_reversed(right: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    picks, scores = right.index_topk(self, *args, **{**kwargs, "with_scores": True})
    flip = (scores[:, :-1] == scores[:, 1:]) & (picks[:, 1:] >= 0)
    picks = picks.clone()
    for t, j in flip.nonzero().tolist():
        picks[t, j], picks[t, j + 1] = picks[t, j + 1].clone(), picks[t, j].clone()
    return picks, scores if kwargs.get("with_scores") else None


@mutant("indexer: k beyond what is visible is filled with entry 0", "index_topk")
def k_overrun(right: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    picks, scores = right.index_topk(self, *args, **kwargs)
    return picks.clamp(min=0), scores


@mutant("indexer: head weights lose their sign", "index_topk")
def weights_made_positive(right: Any, self: Any, q: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Any:
    return right.index_topk(self, q, weights.abs(), *args, **kwargs)


@mutant("indexer: queries are not rounded to the keys' format", "index_topk")
def index_query_unrounded(
    right: Any, self: Any, q: Tensor, weights: Tensor, keys: KV, *args: Any, **kwargs: Any
) -> Any:
    bare = replace(keys, layout=replace(keys.layout, rounding=None))
    return right.index_topk(self, q, weights, bare, *args, **kwargs)


@mutant("indexer: scores are rounded to bf16 before the best are chosen", "index_topk")
def index_scores_rounded(
    right: Any, self: Any, q: Tensor, weights: Tensor, keys: KV, batch: Any, k: int, *, with_scores: bool = False
) -> Any:
    longest = max(k, int(batch.lengths.max(initial=0)))
    picks, scores = right.index_topk(self, q, weights, keys, batch, longest, with_scores=True)
    by_id = picks.where(picks >= 0, longest).argsort(-1)
    best = scores.gather(-1, by_id).bfloat16().argsort(dim=-1, descending=True, stable=True)
    order = by_id.gather(-1, best)[:, :k]
    return picks.gather(-1, order), scores.gather(-1, order) if with_scores else None


# --- rotary embedding -----------------------------------------------------------------------------------------------


@mutant("RoPE: channels are paired by halves instead of neighbours", "rope")
def rope_by_halves(right: Any, self: Any, x: Tensor, cos_sin: Any, inverse: bool = False, **kwargs: Any) -> Tensor:
    width = 2 * cos_sin[0].shape[1]
    order = torch.arange(width).view(2, -1).T.flatten()
    first = x.shape[-1] - width
    y = right.rope(self, torch.cat([x[..., :first], x[..., first:][..., order]], -1), cos_sin, inverse)
    y = torch.cat([y[..., :first], y[..., first:][..., order.argsort()]], -1)
    return y if kwargs.get("out") is None else kwargs["out"].copy_(y)


@mutant("RoPE: the output is not rotated back", "output_proj")
def output_not_rotated_back(right: Any, self: Any, x: Tensor, cos_sin: Any, wo_a: Any, wo_b: Any) -> Tensor:
    low = self.block_diagonal_linear(x.reshape(len(x), wo_a.data.shape[0], wo_a.shape[-1]), wo_a)
    return self.linear(low.flatten(1), wo_b)


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


# --- compressor -----------------------------------------------------------------------------------------------------


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


# --- attention ------------------------------------------------------------------------------------------------------


@mutant("attention: the sink is missing", "sparse_attention")
def sink_missing(right: Any, self: Any, q: Tensor, kv: KV, sink: Tensor, *args: Any, **kwargs: Any) -> Any:
    return right.sparse_attention(self, q, kv, torch.full_like(sink, float("-inf")), *args, **kwargs)


@mutant("attention: the sink is part of the values", "sparse_attention")
def sink_in_values(
    right: Any, self: Any, q: Tensor, kv: KV, sink: Tensor, scale: float, *args: Any, **kwargs: Any
) -> Any:
    y, lse = right.sparse_attention(self, q, kv, sink, scale, *args, **{**kwargs, "return_lse": True})
    share = (sink.to(lse.dtype) - torch.logaddexp(lse, sink.to(lse.dtype))).exp()
    y += torch.where(lse.isfinite(), share, torch.zeros_like(share))[..., None].to(y.dtype)
    return y, lse if kwargs.get("return_lse") else None


def _window(kv: KV, change: int) -> KV:
    return replace(kv, layout=replace(kv.layout, window=max(1, kv.layout.window + change)))


@mutant("attention: the window lacks one key", "sparse_attention")
def window_too_small(right: Any, self: Any, q: Tensor, kv: KV, *args: Any, **kwargs: Any) -> Any:
    return right.sparse_attention(self, q, _window(kv, -1), *args, **kwargs)


@mutant("attention: the window has one key too many", "sparse_attention")
def window_too_large(right: Any, self: Any, q: Tensor, kv: KV, *args: Any, **kwargs: Any) -> Any:
    return right.sparse_attention(self, q, _window(kv, 1), *args, **kwargs)


@mutant("attention: a pick of -1 reads entry 0", "sparse_attention")
def minus_one_read(
    right: Any, self: Any, q: Tensor, kv: KV, sink: Tensor, scale: float, batch: Any, entries: Any = None,
    picks: Tensor | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    if picks is not None:
        ratio = entries.layout.ratio
        seen = (batch.positions + 1 >= ratio) & (batch.seq >= 0)
        picks = torch.where(seen[:, None] & (picks < 0), 0, picks)
    return right.sparse_attention(self, q, kv, sink, scale, batch, entries, picks, **kwargs)


@mutant("attention: the scale is forgotten", "sparse_attention")
def scale_forgotten(right: Any, self: Any, q: Tensor, kv: KV, sink: Tensor, scale: float, *args: Any, **kw: Any) -> Any:
    return right.sparse_attention(self, q, kv, sink, 1.0, *args, **kw)


# --- quantisation ---------------------------------------------------------------------------------------------------


@mutant("FP4: the nibbles of a byte change places", "dequantize")
def nibbles_swapped(right: Any, self: Any, w: QTensor, dtype: torch.dtype) -> Tensor:
    if w.format.pack != 2:
        return right.dequantize(self, w, dtype)
    codes = w.data.view(torch.uint8)
    swapped = ((codes << 4) | (codes >> 4)).view(w.data.dtype)
    return right.dequantize(self, QTensor(swapped, w.scale, w.format), dtype)


@mutant("quantisation: scales are off by one power of two", "quantize")
def scale_doubled(right: Any, self: Any, x: Tensor, fmt: Any) -> QTensor:
    q = right.quantize(self, x, fmt)
    if q.scale is None:
        return q
    return QTensor(q.data, (q.scale.float() * 2).to(q.scale.dtype), fmt)


@mutant("quantisation: what lies halfway is rounded down", "quantize")
def ties_cut(right: Any, self: Any, x: Tensor, fmt: Any) -> QTensor:
    return right.quantize(self, x.float() * (1 - 2.0**-20), fmt)


@mutant("FP8: activations in front of a quantised weight are not rounded", "linear")
def activation_unrounded(right: Any, self: Any, x: Any, w: Any, *args: Any, **kwargs: Any) -> Tensor:
    return right.linear(with_profile(self, activation=None), x, w, *args, **kwargs)


@mutant("FP8: a scale is read one block further", "linear")
def scale_of_the_next_block(right: Any, self: Any, x: Any, w: Any, *args: Any, **kwargs: Any) -> Tensor:
    if w.scale is not None:
        w = replace(w, scale=w.scale.roll(-1, -1))
    return right.linear(self, x, w, *args, **kwargs)


@mutant("MoE: an expert reads the weights of its neighbour", "grouped_linear")
def expert_off_by_one(
    right: Any, self: Any, rows: Tensor, w: Any, offsets: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    scale = None if w.scale is None else w.scale.roll(1, 0)
    return right.grouped_linear(self, rows, replace(w, data=w.data.roll(1, 0), scale=scale), offsets, *args, **kwargs)


@mutant("KV rows: they are not rounded to FP8", "kv_store")
def rows_unrounded(right: Any, self: Any, rows: Tensor, layout: Any, batch: Any, pool: KV | None = None) -> KV:
    if pool is not None or layout.rounding is None:
        bare = replace(layout, rounding=None)
        return replace(right.kv_store(self, rows, bare, batch, pool), layout=layout)
    return replace(right.kv_store(self, rows, replace(layout, rounding=None), batch), layout=layout)


@mutant("norm: the epsilon is forgotten", "rms_norm")
def epsilon_forgotten(right: Any, self: Any, x: Tensor, weight: Tensor | None, eps: float, **kwargs: Any) -> Tensor:
    return right.rms_norm(self, x, weight, 0.0, **kwargs)


@mutant("sampling: top_p is ignored", "sample")
def top_p_ignored(
    right: Any, self: Any, logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, *args: Any
) -> Tensor:
    return right.sample(self, logits, temperature, 1.0, *args)


@mutant("sampling: what top_p keeps is drawn evenly", "sample")
def nucleus_drawn_evenly(
    right: Any, self: Any, logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, generator: Any = None
) -> Tensor:
    if temperature == 0 or top_p >= 1:
        return right.sample(self, logits, temperature, top_p, generator)
    ranked, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    kept = (ranked.cumsum(-1) - ranked < top_p).to(ranked.dtype)
    return torch.multinomial(torch.zeros_like(kept).scatter(-1, order, kept), 1, generator=generator)[:, 0]


# --- gradients: the results are right -------------------------------------------------------------------------------


def constant(t: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of t."""
    return t + (value - t).detach()


@mutant("backward: the clamp of SwiGLU lets gradients through where it binds", "swiglu", backward=True)
def clamp_straight_through(
    right: Any, self: Any, gate_up: Tensor, limit: float | None, *args: Any, **kwargs: Any
) -> Tensor:
    if limit is None:
        return right.swiglu(self, gate_up, limit, *args, **kwargs)
    gate, up = gate_up.chunk(2, -1)
    clamped = torch.cat([constant(gate, gate.clamp(max=limit)), constant(up, up.clamp(-limit, limit))], -1)
    return right.swiglu(self, clamped, None, *args, **kwargs)


@mutant("backward: a norm treats its statistic as a constant", "rms_norm", backward=True)
def statistic_constant(right: Any, self: Any, x: Tensor, weight: Tensor | None, eps: float, **kwargs: Any) -> Tensor:
    root = torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + eps)
    y = x * root if weight is None else x * root * weight
    return constant(y, right.rms_norm(self, x, weight, eps, **kwargs))


@mutant("backward: the last iteration of Sinkhorn is a constant factor", "hc_pre", backward=True)
def sinkhorn_detached(
    right: Any, self: Any, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, *args: Any
) -> Any:
    x, post, comb = right.hc_pre(self, streams, fn, base, scale, iters, *args)
    if iters == 1:
        return x, post, comb
    _, _, before = right.hc_pre(self, streams, fn, base, scale, iters - 1, *args)
    return x, post, constant(before * (comb / before).detach(), comb)


@mutant("backward: the normaliser of routing weights is a constant", "route", backward=True)
def normaliser_constant(right: Any, self: Any, logits: Tensor, k: int, scale: float, *args: Any, **kwargs: Any) -> Any:
    ids, weights = right.route(self, logits, k, scale, *args, **kwargs)
    score = torch.nn.functional.softplus(logits).sqrt().gather(1, ids)
    return ids, constant(score * scale / score.sum(-1, keepdim=True).detach(), weights)


@mutant("backward: attention gives its sink no gradient", "sparse_attention", backward=True)
def sink_detached(right: Any, self: Any, q: Tensor, kv: KV, sink: Tensor, *args: Any, **kwargs: Any) -> Any:
    return right.sparse_attention(self, q, kv, sink.detach(), *args, **kwargs)


@mutant("backward: RoPE turns gradients forwards instead of back", "rope", backward=True)
def rope_gradient_forwards(right: Any, self: Any, x: Tensor, cos_sin: Any, inverse: bool = False, **kw: Any) -> Tensor:
    y = right.rope(self, x, cos_sin, inverse, **kw)
    return constant(right.rope(self, x, cos_sin, not inverse), y)


@mutant("backward: an expert's weights get the gradient of one of its rows", "grouped_linear", backward=True)
def last_row_only(right: Any, self: Any, rows: Tensor, w: Any, offsets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    y = right.grouped_linear(self, rows, w, offsets, *args, **kwargs)
    still = right.grouped_linear(self, rows, replace(w, data=w.data.detach()), offsets, *args, **kwargs)
    ends = torch.zeros(len(rows), 1, dtype=torch.bool, device=rows.device)
    ends[offsets[1:].clamp(min=1) - 1] = True
    return torch.where(ends, y, still)
