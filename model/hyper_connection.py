"""A sub-layer between the residual streams."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dsv4_hal.model.config import ModelConfig
from dsv4_hal.model.scope import Scope
from dsv4_hal.ops import Ops


class HyperConnection:
    """streams [T, n, d] -> streams: read one input from them, run the sub-layer, mix its result back."""

    def __init__(self, cfg: ModelConfig, ops: Ops, weights: Scope, name: str) -> None:
        self.cfg, self.ops = cfg, ops
        self.fn, self.base, self.scale = (weights.vector(f"hc_{name}_{part}") for part in ("fn", "base", "scale"))
        self.norm = weights.vector(f"{name}_norm")

    def __call__(self, streams: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        cfg = self.cfg
        x, post, comb = self.ops.hc_pre_norm(
            streams, self.fn, self.base, self.scale, cfg.hc_sinkhorn_iters, cfg.rms_norm_eps, cfg.hc_eps, self.norm
        )
        return self.ops.hc_post(sublayer(x), streams, post, comb)


class Head:
    """Streams [T, n, d] -> logits [T, V]: join, norm, output matrix. Logits in numerics.accumulate."""

    def __init__(self, cfg: ModelConfig, ops: Ops, weights: Scope, shared: Scope) -> None:
        self.cfg, self.ops = cfg, ops
        self.fn, self.base, self.scale = (weights.vector(f"hc_head_{part}") for part in ("fn", "base", "scale"))
        self.norm = weights.vector("norm")
        self.matrix = shared.matrix("head")

    def __call__(self, streams: Tensor) -> Tensor:
        cfg, ops = self.cfg, self.ops
        x = ops.hc_head(streams, self.fn, self.base, self.scale, cfg.rms_norm_eps, cfg.hc_eps)
        return ops.linear(ops.rms_norm(x, self.norm, cfg.rms_norm_eps), self.matrix, ops.numerics.accumulate)
