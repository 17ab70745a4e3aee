"""Matrix products: inputs rounded as the profile says, exact products, sums in the accumulator, one rounding."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_hal import formats, ops
from dsv4_hal.formats import Format, QTensor, Weight


class Gemm(ops.Gemm):
    def quantize(self, x: Tensor, fmt: Format) -> QTensor:
        return formats.quantize(x, fmt)

    def dequantize(self, w: QTensor, dtype: torch.dtype) -> Tensor:
        return formats.dequantize(w, dtype)

    def linear(
        self, x: Tensor | QTensor, w: Weight, out_dtype: torch.dtype | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        y = F.linear(self._input(x, w), values(w, self.numerics.accumulate))
        return emit(y.to(out_dtype or self.numerics.storage), out)

    def grouped_linear(
        self,
        rows: Tensor,
        w: Weight,
        offsets: Tensor,
        out_dtype: torch.dtype | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        w, x, bounds = in_order(w), self._input(rows, w), offsets.tolist()
        parts = [
            F.linear(x[start:stop], one_of(w, expert, self.numerics.accumulate))
            for expert, (start, stop) in enumerate(pairwise(bounds))
            if stop > start
        ]
        y = torch.cat(parts) if parts else x.new_zeros(0, w.shape[1])
        return emit(y.to(out_dtype or self.numerics.storage), out)

    def block_diagonal_linear(self, x: Tensor, w: Weight, *, out: Tensor | None = None) -> Tensor:
        wide = self.numerics.accumulate
        rounded = values(w, self.numerics.storage).to(wide)
        y = torch.bmm(x.to(wide).transpose(0, 1), rounded.transpose(1, 2)).transpose(0, 1)
        return emit(y.to(self.numerics.storage), out)

    def embedding(self, ids: Tensor, w: Weight) -> Tensor:
        return F.embedding(ids, in_order(w).data).to(self.numerics.storage)

    def _input(self, x: Tensor | QTensor, w: Weight) -> Tensor:
        """x as the product sees it: rounded in front of a quantised weight, widened to the accumulator."""
        if isinstance(x, QTensor):
            return formats.dequantize(x, self.numerics.accumulate)
        fmt, wide = self.numerics.activation, self.numerics.accumulate
        return x.to(wide) if fmt is None or w.format.plain else formats.simulate(x, fmt, wide)


def in_order(w: Weight) -> Weight:
    """The weight in the checkpoint's order. ContractError if another backend has rearranged it for good: it would be
    misread."""
    try:
        return w.ordered()
    except ValueError as error:
        raise ops.ContractError(f"{error}, which the reference reads") from error


def values(w: Weight, dtype: torch.dtype) -> Tensor:
    """A weight's values [..., out, in]."""
    return formats.dequantize(in_order(w), dtype)


def one_of(w: Weight, expert: int, dtype: torch.dtype) -> Tensor:
    """Values [out, in] of one matrix of a stack; a plain one without a Weight in between."""
    return w.data[expert].to(dtype) if w.format.plain else formats.dequantize(w[expert], dtype)


def emit(y: Tensor, out: Tensor | None) -> Tensor:
    """Honour `out=`; a result of one's own is contiguous."""
    return y.contiguous() if out is None else out.copy_(y)
