"""The routed experts of a layer: two products with everything between them in the first one's kernel. The shared expert
is the composite: its products are one matrix each, and cut along K where rows are few."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.cuda.gemm import Gemm
from dsv4_hal.backends.cuda.tiles import EXPERTS
from dsv4_hal.backends.reference.gemm import in_order
from dsv4_hal.backends.triton_kernels.experts import hidden_rows
from dsv4_hal.backends.triton_kernels.gemm import ACTIVATION, Units, matmul
from dsv4_hal.backends.triton_kernels.moe import expert_order, inverse, sum_rows
from dsv4_hal.formats import QTensor, Weight


class Experts(Gemm, ops.Moe):
    def moe_experts(
        self, x: Tensor, ids: Tensor, weights: Tensor, w13: Weight, w2: Weight, limit: float | None
    ) -> Tensor:
        ops.Moe.permute(self, x, ids, w13.data.shape[0])
        offsets, order = expert_order(ids, w13.data.shape[0])
        ops.Moe.grouped_linear(self, x, w13, offsets)
        gate_up = x.new_empty(len(order), w13.shape[1], device="meta")
        ops.Moe.swiglu(self, gate_up, limit, weights.reshape(-1))
        ops.Moe.grouped_linear(self, gate_up[:, ::2], w2, offsets)
        hidden = self._hidden(x, w13, w2, limit, (offsets, order, weights))
        rows = torch.empty(len(order), w2.shape[1], dtype=self.numerics.storage, device=x.device)
        matmul(hidden, in_order(w2), rows, self.units, offsets)
        return sum_rows(rows, inverse(order), (ids.shape[0], ids.shape[1]))

    def _hidden(
        self,
        x: Tensor,
        w13: Weight,
        w2: Weight,
        limit: float | None,
        routed: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor | QTensor:
        """Hidden rows as the product with w2 takes them."""
        coded = not w2.format.plain and self.numerics.activation == ACTIVATION
        units = Units(self.arch.fp8, self.arch.products, self.arch.scaled, EXPERTS[self.arch.name])
        w13, storage = in_order(w13), self.numerics.storage
        return self.activation(hidden_rows(self.activation(x, w13), w13, storage, limit, units, coded, routed), w2)
