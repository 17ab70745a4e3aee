"""A backend of given code, installed as a stranger's package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Package = Callable[[str, str, str], None]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """package(name, code, target): the backend `name` is the class `target` of a module with this code."""

    def install(name: str, code: str, target: str) -> None:
        site = tmp_path / f"site {name}"
        facts = site / f"{name}-1.0.dist-info"
        facts.mkdir(parents=True, exist_ok=True)
        (site / f"{name}_module.py").write_text(code)
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: third-vendor\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(f"[dsv4_hal.backends]\n{name} = {name}_module:{target}\n")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, f"{name}_module", raising=False)

    return install
