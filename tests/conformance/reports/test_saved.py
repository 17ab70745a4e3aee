"""Results read back from their files: all that was written, or an error that names the file and the line."""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4_hal.conformance.judging.results import About, Outcome
from dsv4_hal.conformance.judging.waivers import Waiver
from dsv4_hal.conformance.models.compare import Compared
from dsv4_hal.conformance.models.drift import Free, Part, Picks
from dsv4_hal.conformance.reports import model_report, report
from dsv4_hal.conformance.reports.report import Run
from dsv4_hal.conformance.reports.saved import (
    MODEL_FILE,
    OPS_FILE,
    ModelRun,
    OpsRun,
    folder,
    printable,
    read,
    read_file,
)

ABOUT = About("", {"exact": {"storage": "float32"}}, {"machine": {"system": "a chip"}})
NAN = {"y": {"a": math.nan}}
OUTCOMES = (
    Outcome("chip", "linear", "linear[n=1]", "exact", "native", "agrees", "", 0.25, {"y": {"nmse": 1e-9}}, 0.5),
    Outcome("chip", "linear", "linear[n=2]", "exact", "native", "disagrees", "\x1b far", math.inf, NAN),
    Outcome("chip", "rope", "rope[n=1]", "deployed", "reference", "timeout", "\ud800 no result\nafter 3 s"),
)  # fmt: skip
DAYS = tuple(datetime.date.today() + datetime.timedelta(days) for days in (-4, 30))
WAIVERS = (
    Waiver("linear[n=2", "slow driver", *DAYS),
    Waiver("swigul[", "typo", *DAYS),
)
ROWS = (
    Part("chip", None, None, "embed"),
    Part("chip", 0, 4, "attn", 1e-3, 0.1, 0.0, 0.2, 1e-2, 0.5, math.inf, "disagrees", "layers.0.attn.out: far"),
    Picks("chip", 0, "experts", 0.9, 0.95, "disagrees"),
    Free("chip", 90, 0.75, 0.1, 0.99, 0.2, 3, 9),
)
HEAD: dict[str, Any] = {
    "baseline": "reference", "backends": ["chip"], "model": {"name": "tiny", "layers": 1}, "mode": "deployed",
    "prompts": [60, 30], "steps": ["60+30", "1+1"], "profiles": {"chip": {"storage": "bfloat16"}},
    "environment": {"chip": {"machine": {"system": "a chip"}}}, "ops": {"chip": {"linear": "native"}},
}  # fmt: skip


@pytest.fixture
def ops(tmp_path: Path) -> Path:
    report.write(Run("chip", OUTCOMES, ABOUT, WAIVERS), tmp_path)
    return tmp_path / "results.jsonl"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model_report.write(Compared(HEAD, ROWS), tmp_path)
    return tmp_path / "model.jsonl"


def test_cases_are_read_as_they_were_written(ops: Path) -> None:
    (run,) = read(ops.parent)
    assert isinstance(run, OpsRun) and run.place == ops
    assert run.head.headline == Run("chip", OUTCOMES, ABOUT, WAIVERS).headline
    assert [(w.case, w.date, w.expires, w.stale) for w in run.head.waivers] == [
        (w.case, *DAYS, ("", "no case of it fails")[i]) for i, w in enumerate(WAIVERS)
    ]
    assert [o.waived for o in run.outcomes] == [False, True, False]
    first, second, third = run.outcomes
    for name in (
        "backend",
        "op",
        "case",
        "mode",
        "runs_as",
        "verdict",
        "of_budget",
        "metrics",
        "seconds",
        "size",
        "ok",
    ):
        assert getattr(first, name) == getattr(OUTCOMES[0], name), name
    assert second.of_budget == math.inf and math.isnan(second.metrics["y"]["a"])
    assert second.message == "\\x1b far" and third.message == "\\ud800 no result\nafter 3 s"


def test_rows_are_read_as_they_were_written(model: Path) -> None:
    run = read_file(model)
    assert isinstance(run, ModelRun) and run.rows == list(ROWS)
    assert run.head.headline[0].startswith("chip against reference: 1 native op; 2 parts, 2 wrong")


def test_a_folder_holds_both(ops: Path, model: Path) -> None:
    assert [type(run) for run in read(ops.parent)] == [OpsRun, ModelRun]


def rewritten(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[bytes], bytes]:
    """A file whose lines are changed as objects."""

    def rewrite(content: bytes) -> bytes:
        lines = [json.loads(line) for line in content.splitlines()]
        change(lines)
        return b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    return rewrite


@pytest.mark.parametrize(
    ("damage", "line", "why"),
    [
        (lambda c: b"", 1, "is empty"),
        (lambda c: b"\n" + c, 1, "is not JSON"),
        (lambda c: c[:-20], 4, "is not JSON"),
        (lambda c: b"".join(c.splitlines(True)[:-1]), 3, "ends after 2 cases, and its first line tells of 3"),
        (lambda c: c + c.splitlines(True)[-1], 5, "ends after 4 cases, and its first line tells of 3"),
        (lambda c: c.replace(b"linear[n=2]", b"linear\xff"), 3, "is not JSON"),
        (lambda c: c.replace(b"linear[n=2]", b'"'), 3, "is not JSON"),
        (lambda c: b"[" * 100_000, 1, "is not JSON"),
        (lambda c: b"3\n" + c, 1, "is not a JSON object"),
        (lambda c: b'{"kind": "other"}\n', 1, "begins neither a conformance run nor a comparison of models"),
        (lambda c: b"".join(c.splitlines(True)[1:]), 1, "begins neither a conformance run nor a comparison of models"),
        (rewritten(lambda lines: lines[0].pop("headline")), 1, "headline"),
        (rewritten(lambda lines: lines[2].pop("verdict")), 3, "verdict"),
        (rewritten(lambda lines: lines[2].update(of_budget="much")), 3, "of_budget"),
        (rewritten(lambda lines: lines[2].update(metrics={"y": {"nmse": []}})), 3, "metrics.y.nmse"),
        (rewritten(lambda lines: lines[3].update(backend="other")), 4, "is a case of other, in a run of chip"),
        (rewritten(lambda lines: lines[2].update(case="linear[n=1]")), 3, "linear[n=1]@exact is there already"),
        (rewritten(lambda lines: lines[3].update(verdict="fine")), 4, "'fine' is no verdict"),
        (rewritten(lambda lines: lines[1].update(of_budget=-1)), 2, "of_budget"),
    ],
)
def test_damage_is_named_with_its_line(ops: Path, damage: Callable[[bytes], bytes], line: int, why: str) -> None:
    ops.write_bytes(damage(ops.read_bytes()))
    with pytest.raises(ValueError) as caught:
        read(ops)
    assert str(caught.value).startswith(f"{ops}:{line}: ") and why in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "line", "why"),
    [
        (lambda c: b"".join(c.splitlines(True)[:-1]), 4, "ends after 3 rows, and its first line tells of 4"),
        (rewritten(lambda lines: lines[0].pop("mode")), 1, "mode"),
        (rewritten(lambda lines: lines[2].update(layer="first")), 3, "layer"),
        (rewritten(lambda lines: lines[3].pop("agreement")), 4, "agreement"),
    ],
)
def test_damage_to_a_model_is_named_too(model: Path, damage: Callable[[bytes], bytes], line: int, why: str) -> None:
    model.write_bytes(damage(model.read_bytes()))
    with pytest.raises(ValueError) as caught:
        read(model)
    assert str(caught.value).startswith(f"{model}:{line}: ") and why in str(caught.value)


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither results\.jsonl nor model\.jsonl"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"no such file or folder: .*none\.jsonl"):
        read(tmp_path / "none.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: not a regular file"):
        read(tmp_path / "pipe")


def test_a_folder_is_looked_at_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "new" / "one", OPS_FILE)
    assert not list((tmp_path / "new" / "one").iterdir())
    (tmp_path / "new" / "one" / MODEL_FILE).touch()
    folder(tmp_path / "new" / "one", MODEL_FILE)
    with pytest.raises(ValueError, match=r"one holds model\.jsonl, and reports of the same names"):
        folder(tmp_path / "new" / "one", OPS_FILE)
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"results\.jsonl is a directory"):
        folder(tmp_path, OPS_FILE)

    def refused(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_bytes", refused)
    with pytest.raises(PermissionError, match=r"/new'$"):
        folder(tmp_path / "new", OPS_FILE)


def test_what_cannot_be_printed_is_escaped() -> None:
    assert printable("a\x00b\u2028\ud83d\n\t高") == "a\\x00b\\u2028\\ud83d\n\t高"
