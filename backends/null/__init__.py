"""The null backend: shapes and dtypes on the meta device, no arithmetic.

It answers what a model would allocate and call, without memory or a device: full-size models load and step in seconds.
Composites come from the contract, so that a composite's shapes are those of its parts.
"""

from dsv4_hal.backend import Backend
from dsv4_hal.backends.null.attention import Attention
from dsv4_hal.backends.null.cache import Cache
from dsv4_hal.backends.null.gemm import Gemm
from dsv4_hal.backends.null.hyper_connection import HyperConnection
from dsv4_hal.backends.null.moe import Moe
from dsv4_hal.backends.null.norm_rope import NormRope
from dsv4_hal.backends.null.sampling import Sampling
from dsv4_hal.formats import RowLayout, plain_rows


class Null(Attention, Cache, Moe, HyperConnection, NormRope, Gemm, Sampling, Backend):
    name = "null"
    device_type = "meta"

    def row_layout(self, kind: str, dim: int, rope: int, ratio: int, window: int = 0) -> RowLayout:
        """Plain rows, as the reference keeps them."""
        if kind not in ("window", "entries", "index"):
            raise ValueError(f"unknown kind of cache row {kind!r}: window, entries or index")
        rounding = self.numerics.index if kind == "index" else self.numerics.kv
        kept = 0 if kind == "index" else rope
        return plain_rows(dim, kept, ratio, window, self.numerics.storage, rounding)


__all__ = ["Null"]
