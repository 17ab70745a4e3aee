"""Running verbs as a user does, but in this process; and a backend that a stranger's package registers."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsv4_hal.cli import run as run_verb


@dataclass
class Done:
    code: int
    out: str
    err: str


Tool = Callable[..., Done]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Tool:
    """tool("verb", "--flag", ..., stdin="text"): exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["dsv4-hal", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        code = 0
        try:
            run_verb()  # not as a program: this process has computed, and processes are not forked from it
        except SystemExit as left:
            code = int(left.code or 0)
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return run


THIRD = '''
from dsv4_hal.backend import Verdict
from dsv4_hal.backends.reference import Reference

class Third(Reference):
    """hadamard is its own; hc_pre, its own too, is refused for wide models; the rest is the reference's."""

    name = "third"

    @classmethod
    def environment(cls):
        return {"driver": "3.0"}

    def supports(self, op, facts):
        if op == "hc_pre" and facts.get("hidden_size", 0) > 64:
            return Verdict(False, f"hidden_size {facts['hidden_size']} is above 64")
        return super().supports(op, facts)

    def hadamard(self, x):
        return super().hadamard(x)

    def hc_pre(self, *args, **kwargs):
        return super().hc_pre(*args, **kwargs)
'''


@pytest.fixture
def third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with two backends: `third`, which works, and `broken`, which raises on import."""
    site = tmp_path / "site packages"
    facts = site / "third_vendor-3.0.dist-info"
    facts.mkdir(parents=True)
    (site / "third_vendor.py").write_text(THIRD)
    (site / "third_vendor_broken.py").write_text("raise OSError('libthird.so: cannot open shared object file')\n")
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: third-vendor\nVersion: 3.0\n")
    (facts / "entry_points.txt").write_text(
        "[dsv4_hal.backends]\nthird = third_vendor:Third\nbroken = third_vendor_broken:Backend\n"
    )
    monkeypatch.syspath_prepend(str(site))
    for module in ("third_vendor", "third_vendor_broken"):
        monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v4-tiny with random weights, in a path with spaces."""
    from dsv4_hal.model.checkpoint import init_checkpoint
    from dsv4_hal.model.config import preset

    out = tmp_path_factory.mktemp("a path with spaces") / "v4 tiny"
    init_checkpoint(preset("v4-tiny"), out, dtype="fp8-fp4", seed=0)
    return out
