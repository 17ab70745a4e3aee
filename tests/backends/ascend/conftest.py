"""The emulated torch_npu, where it can be loaded: in the environment of `make test-ascend`, one SoC a process."""

from __future__ import annotations

from types import ModuleType

import pytest

from dsv4_hal.backends.ascend.devices import SOCS, Soc, assumed, emulated


@pytest.fixture(scope="session")
def soc() -> Soc:
    """What this process emulates."""
    return assumed() or SOCS["ascend950"]


@pytest.fixture(scope="session")
def torch_npu(soc: Soc) -> ModuleType:
    """The real package, with emulated operators."""
    if not emulated():
        pytest.skip("needs torch_npu on stub libraries, in an environment of its own: make test-ascend")
    from dsv4_hal.backends.ascend.emulator.load import load

    return load(soc)
