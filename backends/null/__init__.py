"""The null backend: shapes and dtypes on the meta device, no arithmetic.

It answers what a model would allocate and call, without memory or a device: full-size models load and step in seconds.
Composites come from the contract, so that a composite's shapes are those of its parts.
"""

import torch

from dsv4_hal.backend import Backend, BackendError
from dsv4_hal.backends.null.attention import Attention
from dsv4_hal.backends.null.cache import Cache
from dsv4_hal.backends.null.gemm import Gemm
from dsv4_hal.backends.null.hyper_connection import HyperConnection
from dsv4_hal.backends.null.moe import Moe
from dsv4_hal.backends.null.norm_rope import NormRope
from dsv4_hal.backends.null.sampling import Sampling
from dsv4_hal.numerics import Numerics


class Null(Attention, Cache, Moe, HyperConnection, NormRope, Gemm, Sampling, Backend):
    name = "null"
    device_type = "meta"
    automatic = False
    differentiable = False

    def __init__(self, numerics: Numerics, device: torch.device | str | None = None) -> None:
        super().__init__(numerics, device)
        if self.device.type != "meta":
            raise BackendError(f"backend null makes shapes, on the meta device; it has no values to put on {device}")


__all__ = ["Null"]
