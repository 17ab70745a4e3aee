"""ci/device.sh: without a GPU it says so; with one, as a Python that plays it, every part runs in its time."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Says what it was asked, leaves what is asked for with --out or --junitxml, and takes the time that it is told to.
PYTHON = """#!{python}
import os, pathlib, signal, sys, time
line = " ".join(sys.argv[1:])
if sys.argv[1] == "-c":
    print(os.environ.get("GPU", ""))
    sys.exit()
with open(os.environ["CALLS"], "a") as calls:
    print(line, file=calls)
name = next((n for n in ("conform", "compare", "pytest", "gpu.py") if n in line), "")
out = next((pathlib.Path(sys.argv[i + 1]) for i, a in enumerate(sys.argv) if a in ("--out", "--junitxml")), None)
if out is not None:
    out = out / ("results.jsonl" if name == "conform" else "model.jsonl") if not out.suffix else out
    out.parent.mkdir(exist_ok=True)
slow, code = os.environ.get("SLOW", "").split("="), dict(f.split("=") for f in os.environ.get("FAILS", "").split())
if name and slow[0] == name:
    try:
        time.sleep(float(slow[1]))
    except KeyboardInterrupt:
        out.write_text("a part")
        sys.exit(130)
if out is not None:
    out.write_text("all")
print(name, "ran")
sys.exit(int(code.get(name, 0)))
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(PYTHON.format(python=sys.executable))
    path.chmod(0o755)
    return path


def device(python: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    out = python.parent / "out"
    env = os.environ | {"OUT": str(out), "CALLS": str(python.parent / "calls"), "WHEELS": "nowhere"} | variables
    command = ["bash", ROOT / "ci" / "device.sh", python]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_without_a_gpu_it_says_so() -> None:
    done = device(Path(sys.executable), CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (0, "device: skipped, torch finds no NVIDIA GPU on this machine\n")


def test_without_torch_it_fails(tmp_path: Path) -> None:
    done = device(tmp_path / "no python")
    assert done.returncode == 2 and "torch cannot be imported by " in done.stderr


def test_every_part_runs_and_leaves_its_results(python: Path) -> None:
    done = device(python, GPU="a GPU")
    assert done.returncode == 0, done.stderr
    calls = (python.parent / "calls").read_text().splitlines()
    assert [call.partition(" --")[0] for call in calls[1:]] == [
        "-m dsv4_hal conform",
        "-m dsv4_hal compare",
        "-m pytest -p no:cacheprovider",
        "benchmarks/gpu.py",
    ]
    assert "--backend cuda --size quick" in calls[1] and "--model tests/data/tiny" in calls[2]
    out = python.parent / "out"
    kept = ["compare.jsonl", "conform.jsonl", "device.log", "gpu.jsonl", "tests.xml"]
    assert sorted(path.name for path in out.iterdir()) == kept
    assert (out / "device.log").read_text() == done.stdout and "device: a GPU, 480 s\n" in done.stdout
    limits = [int(line.split()[-2]) for line in done.stdout.splitlines() if "at most" in line]
    assert len(limits) == 4 and 190 < limits[0] <= 480 * 45 // 100 - 10  # what one leaves, the next ones have
    assert 400 < limits[-1] <= 470


def test_a_part_that_takes_too_long_leaves_what_it_has_and_the_others_run(python: Path) -> None:
    done = device(python, GPU="a GPU", SLOW="conform=60", BUDGET="16")
    assert done.returncode == 124
    assert (python.parent / "out" / "conform.jsonl").read_text() == "a part"
    assert all(f"{name} ran" in done.stdout for name in ("compare", "pytest", "gpu.py"))


def test_the_first_failure_is_the_exit_code(python: Path) -> None:
    done = device(python, GPU="a GPU", FAILS="compare=1 gpu.py=2")
    assert done.returncode == 1 and "=== gpu: exit code 2 after" in done.stdout


def test_a_python_that_cannot_install_finds_the_backends(tmp_path: Path) -> None:
    """In an interpreter that knows of no installed package but those it needs."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import registered; from importlib import metadata as m; "
        "registered.version = lambda n: m.version(n) if n != 'dsv4-hal' else (_ for _ in ()).throw("
        "m.PackageNotFoundError); sys.exit(registered.main(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, ROOT / "ci", tmp_path], check=True)
    (facts,) = tmp_path.iterdir()
    found = PathDistribution(facts)
    assert found.name == "dsv4-hal" and any(one.startswith("torch") for one in found.requires or ())
    names = {entry.name for entry in found.entry_points if entry.group == "dsv4_hal.backends"}
    assert {"reference", "null", "cuda", "ascend"} <= names
