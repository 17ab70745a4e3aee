"""The emulated torch_npu, where it can be loaded: in the environment of `make test-ascend`, one SoC a process."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from dsv4_hal.backends.ascend.devices import SOCS, Soc, assumed, emulated
from dsv4_hal.backends.ascend.emulator.rules import Refused


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


@pytest.fixture(scope="session")
def layer() -> Callable[[pytest.ExceptionInfo[BaseException]], str]:
    """What refused a call: its "schema", its "meta" kernel or a "rule". An error of the emulator is none of them."""

    def found(error: pytest.ExceptionInfo[BaseException]) -> str:
        if isinstance(error.value, Refused):
            return "meta" if error.value.rule is None else "rule"
        inside = [
            entry
            for entry in error.traceback
            if "ascend/emulator/" in str(entry.path) and "tests" not in str(entry.path)
        ]
        assert not inside, f"not refused, but failed in {inside[-1].path}: {error.value}"
        return "schema"

    return found
