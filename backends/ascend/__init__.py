"""DeepSeek-V4's ops on Huawei Ascend NPUs, by operators of torch_npu and vllm-ascend.

One file per family of the contract. Differences between generations are data: `devices` says what a SoC has, `profiles`
in which numbers it computes. Importing this package imports neither torch_npu nor vllm_ascend. Where there is no NPU,
`DSV4_HAL_EMULATE=true` computes the same operators, called through the real torch_npu, in `emulator`, on the CPU: to
check, not to serve. Nothing here has run on an NPU.
"""

from __future__ import annotations

from dsv4_hal.backend import Verdict
from dsv4_hal.backends.ascend.devices import assumed, emulated
from dsv4_hal.backends.reference import Reference


class Ascend(Reference):
    name = "ascend"
    device_type = "npu"

    @classmethod
    def available(cls) -> Verdict:
        try:
            emulated()
            assumed()
        except ValueError as error:
            return Verdict(False, str(error))
        return Verdict(
            False, "torch_npu is not installed", "pip install torch_npu of the version of your torch, and CANN"
        )


__all__ = ["Ascend"]
