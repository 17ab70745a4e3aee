"""`init`: a checkpoint with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Tool = Callable[..., Any]


def test_init_writes_what_it_says(tool: Tool, tmp_path: Path) -> None:
    out = tmp_path / "a path with spaces"
    done = tool("init", "--preset", "v4-tiny", "--out", out)
    assert done.code == 0, done.err
    assert "random weights (seed 0), fp8-fp4" in done.out
    assert sum(f.stat().st_size for f in out.iterdir()) < 80e6
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == 129280
    assert config["expert_dtype"] == "fp4"


def test_bad_init(tool: Tool, tmp_path: Path) -> None:
    for arguments, text in (
        (("--preset", "v4-huge"), "v4-huge: no such preset"),
        ((), "give one of --preset and --config"),
        (("--preset", "v4-tiny", "--dtype", "int3"), "int3"),
    ):
        done = tool("init", "--out", tmp_path / "x", *arguments)
        assert done.code == 2, done.err
        assert text in done.err
        assert not (tmp_path / "x").exists()


def test_init_loses_nothing(tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    done = tool("init", "--preset", "v4-tiny", "--out", tmp_path)
    assert done.code == 2
    assert str(tmp_path) in "".join(done.err.split("\n"))
    assert (tmp_path / "kept").read_text() == "mine"
