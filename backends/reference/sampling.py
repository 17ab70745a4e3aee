"""From logits to a token."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal import ops


class Sampling(ops.Sampling):
    def sample(
        self, logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        if temperature == 0:
            ids = torch.arange(logits.shape[1], device=logits.device)
            return torch.where(logits == logits.amax(-1, keepdim=True), ids, logits.shape[1] - 1).amin(-1)
        x = logits.to(self.numerics.accumulate)
        p = ((x - x.amax(-1, keepdim=True)) / temperature).softmax(-1)  # a small temperature cannot overflow
        if top_p < 1:
            ranked, order = p.sort(dim=-1, descending=True, stable=True)
            before = ranked.cumsum(-1) - ranked
            first = torch.zeros(1, dtype=order.dtype, device=order.device)
            dropped = (before >= top_p).index_fill(-1, first, False)  # never the likeliest
            p = torch.zeros_like(p).scatter(-1, order, ranked.masked_fill(dropped, 0))
        return torch.multinomial(p, 1, generator=generator)[:, 0]
