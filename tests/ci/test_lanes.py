"""Scripts side by side: what they print is whole, and one that fails is told."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

LANES = Path(__file__).parents[2] / "ci" / "lanes.sh"
SCRIPTS = {
    "hello": 'echo "hello from $1"; sleep 0.2; echo "and $# arguments, $2"',
    "world": "echo world",
    "broken": "echo going down; exit 7",
}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder" / "ci"
    folder.mkdir(parents=True)
    shutil.copy(LANES, folder)
    for name, text in SCRIPTS.items():
        (folder / f"{name}.sh").write_text(text)
    return folder


def lanes(here: Path, *scripts: str) -> tuple[int, list[str]]:
    done = subprocess.run(["bash", here / "lanes.sh", *scripts], capture_output=True, text=True, timeout=60)
    assert not done.stderr
    return done.returncode, [line.partition(" after")[0] for line in done.stdout.splitlines()]


def test_what_a_script_prints_is_shown_in_one_piece(here: Path) -> None:
    code, lines = lanes(here, "hello@.other/bin:loud world", "world")
    assert code == 0
    at = lines.index("=== hello: exit code 0")
    assert lines[at + 1 : at + 3] == ["hello from .other/bin", "and 2 arguments, loud"]
    assert lines.count("=== world: exit code 0") == lines.count("world") == 2
    assert lines[-2:] == ["=== world: exit code 0", "world"]  # the first lane's, behind the slow one


def test_a_script_that_fails_ends_its_lane_and_the_run(here: Path) -> None:
    code, lines = lanes(here, "broken world", "hello")
    assert code == 1 and "hello from .venv/bin" in lines
    assert "=== broken: exit code 7" in lines and "going down" in lines
    assert "=== hello: exit code 0" in lines and "world" not in lines


def test_a_script_that_is_not_there_fails(here: Path) -> None:
    assert lanes(here, "world nothing")[0] == 1
