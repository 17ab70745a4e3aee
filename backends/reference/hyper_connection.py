"""Manifold-constrained hyper-connections."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.formats import cut_hf32


class HyperConnection(ops.HyperConnection):
    def hc_pre(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide, n = self.numerics.accumulate, streams.shape[1]
        x, sizes = streams.to(wide), (n, n, n * n)
        mix = self._project(x, fn, norm_eps, self.numerics.hf32).split(sizes, -1)
        pre, post, comb = (
            m * s + b for m, s, b in zip(mix, scale.to(wide).unbind(), base.to(wide).split(sizes), strict=True)
        )
        mixed = self._weigh(torch.sigmoid(pre) + eps, x)
        return mixed, 2 * torch.sigmoid(post), sinkhorn(comb.unflatten(-1, (n, n)), iters, eps)

    def hc_post(self, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        wide = self.numerics.accumulate
        written = post[..., None] * y.to(wide)[:, None]
        return torch.baddbmm(written, comb.transpose(1, 2), streams.to(wide)).to(self.numerics.storage)

    def hc_head(self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
        wide = self.numerics.accumulate
        x = streams.to(wide)
        mix = self._project(x, fn, norm_eps)
        return self._weigh(torch.sigmoid(mix * scale.to(wide)[0] + base.to(wide)) + eps, x)

    def _project(self, x: Tensor, fn: Tensor, norm_eps: float, hf32: bool = False) -> Tensor:
        u, w = x.flatten(1), fn.to(x.dtype)
        product = cut_hf32(u) @ cut_hf32(w).T if hf32 else u @ w.T
        return product * torch.rsqrt(u.square().mean(-1, keepdim=True) + norm_eps)

    def _weigh(self, pre: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(pre[:, None], x)[:, 0].to(self.numerics.storage)


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """[T, n, n] -> nearly doubly stochastic: rows, then columns, `iters` times; the first row step is a softmax.

    Works on [n, n, T], so that sums run over leading axes and are vectorised over tokens.
    """
    small = logits.new_tensor(eps)
    c = logits.permute(1, 2, 0).softmax(1) + small
    c = c / c.sum(0, keepdim=True).add_(small)
    for _ in range(iters - 1):
        c = c / c.sum(1, keepdim=True).add_(small)
        c = c / c.sum(0, keepdim=True).add_(small)
    return c.permute(2, 0, 1).contiguous()
