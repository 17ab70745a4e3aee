"""torch_npu and vllm-ascend on this machine: whether they load, what device there is, which operators can be called.

Neither is imported before it is asked about. Where torch_npu does not load it raises OSError as well as ImportError, or
whatever its own start-up raises: that is a reason, never an error.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from dsv4_hal.backend import Verdict, described
from dsv4_hal.backends.ascend.devices import Soc, emulated, soc_of

SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
CANN_LIBRARIES = ("libhccl", "libascendcl", "libacl_", "libge_runner", "libgraph", "libruntime")


def load() -> Any:
    """The module torch_npu. Whatever it raises where it does not load."""
    return import_module("torch_npu")


@cache
def package() -> Verdict:
    """Whether torch_npu loads on this machine's CANN, and if not, what to do. Asked once in a process."""
    version = torch.__version__.partition("+")[0]
    if find_spec("torch_npu") is None:
        return Verdict(
            False, "torch_npu is not installed", f"install CANN, then pip install --no-deps torch_npu=={version}"
        )
    try:
        number = load().__version__
    except (Exception, SystemExit) as error:
        chain = described(error) if error.__cause__ is None else f"{described(error)} ({described(error.__cause__)})"
        what = chain.partition("\n")[0]
        if any(library in chain for library in CANN_LIBRARIES):
            return Verdict(
                False,
                f"torch_npu does not load: CANN is missing, or not on the library path: {what}",
                f"install CANN's toolkit and kernels, and `{SET_ENV}` before Python starts",
            )
        return Verdict(
            False,
            f"torch_npu does not load: {what}",
            f"install the torch_npu that is built for torch {version}, and the CANN that it names",
        )
    return Verdict(True, f"torch_npu {number}")


@cache
def device_name() -> Verdict:
    """The name that the runtime gives the first NPU, as the reason; or why there is none."""
    found = package()
    if not found:
        return found
    try:
        npu = load().npu
        if not npu.device_count():
            return Verdict(False, f"{found.reason} finds no NPU", "load the driver: npu-smi info must list a device")
        return Verdict(True, str(npu.get_device_name(0)))
    except (Exception, SystemExit) as error:
        return Verdict(False, f"{found.reason} cannot say which NPU this is: {described(error)}", SET_ENV)


def present() -> Soc:
    """The SoC of this machine. ValueError where there is none that can be used."""
    name = device_name()
    if not name:
        raise ValueError(name.reason)
    return soc_of(name.reason)


def cann() -> str:
    """The version of CANN that torch_npu has loaded."""
    return str(load().npu.utils.get_cann_version())


@cache
def custom() -> Verdict:
    """Whether vllm-ascend's own operators, `torch.ops._C_ascend`, load. Its switch also names their kernels to CANN."""
    if find_spec("vllm_ascend") is None:
        return Verdict(False, "vllm-ascend is not installed", "install vllm-ascend, built for this SoC")
    try:
        if not import_module("vllm_ascend.utils").enable_custom_op():
            return Verdict(False, "this vllm-ascend is built without its own operators", "COMPILE_CUSTOM_KERNELS=1")
    except (Exception, SystemExit) as error:
        return Verdict(False, f"vllm-ascend does not load: {described(error)}", "install the vllm-ascend of this torch")
    return Verdict(True, "vllm-ascend")


def missing(operator: str) -> str:
    """Why `namespace::operator` cannot be called here; "" if it can.

    A schema is no operator: it must have a kernel for the device. vllm-ascend registers one for every SoC, so whether
    its build holds the kernel behind that is said by the tables of providers.
    """
    if operator.startswith("_C_ascend::") and not emulated():
        found = custom()
        if not found:
            return found.reason
    where = "CPU" if emulated() else "PrivateUse1"
    if not torch._C._dispatch_has_kernel(operator):
        return f"{operator} is not in this version"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, where):
        return f"{operator} has a schema, and no kernel for {where}"
    return ""
