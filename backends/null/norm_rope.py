"""Shapes of norms and rotations: those of their input."""

from __future__ import annotations

from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.null.gemm import emit, empty
from dsv4_hal.batch import CosSin


class NormRope(ops.NormRope):
    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float, *, out: Tensor | None = None) -> Tensor:
        return emit(out, *x.shape, dtype=x.dtype)

    def rope(self, x: Tensor, cos_sin: CosSin, inverse: bool = False, *, out: Tensor | None = None) -> Tensor:
        return emit(out, *x.shape, dtype=x.dtype)

    def hadamard(self, x: Tensor) -> Tensor:
        return empty(*x.shape, dtype=x.dtype)
