"""Mixture of experts: hash or learned routing, routed experts, one shared expert."""

from __future__ import annotations

from torch import Tensor

from dsv4_hal.model.config import ModelConfig
from dsv4_hal.model.scope import Scope
from dsv4_hal.model.step import Step
from dsv4_hal.ops import Ops


class MoE:
    """The feed-forward of one layer: normed input [T, d] -> [T, d].

    shared_clamp  whether `swiglu_limit` also holds for the shared expert (the first published code left it out)
    """

    def __init__(self, cfg: ModelConfig, ops: Ops, weights: Scope, shared_clamp: bool) -> None:
        self.cfg, self.ops, self.name = cfg, ops, weights.prefix.rstrip(".")
        self.gate, self.w13, self.w2 = (weights.matrix(n) for n in ("gate", "experts.w13", "experts.w2"))
        self.shared_w13, self.shared_w2 = (weights.matrix(f"shared_experts.{n}") for n in ("w13", "w2"))
        self.hash = weights.vector("gate.tid2eid") if "gate.tid2eid" in weights else None
        self.bias = weights.vector("gate.bias") if "gate.bias" in weights else None
        self.shared_limit = cfg.swiglu_limit if shared_clamp else None

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        ops, cfg = self.ops, self.cfg
        step.trace.see(f"{self.name}.in", x)
        picks = None if self.hash is None else self.hash[step.tokens]
        replayed = step.trace.replay.get(f"{self.name}.experts")
        logits = ops.linear(x, self.gate, ops.numerics.accumulate)
        if replayed is None or step.trace.record:
            ids, weights = ops.route(logits, cfg.num_experts_per_tok, cfg.routed_scaling_factor, self.bias, picks)
            step.trace.see(f"{self.name}.experts", ids)
        if replayed is not None:
            ids, weights = ops.route(logits, cfg.num_experts_per_tok, cfg.routed_scaling_factor, self.bias, replayed)
        routed = ops.moe_experts(x, ids, weights, self.w13, self.w2, cfg.swiglu_limit)
        shared = ops.mlp(x, self.shared_w13, self.shared_w2, self.shared_limit)
        return step.trace.see(f"{self.name}.out", (routed + shared).to(x.dtype))
