"""Wrong gradients: the results are right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsv4_hal.conformance.mutants.hunt import mutant
from dsv4_hal.ops import KV


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
