"""Wrong products and formats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsv4_hal.conformance.mutants.hunt import mutant, with_profile
from dsv4_hal.formats import QTensor


@mutant("FP4: the nibbles of a byte change places", "dequantize")
def nibbles_swapped(right: Any, self: Any, w: QTensor, dtype: torch.dtype) -> Tensor:
    if w.format.pack != 2:
        return right.dequantize(self, w, dtype)
    codes = w.data.view(torch.uint8)
    swapped = ((codes << 4) | (codes >> 4)).view(w.data.dtype)
    return right.dequantize(self, QTensor(swapped, w.scale, w.format), dtype)


@mutant("quantisation: scales are off by one power of two", "quantize")
def scale_doubled(right: Any, self: Any, x: Tensor, fmt: Any) -> QTensor:
    q = right.quantize(self, x, fmt)
    if q.scale is None:
        return q
    return QTensor(q.data, (q.scale.float() * 2).to(q.scale.dtype), fmt)


@mutant("quantisation: what lies halfway is rounded down", "quantize")
def ties_cut(right: Any, self: Any, x: Tensor, fmt: Any) -> QTensor:
    return right.quantize(self, x.float() * (1 - 2.0**-20), fmt)


@mutant("FP8: activations in front of a quantised weight are not rounded", "linear")
def activation_unrounded(right: Any, self: Any, x: Any, w: Any, *args: Any, **kwargs: Any) -> Tensor:
    return right.linear(with_profile(self, activation=None), x, w, *args, **kwargs)


@mutant("FP8: a scale is read one block further", "linear")
def scale_of_the_next_block(right: Any, self: Any, x: Any, w: Any, *args: Any, **kwargs: Any) -> Tensor:
    if w.scale is not None:
        w = replace(w, scale=w.scale.roll(-1, -1))
    return right.linear(self, x, w, *args, **kwargs)


@mutant("MoE: an expert reads the weights of its neighbour", "grouped_linear")
def expert_off_by_one(
    right: Any, self: Any, rows: Tensor, w: Any, offsets: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    scale = None if w.scale is None else w.scale.roll(1, 0)
    return right.grouped_linear(self, rows, replace(w, data=w.data.roll(1, 0), scale=scale), offsets, *args, **kwargs)
