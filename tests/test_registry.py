"""Which backends are registered and usable, and what a user's choice of names stands for."""

import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4_hal import registry
from dsv4_hal.backend import BackendError, Verdict
from dsv4_hal.backends.null import Null
from dsv4_hal.backends.reference import Reference
from dsv4_hal.numerics import Numerics, deployed, exact
from dsv4_hal.registry import backend_class, choose, list_backends


def entries(**targets: str) -> Any:
    return lambda group: [EntryPoint(name, value, group) for name, value in targets.items()]


def test_registered_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pyproject.toml registers, whether or not this tree is installed."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(registry, "entry_points", entries(**project["entry-points"][registry.GROUP]))
    found = {info.name: info for info in list_backends()}
    assert found["reference"].available and found["null"].available
    assert backend_class("reference") is Reference and backend_class("null") is Null


def test_a_broken_backend_is_listed_with_what_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        registry,
        "entry_points",
        entries(
            reference="dsv4_hal.backends.reference:Reference",
            gone="dsv4_hal_vendor_that_is_not_there:Backend",
            nameless="dsv4_hal.backends.reference:Nothing",
            wrong="dsv4_hal.numerics:Numerics",
            other="dsv4_hal.backends.reference:Reference",
        ),
    )
    found = {info.name: info for info in list_backends()}
    assert [i for i in found if found[i].available] == ["reference"]
    assert "ModuleNotFoundError" in found["gone"].reason and "dsv4_hal_vendor" in found["gone"].reason
    assert "AttributeError" in found["nameless"].reason
    assert "not a subclass" in found["wrong"].reason
    assert "calls itself 'reference'; the two names must be one" in found["other"].reason
    assert (
        found["gone"].remedy == "install the package that provides the Python module dsv4_hal_vendor_that_is_not_there"
    )
    assert found["nameless"].remedy == ""
    with pytest.raises(BackendError, match="gone does not load"):
        backend_class("gone")
    with pytest.raises(
        BackendError, match=r"no backend is called 'cuda'; registered: gone, nameless, other, reference, wrong$"
    ):
        backend_class("cuda")
    with pytest.raises(BackendError, match="did you mean reference"):
        backend_class("refrence")


class Absent(Reference):
    name = "absent"

    @classmethod
    def available(cls) -> Verdict:
        return Verdict(False, "no such card", "buy one")


class Faulty(Reference):
    name = "faulty"

    @classmethod
    def available(cls) -> Verdict:
        raise OSError("libdriver.so: cannot open shared object file")


class Vague(Reference):
    name = "vague"

    @classmethod
    def available(cls) -> Verdict:
        return True  # type: ignore[return-value]


class Unsure(Reference):
    name = "unsure"

    @classmethod
    def available(cls) -> Verdict:
        return Verdict("yes", "there is a card")  # type: ignore[arg-type]


class Brittle(Reference):
    name = "brittle"

    def __init__(self, numerics: Numerics, device: torch.device | str | None = None) -> None:
        raise KeyError("no stream")


class Sound(Reference):
    name = "sound"


class Quits:
    def __getattr__(self, name: str) -> Any:
        sys.exit(3)


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends of every kind, this module's and the project's."""
    names = ("absent", "faulty", "vague", "unsure", "brittle", "sound")
    here = {name: f"{__name__}:{name.title()}" for name in names}
    monkeypatch.setitem(sys.modules, "dsv4_hal_quits", Quits())  # type: ignore[arg-type]
    project = {"reference": "dsv4_hal.backends.reference:Reference", "null": "dsv4_hal.backends.null:Null"}
    monkeypatch.setattr(registry, "entry_points", entries(**here, **project, quits="dsv4_hal_quits:Backend"))


@pytest.mark.usefixtures("many")
def test_every_kind_of_unusable_backend_says_why() -> None:
    found = {info.name: info for info in list_backends()}
    assert (found["absent"].reason, found["absent"].remedy) == ("no such card", "buy one")
    assert found["faulty"].reason == "its probe failed: OSError: libdriver.so: cannot open shared object file"
    assert found["vague"].reason == "its probe returned True, not a Verdict with a reason"
    assert "its probe returned Verdict(ok='yes'" in found["unsure"].reason
    assert "SystemExit: 3" in found["quits"].reason
    assert {name for name, info in found.items() if info.available} == {"brittle", "sound", "reference", "null"}
    assert [name for name, info in found.items() if info.available and not info.automatic] == ["null"]


@pytest.mark.usefixtures("many")
def test_automatic_choice_passes_over_with_reasons() -> None:
    (chosen,), passed = choose(["auto"], exact(), None)
    assert chosen.name == "sound"
    assert passed["absent"] == "no such card"
    assert passed["brittle"] == "backend brittle cannot be made: KeyError: 'no stream'"
    assert passed["null"] == "used only where it is named"
    assert passed["reference"] == "sound comes first"


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["absent"], r"backend absent cannot be used here: no such card \(buy one\)"),
        (["faulty"], "backend faulty cannot be used here: its probe failed"),
        (["reference", "quits"], "backend quits does not load: SystemExit: 3"),
        (["brittle"], "backend brittle cannot be made: KeyError"),
        (["reference", "null"], "backend null makes shapes, on the meta device"),
    ],
)
def test_a_named_backend_must_be_usable(names: list[str], error: str) -> None:
    with pytest.raises(BackendError, match=error):
        choose(names, deployed(), None)


@pytest.mark.usefixtures("many")
def test_names_share_profile_and_device() -> None:
    numerics = exact()
    backends, passed = choose(["sound", "reference"], numerics, None)
    assert [b.name for b in backends] == ["sound", "reference"]
    assert {(b.numerics, b.device) for b in backends} == {(numerics, torch.device("cpu"))}
    assert not passed


def test_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", entries(null="dsv4_hal.backends.null:Null"))
    with pytest.raises(BackendError, match="no backend can be used here: null: used only where it is named"):
        choose(["auto"], exact(), None)


def test_a_name_that_two_packages_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [EntryPoint("reference", value, registry.GROUP) for value in ("one:A", "two:B")]
    monkeypatch.setattr(registry, "entry_points", lambda group: both)
    assert "registered more than once: one:A, two:B" in list_backends()[0].reason
