"""Wrong norms and rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_hal.conformance.mutants.hunt import mutant


@mutant("RoPE: channels are paired by halves instead of neighbours", "rope")
def rope_by_halves(right: Any, self: Any, x: Tensor, cos_sin: Any, inverse: bool = False, **kwargs: Any) -> Tensor:
    width = 2 * cos_sin[0].shape[1]
    order = torch.arange(width).view(2, -1).T.flatten()
    first = x.shape[-1] - width
    y = right.rope(self, torch.cat([x[..., :first], x[..., first:][..., order]], -1), cos_sin, inverse)
    y = torch.cat([y[..., :first], y[..., first:][..., order.argsort()]], -1)
    return y if kwargs.get("out") is None else kwargs["out"].copy_(y)


@mutant("norm: the epsilon is forgotten", "rms_norm")
def epsilon_forgotten(right: Any, self: Any, x: Tensor, weight: Tensor | None, eps: float, **kwargs: Any) -> Tensor:
    return right.rms_norm(self, x, weight, 0.0, **kwargs)
