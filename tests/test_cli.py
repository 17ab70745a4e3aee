"""The command line as a user meets it: outputs, errors, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOL = [sys.executable, "-m", "dsv4_hal"]


def call(*arguments: object, stdin: str | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TOOL, *map(str, arguments)], capture_output=True, text=True, input=stdin, cwd=cwd, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("a path with spaces") / "v4 tiny"
    done = call("init", "--preset", "v4-tiny", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "random weights (seed 0), fp8-fp4" in done.stdout
    return out


def test_init_writes_what_it_says(checkpoint: Path) -> None:
    assert sum(f.stat().st_size for f in checkpoint.iterdir()) < 80e6
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["vocab_size"] == 129280
    assert config["expert_dtype"] == "fp4"


def test_generate_is_repeatable_and_says_that_weights_are_random(checkpoint: Path) -> None:
    arguments = ("generate", checkpoint, "--prompt", "The sea is", "--max-new-tokens", 6)
    first, second = call(*arguments), call(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.strip()
    assert "weights are random" in first.stderr
    assert "4 prompt tokens" in first.stderr
    assert "6 new tokens" in first.stderr
    assert "tokens/s" in first.stderr


def test_generate_draws_by_seed(checkpoint: Path) -> None:
    arguments = ("generate", checkpoint, "--prompt", "-", "--max-new-tokens", 5, "--temperature", 1.0, "--top-p", 0.9)
    a, b, c = (call(*arguments, "--seed", seed, stdin="海 is 深い") for seed in (1, 1, 2))
    assert a.returncode == 0, a.stderr
    assert a.stdout == b.stdout != c.stdout


def test_exact_mode_and_an_empty_prompt(checkpoint: Path) -> None:
    done = call("generate", checkpoint, "--prompt", "", "--max-new-tokens", 2, "--mode", "exact")
    assert done.returncode == 0, done.stderr
    assert "reference, exact: 1 prompt tokens" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--backend", "nope"), 3, "no backend is called 'nope'; registered: null, reference"),
        (("--backend", "null"), 2, "computes shapes, not values"),
        (("--mode", "fast"), 2, "unknown mode 'fast': exact or deployed"),
        (("--top-p", "0"), 2, r"top_p must lie in (0, 1]"),
        (("--temperature", "inf"), 2, "temperature must be zero or positive, got inf"),
        (("--temperature", "-1"), 2, "--temperature"),
        (("--max-new-tokens", "0"), 2, "--max-new-tokens"),
        (("--max-new-tokens", "70000"), 2, "exceed the model's 65536 positions"),
        (("--device", "nonsense"), 3, "device 'nonsense' cannot be used"),
        (("--device", "cuda"), 3, "device 'cuda' cannot be used"),
    ],
)
def test_bad_options(checkpoint: Path, arguments: tuple[str, ...], code: int, text: str) -> None:
    done = call("generate", checkpoint, "--prompt", "x", *arguments)
    assert done.returncode == code, done.stderr
    assert text in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_bad_init(tmp_path: Path) -> None:
    for arguments, text in (
        (("--preset", "v4-huge"), "v4-huge: no such preset"),
        ((), "give one of --preset and --config"),
        (("--preset", "v4-tiny", "--dtype", "int3"), "int3"),
    ):
        done = call("init", "--out", tmp_path / "x", *arguments)
        assert done.returncode == 2, done.stderr
        assert text in done.stderr
        assert not (tmp_path / "x").exists()


def test_init_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    done = call("init", "--preset", "v4-tiny", "--out", tmp_path)
    assert done.returncode == 2
    assert str(tmp_path) in "".join(done.stderr.split("\n"))
    assert (tmp_path / "kept").read_text() == "mine"


def test_a_checkpoint_of_its_own_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / "tokenizer.json").write_text("{")
    done = call("generate", copy, "--prompt", "x")
    assert done.returncode == 2
    assert "tokenizer.json is not a tokenizer" in done.stderr


def test_not_a_checkpoint(tmp_path: Path) -> None:
    for directory, text in ((tmp_path / "nowhere", "nowhere"), (tmp_path, "config.json")):
        done = call("generate", directory, "--prompt", "x")
        assert done.returncode == 2
        assert text in done.stderr
        assert "Traceback" not in done.stderr


def test_interrupt_keeps_what_was_said(checkpoint: Path) -> None:
    arguments = [*TOOL, "generate", str(checkpoint), "--prompt", "x", "--max-new-tokens", "20000"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), True)
        first = process.stdout.read(1)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert first
    assert process.returncode == 130
    assert b"interrupted" in errors
    assert b"Traceback" not in errors


def test_version() -> None:
    assert call("--version").stdout.startswith("dsv4-hal 0.")
