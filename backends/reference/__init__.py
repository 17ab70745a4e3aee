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


class Reference(Attention, Cache, Moe, HyperConnection, NormRope, Gemm, Sampling, Backend):
    name = "reference"
    device_type = "cpu"


__all__ = ["Reference"]
