"""RMS norms, rotary embedding, Hadamard rotation: one kernel for the first two, alone or together."""

from __future__ import annotations

from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.triton_kernels import norm_rope as kernels
from dsv4_hal.backends.triton_kernels.runtime import emit, result
from dsv4_hal.batch import CosSin


class NormRope(ops.NormRope):
    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float, *, out: Tensor | None = None) -> Tensor:
        made = result(x.shape, x.dtype, x.device, out)
        if weight is None:
            kernels.norm_rope(x, made, norm="head", eps=eps, narrow=self.numerics.q_norm)
        else:
            kernels.norm_rope(x, made, norm="weight", weight=weight, eps=eps)
        return emit(made, out)

    def rope(self, x: Tensor, cos_sin: CosSin, inverse: bool = False, *, out: Tensor | None = None) -> Tensor:
        made = result(x.shape, x.dtype, x.device, out)
        return emit(kernels.norm_rope(x, made, cos_sin=cos_sin, inverse=inverse), out)

    def hadamard(self, x: Tensor) -> Tensor:
        return kernels.hadamard(x)

    def q_norm_rope(self, q: Tensor, eps: float, cos_sin: CosSin) -> Tensor:
        ops.NormRope.rope(self, q, cos_sin)  # the preconditions
        made = result(q.shape, q.dtype, q.device, None)
        return kernels.norm_rope(q, made, norm="head", eps=eps, narrow=self.numerics.q_norm, cos_sin=cos_sin)
