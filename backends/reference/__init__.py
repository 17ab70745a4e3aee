"""The reference backend: what every op means, in plain PyTorch, on any torch device, differentiable.

One file per family of the contract. Read `dsv4_hal/ops` for shapes and rules, and these files for the arithmetic.
"""

from dsv4_hal.backend import Backend
from dsv4_hal.backends.reference.attention import Attention
from dsv4_hal.backends.reference.cache import Cache
from dsv4_hal.backends.reference.gemm import Gemm
from dsv4_hal.backends.reference.hyper_connection import HyperConnection
from dsv4_hal.backends.reference.moe import Moe
from dsv4_hal.backends.reference.norm_rope import NormRope
from dsv4_hal.backends.reference.sampling import Sampling
from dsv4_hal.formats import RowLayout, plain_rows


class Reference(Attention, Cache, Moe, HyperConnection, NormRope, Gemm, Sampling, Backend):
    name = "reference"
    device_type = "cpu"

    def row_layout(self, kind: str, dim: int, rope: int, ratio: int, window: int = 0) -> RowLayout:
        """Rows are rounded as the profile says and stored as plain values, so that reading them back costs nothing."""
        if kind not in ("window", "entries", "index"):
            raise ValueError(f"unknown kind of cache row {kind!r}: window, entries or index")
        rounding = self.numerics.index if kind == "index" else self.numerics.kv
        kept = 0 if kind == "index" else rope
        return plain_rows(dim, kept, ratio, window, self.numerics.storage, rounding)


__all__ = ["Reference"]
