"""What Ascend NPUs can do, by SoC, as data.

Names are those of CANN's build lists. Which operators are compiled for which SoC follows vllm-ascend
csrc/build_aclnn.sh (commit 182b75ea) and the documents of torch_npu 2.13.0; none of it was tried on a device.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dsv4_hal import backend

EMULATE = "DSV4_HAL_EMULATE"  # environment variable, and key `emulate` of a run: operators computed on the CPU


@dataclass(frozen=True)
class Soc:
    """One generation.

    name     as CANN's build lists call it
    title    as its users call it
    devices  beginnings of the names that the runtime gives its devices
    mode     the numeric profile that its operators compute in, see `profiles`
    formats  stored formats of weights and activations that its matrix units multiply
    """

    name: str
    title: str
    devices: tuple[str, ...]
    mode: str
    formats: frozenset[str]


SOCS: Mapping[str, Soc] = MappingProxyType(
    {
        s.name: s
        for s in (
            Soc(
                "ascend910b",
                "Ascend 910B (A2)",
                ("Ascend910B",),
                "a3",
                frozenset({"bf16", "fp16", "fp32", "int8_channel", "int4_channel"}),
            ),
            Soc(
                "ascend910_93",
                "Ascend 910C (A3)",
                ("Ascend910_93",),
                "a3",
                frozenset({"bf16", "fp16", "fp32", "int8_channel", "int4_channel"}),
            ),
            Soc(
                "ascend950",
                "Ascend 950 (A5)",
                ("Ascend950",),
                "a5",
                frozenset({"bf16", "fp16", "fp32", "int8_channel", "mxfp8", "mxfp4"}),
            ),
        )
    }
)
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "Ascend310": "it has none of the operators that DeepSeek-V4 needs",
        "Ascend910A": "the first 910 lacks bfloat16",
        "Ascend910P": "the first 910 lacks bfloat16",
    }
)
DEFAULT: Mapping[str, str] = MappingProxyType({"a3": "ascend910_93", "a5": "ascend950"})  # what is emulated for a mode


def soc_of(device: str) -> Soc:
    """The SoC of a device by the name that the runtime gives it. ValueError for one that cannot run DeepSeek-V4, or is
    not known."""
    for soc in SOCS.values():
        if device.startswith(soc.devices):
            return soc
    for beginning, why in REFUSED.items():
        if device.startswith(beginning):
            raise ValueError(f"{device} cannot be used: {why}")
    known = ", ".join(soc.title for soc in SOCS.values())
    raise ValueError(f"{device!r} is no SoC that is known here; there are {known}")


def assumed() -> Soc | None:
    """The SoC that is assumed, if one is. ValueError names the nearest one for a name that is not known."""
    return backend.assumed(SOCS, "SoC")


def emulated() -> bool:
    """Whether operators shall be computed by the emulator. ValueError for a value that is neither true nor false."""
    value = os.environ.get(EMULATE, "false").lower()
    if value not in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        raise ValueError(f"{EMULATE}={value}: must be true or false")
    return value in ("true", "yes", "on", "1")
