"""Formats, and matrix products over them. Embedding is the reference's: a look-up is nothing to write a kernel for."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.cuda.devices import Arch
from dsv4_hal.backends.cuda.tiles import GEMM
from dsv4_hal.backends.reference.gemm import in_order
from dsv4_hal.backends.triton_kernels import gemm as kernels
from dsv4_hal.backends.triton_kernels import quantize as formats
from dsv4_hal.backends.triton_kernels.runtime import emit, result
from dsv4_hal.formats import Format, QTensor, Weight


class Gemm(ops.Gemm):
    arch: Arch

    def quantize(self, x: Tensor, fmt: Format) -> QTensor:
        """Float64 is the reference's, in its own arithmetic."""
        if not fmt.plain and fmt.element != "e4m3" and not bool(x.isfinite().all()):
            raise ValueError(f"{fmt.name} has no code for NaN or infinity, which a tensor {tuple(x.shape)} holds")
        return formats.encode(x, fmt)

    def dequantize(self, w: QTensor, dtype: torch.dtype) -> Tensor:
        """Float64 is the reference's, in its own arithmetic."""
        return formats.decode(w, dtype)

    def linear(
        self, x: Tensor | QTensor, w: Weight, out_dtype: torch.dtype | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        made = result((x.shape[0], w.shape[0]), out_dtype or self.numerics.storage, x.device, out)
        return emit(kernels.matmul(self.activation(x, w), in_order(w), made, self.units), out)

    def grouped_linear(
        self,
        rows: Tensor,
        w: Weight,
        offsets: Tensor,
        out_dtype: torch.dtype | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        made = result((rows.shape[0], w.shape[1]), out_dtype or self.numerics.storage, rows.device, out)
        return emit(kernels.matmul(self.activation(rows, w), in_order(w), made, self.units, offsets.contiguous()), out)

    def block_diagonal_linear(self, x: Tensor, w: Weight, *, out: Tensor | None = None) -> Tensor:
        made = result((*x.shape[:2], w.shape[1]), self.numerics.storage, x.device, out)
        return emit(kernels.matmul(x, in_order(w), made, self.units, fold=True), out)

    def activation(self, x: Tensor | QTensor, w: Weight) -> Tensor | QTensor:
        """x as the product with w sees it: in front of a quantised weight, codes and scales, if the profile says so."""
        fmt = self.numerics.activation
        return x if isinstance(x, QTensor) or fmt is None or w.format.plain else formats.encode(x, fmt)

    @property
    def units(self) -> kernels.Units:
        return kernels.Units(self.arch.fp8, self.arch.products, self.arch.scaled, GEMM[self.arch.name])
