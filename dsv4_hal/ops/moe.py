"""Mixture of experts: routing, the permutation to expert order, the clamped SwiGLU, and their composites."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.formats import Weight
from dsv4_hal.ops.cases import moe as cases
from dsv4_hal.ops.gemm import Gemm
from dsv4_hal.ops.spec import Compare, ContractError, Tolerance, check_out, composite, primitive

_ROUTE = Tolerance(Compare.SELECTION, 4.0, "experts whose scores are within rounding error may change places")
_COPY = Tolerance(Compare.BITWISE, 0.0, "a copy in an order the contract fixes")
_SUM = Tolerance(Compare.NMSE, 4.0, "the order of the sum over a token's experts is free")
_SWIGLU = Tolerance(Compare.NMSE, 4.0, "the exponential in silu is free in its last bit")
_ORDERS = "the orders of the sums are free; the rounding of the hidden rows is not"
_EXPERTS = Tolerance(Compare.NMSE, 4.0, _ORDERS)


class Moe(Gemm):
    @primitive(_ROUTE, cases.route, grad=("logits",))
    def route(
        self, logits: Tensor, k: int, scale: float, bias: Tensor | None = None, picks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Experts of each token and their weights -> (ids int64 [T, k], weights [T, k] in numerics.accumulate).

        logits  [T, E] in numerics.accumulate; s = sqrt(softplus(logits)), softplus linear above 20
                one of a token's picks must be above -80: further down s underflows, and has no sum to divide by
        bias    [E], added to s for choosing only (load balance), never in the weights
        picks   [T, k] int64 ids to use instead of the k best: hash routing, replay and anticipatory routing
        weights = s[ids] / sum(s[ids]) * scale: normalised once, scaled once. Best first, equal scores lower id first.
        Raises ContractError if picks do not have one row per token. Source: DeepSeek-V4 report, section 2.1.
        """
        if logits.dim() != 2 or logits.dtype != self.numerics.accumulate:
            raise ContractError(
                f"route: logits must be [T, E] {self.numerics.accumulate}, got {logits.dtype} {tuple(logits.shape)}"
            )
        if not 0 < k <= logits.shape[1]:
            raise ContractError(f"route: k {k} of {logits.shape[1]} experts")
        if bias is not None and bias.shape != logits.shape[1:]:
            raise ContractError(f"route: bias {tuple(bias.shape)}, need [{logits.shape[1]}]")
        if picks is not None and (picks.shape != (logits.shape[0], k) or picks.dtype != torch.int64):
            raise ContractError(f"route: picks {picks.dtype} {tuple(picks.shape)}, need int64 {(logits.shape[0], k)}")

    @primitive(_COPY, cases.permute, grad=("x",))
    def permute(self, x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copy token rows into expert order -> (rows [T * k, d], offsets [E + 1] int64, order [T * k] int64).

        ids [T, k] int64 in 0 .. experts - 1. order[j] is the flat (token, slot) that row j came from: sorted by expert,
        then by token, then by slot. Rows of expert e are offsets[e] .. offsets[e + 1] - 1. Ids outside
        that range are the caller's error: a check would wait for the device; hash tables are checked when loaded.
        """
        if ids.dim() != 2 or ids.shape[0] != x.shape[0] or ids.dtype != torch.int64:
            raise ContractError(f"permute: ids {ids.dtype} {tuple(ids.shape)} for x {tuple(x.shape)}")

    @primitive(_SUM, cases.unpermute, grad=("rows",))
    def unpermute(self, rows: Tensor, order: Tensor, shape: tuple[int, int]) -> Tensor:
        """Sum each token's rows: rows [T * k, d] in expert order, shape (T, k) -> [T, d] in numerics.accumulate."""
        if order.shape != rows.shape[:1] or shape[0] * shape[1] != rows.shape[0]:
            raise ContractError(f"unpermute: rows {tuple(rows.shape)}, order {tuple(order.shape)}, shape {shape}")

    @primitive(_SWIGLU, cases.swiglu, grad=("gate_up", "row_weight"))
    def swiglu(
        self, gate_up: Tensor, limit: float | None, row_weight: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """silu(gate) * up * row_weight: gate_up [M, 2 * I], gate in the first half -> [M, I] in numerics.storage.

        limit       gate is clamped from above to limit, up to -limit .. limit, before anything else; None: no clamp
        row_weight  [M] routing weight, multiplied in front of the rounding
        In numerics.accumulate, rounded once. Source: DeepSeek-V4 report, section 4.2.3; published inference code.
        """
        if gate_up.dim() != 2 or gate_up.shape[1] % 2:
            raise ContractError(f"swiglu: gate_up must be [M, 2 * I], got {tuple(gate_up.shape)}")
        if limit is not None and not limit > 0:
            raise ContractError(f"swiglu: limit must be positive or None, got {limit}")
        if row_weight is not None and row_weight.shape != gate_up.shape[:1]:
            raise ContractError(f"swiglu: row_weight {tuple(row_weight.shape)} for {gate_up.shape[0]} rows")
        check_out("swiglu", out, (gate_up.shape[0], gate_up.shape[1] // 2), self.numerics.storage)

    @composite(_EXPERTS, cases.moe_experts, grad=("x", "weights", "w13", "w2"))
    def moe_experts(
        self, x: Tensor, ids: Tensor, weights: Tensor, w13: Weight, w2: Weight, limit: float | None
    ) -> Tensor:
        """Routed experts of x [T, d] -> [T, d] in numerics.accumulate.

        ids, weights  [T, k] from `route`;  w13 [E, 2 * I, d] (gate rows, then up rows);  w2 [E, d, I]
        The routing weight multiplies the hidden row, in front of its rounding and of w2.
        """
        rows, offsets, order = self.permute(x, ids, w13.data.shape[0])
        hidden = self.swiglu(self.grouped_linear(rows, w13, offsets), limit, weights.flatten()[order])
        return self.unpermute(self.grouped_linear(hidden, w2, offsets), order, (ids.shape[0], ids.shape[1]))

    @composite(_EXPERTS, cases.mlp, grad=("x", "w13", "w2"))
    def mlp(self, x: Tensor, w13: Weight, w2: Weight, limit: float | None) -> Tensor:
        """The shared expert: x [T, d], w13 [2 * I, d], w2 [d, I] -> [T, d] in numerics.storage."""
        return self.linear(self.swiglu(self.linear(x, w13), limit), w2)
