"""The backend `cuda-vendor`: the CUDA backend, with DeepGEMM's and FlashMLA's kernels where they serve an op.

A run asks for it by name, `backend: [cuda-vendor, cuda]`, since these libraries do not promise that a token's result
is the same in every batch. What they cannot serve, `explain` names with the reason, and the next backend runs.
"""

from __future__ import annotations

from dsv4_hal.backend import Verdict
from dsv4_hal.backends.cuda.vendor import probe
from dsv4_hal.backends.cuda.vendor.attention import Attention
from dsv4_hal.backends.cuda.vendor.gemm import Gemm
from dsv4_hal.backends.cuda.vendor.hyper_connection import HyperConnection
from dsv4_hal.backends.cuda.vendor.indexer import Indexer
from dsv4_hal.backends.cuda.vendor.moe import Moe


class CudaVendor(Attention, Indexer, Moe, HyperConnection, Gemm):
    """Where a call is outside what a library takes (a format, a width), the kernel of `cuda` runs, and a warning says
    so once, but for plain weights, which no library here is for."""

    name = "cuda-vendor"
    automatic = False

    @classmethod
    def available(cls) -> Verdict:
        base = super().available()
        if not base:
            return base
        found = {title: probe.verdict(library) for library, (title, _) in probe.LIBRARIES.items()}
        usable = [verdict.reason for verdict in found.values() if verdict]
        if usable:
            return Verdict(True, f"{base.reason}, with {' and '.join(usable)}")
        why = "; ".join(f"{title}: {verdict.reason}" for title, verdict in found.items())
        return Verdict(False, why, "; ".join(verdict.remedy for verdict in found.values() if verdict.remedy))


__all__ = ["CudaVendor"]
