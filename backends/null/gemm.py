"""Shapes of matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.formats import Format, QTensor, Weight


class Gemm(ops.Gemm):
    def quantize(self, x: Tensor, fmt: Format) -> QTensor:
        shape = tuple(x.shape)
        scale = fmt.scale_shape(shape)
        return QTensor(
            empty(*fmt.data_shape(shape), dtype=fmt.storage),
            None if scale is None else torch.empty(scale, dtype=fmt.scale_dtype, device="meta"),
            fmt,
        )

    def dequantize(self, w: QTensor, dtype: torch.dtype) -> Tensor:
        return empty(*w.shape, dtype=dtype)

    def linear(
        self, x: Tensor | QTensor, w: Weight, out_dtype: torch.dtype | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        return emit(out, x.shape[0], w.shape[0], dtype=out_dtype or self.numerics.storage)

    def grouped_linear(
        self,
        rows: Tensor,
        w: Weight,
        offsets: Tensor,
        out_dtype: torch.dtype | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        return emit(out, len(rows), w.shape[1], dtype=out_dtype or self.numerics.storage)

    def block_diagonal_linear(self, x: Tensor, w: Weight, *, out: Tensor | None = None) -> Tensor:
        return emit(out, *x.shape[:2], w.shape[1], dtype=self.numerics.storage)

    def embedding(self, ids: Tensor, w: Weight) -> Tensor:
        return empty(len(ids), w.shape[1], dtype=self.numerics.storage)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def emit(out: Tensor | None, *shape: int, dtype: torch.dtype) -> Tensor:
    """Honour `out=`."""
    return empty(*shape, dtype=dtype) if out is None else out
