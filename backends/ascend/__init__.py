"""DeepSeek-V4's ops on Huawei Ascend NPUs, by operators of torch_npu and vllm-ascend.

One file per family of the contract; beside the code, which operators there are for an op, and why each is used or not.
Differences between generations are data: `devices` says what a SoC has, `profiles` in which numbers it computes.
Importing this package imports neither torch_npu nor vllm_ascend. Where there is no NPU, `DSV4_HAL_EMULATE=true`
computes the same operators, called through the real torch_npu, in `emulator`, on the CPU: to check, not to serve.
Nothing here has run on an NPU.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

import torch

from dsv4_hal.backend import BackendError, Verdict
from dsv4_hal.backends.ascend import attention, cache, gemm, hyper_connection, moe, norm_rope, runtime
from dsv4_hal.backends.ascend.attention import Attention
from dsv4_hal.backends.ascend.cache import Cache
from dsv4_hal.backends.ascend.devices import DEFAULT, SOCS, Soc, assumed, emulated
from dsv4_hal.backends.ascend.gemm import Gemm
from dsv4_hal.backends.ascend.hyper_connection import HyperConnection
from dsv4_hal.backends.ascend.moe import Moe
from dsv4_hal.backends.ascend.norm_rope import NormRope
from dsv4_hal.backends.ascend.providers import choose, operators
from dsv4_hal.numerics import Numerics

TABLE = (
    *gemm.PROVIDERS,
    *norm_rope.PROVIDERS,
    *cache.PROVIDERS,
    *attention.PROVIDERS,
    *moe.PROVIDERS,
    *hyper_connection.PROVIDERS,
)

_ADOPTED = {
    **dict.fromkeys(("embedding", "kv_load", "state_new", "state_copy", "state_reset"), "torch's own copy, on the NPU"),
    "compress": "the part that no operator has by itself; torch computes it on the NPU",
    "plan": "once a step, from lengths that lie on the host; torch computes it on the NPU",
    "dequantize": "of weights, when they are loaded; torch computes it on the NPU",
    "sample": "once a step, and its draws are compared; torch computes it on the NPU",
}


class Ascend(Attention, Cache, Gemm, Moe, HyperConnection, NormRope):
    """soc  the generation that operators are chosen for: the device's own, an assumed one, or the one that is emulated.
    Emulated operators compute on the CPU; of an assumed SoC that is not this machine's there are shapes on the meta
    device: enough to explain what would run."""

    name = "ascend"
    device_type = "npu"
    collectives = "hccl"
    differentiable = False

    def __init__(self, numerics: Numerics, device: torch.device | str | None = None) -> None:
        try:
            soc, where = _place(numerics.mode)
        except ValueError as error:
            raise BackendError(f"backend ascend cannot be used here: {error}") from error
        if numerics.mode != soc.mode:
            raise BackendError(
                f"backend ascend: {soc.title} computes in mode {soc.mode}, not {numerics.mode}: --mode {soc.mode}"
            )
        if where == "cpu":
            from dsv4_hal.backends.ascend.emulator.load import load

            load(soc)
        elif where == "npu":
            runtime.load()
        super().__init__(numerics, device or where)
        if self.device.type != where:
            raise BackendError(f"backend ascend: its operators are {_HOW[where]}; device {device} cannot be used")
        self.soc = soc
        self.collectives = "hccl" if where == "npu" else "gloo"
        known = operators(TABLE, soc) if where != "meta" else ()
        missing = {name: why for name in known if (why := runtime.missing(name))}
        ops = dict.fromkeys(p.op for p in TABLE)
        self.choices = MappingProxyType({op: choose(TABLE, op, soc, missing) for op in ops})
        self.adopts = MappingProxyType(_ADOPTED | self._adopted())

    @classmethod
    def available(cls) -> Verdict:
        try:
            taken = assumed()
            if emulated():
                return _emulator(taken)
        except ValueError as error:
            return Verdict(False, str(error))
        found = runtime.device_name()
        try:
            here = runtime.present() if found else None
        except ValueError as error:
            return Verdict(False, str(error))
        if taken is not None and taken != here:
            return Verdict(
                True, f"this machine is taken for an {taken.title}: what would run can be explained, not run"
            )
        if here is None:
            hint = "or DSV4_HAL_EMULATE=true, to check its calls on the CPU"
            return Verdict(False, found.reason, f"{found.remedy}; {hint}" if found.remedy else hint)
        return Verdict(True, f"{found.reason}, {here.title}")

    @classmethod
    def deployed(cls) -> str:
        try:
            return (assumed() or runtime.present()).mode
        except ValueError:  # no SoC to ask: using the backend says why
            return super().deployed()

    @classmethod
    def environment(cls) -> dict[str, str]:
        found = {name: number for name in ("torch_npu", "vllm_ascend") if (number := _version(name))}
        if emulated():
            return found | {"emulated": cls.available().reason.partition(":")[0]}
        if not runtime.device_name():
            return found
        return found | {"npu": runtime.device_name().reason, "CANN": runtime.cann()}

    def _adopted(self) -> dict[str, str]:
        """Ops that no operator of this SoC computes as the contract says, whatever is installed."""
        return {
            op: f"no operator of {self.soc.title} computes it as the contract says: torch's own do, on the NPU"
            for op, choice in self.choices.items()
            if not choice.used and all(provider.lacks(self.soc) for provider, _ in choice.passed)
        }


_HOW = {
    "cpu": "emulated, on the CPU",
    "meta": "for a SoC that this machine has not, on the meta device",
    "npu": "npu's",
}


def _place(mode: str) -> tuple[Soc, str]:
    """The SoC to choose operators for, and the type of device to compute on. ValueError where there is none."""
    taken = assumed()
    if emulated():
        if taken is None and mode not in DEFAULT:
            raise ValueError(f"no Ascend SoC computes in mode {mode}: --mode {' or '.join(DEFAULT)}")
        return taken or SOCS[DEFAULT[mode]], "cpu"
    if taken is None:
        return runtime.present(), "npu"
    try:
        here = runtime.present()
    except ValueError:
        return taken, "meta"
    return (here, "npu") if here == taken else (taken, "meta")


def _emulator(taken: Soc | None) -> Verdict:
    number = _version("torch_npu")
    if not number:
        return Verdict(
            False,
            "its emulator needs the package torch_npu, which is not installed",
            f"pip install --no-deps torch_npu=={torch.__version__.partition('+')[0]}, in an environment of its own",
        )
    titles = {mode: SOCS[name].title for mode, name in DEFAULT.items()}
    title = taken.title if taken else " or ".join(f"{title} in mode {mode}" for mode, title in titles.items())
    how = f"emulated on the CPU, as an {title}, by torch_npu {number} on stub libraries"
    return Verdict(True, f"{how}: to check calls, not to serve")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


__all__ = ["Ascend"]
