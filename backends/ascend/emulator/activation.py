"""Gated activations. Computed in float32 and rounded once, where the documents do not say more; read, not run."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.backends.ascend.emulator.call import emulated


@emulated("npu::npu_swiglu")
def npu_swiglu(input: Tensor, dim: int) -> Tensor:
    """A * sigmoid(A) * B, where A and B are the halves of input along `dim`."""
    a, b = input.to(torch.float32).chunk(2, dim)
    return (a * a.sigmoid() * b).to(input.dtype)


@emulated("npu::npu_clipped_swiglu")
def npu_clipped_swiglu(
    x: Tensor, group_index: Tensor | None, dim: int, alpha: float, limit: float, bias: float, interleaved: bool
) -> Tensor:
    """A * sigmoid(alpha * A) * (B + bias), A at most `limit`, B between -limit and limit.

    A and B are the even and odd elements along `dim` if interleaved, else its halves. `group_index`, the rows of each
    group, is refused by a rule: what lies behind them is not documented.
    """
    wide = x.to(torch.float32).movedim(dim, -1)
    a, b = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    a, b = a.clamp(max=limit), b.clamp(-limit, limit)
    return (a * (alpha * a).sigmoid() * (b + bias)).movedim(-1, dim).to(x.dtype)
