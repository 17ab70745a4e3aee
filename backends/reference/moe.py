"""Mixture of experts: routing, permutation, clamped SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.reference.gemm import emit


class Moe(ops.Moe):
    def route(
        self, logits: Tensor, k: int, scale: float, bias: Tensor | None = None, picks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        score = F.softplus(logits, threshold=20).sqrt()
        if picks is None:
            choice = score if bias is None else score + bias.to(score.dtype)
            picks = choice.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
        chosen = score.gather(-1, picks)
        return picks, chosen / chosen.sum(-1, keepdim=True) * scale

    def permute(self, x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        ranked, order = ids.flatten().sort(stable=True)
        offsets = torch.searchsorted(ranked, torch.arange(experts + 1, device=ids.device))
        return x[order // ids.shape[1]], offsets, order

    def unpermute(self, rows: Tensor, order: Tensor, shape: tuple[int, int]) -> Tensor:
        wide = rows.to(self.numerics.accumulate)
        return torch.zeros_like(wide).index_copy(0, order, wide).unflatten(0, shape).sum(1)

    def swiglu(
        self, gate_up: Tensor, limit: float | None, row_weight: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        gate, up = gate_up.to(self.numerics.accumulate).chunk(2, -1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        hidden = F.silu(gate) * up
        if row_weight is not None:
            hidden = hidden * row_weight[:, None]
        return emit(hidden.to(self.numerics.storage), out)
