"""The multi-token-prediction block: one more layer that predicts the token after the next."""

from __future__ import annotations

from torch import Tensor

from dsv4_hal.model.block import Block
from dsv4_hal.model.config import ModelConfig
from dsv4_hal.model.hyper_connection import Head
from dsv4_hal.model.scope import Scope
from dsv4_hal.model.step import Step
from dsv4_hal.ops import Ops


class Mtp:
    """Streams [T, n, d] after the last layer and the embedding of each token's successor [T, d] -> logits [T, V].

    Two projections are added (no concatenation); the block has a window only; embedding and output matrix are the
    model's, norms and stream head its own. Source: published inference code.
    """

    def __init__(self, cfg: ModelConfig, ops: Ops, weights: Scope, shared: Scope, shared_clamp: bool) -> None:
        self.cfg, self.ops = cfg, ops
        self.enorm, self.hnorm = weights.vector("enorm"), weights.vector("hnorm")
        self.e_proj, self.h_proj = weights.matrix("e_proj"), weights.matrix("h_proj")
        self.block = Block(cfg, ops, weights, cfg.num_hidden_layers, 0, shared_clamp)
        self.head = Head(cfg, ops, weights, shared)

    def __call__(self, streams: Tensor, following: Tensor, step: Step) -> Tensor:
        ops, eps = self.ops, self.cfg.rms_norm_eps
        e = ops.linear(ops.rms_norm(following, self.enorm, eps), self.e_proj)
        h = ops.linear(ops.rms_norm(streams, self.hnorm, eps).flatten(0, 1), self.h_proj).view(streams.shape)
        return self.head(self.block(e[:, None] + h, step))
