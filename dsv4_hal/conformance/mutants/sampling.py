"""Wrong sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_hal.conformance.mutants.hunt import mutant


@mutant("sampling: top_p is ignored", "sample")
def top_p_ignored(
    right: Any, self: Any, logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, *args: Any
) -> Tensor:
    return right.sample(self, logits, temperature, 1.0, *args)


@mutant("sampling: what top_p keeps is drawn evenly", "sample")
def nucleus_drawn_evenly(
    right: Any, self: Any, logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, generator: Any = None
) -> Tensor:
    if temperature == 0 or top_p >= 1:
        return right.sample(self, logits, temperature, top_p, generator)
    ranked, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    kept = (ranked.cumsum(-1) - ranked < top_p).to(ranked.dtype)
    return torch.multinomial(torch.zeros_like(kept).scatter(-1, order, kept), 1, generator=generator)[:, 0]
