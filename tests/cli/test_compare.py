"""`record --model`, `compare` and `bisect`, as a user calls them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Tool = Callable[..., Any]
SHORT = ("--tokens", "40,9", "--decode", "1")

WRONG = """
from dsv4_hal.backends.reference import Reference

class Third(Reference):
    name = "third"

    def swiglu(self, *args, **kwargs):
        return super().swiglu(*args, **kwargs) * 1.5
"""


@pytest.mark.usefixtures("third")
def test_a_wrong_backend_on_a_model(tool: Tool, tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "site packages" / "third_vendor.py").write_text(WRONG)
    done = tool("compare", "--backends", "reference,third", "--model", tiny_dir, *SHORT, "--out", tmp_path / "out")
    assert done.code == 1, done.err
    assert "third: layers.0.ffn: disagrees: layers.0.ffn.out: nmse" in done.out
    assert "third against reference: 1 native op; 17 parts, 5 wrong" in done.out
    head, *rows = [json.loads(line) for line in (tmp_path / "out" / "model.jsonl").read_text().splitlines()]
    assert head["steps"] == ["40+9", "1+1"]
    assert [r["layer"] for r in rows if r.get("verdict") == "disagrees"] == [0, 1, 2, 3, 4]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.jsonl", "junit.xml", "report.md", "report.html"}


@pytest.mark.usefixtures("third")
def test_a_bundle_is_compared_and_bisected(tool: Tool, tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "site packages" / "third_vendor.py").write_text(WRONG)
    bundle = tmp_path / "a folder" / "a.bundle"
    done = tool("record", "--backend", "third", "--model", tiny_dir, *SHORT, "--ops", "--out", bundle)
    assert done.code == 0 and "40 + 9 tokens and 1 decoded" in done.out, done.err
    done = tool("bisect", "--against", bundle, "--model", tiny_dir)
    assert done.code == 1
    assert "first wrong op: moe_experts > swiglu in layers.0.ffn, step 0: nmse" in done.out
    table = [(row.split()[1], row.split()[-2]) for row in done.out.splitlines() if row.startswith("│")]
    assert ("route", "agrees") in table and ("unpermute", "follows") in table
    assert [op for op, verdict in table if verdict == "wrong"] == ["swiglu"]
    assert "alone: dsv4-hal conform --backend third -o swiglu" in done.out
    done = tool("compare", "--against", bundle)
    assert done.code == 2 and "holds a whole model: add --model DIR" in done.err
    assert tool("record", "--model", tiny_dir, "--out", bundle).code == 2


def test_bad_input(tool: Tool, tiny_dir: Path, tmp_path: Path) -> None:
    pair, model = ("--backends", "reference,null"), ("--model", tiny_dir)
    for arguments, code, message in (
        (("compare",), 2, "name what to compare"),
        (("compare", *pair), 2, "name what to compare"),
        (("compare", "--backends", "reference", *model), 2, "two or more different names"),
        (("compare", "--backends", "reference,reference", *model), 2, "two or more different names"),
        (("compare", *pair, "--model", "v4-flash"), 2, "it has shapes but no weights"),
        (("compare", *pair, "--model", tmp_path), 2, "config.json"),
        (("compare", *pair, *model, "--mode", "fast"), 2, "--mode must be exact, deployed"),
        *(
            (("compare", *pair, *model, "--tokens", wrong), 2, "--tokens must be whole numbers")
            for wrong in ("9,x", "", "0", "1_0", "+5", "٣")
        ),
        (("compare", *pair, *model, "--tokens", "99999999999"), 2, "exceed the model's"),
        (("compare", *pair, *model, "--seed", 2**64), 2, "--seed"),
        (("compare", "--backends", "reference,auto", *model), 2, "auto is not a backend to compare"),
        (("compare", "--against", tmp_path / "no", "--backend", "auto", *model), 2, "auto is not a backend"),
        (("compare", "--against", tmp_path / "no", "--limit", "9"), 2, "--limit goes with --model"),
        (("compare", "--backends", "reference,nul", *model), 3, "did you mean null?"),
        (("compare", *pair, *model), 3, "computes shapes, not values"),
        (("compare", *pair, *model, "--tokens", "9", "--prompt", "Hi"), 2, "--prompt gives the tokens"),
        (("compare", *pair, *model, "--backend", "null"), 2, "--backend goes with --against"),
        (("compare", "--against", tmp_path / "no", *pair), 2, "says what was run"),
        (("compare", "--against", tmp_path / "no", *model), 2, "no such file"),
        (("compare", "--against", tmp_path / "no", "--backend", "null"), 2, "compared with the reference"),
        (("compare", "--backends", "nul,reference", *model), 3, "did you mean null?"),
        (("compare", "--backends", "null,reference", *model), 3, "computes shapes, not values"),
        (("bisect", *pair), 2, "name what to compare"),
        (("bisect", *model), 2, "name what to compare"),
        (("bisect", "--against", tmp_path / "no", "--backend", "auto", *model), 2, "auto is not a backend"),
        (("bisect", "--backends", "a,b,c", *model), 2, "bisect takes two backends"),
        (("record", "--ops", "--out", tmp_path / "b"), 2, "go with --model"),
        (("record", *model, "-o", "linear", "--out", tmp_path / "b"), 2, "a whole model is recorded whole"),
        (("record", *model, "--size", "tiny", "--out", tmp_path / "b"), 2, "a whole model is recorded whole"),
        (("record", *model, "--tokens", "2000000", "--out", tmp_path / "b"), 2, "exceed the model's"),
        (("record", *model, "--backend", "auto", "--out", tmp_path / "b"), 2, "auto is not a backend"),
        (("record", "--out", tmp_path / ("b" * 240)), 2, "File name too long"),
        (("record", "--out", "/proc/b"), 2, "/proc/.b.partial"),
    ):
        done = tool(*arguments)
        assert done.code == code, (arguments, done.err)
        assert message in done.err, (arguments, done.err)
    assert not (tmp_path / "b").exists()
