"""Waivers, and the files a run leaves behind."""

from __future__ import annotations

import datetime
import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dsv4_hal.conformance.judging.results import GRAD, About, Extent, Outcome, Suite, jobs, suite
from dsv4_hal.conformance.judging.waivers import Waiver, read_waivers
from dsv4_hal.conformance.reports.report import Run, jsonl, junit, markdown, rows, write
from dsv4_hal.conformance.reports.saved import OpsRun, read_file
from dsv4_hal.conformance.workers import files
from dsv4_hal.numerics import MODES

DAY, LAST = (datetime.date.today() + datetime.timedelta(days) for days in (-4, 30))
FAR, DAYS = datetime.date.today() + datetime.timedelta(400), f"date: {DAY}, expires: {LAST}"
FIRST, SECOND = (f"linear[format=bf16,tokens={n},inputs=256,outputs=384]" for n in (1, 5))
GOOD = Outcome("chip", "linear", FIRST, "exact", "native", "agrees", of_budget=0.25)
BAD = Outcome("chip", "linear", SECOND, "exact", "native", "disagrees", "y: \x1b too far", float("inf"))
LOST = Outcome("chip", "rope", "rope[a=1]", "deployed", "reference", "error", "ValueError: no rope")
ABOUT = About("", {"exact": {"storage": "float32"}}, {"machine": {"system": "a chip"}})
KINDS = {"linear": "native", "rope": "reference"}


def a_run(*waivers: Waiver, outcomes: tuple[Outcome, ...] = (GOOD, BAD, LOST)) -> Run:
    return Run("chip", outcomes, ABOUT, waivers)


def test_the_headline_says_first_what_is_the_backends_own() -> None:
    assert a_run().headline == (
        "chip: 1 native op of the 2 that ran; 3 cases: 1 agrees, 1 disagrees, 1 error; "
        "size classes tiny, interpreted, quick, full"
    )
    assert Run("chip", [LOST], ABOUT).headline.startswith("chip: 0 native ops of the 1 that ran; 1 case:")
    assert "nothing of it" not in a_run().headline
    mixed = [GOOD, replace(GOOD, mode="deployed", runs_as="reference")]
    assert Run("chip", mixed, ABOUT).runs_as == {"linear": "native / reference"}
    assert Run("chip", mixed, ABOUT).headline.startswith("chip: 0 native ops and 1 in part of the 1 that ran; 2 cases")


def test_the_headline_says_what_was_not_run() -> None:
    some = Run("chip", [GOOD], ABOUT, extent=Extent("quick", "interpreted", 220))
    told = "size classes tiny, interpreted; 220 larger cases not run, since the backend affords interpreted at most"
    assert some.headline.endswith(told)
    assert told in markdown(some)
    assert json.loads(jsonl(some).splitlines()[0])["sizes"] == {
        "size": "quick", "affords": "interpreted", "beyond": 220, "seed": None, "soak": 0,
        "classes": ["tiny", "interpreted"],
    }  # fmt: skip
    drawn = Run("chip", [GOOD], ABOUT, extent=Extent("tiny", seed=7))
    assert drawn.headline.endswith("1 case: 1 agrees; drawn with seed 7, as for size classes tiny")


def test_an_interrupted_run_says_so_everywhere(tmp_path: Path) -> None:
    run = Run("chip", [GOOD], ABOUT, interrupted_of=12)
    assert run.headline.startswith("interrupted after 1 of 12 cases; chip: 1 native op")
    assert markdown(run).startswith(f"# {run.headline}")
    write(run, tmp_path)
    saved = read_file(tmp_path / "results.jsonl")
    assert isinstance(saved, OpsRun) and saved.head.interrupted_of == 12
    suite = junit(run)
    assert (suite.get("tests"), suite.get("errors"), suite.get("failures")) == ("2", "1", "0")
    assert suite[1][0].get("message") == run.headline


def test_ops_that_are_refused_are_told() -> None:
    no = replace(GOOD, runs_as="reference", refused="no <device>\nhere")
    lacking = replace(LOST, verdict="agrees", refused="not implemented")
    run = Run("chip", [no, lacking], ABOUT)
    assert run.refused == {"linear": "no <device>\nhere"} and not run.judged
    assert "2 cases: 2 agrees; nothing of it was judged; size classes" in run.headline
    assert "- `linear`: no &lt;device> here\n" in markdown(run)
    wide = replace(no, case=SECOND, refused="too wide")
    some = Run("chip", [GOOD, no, wide, replace(no, mode="deployed")], ABOUT)
    assert some.refused == {"linear": "in 3 of 4 cases: no <device>\nhere; and 1 other reason"} and some.judged
    assert json.loads(jsonl(some).splitlines()[0])["refused"] == some.refused


def test_what_is_found_out_about_a_backend() -> None:
    def judged(**facts: str) -> bool:
        return Run("chip", [replace(GOOD, **facts)], ABOUT).judged

    assert judged() and judged(runs_as="reference")  # inherited: what the backend offers
    assert judged(runs_as="composite", refused="a fused kernel is, its parts run")
    assert not judged(verdict="shapes") and not judged(runs_as="reference", refused="no")
    assert judged(verdict="disagrees")


def test_remarks_are_told() -> None:
    run = Run("chip", [GOOD], replace(ABOUT, remarks=["kv_stores is no op <b>"]))
    assert "## Remarks\n\n- kv_stores is no op &lt;b>\n" in markdown(run)
    assert json.loads(jsonl(run).splitlines()[0])["remarks"] == ["kv_stores is no op <b>"]


def test_a_recording_says_what_there_is_and_what_it_lacks() -> None:
    work = jobs(["hadamard", "linear"], modes=["exact"], size="tiny")
    found = suite(work[:-1], Extent("quick", "tiny"))
    every = jobs(size="tiny")
    assert found.cases == len(every) and set(found.missing) == {job.id for job in every} - {j.id for j in work[:-1]}
    assert suite(jobs(modes=["a3"], size="tiny"), Extent("tiny")) == Suite(len(every) // 2)
    run = Run("chip", [GOOD], ABOUT, suite=Suite(3, ("linear[a=1]@exact", "linear[a=1]@deployed", "rope[b=1]@exact")))
    assert "1 case: 1 agrees; 0 of 3 cases recorded; size classes" in run.headline
    assert "## Cases that were not recorded\n\n- linear (2 cases), rope (1 case)\n" in markdown(run)
    assert json.loads(jsonl(run).splitlines()[0])["suite"]["cases"] == 3


def test_a_row_says_what_its_errors_are() -> None:
    def told(*outcomes: Outcome) -> str:
        return str(rows(Run("chip", outcomes, ABOUT))[0]["of_budget"])

    exactly = replace(GOOD, of_budget=None)
    assert told(GOOD, exactly) == "0.25" and told(exactly) == "exact" and told(replace(GOOD, of_budget=1e-3)) == "<0.01"
    assert told(replace(exactly, verdict="shapes")) == "shapes"
    assert told(exactly, replace(exactly, verdict="crash")) == "crash"


def test_waivers_cover_failures_and_grow_stale() -> None:
    rope, linear = (
        Waiver("rope[", "slow driver", DAY, LAST),
        Waiver("linear[format=bf16,tokens=5", "rounds per 32", DAY, LAST, "exact"),
    )
    assert [o.case for o in a_run(rope).failed] == [BAD.case]
    assert not a_run(rope, linear).failed and not a_run(rope, linear).stale
    fine = Waiver(FIRST, "was wrong once", DAY, LAST, "exact")
    assert a_run(rope, fine).stale == [fine]
    assert not a_run(Waiver("swiglu[", "did not run", DAY, LAST)).stale
    typo = Waiver("swigul[", "fits no case", DAY, LAST)
    assert a_run(typo).stale == [typo]
    assert not Waiver("linear[", "x", DAY, LAST, backend="other").covers(BAD)
    assert not Waiver("linear[format=bf16,tokens=5", "x", DAY, LAST, "deployed").covers(BAD)
    assert "1 waived" in a_run(rope).headline


@pytest.mark.parametrize("verdict", ["crash", "timeout", "misconduct"])
def test_no_waiver_covers_a_crash_a_hang_or_misconduct(verdict: str) -> None:
    bad = replace(LOST, verdict=verdict)
    run = a_run(Waiver("rope[", "slow driver", DAY, LAST), outcomes=(bad,))
    assert run.failed == [bad] and run.waiver(bad) is None and not run.stale
    assert f"1 {verdict}" in run.headline


def test_a_waiver_that_expired_is_stale() -> None:
    old = Waiver("rope[", "slow driver", DAY, DAY)
    assert old.expired and a_run(old).stale == [old] and old.why_stale == f"it expired on {DAY}"
    assert f"- `rope[` of {DAY}: it expired on {DAY}: slow driver" in markdown(a_run(old))
    today = Waiver("rope[", "slow driver", DAY, datetime.date.today())
    assert not today.expired and not a_run(today).stale


def test_a_waiver_is_stale_only_where_every_case_of_it_ran() -> None:
    waiver = Waiver("rope[tokens=5", "slow driver", DAY, LAST)
    work = [job for job in jobs(["rope"], modes=(*MODES, GRAD), size="full") if job.case.startswith(waiver.case)]
    every = [Outcome("chip", job.op, job.case, job.mode, "native", "agrees") for job in work]
    listed, grad = ([o for o in every if (o.mode == GRAD) == wanted] for wanted in (False, True))

    def stale(outcomes: list[Outcome], waiver: Waiver = waiver, about: About = ABOUT) -> bool:
        return bool(Run("chip", outcomes, about, [waiver]).stale)

    assert stale(listed) and not stale(listed[1:]) and not stale(grad) and not stale([])
    assert not stale([o for o in listed if o.mode == "exact"])
    assert stale([o for o in listed if o.mode == "exact"], replace(waiver, mode="exact"))
    assert stale(grad, replace(waiver, mode=GRAD)) and not stale(listed, replace(waiver, mode=GRAD))
    assert not stale([*listed[1:], replace(listed[0], verdict="disagrees")])
    assert not stale(listed, replace(waiver, backend="other"))
    large = Waiver("hc_post[tokens=70", "beyond it", DAY, LAST)
    tiny = [
        Outcome("chip", "hc_post", job.case, job.mode, "native", "agrees") for job in jobs(["hc_post"], size="tiny")
    ]
    assert not stale(tiny, large, replace(ABOUT, affords="tiny"))


def test_a_disk_that_is_full_leaves_the_earlier_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(a_run(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    plain = Path.write_text

    def full(path: Path, text: str, **how: str) -> int:
        if "report.md" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(path, text, **how)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: .*/report\.md'$"):
        write(a_run(outcomes=(GOOD,)), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_that_cannot_be_put_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match=r"/a'$"), files.whole(tmp_path / "a") as partial:
        partial.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_files(tmp_path: Path) -> None:
    write(a_run(Waiver("rope[", "slow driver", DAY, LAST)), tmp_path / "new" / "folder")
    head, *lines = [json.loads(line) for line in (tmp_path / "new/folder/results.jsonl").read_text().splitlines()]
    assert head["run"] == "chip" and head["ops"] == KINDS and head["environment"]["machine"] == {"system": "a chip"}
    assert head["judged"]["packages"]["torch"] and head["profiles"]["exact"]["storage"] == "float32"
    assert [(line["verdict"], line["waived"]) for line in lines] == [
        ("agrees", False), ("disagrees", False), ("error", True),
    ]  # fmt: skip
    assert lines[0]["of_budget"] == 0.25 and lines[1]["of_budget"] == "inf"
    suite = ElementTree.parse(tmp_path / "new/folder/junit.xml").getroot()
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["3", "1", "0", "1"]
    assert [child.tag for case in suite for child in case] == ["failure", "skipped"]
    text = (tmp_path / "new/folder/report.md").read_text()
    assert "| linear | native | 2 | 1 | ∞ |" in text
    assert f"`{BAD.id}` disagrees" in text


def test_junit_tells_failures_errors_and_stale_waivers_apart() -> None:
    suite = junit(a_run(Waiver("swigul[", "fits no case", DAY, LAST)))
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["4", "2", "1", "0"]
    assert [child.tag for case in suite for child in case] == ["failure", "error", "failure"]
    assert suite[3].get("classname") == "chip.waivers" and "stale" in str(suite[3][0].get("message"))


def test_junit_has_the_trace_of_an_exception() -> None:
    raised = replace(LOST, trace='File "chip.py", line 3, in rope\n  \x1b<b>\n')
    text = ElementTree.tostring(junit(a_run(outcomes=(raised,))), "unicode")
    (error,) = ElementTree.fromstring(text).iter("error")
    assert (
        error.text == 'File "chip.py", line 3, in rope\n  \\x1b<b>\n'
        and error.get("message") == f"error: {LOST.message}"
    )


def test_a_message_stays_on_its_line() -> None:
    bad = replace(BAD, message="ValueError: first\n# second <b>")
    assert f"- `{bad.id}` disagrees: ValueError: first # second &lt;b>\n" in markdown(a_run(outcomes=(bad,)))


def test_reading_waivers(tmp_path: Path) -> None:
    file = tmp_path / "waivers.yaml"
    file.write_text(f'- {{case: "linear[", mode: exact, reason: why, {DAYS}}}\n')
    assert read_waivers(file) == [Waiver("linear[", "why", DAY, LAST, "exact")]
    file.write_text(f"- {{case: 'a[', reason: b, date: '{DAY}', expires: {LAST}, backend: 'null'}}\n")
    assert read_waivers(file) == [Waiver("a[", "b", DAY, LAST, backend="null")]
    file.write_text("# all gone\n")
    assert read_waivers(file) == read_waivers(tmp_path / "none.yaml") == []
    file.unlink()
    for target in (file.name, "gone.yaml"):
        file.symlink_to(target)
        with pytest.raises(ValueError, match=r"waivers\.yaml"):
            read_waivers(file)
        file.unlink()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a: 1", "must be a list of waivers"),
        ("- 3", "waiver 1: must have case, reason, date and expires"),
        ("- {case: 'a[', reason: b}", "waiver 1: date must be a day"),
        (f"- {{case: 'a[', reason: b, date: {DAY}}}", "waiver 1: expires must be a day, as in 2026-11-25, got None"),
        (f"- {{case: 'a[', {DAYS}}}", "waiver 1: reason must be text"),
        (f"- {{case: 'a[', reason: ' ', {DAYS}}}", "waiver 1: reason must be text"),
        (f"- {{case: '', reason: b, {DAYS}}}", "waiver 1: case must be text"),
        (f"- {{case: l, reason: b, {DAYS}}}", "waiver 1: case must be a case id, or begin one: 'linear[...', got 'l'"),
        (f"- {{case: '[tokens', reason: b, {DAYS}}}", "waiver 1: case must be a case id, or begin one"),
        (f"- {{case: 'a[', reason: b, {DAYS}, mod: exact}}", "waiver 1: unknown key mod"),
        (f"- {{case: 'a[', reason: b, {DAYS}, mode: fast}}", "waiver 1: mode must be exact, deployed"),
        ("- {case: 'a[', reason: b, date: 2026-11-25T10:00:00}", "waiver 1: date must be a day"),
        (f"- {{case: 'a[', reason: b, date: {DAY}, expires: {FAR}}}", "waiver 1: expires must be a day between"),
        (f"- {{case: 'a[', reason: b, date: {FAR}, expires: {FAR}}}", "a year from today, got"),
        (f"- {{case: 'a[', reason: b, date: {LAST}, expires: {DAY}}}", "waiver 1: expires must be a day between"),
        ("- [", "waivers.yaml: while parsing"),
        (
            "- {case: 'a[', reason: b, date: 2026-13-45}",
            "waiver 1: date must be a day, as in 2026-11-25, got '2026-13-45'",
        ),
        ("- {case: a, case: b, reason: c, date: 2026-11-25}", "line 1: case stands twice"),
        ("- {[a]: b}", "line 1: ['a'] stands twice, or is no text"),
        (f"- {{case: 'a[', reason: b, {DAYS}, backend: nul}}", "waiver 1: no backend is called 'nul'"),
        ("- " + "[" * 10_000, "waivers.yaml: is nested too deeply"),
    ],
)
def test_bad_waivers(tmp_path: Path, text: str, error: str) -> None:
    file = tmp_path / "waivers.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"waivers\.yaml: ") as caught:
        read_waivers(file)
    assert error in str(caught.value)
