"""DeepSeek-V4's ops on NVIDIA GPUs, in Triton.

One file per family of the contract; the kernels lie in `dsv4_hal.backends.triton_kernels`. Where there is no GPU,
`TRITON_INTERPRET=1` runs the same kernels, with the same numbers, in Triton's interpreter on the CPU: for checking.
Importing this package imports triton, and fails where that is missing or broken: the registry says so.
"""

from __future__ import annotations

import torch
import triton

from dsv4_hal.backend import BackendError, Facts, Verdict
from dsv4_hal.backends.cuda.autograd import Differentiable
from dsv4_hal.backends.cuda.devices import ARCHS, Arch, arch_of, current
from dsv4_hal.backends.cuda.moe import Moe
from dsv4_hal.backends.cuda.norm_rope import NormRope
from dsv4_hal.backends.cuda.sampling import Sampling
from dsv4_hal.backends.reference import Reference
from dsv4_hal.backends.triton_kernels.runtime import INTERPRETED
from dsv4_hal.numerics import Numerics


class Cuda(Differentiable, Moe, NormRope, Sampling, Reference):
    name = "cuda"
    device_type = "cpu" if INTERPRETED else "cuda"
    automatic = not INTERPRETED
    affords = "interpreted" if INTERPRETED else "full"
    arch: Arch

    def __init__(self, numerics: Numerics, device: torch.device | str | None = None) -> None:
        super().__init__(numerics, device)
        if (self.device.type == "cuda") == INTERPRETED and self.device.type != "meta":
            how = "interpreted, on the CPU" if INTERPRETED else "compiled, on a GPU"
            raise BackendError(f"backend cuda: its kernels run {how}, not on {self.device}")
        try:
            self.arch = current(self.device)
        except ValueError as error:
            raise BackendError(f"backend cuda: {error}") from error

    @classmethod
    def available(cls) -> Verdict:
        if INTERPRETED:
            return Verdict(
                True, f"interpreted on the CPU by triton {triton.__version__}: to check kernels, not to serve"
            )
        if not torch.cuda.is_available():
            return Verdict(
                False,
                "torch finds no NVIDIA GPU",
                "install a driver and a torch built for CUDA; or TRITON_INTERPRET=1, to check its kernels on the CPU",
            )
        capability = torch.cuda.get_device_capability()
        if arch_of(capability) is None:
            known = ", ".join(name for name in ARCHS if name.startswith("sm_"))
            return Verdict(False, f"its kernels are for {known}; this GPU is sm_{capability[0]}{capability[1]}")
        return Verdict(True, f"{torch.cuda.get_device_name()}, sm_{capability[0]}{capability[1]}")

    @classmethod
    def environment(cls) -> dict[str, str]:
        found = {"triton": triton.__version__}
        if INTERPRETED:
            return found | {"kernels": f"interpreted on the CPU, as for {current(torch.device('cpu')).name}"}
        return found | {"kernels": "compiled", "cuda device": torch.cuda.get_device_name()}

    def supports(self, op: str, facts: Facts) -> Verdict:
        if self.numerics.accumulate != torch.float32 and self.origin(op).kind == "native":
            return Verdict(False, f"its kernels sum in float32, the profile in {self.numerics.accumulate}")
        return super().supports(op, facts)


__all__ = ["Cuda"]
