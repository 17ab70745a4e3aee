"""The contract: every op that a DeepSeek-V4 model is written in, one file per family.

`Ops` is the type the model sees. A backend implements it (`dsv4_hal.backend.Backend`); `dsv4_hal.dispatch.resolve`
makes the object whose methods check the preconditions and then run the chosen implementation.
"""

from dsv4_hal.formats import RowLayout, Weight
from dsv4_hal.ops.attention import Attention
from dsv4_hal.ops.cache import KV, Cache, CompressorWeights
from dsv4_hal.ops.gemm import Gemm
from dsv4_hal.ops.hyper_connection import HyperConnection
from dsv4_hal.ops.moe import Moe
from dsv4_hal.ops.norm_rope import NormRope
from dsv4_hal.ops.sampling import Sampling
from dsv4_hal.ops.spec import OPS, SIZES, Case, Compare, ContractError, OpSpec, Tolerance


class Ops(Attention, Cache, Moe, HyperConnection, Sampling):
    """All ops of the contract, and the two questions a model asks of a backend beside them."""

    def row_layout(self, kind: str, dim: int, rope: int, ratio: int, window: int = 0) -> RowLayout:
        """How cache rows are rounded and stored.

        kind    "window" (a row per token), "entries" (compressed; in both the last `rope` channels stay unrounded) or
                "index" (indexer keys)
        ratio   tokens per row; window: keys a token sees, itself included (kind "window" only)
        ValueError for another kind, or for widths that the layout cannot hold
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it stores {kind} rows")

    def repack(self, weight: Weight) -> Weight:
        """The checkpoint's weight in the arrangement that these ops read. Called once per weight, at load."""
        return weight


FAMILIES = tuple(dict.fromkeys(spec.family for spec in OPS.values()))

__all__ = [
    "FAMILIES",
    "KV",
    "OPS",
    "SIZES",
    "Attention",
    "Cache",
    "Case",
    "Compare",
    "CompressorWeights",
    "ContractError",
    "Gemm",
    "HyperConnection",
    "Moe",
    "NormRope",
    "OpSpec",
    "Ops",
    "Sampling",
    "Tolerance",
]
