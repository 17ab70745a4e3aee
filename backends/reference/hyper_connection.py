"""Manifold-constrained hyper-connections."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal import ops


class HyperConnection(ops.HyperConnection):
    def hc_pre(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide, n = self.numerics.accumulate, streams.shape[1]
        x = streams.to(wide)
        base, scale = base.to(wide), scale.to(wide)
        mix = self._project(x, fn, norm_eps)
        pre = torch.sigmoid(mix[:, :n] * scale[0] + base[:n]) + eps
        post = 2 * torch.sigmoid(mix[:, n : 2 * n] * scale[1] + base[n : 2 * n])
        comb = sinkhorn((mix[:, 2 * n :] * scale[2] + base[2 * n :]).view(-1, n, n), iters, eps)
        return self._weigh(pre, x), post, comb

    def hc_post(self, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        wide = self.numerics.accumulate
        mixed = torch.bmm(comb.transpose(1, 2), streams.to(wide))
        return (post[..., None] * y.to(wide)[:, None] + mixed).to(self.numerics.storage)

    def hc_head(self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
        wide = self.numerics.accumulate
        x = streams.to(wide)
        mix = self._project(x, fn, norm_eps)
        return self._weigh(torch.sigmoid(mix * scale.to(wide)[0] + base.to(wide)) + eps, x)

    def _project(self, x: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
        u = x.flatten(1)
        return (u @ fn.to(u.dtype).T) * torch.rsqrt(u.square().mean(-1, keepdim=True) + norm_eps)

    def _weigh(self, pre: Tensor, x: Tensor) -> Tensor:
        return (pre[..., None] * x).sum(1).to(self.numerics.storage)


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """[T, n, n] -> nearly doubly stochastic: rows, then columns, `iters` times; the first row step is a softmax."""
    c = logits.softmax(-1) + eps
    c = c / (c.sum(1, keepdim=True) + eps)
    for _ in range(iters - 1):
        c = c / (c.sum(2, keepdim=True) + eps)
        c = c / (c.sum(1, keepdim=True) + eps)
    return c
