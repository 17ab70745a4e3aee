"""Matrix products over stored formats, and the formats themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.formats import Format, QTensor, Weight
from dsv4_hal.ops.cases import gemm as cases
from dsv4_hal.ops.family import Family
from dsv4_hal.ops.spec import Compare, ContractError, Tolerance, check_dtype, check_out, primitive

_GEMM = Tolerance(Compare.NMSE, 4.0, "the order of a long sum is free; every rounding of its inputs and result is not")
_BITS = Tolerance(Compare.BITWISE, 0.0, "rounding to a format has one right answer")


class Gemm(Family):
    @primitive(_BITS, cases.quantize)
    def quantize(self, x: Tensor, fmt: Format) -> QTensor:
        """Round x [..., K] to `fmt`: codes and one scale per block of the last axis (or last two).

        amax = max(|block|, fmt.floor); scale = amax / fmt.top, raised to a power of two where the format stores e8m0;
        codes = x / scale rounded to nearest even, saturating. Arithmetic in float32, or float64 for float64 x.
        Raises ContractError unless x is floating, and ValueError where it holds NaN or infinity and the element has no
        code for it (e2m1, int8, int4; a check that waits for the device). Source: published quantisers; OCP MX.
        """
        if not x.is_floating_point():
            raise ContractError(f"quantize: x must be floating, got {x.dtype}")

    @primitive(_BITS, cases.dequantize)
    def dequantize(self, w: QTensor, dtype: torch.dtype) -> Tensor:
        """Values of w [..., K], code x scale, computed in float32 (float64 if dtype is) and rounded once to `dtype`."""
        if not dtype.is_floating_point:
            raise ContractError(f"dequantize: dtype must be floating, got {dtype}")

    @primitive(_GEMM, cases.linear, grad=("x", "w"))
    def linear(
        self, x: Tensor | QTensor, w: Weight, out_dtype: torch.dtype | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """x [T, K] times w [N, K] transposed -> [T, N].

        x          in numerics.storage, or already quantised along K. Where w is quantised and the profile quantises
                   activations, a plain x is first rounded to numerics.activation (per token and block of channels).
        out_dtype  default numerics.storage; the result is rounded to it once from the accumulator
        out        written and returned, if given
        Products are exact, sums are in numerics.accumulate. Raises ContractError on widths or dtypes that differ.
        Source: published inference code (FP8 and FP4 linear layers).
        """
        if w.data.dim() != 2:
            raise ContractError(f"linear: {w.name or 'w'} must be [N, K], got {w.shape}")
        if x.shape[-1] != w.shape[-1] or len(x.shape) != 2:
            raise ContractError(
                f"linear: x {tuple(x.shape)} does not fit {w.name or 'w'} {w.shape}: need x [T, K], w [N, K]"
            )
        if isinstance(x, Tensor):
            check_dtype("linear", "x", x, self.numerics.storage)
        check_out("linear", out, (x.shape[0], w.data.shape[0]), out_dtype or self.numerics.storage)

    @primitive(_GEMM, cases.grouped_linear, grad=("rows", "w"))
    def grouped_linear(
        self,
        rows: Tensor,
        w: Weight,
        offsets: Tensor,
        out_dtype: torch.dtype | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Rows of expert e times its own matrix: rows [M, K], w [E, N, K], offsets [E + 1] int64 -> [M, N].

        Rows offsets[e] .. offsets[e + 1] - 1 belong to expert e; offsets rises from 0 to M. Rounding as in `linear`.
        An expert without rows is not read.
        """
        if w.data.dim() != 3:
            raise ContractError(f"grouped_linear: {w.name or 'w'} must be [E, N, K], got {w.shape}")
        if rows.dim() != 2 or rows.shape[-1] != w.shape[-1]:
            raise ContractError(f"grouped_linear: rows {tuple(rows.shape)} do not fit {w.name or 'w'} {w.shape}")
        if offsets.shape != (w.data.shape[0] + 1,) or offsets.dtype != torch.int64:
            raise ContractError(
                f"grouped_linear: offsets must be int64 [{w.data.shape[0] + 1}], "
                f"got {offsets.dtype} {tuple(offsets.shape)}"
            )
        check_dtype("grouped_linear", "rows", rows, self.numerics.storage)
        check_out("grouped_linear", out, (rows.shape[0], w.data.shape[1]), out_dtype or self.numerics.storage)

    @primitive(_GEMM, cases.block_diagonal_linear, grad=("x", "w"))
    def block_diagonal_linear(self, x: Tensor, w: Weight, *, out: Tensor | None = None) -> Tensor:
        """Group g of x times its own matrix: x [T, G, K], w [G, N, K] -> [T, G, N] in numerics.storage.

        x is never quantised here. A quantised w is dequantised and rounded once to numerics.storage first: the
        published code converts this weight (wo_a) when it loads. Sums in numerics.accumulate.
        """
        if w.data.dim() != 3 or x.dim() != 3 or x.shape[1] != w.data.shape[0] or x.shape[-1] != w.shape[-1]:
            raise ContractError(
                f"block_diagonal_linear: x {tuple(x.shape)} does not fit {w.name or 'w'} {w.shape}: "
                "need x [T, G, K], w [G, N, K]"
            )
        check_dtype("block_diagonal_linear", "x", x, self.numerics.storage)
        check_out("block_diagonal_linear", out, (*x.shape[:2], w.data.shape[1]), self.numerics.storage)

    @primitive(_BITS, cases.embedding, grad=("w",))
    def embedding(self, ids: Tensor, w: Weight) -> Tensor:
        """Rows of w [V, D] for ids [T] int64 -> [T, D], rounded to numerics.storage.

        Ids outside 0 .. V - 1 are the caller's error: the model checks them where that needs no device sync.
        """
        if ids.dim() != 1 or ids.dtype != torch.int64:
            raise ContractError(f"embedding: ids must be int64 [T], got {ids.dtype} {tuple(ids.shape)}")
        if w.data.dim() != 2 or not w.format.plain:
            raise ContractError(f"embedding: {w.name or 'w'} must be a plain [V, D], got {w.format.name} {w.shape}")
