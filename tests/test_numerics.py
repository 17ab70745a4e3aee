"""Numeric profiles: the two modes, and those that packages declare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch

from dsv4_hal import numerics
from dsv4_hal.formats import FORMATS
from dsv4_hal.numerics import Numerics, deployed, exact, mode_names, numerics_for

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


@pytest.mark.parametrize("profile", [exact(), exact(torch.float64), deployed(), replace(CHIP, hf32=True)])
def test_a_profile_is_told_as_data(profile: Numerics) -> None:
    assert Numerics.from_dict(profile.to_dict()) == profile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"score": "float8_e4m3fn"},
            "a numeric profile's score must be float64, float32, bfloat16, float16, got 'float8",
        ),
        ({"score": None}, "score must be float64"),
        ({"kv": "e9m9"}, "kv must be fp64, fp32, .*, got 'e9m9'"),
        ({"kv": True}, "kv must be fp64"),
        ({"hf32": "True"}, "hf32 must be bool, got 'True'"),
        ({"mode": 3}, "mode must be str, got 3"),
        ({"more": 3}, "a numeric profile has mode, storage, .*; got"),
    ],
)
def test_data_that_is_no_profile(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Numerics.from_dict(deployed().to_dict() | change)
    with pytest.raises(ValueError, match="a numeric profile has"):
        Numerics.from_dict({})


def test_a_declared_profile_has_formats_that_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("chip", f"{__name__}:CHIP", numerics.GROUP)
    monkeypatch.setattr(numerics, "_declared", lambda: {"chip": [entry]})
    for kv, why in (
        (replace(FORMATS["mxfp8"], name="own"), "a numeric profile's kv must be fp64, .*, got 'own'"),
        (replace(FORMATS["mxfp8"], top=9.0), "it has a format that is not that of its name"),
    ):
        monkeypatch.setattr(EntryPoint, "load", lambda entry, kv=kv: replace(CHIP, kv=kv))
        with pytest.raises(ValueError, match=f"mode chip: .*:CHIP: {why}"):
            numerics_for("chip")
