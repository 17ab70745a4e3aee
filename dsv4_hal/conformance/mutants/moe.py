"""Wrong routing, permutation, SwiGLU and shared expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_hal.conformance.mutants.hunt import mutant


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
