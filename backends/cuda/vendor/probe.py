"""Whether DeepGEMM and FlashMLA can be used on this machine, and what they offer.

The device is asked first: without one they need not be imported to be refused. Where they do not load they raise
OSError as well as ImportError, or whatever a build step of theirs raises: that is a reason, never an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch

from dsv4_hal.backend import Verdict

LIBRARIES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"deep_gemm": ("DeepGEMM", "sgl-deep-gemm"), "flash_mla": ("FlashMLA", "sgl-flash-mla")}
)
"""Module -> name, and a package on PyPI that provides it."""


def device() -> Verdict:
    """Whether there is a GPU of an architecture that any of these libraries is for."""
    if not torch.cuda.is_available():
        return Verdict(False, "torch finds no NVIDIA GPU")
    if torch.version.hip is not None:
        return Verdict(False, "it is for NVIDIA GPUs, and this one is AMD's")
    major, minor = torch.cuda.get_device_capability()
    if major not in (9, 10):
        return Verdict(False, f"its kernels are for sm_90 and sm_100; this GPU is sm_{major}{minor}")
    return Verdict(True, f"sm_{major}{minor}")


@cache
def verdict(library: str) -> Verdict:
    """Whether a library of LIBRARIES can be used: asked once in a process."""
    here = device()
    if not here:
        return here
    title, package = LIBRARIES[library]
    try:
        module = import_module(library)
        version = str(getattr(module, "__version__", "of unknown version"))
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == library
        remedy = f"install {title}" if missing else f"install a {title} that is built for this torch and this driver"
        what = str(error).partition("\n")[0]
        return Verdict(False, f"it does not load: {type(error).__name__}: {what}", f"{remedy} (on PyPI: {package})")
    return Verdict(True, f"{title} {version}")


def offers(library: str, *names: str) -> Verdict:
    """Whether the library can be used and has callables of these names; older versions lack some."""
    found = verdict(library)
    if not found:
        return Verdict(False, f"{LIBRARIES[library][0]}: {found.reason}", found.remedy)
    module = load(library)
    absent = [name for name in names if not callable(getattr(module, name, None))]
    if absent:
        return Verdict(False, f"{found.reason} has no {', '.join(absent)}", f"install a newer {LIBRARIES[library][0]}")
    return found


def load(library: str) -> Any:
    """The module of a library that `verdict` approved of."""
    return import_module(library)


def environment() -> dict[str, str]:
    """What a bug report should say about the libraries."""
    found = {title: verdict(library) for library, (title, _) in LIBRARIES.items()}
    return {title: f"{'usable' if v else 'not usable'}: {v.reason}" for title, v in found.items()}
