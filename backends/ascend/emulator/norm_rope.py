"""Norms and rotary embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.backends.ascend.emulator.call import emulated


@emulated("npu::npu_rms_norm")
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """input / rms(input) * gamma over the dimensions of gamma; and 1 / rms, float32."""
    x = input.to(torch.float32)
    rstd = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (x * rstd * gamma.to(torch.float32)).to(input.dtype), rstd
