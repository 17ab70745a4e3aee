"""The long projection of hyper-connections by DeepGEMM; what follows it is the CUDA backend's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backend import Facts, Verdict
from dsv4_hal.backends.cuda.vendor import deep_gemm
from dsv4_hal.backends.cuda.vendor.common import Base, own_kernel
from dsv4_hal.backends.triton_kernels import hyper_connection as kernels


class HyperConnection(Base):
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

    def _parts(self, op: str, streams: Tensor, fn: Tensor) -> Tensor | None:
        """The sums that make the projection; None where the library does not serve it."""
        verdict = self._projects(fn.shape[1])
        if not verdict:
            own_kernel(op, verdict)
            return None
        return deep_gemm.hc_project(streams.flatten(1), self.once(fn, lambda: deep_gemm.hc_matrix(fn)), len(fn))

    def hc_pre(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = self._parts("hc_pre", streams, fn)
        return kernels.join(streams, fn, base, scale, norm_eps, eps, iters, parts=parts)

    def hc_head(self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
        return kernels.join(streams, fn, base, scale, norm_eps, eps, parts=self._parts("hc_head", streams, fn))[0]

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
        parts = self._parts("hc_pre_norm", streams, fn)
        return kernels.join(streams, fn, base, scale, norm_eps, eps, iters, weight, parts)
