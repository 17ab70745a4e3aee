"""Numeric profiles: the two modes, and those that packages declare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch

from dsv4_hal import numerics
from dsv4_hal.formats import FORMATS
from dsv4_hal.numerics import deployed, exact, mode_names, numerics_for

CHIP = replace(deployed(), mode="chip", activation=FORMATS["int8_channel"], kv=None)
NOT_A_PROFILE = "a text"


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that declares profiles: a good one, one of another name, one that is none, one that does not load."""
    values = {
        "chip": f"{__name__}:CHIP",
        "other": f"{__name__}:CHIP",
        "text": f"{__name__}:NOT_A_PROFILE",
        "gone": "no_such_package:PROFILE",
    }
    entries = {name: [EntryPoint(name, value, numerics.GROUP)] for name, value in values.items()}
    entries["twice"] = [EntryPoint("twice", value, numerics.GROUP) for value in ("one:P", "two:P")]
    monkeypatch.setattr(numerics, "_declared", lambda: entries)
    loads = EntryPoint.load
    here = {"CHIP": CHIP, "NOT_A_PROFILE": NOT_A_PROFILE}
    monkeypatch.setattr(EntryPoint, "load", lambda entry: here[entry.attr] if entry.attr in here else loads(entry))
    yield


def test_the_two_modes() -> None:
    assert numerics_for("exact") == exact()
    assert numerics_for("exact", torch.float64).accumulate == torch.float64
    assert numerics_for("deployed") == numerics_for("deployed", torch.bfloat16) == deployed()
    with pytest.raises(ValueError, match=r"mode deployed stores activations in bfloat16; dtype float32"):
        numerics_for("deployed", torch.float32)


@pytest.mark.usefixtures("declared")
def test_a_declared_profile_is_a_mode() -> None:
    assert mode_names() == ("exact", "deployed", "chip", "gone", "other", "text", "twice")
    assert numerics_for("chip") == numerics_for("chip", torch.bfloat16) == CHIP
    with pytest.raises(ValueError, match=r"mode chip stores activations in bfloat16"):
        numerics_for("chip", torch.float32)


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("other", "mode other: .*:CHIP is Numerics.*, not a profile of that name"),
        ("text", "mode text: .*:NOT_A_PROFILE is 'a text', not a profile"),
        ("gone", "mode gone: no_such_package:PROFILE does not load: ModuleNotFoundError: No module named"),
        ("twice", "mode twice is declared more than once: one:P, two:P; uninstall all but one"),
        ("chp", "unknown mode 'chp': there are exact, deployed, chip, .*; did you mean chip?"),
    ],
)
def test_what_is_no_profile(mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        numerics_for(mode)


def test_the_two_modes_are_not_redeclared(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("exact", "vendor:EXACT", numerics.GROUP)
    monkeypatch.setattr(numerics, "_declared", lambda: {"exact": [entry]})
    assert mode_names() == ("exact", "deployed")
    with pytest.raises(ValueError, match="mode exact is this project's, and vendor:EXACT declares one of that name"):
        numerics_for("exact")
