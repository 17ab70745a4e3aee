"""SoCs by the names that runtimes give their devices, and the two switches of the environment."""

from __future__ import annotations

import re

import pytest

from dsv4_hal.backend import ASSUME
from dsv4_hal.backends.ascend.devices import DEFAULT, EMULATE, SOCS, assumed, emulated, soc_of


@pytest.mark.parametrize(
    ("device", "name"),
    [("Ascend910B3", "ascend910b"), ("Ascend910_9382", "ascend910_93"), ("Ascend950DT_9582", "ascend950")],
)
def test_soc_of(device: str, name: str) -> None:
    assert soc_of(device) is SOCS[name]


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("Ascend310P3", "Ascend310P3 cannot be used: it has none of the operators"),
        ("Ascend910A", "Ascend910A cannot be used: the first 910 lacks bfloat16"),
        ("Ascend910ProB", "Ascend910ProB cannot be used: the first 910 lacks bfloat16"),
        ("Ascend1000", "'Ascend1000' is no SoC that is known here"),
        ("", "'' is no SoC that is known here; there are Ascend 910B (A2)"),
    ],
)
def test_devices_that_are_refused(device: str, said: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(said)):
        soc_of(device)


def test_every_mode_has_a_soc_of_that_mode() -> None:
    assert {mode: SOCS[name].mode for mode, name in DEFAULT.items()} == {mode: mode for mode in ("a3", "a5")}


def test_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ASSUME, raising=False)
    assert assumed() is None
    monkeypatch.setenv(ASSUME, "ascend910b")
    assert assumed() is SOCS["ascend910b"]
    monkeypatch.setenv(ASSUME, "ascend901b")
    with pytest.raises(ValueError, match=r"no such SoC; known are .*did you mean ascend910b\?"):
        assumed()


def test_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, meant in (("true", True), ("On", True), ("1", True), ("no", False), ("false", False), ("0", False)):
        monkeypatch.setenv(EMULATE, value)
        assert emulated() is meant
    monkeypatch.setenv(EMULATE, "2")
    with pytest.raises(ValueError, match="must be true or false"):
        emulated()
