"""One layer: attention and feed-forward, each between the residual streams."""

from __future__ import annotations

from torch import Tensor

from dsv4_hal.model.attention import Attention
from dsv4_hal.model.config import ModelConfig
from dsv4_hal.model.hyper_connection import HyperConnection
from dsv4_hal.model.moe import MoE
from dsv4_hal.model.scope import Scope
from dsv4_hal.model.step import Step
from dsv4_hal.ops import Ops


class Block:
    """Streams [T, n, d] -> streams. index: which pools of the cache; ratio: 0 window only, 4 CSA, 128 HCA."""

    def __init__(self, cfg: ModelConfig, ops: Ops, weights: Scope, index: int, ratio: int, shared_clamp: bool) -> None:
        self.attn = Attention(cfg, ops, weights.below("attn"), index, ratio)
        self.ffn = MoE(cfg, ops, weights.below("ffn"), shared_clamp)
        self.around_attn = HyperConnection(cfg, ops, weights, "attn")
        self.around_ffn = HyperConnection(cfg, ops, weights, "ffn")

    def __call__(self, streams: Tensor, step: Step) -> Tensor:
        streams = self.around_attn(streams, lambda x: self.attn(x, step))
        return self.around_ffn(streams, lambda x: self.ffn(x, step))
