"""Shapes of the mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.null.gemm import emit, empty


class Moe(ops.Moe):
    def route(
        self, logits: Tensor, k: int, scale: float, bias: Tensor | None = None, picks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        shape = len(logits), k
        return empty(*shape, dtype=torch.int64), empty(*shape, dtype=self.numerics.accumulate)

    def permute(self, x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        count = ids.shape[0] * ids.shape[1]
        return (
            empty(count, x.shape[1], dtype=x.dtype),
            empty(experts + 1, dtype=torch.int64),
            empty(count, dtype=torch.int64),
        )

    def unpermute(self, rows: Tensor, order: Tensor, shape: tuple[int, int]) -> Tensor:
        return empty(shape[0], rows.shape[1], dtype=self.numerics.accumulate)

    def swiglu(
        self, gate_up: Tensor, limit: float | None, row_weight: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        return emit(out, len(gate_up), gate_up.shape[1] // 2, dtype=self.numerics.storage)
