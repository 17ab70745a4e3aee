"""The page: what it says, that it is whole by itself, and that no text on it can act."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dsv4_hal.conformance.judging.results import About, Outcome
from dsv4_hal.conformance.judging.waivers import Waiver
from dsv4_hal.conformance.models.compare import Compared
from dsv4_hal.conformance.models.drift import Free, Part, Picks, Row
from dsv4_hal.conformance.reports import model_report, report
from dsv4_hal.conformance.reports.html import command, page, results
from dsv4_hal.conformance.reports.report import Run
from dsv4_hal.conformance.reports.saved import ModelRun, OpsRun, SavedOutcome, read_file

ABOUT = About("", {"exact": {"storage": "float32"}}, {"machine": {"system": "a chip"}})
NUMBERS = {"y": {"nmse": 1e-10, "cosine": 1.0}}
OWN = Outcome("chip", "linear", "linear[format=bf16,n=1]", "exact", "native", "agrees", "", 0.25, NUMBERS)
BORROWED = Outcome("chip", "rope", "rope[n=1]", "exact", "reference", "agrees", "", 0.0, NUMBERS)
BAD = replace(OWN, case="linear[format=mxfp4,n=2]", verdict="disagrees", message="y: too far", of_budget=math.inf)
SHAPES = Outcome("null", "linear", "linear[format=bf16,n=1]", "exact", "native", "shapes")
VOID = {"meta", "link", "input", "wbr", "br"}


class Page(HTMLParser):
    """The elements of a page, each with what it holds. AssertionError where they are not nested well."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.open = text, list[dict[str, Any]]()
        self.all: list[dict[str, Any]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"tag": tag, "text": "", "within": [e["tag"] for e in self.open], **dict(attrs)}
        self.all.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append({"tag": tag, "text": "", **dict(attrs)})

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()["tag"] == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def find(self, tag: str, **attributes: str) -> list[dict[str, Any]]:
        return [
            e
            for e in self.all
            if e["tag"] == tag and all(e.get(k.strip("_").replace("_", "-")) == v for k, v in attributes.items())
        ]

    @property
    def words(self) -> str:
        """What can be read on it."""
        return " ".join(self.find("body")[0]["text"].split())


def ops(where: Path, *outcomes: Outcome, about: About = ABOUT) -> OpsRun:
    report.write(Run(outcomes[0].backend, outcomes, about), where)
    run = read_file(where / "results.jsonl")
    assert isinstance(run, OpsRun)
    return run


def a_model(where: Path, *rows: Row, mode: str = "deployed") -> ModelRun:
    head = {
        "baseline": "reference", "backends": ["chip"], "model": {"name": "tiny", "layers": 1}, "mode": mode,
        "prompts": [60, 30], "steps": ["60+30", "1+1"], "profiles": {"chip": {"storage": "bfloat16"}},
        "environment": {"chip": {"machine": {"system": "a chip"}}}, "ops": {"chip": {"linear": "native"}},
    }  # fmt: skip
    model_report.write(Compared(head, rows), where)
    run = read_file(where / "model.jsonl")
    assert isinstance(run, ModelRun)
    return run


def cell(found: Page, op: str, label: str) -> dict[str, Any]:
    """The first cell of an op's row that is told of as `label`."""
    named = re.compile(f"Cases of {op} .*on {label}, table")
    id = next(e["id"] for e in found.find("div") if named.fullmatch(e.get("aria-label", "")))
    return next(e for e in found.find("a") if e.get("href") == f"#{id}" and "cell" in e.get("class", ""))


def test_ops_that_are_refused_are_told_with_the_reason(tmp_path: Path) -> None:
    no = {"runs_as": "reference", "refused": "<b>no</b>"}
    found = Page(page([ops(tmp_path / "a", replace(OWN, **no), replace(BORROWED, **no)), ops(tmp_path / "b", SHAPES)]))
    chip, null = (next(e for e in found.find("article") if name in e["text"]) for name in ("chip", "null"))
    assert "Refused: linear, rope (<b>no</b>)" in chip["text"]
    assert "○ nothing was judged: the reference ran in its place" in chip["text"]
    assert "Refused" not in null["text"]


def test_a_model_of_which_nothing_was_judged(tmp_path: Path) -> None:
    run = a_model(tmp_path, Part("chip", None, None, "embed"))
    told = Page(page([replace(run, head=replace(run.head, unjudged=("chip",)))])).words
    assert "○ nothing was judged: chip refused every op" in told and "no failures" in Page(page([run])).words


def test_remarks_are_told(tmp_path: Path) -> None:
    about = replace(ABOUT, remarks=("kv_stores is no <b>op</b>",))
    assert "Remark: kv_stores is no <b>op</b>" in Page(page([ops(tmp_path, OWN, about=about)])).words


def test_headlines_stand_as_they_are(tmp_path: Path) -> None:
    run = ops(tmp_path, OWN, BORROWED, BAD)
    head, *rest = (tmp_path / "results.jsonl").read_text().splitlines()
    told = "as the file says it, whatever the cases are"
    (tmp_path / "results.jsonl").write_text("\n".join([json.dumps(json.loads(head) | {"headline": told}), *rest]))
    assert run.head.headline in Page(page([run])).words
    assert told in Page(page([read_file(tmp_path / "results.jsonl")])).words


def test_states_are_told_apart(tmp_path: Path) -> None:
    found = Page(page([ops(tmp_path / "a", OWN, BORROWED, BAD), ops(tmp_path / "b", SHAPES)]))
    (null, chip) = cell(found, "linear", "null"), cell(found, "linear", "chip")
    assert null["class"] == "cell shapes" and "▢ shapes" in null["text"] and "no values compared" in null["text"]
    assert chip["class"] == "cell agrees" and "✓ 0.25" in chip["text"] and "the backend’s own code" in chip["text"]
    rope = cell(found, "rope", "chip")
    assert rope["class"] == "cell borrowed" and "○ 0.00" in rope["text"] and "not the backend’s own" in rope["text"]
    assert "not run" in found.find("table", class_="matrix")[0]["text"]
    cards = {e["text"].split()[0]: e for e in found.find("article")}
    assert cards["null"]["class"] == "card shapes" and "agrees" not in cards["null"]["text"]
    assert cards["chip"]["class"] == "card fails" and "✕ disagrees" in cards["chip"]["text"]


def test_a_run_of_shapes_alone_claims_no_agreement(tmp_path: Path) -> None:
    found = Page(page([ops(tmp_path, SHAPES)]))
    matrix, cases = found.find("table", class_="matrix")[0], found.find("details", class_="op")[0]
    for part in (found.find("article")[0], matrix, cases):
        assert "agree" not in part["text"] and "✓" not in part["text"] and "exact" not in part["text"].split()
    assert "No values were compared." in found.words


def test_failures_say_what_is_wrong_and_how_to_see_it_again(tmp_path: Path) -> None:
    lost = Outcome("chip", "rope", "rope[n=2]", "deployed", "native", "crash", "exit code 11", size="full")
    found = Page(page([ops(tmp_path, OWN, BAD, lost)]))
    (table,) = found.find("table", class_="failures")
    assert "linear, mxfp4" in table["text"] and "disagrees: y: too far" in table["text"] and "∞" in table["text"]
    assert "crash: exit code 11" in table["text"]
    assert command(SavedOutcome(**vars(BAD))) in found.words
    assert "dsv4-hal conform --backend chip -o rope -p 'rope[n=2]@deployed' --size full" in found.words
    assert not Page(page([ops(tmp_path, OWN)])).find("table", class_="failures")


def test_an_interrupted_run_is_not_green(tmp_path: Path) -> None:
    report.write(Run("chip", (OWN,), ABOUT, interrupted_of=12), tmp_path)
    (card,) = Page(page([read_file(tmp_path / "results.jsonl")])).find("article")
    assert card["class"] == "card waived" and "⚑ interrupted after 1 of 12 cases" in card["text"]
    assert "no failures" not in card["text"]


def test_a_path_that_is_not_utf_8_can_be_shown(tmp_path: Path) -> None:
    runs = [ops(tmp_path / name, OWN) for name in ("a", "b")]
    odd = [replace(run, place=Path(f"\udcff{n}")) for n, run in enumerate(runs)]
    assert "chip (\\udcff0)" in Page(page(odd)).words
    page(odd).encode()


def test_every_case_is_on_the_page_with_its_numbers(tmp_path: Path) -> None:
    many = [replace(OWN, case=f"linear[format=bf16,n={n}]", mode=m) for n in range(30) for m in ("exact", "deployed")]
    found = Page(page([ops(tmp_path, *many)]))
    rows = [e for e in found.find("tbody") if "data-state" in e]
    assert Counter(e["data-mode"] for e in rows) == {"exact": 30, "deployed": 30}
    for outcome in many:
        (row,) = [e for e in rows if outcome.id in e["text"]]
        assert "1e-10" in row["text"] and "agrees" in row["text"]


def test_links_lead_somewhere_and_ids_are_unique(tmp_path: Path) -> None:
    runs = [
        ops(tmp_path / "a", OWN, BAD),
        ops(tmp_path / "b", SHAPES),
        a_model(tmp_path / "c", Part("chip", None, None, "embed")),
    ]
    found = Page(page(runs))
    ids = [e["id"] for e in found.all if "id" in e]
    assert len(ids) == len(set(ids))
    links = [e["href"] for e in found.find("a")]
    assert links and all(link[0] == "#" and link[1:] in ids for link in links)
    assert all(e["aria-labelledby"] in ids for e in found.all if "aria-labelledby" in e)
    assert all(e["for"] in ids for e in found.find("label") if "for" in e)


def test_tables_can_be_read_aloud(tmp_path: Path) -> None:
    rows = (
        Part("chip", 0, 4, "attn", 1e-3),
        Picks("chip", 0, "experts", 1.0, 0.9, "agrees"),
        Free("chip", 3, 1.0, 0.0),
    )
    found = Page(page([ops(tmp_path / "a", OWN, BAD), a_model(tmp_path / "b", *rows)]))
    assert len(found.find("table")) == len(found.find("caption")) >= 8
    assert all(e.get("scope") in ("col", "row", "rowgroup") for e in found.find("th"))
    for region in found.find("div", class_="scroll"):
        assert region["role"] == "region" and region["tabindex"] == "0" and region["aria-label"]
    assert all(e["aria-label"] for e in found.find("svg", role="img"))
    levels = [int(e["tag"][1]) for e in found.all if re.fullmatch(r"h\d", e["tag"])]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


HOSTILE = "<script>x()</script></style><!--'\"&amp;{{ 7*7 }}\u2028</tbody>\\"


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    nasty = dict.fromkeys(("backend", "op", "case", "mode", "runs_as", "message"), HOSTILE)
    outcome = Outcome(**nasty, verdict="error", metrics={HOSTILE: {HOSTILE: 1.0}})
    about = About("", {HOSTILE: {HOSTILE: HOSTILE}}, {HOSTILE: {HOSTILE: HOSTILE}})
    rows = (
        Part(HOSTILE, 0, 0, HOSTILE, 1e-3, verdict="error", message=HOSTILE),
        Picks(HOSTILE, 0, HOSTILE, 1.0, 1.0, HOSTILE),
        Free(HOSTILE, 1, 1.0, 0.0, verdict=HOSTILE, message=HOSTILE),
    )  # fmt: skip
    text = page([ops(tmp_path / "a", outcome, about=about), a_model(tmp_path / "b", *rows, mode=HOSTILE)])
    found = Page(text)
    plain = Page(page([ops(tmp_path / "c", replace(BAD, metrics=NUMBERS)), a_model(tmp_path / "d", *rows)]))
    for tag in ("script", "style"):
        assert len(found.find(tag)) == 1 and found.find(tag)[0]["text"] == plain.find(tag)[0]["text"]
    assert "\u2028" not in text and "<!--" not in text and "49" not in found.find("article")[0]["text"]
    assert HOSTILE.replace("\u2028", "\\u2028") in found.find("article")[0]["text"]
    assert not [name for e in found.all for name in e if name.startswith("on")]


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    found = Page(page([ops(tmp_path / "a", OWN, BAD), a_model(tmp_path / "b", Part("chip", 0, 0, "attn", 1e-3))]))
    assert [e["href"] for e in found.find("link")] == ["data:,"]
    assert not [e for e in found.all if "src" in e or "srcset" in e or "action" in e]
    (style,), (script,) = found.find("style"), found.find("script")
    assert "url(" not in style["text"] and "@import" not in style["text"]
    policy = next(e["content"] for e in found.find("meta") if e.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none';")


def test_runs_of_one_backend_have_names_of_their_own(tmp_path: Path) -> None:
    a, b = ops(tmp_path / "before", OWN), ops(tmp_path / "after", OWN)
    found = Page(page([a, b]))
    labels = {e["data-run"] for e in found.find("details") if "data-run" in e}
    assert labels == {f"chip ({run.place})" for run in (a, b)}
    with pytest.raises(ValueError, match=r"results\.jsonl is given twice"):
        page([a, b, a])
    other = ops(tmp_path / "other", replace(OWN, backend=f"chip ({a.place})"))
    with pytest.raises(ValueError, match=r"two runs are called chip \("):
        page([a, b, other])


def test_environments_stand_side_by_side(tmp_path: Path) -> None:
    other = About("", ABOUT.profiles, {"machine": {"system": "a chip", "driver": "3"}})
    runs = [ops(tmp_path / "a", OWN), ops(tmp_path / "b", SHAPES, about=other)]
    found = Page(page(runs))
    (where,) = [e for e in found.find("section") if e.get("id") == "environments"]
    assert "Only what differs" in where["text"] and "differs: driver" in where["text"]
    assert "judge of chip; judge of null" in where["text"]  # equal ones have one column
    (numerics,) = [e for e in found.find("section") if e.get("id") == "numerics"]
    assert "Only what differs" not in numerics["text"] and "chip; null" in numerics["text"]


def test_a_model_has_its_headline_parts_picks_and_free_run(tmp_path: Path) -> None:
    rows = (
        Part("chip", None, None, "embed"),
        Part("chip", 0, 4, "attn", 1.25e-3, 0.1, 0.0, 0.2, 1e-2, 0.5, 0.125),
        Part("chip", 1, 4, "attn", 0.5, 0.1, 0.0, 0.2, 1e-2, 0.5, 50.0, "disagrees", "layers.1.attn.out: far"),
        Picks("chip", 0, "experts", 0.875, 0.95, "disagrees"),
        Free("chip", 90, 0.75, 0.125, 0.99, 0.2, None, 9),
    )
    found = Page(page([run := a_model(tmp_path, *rows)]))
    assert run.head.headline[0] in found.words and "✕ disagrees" in found.words
    assert "layers.1.attn disagrees: layers.1.attn.out: far" in found.words
    (chart,) = [e for e in found.find("svg") if e.get("role") == "img"]
    assert "chip, layer 0: 0.00125, agrees" in chart["text"]
    assert "2 parts, 1 of them fail, worst error 0.5" in chart["aria-label"]
    assert (
        "87.50 %" in found.words and "95.00 %" in found.words and "75.0 %" in found.words and "none of 9" in found.words
    )
    assert "✓ no failures" in Page(page([a_model(tmp_path, *rows[:2], rows[4])])).words


def test_models_without_rows_claim_nothing(tmp_path: Path) -> None:
    found = Page(page([a_model(tmp_path)]))
    assert "nothing ran" in found.words and "no failures" not in found.words


def test_results_with_the_same_numbers_stand_together() -> None:
    zero, one = {"differing": 0.0}, {"differing": 1.0}
    outcome = SavedOutcome(**vars(OWN) | {"metrics": {"a": zero, "b": one, "c": zero}})
    assert results(outcome) == [("a, c", zero), ("b", one)]


def test_stale_and_waived_are_told(tmp_path: Path) -> None:
    day, last = (datetime.date.today() + datetime.timedelta(days) for days in (-4, 30))
    waivers = tuple(Waiver(*w, day, last) for w in (("linear[format=mxfp4", "per 32"), ("rope[n=1", "was wrong once")))
    report.write(Run("chip", (OWN, BORROWED, BAD), ABOUT, waivers), tmp_path)
    words = Page(page([read_file(tmp_path / "results.jsonl")])).words
    assert "⚑ a waiver is stale" in words and f"rope[n=1 of {day}: no case of it fails: was wrong" in words
    assert f"waived {day}: per 32" in words
    report.write(Run("chip", (OWN, BAD), ABOUT, waivers[:1]), tmp_path)
    assert "⚑ waivers cover all failures" in Page(page([read_file(tmp_path / "results.jsonl")])).words


def test_a_page_of_many_cases_stays_small(tmp_path: Path) -> None:
    """1,200 cases on three backends, each with ids and numbers of a usual length: under 3 MB."""
    metrics = {name: dict.fromkeys(("nmse", "max_abs", "max_rel", "cosine", "1e-3", "5e-3"), 1.234e-5) for name in "ab"}
    ids = [f"linear[format=bf16,tokens={n},inputs=256,outputs=384,how=strided]" for n in range(1200)]
    run = ops(tmp_path, OWN)
    runs = [
        OpsRun(
            Path(backend),
            replace(run.head, run=backend),
            [replace(run.outcomes[0], backend=backend, case=id, metrics=metrics) for id in ids],
        )
        for backend in ("a", "b", "c")
    ]
    assert len(page(runs).encode()) < 3e6
