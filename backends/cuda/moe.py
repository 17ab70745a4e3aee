"""Mixture of experts: routing, the permutation to expert order, the clamped SwiGLU."""

from __future__ import annotations

from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.triton_kernels import moe as kernels
from dsv4_hal.backends.triton_kernels.runtime import emit, result


class Moe(ops.Moe):
    def route(
        self, logits: Tensor, k: int, scale: float, bias: Tensor | None = None, picks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return kernels.route(logits, k, scale, bias, picks)

    def permute(self, x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        offsets, order = kernels.expert_order(ids, experts)
        return kernels.take_rows(x, order, ids.shape[1]), offsets, order

    def unpermute(self, rows: Tensor, order: Tensor, shape: tuple[int, int]) -> Tensor:
        return kernels.sum_rows(rows, kernels.inverse(order), shape)

    def swiglu(
        self, gate_up: Tensor, limit: float | None, row_weight: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        made = result((gate_up.shape[0], gate_up.shape[1] // 2), self.numerics.storage, gate_up.device, out)
        return emit(kernels.swiglu(gate_up, made, limit, row_weight), out)
