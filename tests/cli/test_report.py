"""`dsv4-hal report`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4_hal.conformance.judging.results import About, Outcome
from dsv4_hal.conformance.reports import report
from dsv4_hal.conformance.reports.report import Run

Tool = Callable[..., Any]


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of two runs; the second fails."""
    for name, verdict in (("one", "agrees"), ("two", "disagrees")):
        outcome = Outcome(name, "rope", "rope[n=1]", "exact", "native", verdict, of_budget=0.5)
        report.write(Run(name, [outcome], About("", {}, {})), tmp_path / name)
    return tmp_path / "one", tmp_path / "two"


def test_runs_are_put_on_one_page(tool: Tool, runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    done = tool("report", runs[0], runs[1] / "results.jsonl", "--out", out)
    assert done.code == 0, done.err
    assert done.out == f"{out}: 2 runs, {out.stat().st_size / 1e6:.1f} MB\n"
    page = out.read_text(encoding="utf-8")
    assert all(f"{name}: 1 native op of the 1 that ran" in page for name in ("one", "two"))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["one", "--out", "one/results.jsonl"], "must be a file whose name ends in .html"),
        (["one", "one/results.jsonl", "--out", "page.html"], "one/results.jsonl is given twice"),
        (["three", "--out", "page.html"], "no such file or folder: three"),
        ([".", "--out", "page.html"], "holds neither results.jsonl nor model.jsonl"),
        (["one/junit.xml", "--out", "page.html"], "one/junit.xml:1: is not JSON"),
    ],
)
@pytest.mark.usefixtures("runs")
def test_what_cannot_be_done(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    truth = (tmp_path / "one" / "results.jsonl").read_bytes()
    done = tool("report", *arguments)
    assert done.code == 2 and error in done.err
    assert not (tmp_path / "page.html").exists() and (tmp_path / "one" / "results.jsonl").read_bytes() == truth


def test_it_has_no_default(tool: Tool) -> None:
    assert tool("report").code == 2
