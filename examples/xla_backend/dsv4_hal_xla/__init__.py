"""DeepSeek-V4's ops in JAX: what a vendor's own package looks like.

One file per family of the contract, named as in the backends of dsv4-hal; `bridge` takes tensors to JAX and back, and
`formats` reads stored weights there. An op that has no file here runs as the reference's code, and is reported as that.
Importing this package does not import JAX: a machine that lacks it, or has a broken one, gets a reason.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import torch

from dsv4_hal.backend import BackendError, Facts, Verdict
from dsv4_hal.backends.reference import Reference
from dsv4_hal.formats import Weight
from dsv4_hal.numerics import Numerics
from dsv4_hal_xla.attention import Attention
from dsv4_hal_xla.bridge import ALIGNMENT, jax
from dsv4_hal_xla.formats import ROUNDED
from dsv4_hal_xla.gemm import Gemm
from dsv4_hal_xla.hyper_connection import HyperConnection
from dsv4_hal_xla.moe import Moe
from dsv4_hal_xla.norm_rope import NormRope


class XLA(Gemm, NormRope, Attention, Moe, HyperConnection, Reference):
    name = "xla"
    device_type = "cpu"
    automatic = False  # an example, slower than the reference on a CPU: only who names it gets it
    differentiable = False  # what goes through DLPack leaves no trace for torch's autograd

    def __init__(self, numerics: Numerics, device: torch.device | str | None = None) -> None:
        super().__init__(numerics, device)
        try:
            jax.devices()
        except Exception as error:  # an installed jax may break in any way it likes
            raise BackendError(f"backend xla: jax does not work: {type(error).__name__}: {error}") from error

    @classmethod
    def available(cls) -> Verdict:
        missing = [name for name in ("jax", "jaxlib") if find_spec(name) is None]
        if missing:
            return Verdict(False, f"{missing[0]} is not installed", "pip install jax")
        return Verdict(True, "jax is installed")

    @classmethod
    def environment(cls) -> dict[str, str]:
        devices = ", ".join(f"{d.platform} {d.device_kind}" for d in jax.devices())
        return {"jax": jax.__version__, "jaxlib": jax.lib.__version__, "jax devices": devices}

    def supports(self, op: str, facts: Facts) -> Verdict:
        n = self.numerics
        if self.origin(op).kind != "native":
            return super().supports(op, facts)
        if n.accumulate != torch.float32:
            return Verdict(False, f"sums in {n.accumulate}, and JAX has float32 unless told otherwise for everybody")
        unknown = [f.name for f in (n.activation, n.index) if f and (f.element not in ROUNDED or f.scale != "e8m0")]
        if unknown:
            return Verdict(False, f"rounds to e4m3 and e2m1 with e8m0 scales, not to {unknown[0]}")
        return Verdict(True, "no restriction")

    def repack(self, weight: Weight) -> Weight:
        """Codes where JAX can read them in place: those of a memory-mapped file seldom lie so."""
        if weight.data.data_ptr() % ALIGNMENT == 0:
            return weight
        return replace(weight, data=weight.data.clone())


__all__ = ["XLA"]
