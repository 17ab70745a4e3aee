"""The long projection of hyper-connections by DeepGEMM; all else as in the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backend import Facts, Verdict
from dsv4_hal.backends import reference
from dsv4_hal.backends.cuda.vendor import deep_gemm
from dsv4_hal.backends.cuda.vendor.common import Base, own_kernel


class HyperConnection(Base):
    hc_pre_norm = ops.HyperConnection.hc_pre_norm  # through `hc_pre`, and not fused

    def supports(self, op: str, facts: Facts) -> Verdict:
        verdict = super().supports(op, facts)
        if op not in ("hc_pre", "hc_head", "hc_pre_norm"):
            return verdict
        channels = facts["hc_mult"] * facts["hidden_size"] if facts else deep_gemm.HC_CHANNELS
        return verdict and self._projects(channels)

    def _projects(self, channels: int) -> Verdict:
        if self.numerics.storage != torch.bfloat16:
            return Verdict(False, "DeepGEMM projects streams in bfloat16")
        return deep_gemm.able(self.arch.name, "tf32_hc_prenorm_gemm") and deep_gemm.hc_verdict(channels)

    def hc_pre(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        verdict = self._projects(fn.shape[1])
        if not verdict:
            own_kernel("hc_pre", verdict)
            return super().hc_pre(streams, fn, base, scale, iters, norm_eps, eps)
        return reference.HyperConnection.hc_pre(self, streams, fn, base, scale, iters, norm_eps, eps)

    def hc_head(self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
        verdict = self._projects(fn.shape[1])
        if not verdict:
            own_kernel("hc_head", verdict)
            return super().hc_head(streams, fn, base, scale, norm_eps, eps)
        return reference.HyperConnection.hc_head(self, streams, fn, base, scale, norm_eps, eps)

    def _project(self, x: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
        """What the two above call; x [T, n, d] holds values of bfloat16."""
        if not self._projects(fn.shape[1]):
            return super()._project(x, fn, norm_eps)
        matrix = self.once(fn, lambda: deep_gemm.hc_matrix(fn))
        product, square = deep_gemm.hc_project(x.flatten(1).to(self.numerics.storage), matrix, len(fn))
        return product * torch.rsqrt(square / fn.shape[1] + norm_eps)[:, None]
