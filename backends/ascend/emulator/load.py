"""The real torch_npu on stub libraries, with the emulator's operators on its schemas.

A process emulates one SoC: torch_npu asks for its name once. `TORCH_DEVICE_BACKEND_AUTOLOAD=0` must be in the
environment before Python starts, or `import torch` itself looks for CANN, and fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType, ModuleType

from dsv4_hal.backends.ascend.devices import Soc
from dsv4_hal.backends.ascend.emulator import call
from dsv4_hal.backends.ascend.emulator.build import LIBRARIES, build

CANN = "9.1.0"  # the version that the stub claims: what torch_npu 2.13.0 is released for
DEVICE: Mapping[str, str] = MappingProxyType(  # SoC -> what its runtime would call a device of it
    {"ascend910b": "Ascend910B3", "ascend910_93": "Ascend910_9382", "ascend950": "Ascend950DT_9582"}
)
FAMILIES = (  # files of operators
    "activation",
    "custom_attention",
    "custom_cache",
    "custom_compressor",
    "custom_experts",
    "custom_indexer",
    "custom_streams",
    "matmul",
    "norm_rope",
    "quantize",
    "routing",
    "storage",
    "streams",
)


def load(soc: Soc) -> ModuleType:
    """torch_npu as on a machine with `soc`, with emulated operators for CPU tensors. The same when called again.

    RuntimeError if torch_npu is loaded already on something else, or another SoC is emulated in this process;
    build.BuildError if the stubs cannot be made.
    """
    now = call.current()
    if now is not None:
        if now != soc:
            raise RuntimeError(f"this process emulates {now.title}; {soc.title} needs a process of its own")
        return sys.modules["torch_npu"]
    if "torch_npu" in sys.modules:
        raise RuntimeError(
            "torch_npu is loaded already, on the CANN of this machine: set TORCH_DEVICE_BACKEND_AUTOLOAD=0 before "
            "Python starts, and do not import it before the emulator does"
        )
    os.environ["DSV4_HAL_STUB_SOC"], os.environ["DSV4_HAL_STUB_CANN"] = DEVICE[soc.name], CANN
    folder = build()
    for library in LIBRARIES:
        ctypes.CDLL(str(folder / f"lib{library}.so"), ctypes.RTLD_GLOBAL)
    with contextlib.redirect_stdout(sys.stderr):  # it says there that it finds no CANN; stdout is the program's
        torch_npu = import_module("torch_npu")
    for family in FAMILIES:
        import_module(f"{__package__}.{family}")
    call.register(soc)
    return torch_npu
