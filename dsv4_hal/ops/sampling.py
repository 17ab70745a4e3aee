"""From logits to a token."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.ops.cases import sampling as cases
from dsv4_hal.ops.family import Family
from dsv4_hal.ops.spec import Compare, ContractError, Tolerance, primitive

_DRAWS = Tolerance(Compare.STATISTICAL, 5.0, "generators differ between devices; frequencies may not, within 5 sigma")


class Sampling(Family):
    @primitive(_DRAWS, cases.sample)
    def sample(
        self, logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """One token per row of logits [R, V] -> int64 [R].

        temperature  divides the logits; 0 takes the largest, the lowest id where equal
        top_p        keeps the smallest set of most likely tokens whose probability reaches top_p (at least one; equal
                     probabilities lower id first), then renormalises
        Probabilities in numerics.accumulate.
        generator    on the op's device; the same state gives the same draw on the same backend
        """
        if logits.dim() != 2 or logits.shape[1] == 0:
            raise ContractError(f"sample: logits must be [R, V], got {tuple(logits.shape)}")
        if not temperature >= 0 or temperature == float("inf"):
            raise ContractError(f"sample: temperature must be zero or positive, got {temperature}")
        if not 0 < top_p <= 1:
            raise ContractError(f"sample: top_p must lie in (0, 1], got {top_p}")
