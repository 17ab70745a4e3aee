"""RMS norms, rotary embedding, Hadamard rotation."""

from __future__ import annotations

from torch import Tensor

from dsv4_hal.batch import CosSin
from dsv4_hal.ops.cases import norm_rope as cases
from dsv4_hal.ops.family import Family
from dsv4_hal.ops.spec import Compare, ContractError, Tolerance, check_out, composite, primitive

_NORM = Tolerance(Compare.NMSE, 4.0, "the order of the sum of squares and the last bit of rsqrt are free")
_ROPE = Tolerance(Compare.NMSE, 4.0, "a fused multiply-add rounds once where two operations round twice")
_HADAMARD = Tolerance(Compare.NMSE, 4.0, "the order of the sum over channels is free")


class NormRope(Family):
    @primitive(_NORM, cases.rms_norm, grad=("x", "weight"))
    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float, *, out: Tensor | None = None) -> Tensor:
        """x * rsqrt(mean(x^2) + eps) * weight over the last axis: x [..., D], weight [D] -> [..., D] in x's dtype.

        With a weight: everything in numerics.accumulate, one rounding at the end.
        Without (the per-head query norm): squares, mean, mean + eps and reciprocal root are each rounded to
        numerics.q_norm, as the published code does, and the product to x's dtype; the mean is summed in
        numerics.accumulate.
        """
        if weight is not None and weight.shape != x.shape[-1:]:
            raise ContractError(f"rms_norm: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
        check_out("rms_norm", out, x.shape, x.dtype)

    @primitive(_ROPE, cases.rope, grad=("x",))
    def rope(self, x: Tensor, cos_sin: CosSin, inverse: bool = False, *, out: Tensor | None = None) -> Tensor:
        """Rotate the last channels of x [N, ..., D] by per-row angles; the others pass unchanged.

        cos_sin  two tables [N, R / 2] in numerics.accumulate; the last R channels are rotated in interleaved pairs
                 (2i, 2i + 1): (a, b) -> (a cos - b sin, a sin + b cos)
        inverse  rotate back by the same angles
        Products in numerics.accumulate, one rounding to x's dtype. Source: published inference code (rotary embedding).
        """
        cos, sin = cos_sin
        if x.dim() < 2 or cos.shape != sin.shape or cos.dim() != 2 or cos.shape[0] != x.shape[0]:
            raise ContractError(
                f"rope: tables {tuple(cos.shape)}, {tuple(sin.shape)} do not fit x {tuple(x.shape)}: "
                "need x [N, ..., D], tables [N, R / 2]"
            )
        if 2 * cos.shape[1] > x.shape[-1]:
            raise ContractError(f"rope: {2 * cos.shape[1]} rotary channels do not fit {x.shape[-1]}")
        check_out("rope", out, x.shape, x.dtype)

    @primitive(_HADAMARD, cases.hadamard, grad=("x",))
    def hadamard(self, x: Tensor) -> Tensor:
        """x [..., D] times the Sylvester Hadamard matrix, divided by sqrt(D): orthonormal and its own inverse.

        D is a power of two. Sums in numerics.accumulate, one rounding to x's dtype. Source: published indexer.
        """
        d = x.shape[-1] if x.dim() else 0
        if d < 1 or d & (d - 1):
            raise ContractError(f"hadamard: width must be a power of two, got {d}")

    @composite(_NORM, cases.q_norm_rope, grad=("q",))
    def q_norm_rope(self, q: Tensor, eps: float, cos_sin: CosSin) -> Tensor:
        """Per-head query norm without a weight, then RoPE: q [T, H, D] -> [T, H, D] in q's dtype."""
        return self.rope(self.rms_norm(q, None, eps), cos_sin)
