"""What GPUs can do, by architecture, as data. Figures are NVIDIA's and AMD's published ones, per device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

ASSUME = "DSV4_HAL_ASSUME"  # environment variable: the architecture to choose kernels for where there is no such device


@dataclass(frozen=True)
class Arch:
    """One architecture.

    name    "sm_90" or "gfx942"
    shared  bytes of shared memory that one block may use
    tensor  columns of tensor memory; 0: there is none
    warp    threads of a warp
    fp8     whether matrix units multiply float8 (e4m3) as it is; elsewhere codes are widened to bfloat16, exactly
    scaled  whether matrix units multiply MXFP4 and MXFP8 with their block scales; elsewhere codes are widened likewise
    """

    name: str
    shared: int
    tensor: int = 0
    warp: int = 32
    fp8: bool = False
    scaled: bool = False


ARCHS: Mapping[str, Arch] = MappingProxyType(
    {
        a.name: a
        for a in (
            Arch("sm_80", 163 * 1024),
            Arch("sm_86", 99 * 1024),
            Arch("sm_89", 99 * 1024, fp8=True),
            Arch("sm_90", 227 * 1024, fp8=True),
            Arch("sm_100", 227 * 1024, tensor=512, fp8=True, scaled=True),
            Arch("sm_103", 227 * 1024, tensor=512, fp8=True, scaled=True),
            Arch("sm_120", 99 * 1024, fp8=True),
            Arch("gfx942", 64 * 1024, warp=64),  # its float8 is another format (fnuz)
            Arch("gfx950", 160 * 1024, warp=64, fp8=True, scaled=True),
        )
    }
)
DEFAULT = "sm_90"  # what the interpreter stands for, unless told otherwise


def arch_of(capability: tuple[int, int]) -> Arch | None:
    """The architecture of a compute capability; None for one that is not known, or too old."""
    return ARCHS.get(f"sm_{capability[0]}{capability[1]}")


def current(device: torch.device) -> Arch:
    """The architecture that kernels are chosen for: the one assumed, the device's own, or the default.

    ValueError where an unknown one is assumed.
    """
    assumed = os.environ.get(ASSUME)
    if assumed is not None:
        if assumed not in ARCHS:
            raise ValueError(f"{ASSUME}={assumed}: no such architecture; known are {', '.join(ARCHS)}")
        return ARCHS[assumed]
    if device.type == "cuda":
        found = arch_of(torch.cuda.get_device_capability(device))
        if found is None:
            raise ValueError(f"compute capability {torch.cuda.get_device_capability(device)} is not known")
        return found
    return ARCHS[DEFAULT]
