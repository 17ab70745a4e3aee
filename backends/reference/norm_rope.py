"""RMS norms, rotary embedding, Hadamard rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.reference.gemm import emit
from dsv4_hal.batch import CosSin


class NormRope(ops.NormRope):
    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float, *, out: Tensor | None = None) -> Tensor:
        wide = self.numerics.accumulate
        if weight is None:
            return emit(self._head_norm(x, eps), out)
        v = x.to(wide)
        v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
        return emit(v.to(x.dtype), out)

    def _head_norm(self, x: Tensor, eps: float) -> Tensor:
        # Each step is computed in the accumulator and then rounded: on a CPU torch.rsqrt of a small bfloat16 tensor
        # takes a path that rounds twice, and decode would differ from prefill.
        wide, narrow = self.numerics.accumulate, self.numerics.q_norm
        square = x.to(wide).square().to(narrow).to(wide)
        mean = square.mean(-1, keepdim=True).to(narrow).to(wide)
        root = torch.rsqrt((mean + eps).to(narrow).to(wide)).to(narrow)
        return (x.to(wide) * root.to(wide)).to(x.dtype)

    def rope(self, x: Tensor, cos_sin: CosSin, inverse: bool = False, *, out: Tensor | None = None) -> Tensor:
        cos, sin = cos_sin
        for _ in range(x.dim() - 2):
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        kept = x.shape[-1] - 2 * cos.shape[-1]
        a, b = x[..., kept:].to(self.numerics.accumulate).unflatten(-1, (-1, 2)).unbind(-1)
        if inverse:
            sin = -sin
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
        return emit(torch.cat([x[..., :kept], turned], -1), out)

    def hadamard(self, x: Tensor) -> Tensor:
        v, width = x.to(self.numerics.accumulate), 1
        while width < x.shape[-1]:
            a, b = v.unflatten(-1, (-1, 2, width)).unbind(-2)
            v = torch.stack([a + b, a - b], -2).flatten(-3)
            width *= 2
        return (v * x.shape[-1] ** -0.5).to(x.dtype)
