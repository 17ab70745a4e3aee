"""The clamped SwiGLU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backends.reference.gemm import emit
from dsv4_hal.numerics import Numerics
from dsv4_hal_xla.bridge import bucket, dtype, jax, jnp, kernel, padded


@kernel("limit", "numerics")
def gated(gate_up: Any, row_weight: Any, *, limit: float | None, numerics: Numerics) -> Any:
    gate, up = jnp.split(gate_up.astype(dtype(numerics.accumulate)), 2, -1)
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    hidden = jax.nn.silu(gate) * up
    hidden = hidden if row_weight is None else hidden * row_weight[:, None]
    return hidden.astype(dtype(numerics.storage))


class Moe(ops.Moe):
    def swiglu(
        self, gate_up: Tensor, limit: float | None, row_weight: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        rows = bucket(len(gate_up))
        weight = None if row_weight is None else padded(row_weight, rows)
        y = gated(padded(gate_up, rows), weight, limit=limit, numerics=self.numerics)
        return emit(y[: len(gate_up)], out)
