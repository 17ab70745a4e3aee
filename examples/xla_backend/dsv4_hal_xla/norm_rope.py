"""RMS norms and rotary embedding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.reference.gemm import emit
from dsv4_hal.batch import CosSin
from dsv4_hal_xla.bridge import bucket, dtype, jnp, kernel, lax, padded, rounded


@kernel("wide")
def norm(x: Any, weight: Any, eps: float, *, wide: torch.dtype) -> Any:
    v = x.astype(dtype(wide))
    root = lax.rsqrt(jnp.square(v).mean(-1, keepdims=True) + eps)
    return (v * root * weight.astype(v.dtype)).astype(x.dtype)


@kernel("wide", "narrow")
def head_norm(x: Any, eps: float, *, wide: torch.dtype, narrow: torch.dtype) -> Any:
    """Squares, mean, mean + eps and root are rounded one by one, as the published query norm does."""
    v = x.astype(dtype(wide))
    mean = rounded(rounded(jnp.square(v), narrow).mean(-1, keepdims=True), narrow)
    root = rounded(lax.rsqrt(rounded(mean + eps, narrow)), narrow)
    return (v * root).astype(x.dtype)


@kernel("inverse")
def rotate(x: Any, cos: Any, sin: Any, *, inverse: bool) -> Any:
    """x [N, heads, D]; the last 2 R channels turn, in interleaved pairs."""
    sin = -sin if inverse else sin
    half = cos.shape[-1]
    kept = x.shape[-1] - 2 * half
    pairs = x[..., kept:].astype(cos.dtype).reshape(*x.shape[:-1], half, 2)
    a, b, cos, sin = pairs[..., 0], pairs[..., 1], cos[:, None], sin[:, None]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(*x.shape[:-1], 2 * half)
    return jnp.concatenate([x[..., :kept], turned.astype(x.dtype)], -1)


class NormRope(ops.NormRope):
    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float, *, out: Tensor | None = None) -> Tensor:
        flat, n = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), self.numerics
        rows = padded(flat, bucket(len(flat)))
        if weight is None:
            y = head_norm(rows, eps, wide=n.accumulate, narrow=n.q_norm)
        else:
            y = norm(rows, weight, eps, wide=n.accumulate)
        return emit(y[: len(flat)].view(x.shape), out)

    def rope(self, x: Tensor, cos_sin: CosSin, inverse: bool = False, *, out: Tensor | None = None) -> Tensor:
        rows = bucket(len(x))
        cos, sin = (padded(table, rows) for table in cos_sin)
        heads = padded(x, rows).reshape(rows, math.prod(x.shape[1:-1]), x.shape[-1])
        return emit(rotate(heads, cos, sin, inverse=inverse)[: len(x)].view(x.shape), out)
