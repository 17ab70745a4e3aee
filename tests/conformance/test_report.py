"""Waivers, and the files a run leaves behind."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dsv4_hal.conformance.report import Run, jsonl, markdown, write
from dsv4_hal.conformance.runner import About, Extent, Outcome
from dsv4_hal.conformance.waivers import Waiver, read_waivers

DAY = datetime.date(2026, 11, 25)
FIRST, SECOND = (f"linear[format=bf16,tokens={n},inputs=256,outputs=384]" for n in (1, 5))
GOOD = Outcome("chip", "linear", FIRST, "exact", "native", "agrees", of_budget=0.25)
BAD = Outcome("chip", "linear", SECOND, "exact", "native", "disagrees", "y: \x1b too far", float("inf"))
LOST = Outcome("chip", "rope", "rope[a=1]", "deployed", "reference", "timeout", "no result after 3 s")
ABOUT = About("", {"exact": {"storage": "float32"}}, {"machine": {"system": "a chip"}})
KINDS = {"linear": "native", "rope": "reference"}


def a_run(*waivers: Waiver, outcomes: tuple[Outcome, ...] = (GOOD, BAD, LOST)) -> Run:
    return Run("chip", outcomes, ABOUT, waivers)


def test_the_headline_says_first_what_is_the_backends_own() -> None:
    assert a_run().headline == (
        "chip: 1 native op of the 2 that ran; 3 cases: 1 agrees, 1 disagrees, 1 timeout; "
        "size classes tiny, interpreted, quick, full"
    )
    assert Run("chip", [LOST], ABOUT).headline.startswith("chip: 0 native ops of the 1 that ran; 1 cases")
    mixed = [GOOD, replace(GOOD, mode="deployed", runs_as="reference")]
    assert Run("chip", mixed, ABOUT).runs_as == {"linear": "native / reference"}


def test_the_headline_says_what_was_not_run() -> None:
    some = Run("chip", [GOOD], ABOUT, extent=Extent("quick", "interpreted", 220))
    told = "size classes tiny, interpreted; 220 larger cases not run, since the backend affords interpreted at most"
    assert some.headline.endswith(told)
    assert told in markdown(some)
    assert json.loads(jsonl(some).splitlines()[0])["sizes"] == {
        "size": "quick", "affords": "interpreted", "beyond": 220, "classes": ["tiny", "interpreted"],
    }  # fmt: skip


def test_waivers_cover_failures_and_grow_stale() -> None:
    rope, linear = (
        Waiver("rope[", "slow driver", DAY),
        Waiver("linear[format=bf16,tokens=5", "rounds per 32", DAY, "exact"),
    )
    assert [o.case for o in a_run(rope).failed] == [BAD.case]
    assert not a_run(rope, linear).failed and not a_run(rope, linear).stale
    fine = Waiver("linear[format=bf16,tokens=1", "was wrong once", DAY)
    assert a_run(rope, fine).stale == [fine]
    assert not a_run(Waiver("swiglu[", "did not run", DAY)).stale
    typo = Waiver("swigul[", "fits no case", DAY)
    assert a_run(typo).stale == [typo]
    assert not Waiver("linear[", "x", DAY, backend="other").matches(BAD)
    assert not Waiver("linear[format=bf16,tokens=5", "x", DAY, "deployed").matches(BAD)
    assert "1 waived" in a_run(rope).headline


def test_files(tmp_path: Path) -> None:
    write(a_run(Waiver("rope[", "slow driver", DAY)), tmp_path / "new" / "folder")
    head, *lines = [json.loads(line) for line in (tmp_path / "new/folder/results.jsonl").read_text().splitlines()]
    assert head["run"] == "chip" and head["ops"] == KINDS and head["environment"]["machine"] == {"system": "a chip"}
    assert head["judged"]["packages"]["torch"] and head["profiles"]["exact"]["storage"] == "float32"
    assert [(line["verdict"], line["waived"]) for line in lines] == [
        ("agrees", False), ("disagrees", False), ("timeout", True),
    ]  # fmt: skip
    assert lines[0]["of_budget"] == 0.25 and lines[1]["of_budget"] == "inf"
    suite = ElementTree.parse(tmp_path / "new/folder/junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    assert [child.tag for case in suite for child in case] == ["failure", "skipped"]
    text = (tmp_path / "new/folder/report.md").read_text()
    assert "| linear | native | 2 | 1 | inf |" in text
    assert f"`{BAD.id}` disagrees" in text


def test_reading_waivers(tmp_path: Path) -> None:
    file = tmp_path / "waivers.yaml"
    file.write_text('- {case: "linear[", mode: exact, reason: why, date: 2026-11-25}\n')
    assert read_waivers(file) == [Waiver("linear[", "why", DAY, "exact")]
    file.write_text("# all gone\n")
    assert read_waivers(file) == read_waivers(tmp_path / "none.yaml") == []


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a: 1", "must be a list of waivers"),
        ("- 3", "waiver 1: must have case, reason and date"),
        ("- {case: a, reason: b}", "waiver 1: date must be a day"),
        ("- {case: a, date: 2026-11-25}", "waiver 1: reason must be text"),
        ("- {case: a, reason: ' ', date: 2026-11-25}", "waiver 1: reason must be text"),
        ("- {case: a, reason: b, date: 2026-11-25, mod: exact}", "waiver 1: unknown key mod"),
        ("- {case: a, reason: b, date: 2026-11-25, mode: fast}", "waiver 1: mode must be exact, deployed or"),
        ("- {case: a, reason: b, date: 2026-11-25T10:00:00}", "waiver 1: date must be a day"),
        ("- [", "waivers.yaml: while parsing"),
    ],
)
def test_bad_waivers(tmp_path: Path, text: str, error: str) -> None:
    file = tmp_path / "waivers.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"waivers\.yaml: ") as caught:
        read_waivers(file)
    assert error in str(caught.value)
