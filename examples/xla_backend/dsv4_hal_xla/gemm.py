"""Matrix products: weights are decoded inside the compiled function, in whatever format they are stored."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.reference.gemm import emit
from dsv4_hal.formats import Format, QTensor, Weight, plain_format
from dsv4_hal_xla.bridge import bucket, dtype, kernel, long_sum, padded
from dsv4_hal_xla.formats import decode, simulate


@kernel("x_format", "w_format", "activation", "out_dtype")
def product(
    x: Any, x_scale: Any, w: Any, w_scale: Any, *, x_format: Format, w_format: Format, activation: Any, out_dtype: Any
) -> Any:
    x = decode(x, x_scale, x_format)
    x = x if activation is None else simulate(x, activation)
    return long_sum("ti,oi->to", x, decode(w, w_scale, w_format)).astype(dtype(out_dtype))


class Gemm(ops.Gemm):
    def linear(
        self, x: Tensor | QTensor, w: Weight, out_dtype: torch.dtype | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        return emit(self._product(x, w, out_dtype or self.numerics.storage), out)

    def grouped_linear(
        self,
        rows: Tensor,
        w: Weight,
        offsets: Tensor,
        out_dtype: torch.dtype | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        narrow = out_dtype or self.numerics.storage
        y = torch.empty(len(rows), w.shape[1], dtype=narrow, device=rows.device) if out is None else out
        for expert, (start, stop) in enumerate(pairwise(offsets.tolist())):
            if stop > start:
                y[start:stop] = self._product(rows[start:stop], w[expert], narrow)
        return y

    def _product(self, x: Tensor | QTensor, w: Weight, out_dtype: torch.dtype) -> Tensor:
        if w.layout != "checkpoint":
            raise ops.ContractError(f"{w.name or 'weight'} is arranged as {w.layout}, xla reads checkpoint order")
        activation = None
        if isinstance(x, Tensor):
            activation = None if w.format.plain else self.numerics.activation
            x = QTensor(x, None, plain_format(x.dtype))
        rows = bucket(x.shape[0])
        scales = x.format.scale_shape((rows, x.shape[1]))
        scale = None if x.scale is None or scales is None else padded(x.scale, scales[0])
        y = product(
            padded(x.data, rows),
            scale,
            w.data,
            w.scale,
            x_format=x.format,
            w_format=w.format,
            activation=activation,
            out_dtype=out_dtype,
        )
        return y[: x.shape[0]]
