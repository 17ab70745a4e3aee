"""From logits to a token: one uniform number per row, and the token it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.triton_kernels import sampling as kernels


class Sampling(ops.Sampling):
    def sample(
        self, logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        if temperature == 0:
            return kernels.largest(logits)
        uniform = torch.rand(len(logits), generator=generator, dtype=torch.float32, device=logits.device)
        return kernels.draw(logits, uniform, temperature, top_p)
