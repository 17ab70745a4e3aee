"""Shapes of hyper-connections."""

from __future__ import annotations

from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.null.gemm import empty


class HyperConnection(ops.HyperConnection):
    def hc_pre(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        (t, n, d), wide = streams.shape, self.numerics.accumulate
        return empty(t, d, dtype=self.numerics.storage), empty(t, n, dtype=wide), empty(t, n, n, dtype=wide)

    def hc_post(self, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return empty(*streams.shape, dtype=self.numerics.storage)

    def hc_head(self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
        return empty(streams.shape[0], streams.shape[2], dtype=self.numerics.storage)
