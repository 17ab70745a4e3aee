"""Norms and rotary embeddings. Read from documents, not run: see each operator for what they leave open."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.backends.ascend.emulator.call import emulated


@emulated("npu::npu_rms_norm")
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """input / sqrt(mean(input ** 2) + epsilon) * gamma over the axes of gamma, in input's dtype; and the reciprocal
    root, float32, with those axes kept as 1.

    Computed in float32 and rounded once. The documents (torch_npu's; ops-nn, aclnnRmsNorm.md, commit 2ed368e0) do not
    say where a bfloat16 result is rounded in between.
    """
    axes = tuple(range(-gamma.dim(), 0))
    x = input.to(torch.float32)
    rstd = (x.square().mean(axes, keepdim=True) + epsilon).rsqrt()
    return (x * rstd * gamma.to(torch.float32)).to(input.dtype), rstd


@emulated("npu::npu_rotary_mul")
def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, rotate: Tensor | None) -> Tensor:
    """r1 * input + r2 * turned; `half` turns (a, b) of the two halves into (-b, a), `interleave` of neighbours.

    Computed in float32 and rounded once; the documents do not say where a product of bfloat16 is rounded. `rotate`, a
    matrix instead of a mode, is refused by a rule.
    """
    if rotary_mode == "half":
        first, second = input.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    else:
        turned = torch.stack((-input[..., 1::2], input[..., ::2]), -1).flatten(-2)
    wide = torch.float32
    return (r1.to(wide) * input.to(wide) + r2.to(wide) * turned.to(wide)).to(input.dtype)
