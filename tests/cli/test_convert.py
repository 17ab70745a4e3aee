"""`convert`, as a user calls it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Tool = Callable[..., Any]


def test_a_checkpoint_is_converted_and_what_changed_is_told(tool: Tool, tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "a folder" / "w8a8"
    done = tool("convert", tiny_dir, "--to", "ascend-a3-w8a8", "--out", out)
    assert done.code == 0, done.err
    first, second, third, last = done.out.splitlines()
    assert first == "e4m3_128x128 to bf16: 18 tensors, exact"
    assert second.startswith("e4m3_128x128 to int8_channel: 34 tensors, rms error 0.6")
    assert third.startswith("mxfp4 to int8_channel: 144 tensors, rms error 0.7") and "its channel" in third
    assert last.startswith(f"{out}: ascend-a3-w8a8, 196 tensors converted, 116 kept, 8.4 MB before, 11.5 MB after")
    done = tool("info", out)
    assert done.code == 0, done.err


def test_bad_input(tool: Tool, tiny_dir: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((tiny_dir, "--to", "w8a8", "--out", tmp_path / "x"), "no target is called 'w8a8'; there are bf16, ascend-a3"),
        ((tmp_path, "--to", "bf16", "--out", tmp_path / "x"), "config.json: no such file"),
        ((tiny_dir, "--to", "bf16", "--out", tiny_dir), "exists and is not an empty directory"),
    ):
        done = tool("convert", *arguments)
        assert done.code == 2 and message in done.err, done.err
        assert not (tmp_path / "x").exists()
