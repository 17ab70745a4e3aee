"""A backend of the given code, installed as a stranger's package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Install = Callable[[str], None]

MODULE = """
from dsv4_hal.backends.reference import Reference
from dsv4_hal.conformance.mutants import _class, mutants

class Vendor(Reference):
    name = "vendor"

"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install(code): the backend `vendor`, a subclass of the reference with this body."""

    def do(body: str) -> None:
        site = tmp_path / "site packages"
        facts = site / "third_vendor-1.0.dist-info"
        facts.mkdir(parents=True, exist_ok=True)
        (site / "vendor_module.py").write_text(MODULE + body)
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: third-vendor\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text("[dsv4_hal.backends]\nvendor = vendor_module:Vendor\n")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, "vendor_module", raising=False)

    return do
