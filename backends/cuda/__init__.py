"""DeepSeek-V4's ops on NVIDIA GPUs, in Triton.

One file per family of the contract; the kernels lie in `dsv4_hal.backends.triton_kernels`. Where there is no GPU,
`TRITON_INTERPRET=1` runs the same kernels, with the same numbers, in Triton's interpreter on the CPU: for checking.
Importing this package imports triton, and fails where that is missing or broken: the registry says so.
"""

from __future__ import annotations

import torch
import triton

from dsv4_hal.backend import BackendError, Facts, Verdict
from dsv4_hal.backends.cuda.attention import Attention
from dsv4_hal.backends.cuda.autograd import Differentiable
from dsv4_hal.backends.cuda.cache import Cache
from dsv4_hal.backends.cuda.devices import ARCHS, DEFAULT, Arch, assumed, present
from dsv4_hal.backends.cuda.experts import Experts
from dsv4_hal.backends.cuda.gemm import Gemm
from dsv4_hal.backends.cuda.hyper_connection import HyperConnection
from dsv4_hal.backends.cuda.moe import Moe
from dsv4_hal.backends.cuda.norm_rope import NormRope
from dsv4_hal.backends.cuda.sampling import Sampling
from dsv4_hal.backends.cuda.vendor import probe
from dsv4_hal.backends.reference import Reference
from dsv4_hal.backends.triton_kernels.runtime import INTERPRETED
from dsv4_hal.formats import FORMATS, RowLayout, flashmla_rows, index_fp4_rows
from dsv4_hal.numerics import Numerics

_COPY = "torch's own copy, on the GPU"
_PLAN = "once a step, from lengths that lie on the host; torch computes it on the GPU"


class Cuda(Differentiable, Attention, Experts, Cache, Gemm, Moe, HyperConnection, NormRope, Sampling, Reference):
    """arch  the architecture that kernels and tiles are chosen for: the GPU's own, or one that is assumed. Interpreted
    kernels compute what they would on it; else, where it is not this machine's, there are shapes on the meta device:
    enough to explain what would run, and to compile it."""

    name = "cuda"
    device_type = "cpu" if INTERPRETED else "cuda"
    automatic = not INTERPRETED
    affords = "interpreted" if INTERPRETED else "full"
    collectives = "gloo" if INTERPRETED else "nccl"
    adopts = dict.fromkeys(("embedding", "kv_load", "state_new", "state_copy", "state_reset"), _COPY) | {"plan": _PLAN}
    arch: Arch

    def __init__(self, numerics: Numerics, device: torch.device | str | None = None) -> None:
        try:
            arch = _arch()
        except ValueError as error:
            raise BackendError(f"backend cuda cannot be used here: {error}") from error
        here = INTERPRETED or arch == present()
        super().__init__(numerics, device or ("meta" if not here else None))
        if self.device.type not in ("meta", self.device_type if here else "meta"):
            where = f"interpreted, on {self.device_type}" if INTERPRETED else f"for {arch and arch.name}"
            raise BackendError(f"backend cuda: its kernels are {where}; device {self.device} cannot be used")
        assert arch is not None  # it is available
        self.arch = arch

    @classmethod
    def available(cls) -> Verdict:
        try:
            arch = _arch()
        except ValueError as error:
            return Verdict(False, str(error))
        if INTERPRETED:
            return Verdict(True, f"{_emulated()}: to check kernels, not to serve")
        if arch is not None and arch != present():
            return Verdict(True, f"this machine is taken for a {arch.name}: what would run can be explained, not run")
        if not torch.cuda.is_available():
            return Verdict(
                False,
                "torch finds no NVIDIA GPU",
                "install a driver and a torch built for CUDA; or TRITON_INTERPRET=1, to check its kernels on the CPU",
            )
        major, minor = torch.cuda.get_device_capability()
        if arch is None:
            known = ", ".join(name for name in ARCHS if name.startswith("sm_"))
            return Verdict(False, f"its kernels are for {known}; this GPU is sm_{major}{minor}")
        return Verdict(True, f"{torch.cuda.get_device_name()}, {arch.name}")

    @classmethod
    def environment(cls) -> dict[str, str]:
        found = {"triton": triton.__version__, **probe.environment()}
        if INTERPRETED:
            return found | {"emulated": _emulated()}
        return found | ({"cuda device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})

    def supports(self, op: str, facts: Facts) -> Verdict:
        if self.numerics.accumulate != torch.float32 and self.origin(op).kind == "native":
            return Verdict(False, f"its kernels sum in float32, the profile in {self.numerics.accumulate}")
        if self.numerics.hf32 and op in ("hc_pre", "hc_pre_norm"):
            return Verdict(False, f"its kernels multiply in float32, mode {self.numerics.mode} in HF32")
        return super().supports(op, facts)

    def row_layout(self, kind: str, dim: int, rope: int, ratio: int, window: int = 0) -> RowLayout:
        """FlashMLA's rows where FP8 rows fill its blocks, packed MXFP4 for indexer keys; else plain values."""
        fp8, fp4 = self.numerics.kv == FORMATS["e4m3_1x64"], self.numerics.index == FORMATS["mxfp4"]
        if kind in ("window", "entries") and fp8 and dim > rope and (dim - rope) % 64 == 0:
            return flashmla_rows(ratio, window, dim, rope)
        if kind == "index" and fp4 and dim % 32 == 0:
            return index_fp4_rows(ratio, dim)
        return super().row_layout(kind, dim, rope, ratio, window)


def _arch() -> Arch | None:
    """What kernels are chosen for; None where nothing says. ValueError for one that is assumed and not known."""
    return assumed() or (ARCHS[DEFAULT] if INTERPRETED else present())


def _emulated() -> str:
    arch = _arch()
    return f"interpreted on the CPU by triton {triton.__version__}, as for {arch and arch.name}"


__all__ = ["Cuda"]
