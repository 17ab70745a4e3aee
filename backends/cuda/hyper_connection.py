"""Hyper-connections: a projection in parts, then one kernel for the rest, the sub-layer's norm included; and mixing."""

from __future__ import annotations

from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.triton_kernels import hyper_connection as kernels


class HyperConnection(ops.HyperConnection):
    def hc_pre(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.join(streams, fn, base, scale, norm_eps, eps, iters)

    def hc_post(self, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return kernels.spread(y, streams, post, comb)

    def hc_head(self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
        return kernels.join(streams, fn, base, scale, norm_eps, eps)[0]

    def hc_pre_norm(
        self,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        iters: int,
        norm_eps: float,
        eps: float,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ops.HyperConnection.hc_pre(self, streams, fn, base, scale, iters, norm_eps, eps)  # the preconditions
        ops.NormRope.rms_norm(self, streams[:, 0], weight, norm_eps)
        return kernels.join(streams, fn, base, scale, norm_eps, eps, iters, weight)
