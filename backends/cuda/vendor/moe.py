"""Routed experts in one kernel by DeepGEMM, where a run's profile and process group are what it needs.

What it does otherwise than the contract: hidden rows go from float32 to FP8 without being rounded to storage between,
and a token's sum is rounded to bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backend import Facts, Verdict
from dsv4_hal.backends.cuda.vendor import deep_gemm
from dsv4_hal.backends.cuda.vendor.common import Base, own_kernel
from dsv4_hal.formats import Weight
from dsv4_hal.numerics import Numerics
from dsv4_hal.ops import ContractError

FUNCTIONS = ("fp8_fp4_mega_moe", "get_symm_buffer_for_mega_moe")


class Moe(Base):
    def __init__(self, numerics: Numerics, device: torch.device | str | None = None) -> None:
        super().__init__(numerics, device)
        self._buffers: dict[tuple[int, ...], Any] = {}

    def supports(self, op: str, facts: Facts) -> Verdict:
        verdict = super().supports(op, facts)
        if op != "moe_experts":
            return verdict
        fmt = "mxfp4" if facts.get("expert_dtype", "fp4") == "fp4" else "another format"
        return verdict and self._fuses(fmt, facts.get("hidden_size", 128), facts.get("moe_intermediate_size", 128))

    def _fuses(self, fmt: str, hidden: int, inner: int) -> Verdict:
        arch = self.arch.name
        if fmt != "mxfp4":
            return Verdict(False, f"DeepGEMM's fused experts are in mxfp4, these in {fmt}")
        able = deep_gemm.able(arch, *FUNCTIONS)
        return able and deep_gemm.mega_verdict(arch, self.numerics.activation, hidden, inner)

    def moe_experts(
        self, x: Tensor, ids: Tensor, weights: Tensor, w13: Weight, w2: Weight, limit: float | None
    ) -> Tensor:
        ops.Moe.permute(self, x, ids, w13.data.shape[0])  # the preconditions
        (experts, both, hidden), inner = w13.shape, w2.shape[-1]
        if weights.shape != ids.shape or (both, w2.shape) != (2 * inner, (experts, hidden, inner)):
            raise ContractError(f"moe_experts: weights {tuple(weights.shape)}, w13 {w13.shape}, w2 {w2.shape}")
        verdict = self._fuses(w13.format.name if w13.format == w2.format else "two formats", hidden, inner)
        if not verdict:
            own_kernel("moe_experts", verdict)
            return super().moe_experts(x, ids, weights, w13, w2, limit)
        prepared = self.once(w13.data, lambda: deep_gemm.mega_weights(w13, w2))
        key = (experts, ids.shape[1], hidden, inner)
        if key not in self._buffers or len(self._buffers[key].x) < len(x):
            self._buffers[key] = deep_gemm.mega_buffer(experts, len(x), ids.shape[1], hidden, inner)
        coded = self.quantize(x, deep_gemm.MEGA_ROWS)
        y = deep_gemm.mega_moe(coded, ids, weights, prepared, limit, self._buffers[key])
        return y.to(self.numerics.accumulate)
