"""What GPUs can do, by architecture, as data. Figures are NVIDIA's and AMD's published ones, per device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from dsv4_hal import backend


@dataclass(frozen=True)
class Arch:
    """One architecture.

    name      "sm_90" or "gfx942"
    shared    bytes of shared memory that one block may use
    tensor    columns of tensor memory; 0: there is none
    warp      threads of a warp
    fp8       whether it converts float8 (e4m3) by itself
    products  whether matrix units multiply float8 and keep float32 sums; elsewhere codes are widened to bfloat16,
              exactly. Ada's and Hopper's keep 14 bits of a sum (DeepSeek-V3 report, 3.3.2): on an H200, attention
              blocks were over twice their budget off
    scaled    whether matrix units multiply MXFP4 and MXFP8 with their block scales; elsewhere codes are widened
    """

    name: str
    shared: int
    tensor: int = 0
    warp: int = 32
    fp8: bool = False
    products: bool = False
    scaled: bool = False


ARCHS: Mapping[str, Arch] = MappingProxyType(
    {
        a.name: a
        for a in (
            Arch("sm_80", 163 * 1024),
            Arch("sm_86", 99 * 1024),
            Arch("sm_89", 99 * 1024, fp8=True),
            Arch("sm_90", 227 * 1024, fp8=True),
            Arch("sm_100", 227 * 1024, tensor=512, fp8=True, products=True, scaled=True),
            Arch("sm_103", 227 * 1024, tensor=512, fp8=True, products=True, scaled=True),
            Arch("sm_120", 99 * 1024, fp8=True),  # how its units sum is not published
            Arch("gfx942", 64 * 1024, warp=64),  # its float8 is another format (fnuz)
            Arch("gfx950", 160 * 1024, warp=64, fp8=True, products=True, scaled=True),
        )
    }
)
DEFAULT = "sm_90"  # what the interpreter stands for, unless told otherwise


def arch_of(capability: tuple[int, int]) -> Arch | None:
    """The architecture of a compute capability; None for one that is not known, or too old."""
    return ARCHS.get(f"sm_{capability[0]}{capability[1]}")


def assumed() -> Arch | None:
    """The architecture that is assumed, if one is. ValueError names the nearest one for a name that is not known."""
    return backend.assumed(ARCHS, "architecture")


def present() -> Arch | None:
    """The architecture of this machine's GPU; None where there is none, or one that is not known."""
    return arch_of(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


@dataclass(frozen=True)
class Device:
    """One GPU, for bounds on how fast anything can be on it.

    rates   operations a second of its units, dense, by the format of the operands; sums in float32
    memory  bytes a second
    """

    name: str
    arch: str
    memory: float
    rates: Mapping[str, float]

    def bound(self, flops: Mapping[str, float], moved: float) -> float:
        """Seconds that `flops` (by the format of their operands) and `moved` bytes take at least."""
        return max(sum(count / self.rate(format) for format, count in flops.items()), moved / self.memory)

    def rate(self, format: str) -> float:
        """Operations a second on operands of `format`, which the next wider one that the GPU has holds exactly."""
        return next(self.rates[f] for f in _WIDER[_WIDER.index(format) :] if f in self.rates)


_WIDER = ("fp4", "fp8", "bf16", "fp32")

# NVIDIA H100 and A100 whitepapers and datasheets, H200 datasheet, Blackwell architecture technical brief (HGX B200);
# A100 with 80 GB. fp32 is the rate of ordinary float32 arithmetic: no matrix unit multiplies float32 exactly.
DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        d.name: d
        for d in (
            Device("H100", "sm_90", 3.35e12, {"fp8": 1979e12, "bf16": 989.4e12, "fp32": 66.9e12}),
            Device("H200", "sm_90", 4.8e12, {"fp8": 1979e12, "bf16": 989.4e12, "fp32": 66.9e12}),
            Device("B200", "sm_100", 8e12, {"fp4": 9000e12, "fp8": 4500e12, "bf16": 2250e12, "fp32": 80e12}),
            Device("A100", "sm_80", 2.039e12, {"bf16": 312e12, "fp32": 19.5e12}),
        )
    }
)
