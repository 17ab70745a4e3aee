"""What users copy into their CI: its command lines are the tool's, everything runs, and exit codes decide.

The scripts run with a `dsv4-hal` that writes down what it was asked, makes what it would make, and fails where told to.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from dsv4_hal.cli import app

TEMPLATES = Path(__file__).parents[2] / "ci" / "templates"
BACKENDS = ("cuda", "ascend")

START = """#!/bin/sh
exec '{python}' -SE "$0.py" "$@"
"""
FAKE = """
import json, os, pathlib, sys
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
verb, line = sys.argv[1], " ".join(sys.argv[1:])
fails = dict(pair.split("=") for pair in os.environ.get("FAILS", "").split(",") if pair)
code = next((int(code) for part, code in fails.items() if part in line), 0)
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]) if "--out" in sys.argv else None
if verb == "compare":
    out.mkdir(parents=True)
    verdict = "disagrees" if code else "agrees"
    (out / "results.jsonl").write_text('{"verdict": "' + verdict + '"}\\n')
elif out is not None and not code:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("")
sys.exit(code)
"""


@dataclass
class Machine:
    """A folder, and a shell in it, or in a folder `where` of it, that has the tool above."""

    folder: Path

    def run(
        self, *command: str, fails: str = "", where: str = ".", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        env = os.environ | variables | {"FAILS": fails, "CALLS": str(self.folder / "calls")}
        env["PATH"] = f"{self.folder / 'bin'}:{env['PATH']}"
        return subprocess.run(command, cwd=self.folder / where, env=env, capture_output=True, text=True, timeout=60)

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    @property
    def verbs(self) -> list[str]:
        return [call[0] for call in self.calls]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "dsv4-hal.py").write_text(FAKE)
    (tmp_path / "bin" / "dsv4-hal").write_text(START.format(python=sys.executable))
    (tmp_path / "bin" / "dsv4-hal").chmod(0o755)
    return Machine(tmp_path)


def parses(call: list[str]) -> None:
    """Whether the real tool takes a command line; a usage error otherwise."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    verbs[call[0]].make_context(call[0], call[1:])


# The two files for runners of several kinds, as scripts in order: the backend that the script's job records, or ""
# where bundles are compared; its variables; its text.


Script = tuple[str, dict[str, str], str]


def github() -> Iterator[Script]:
    found = read("github-actions.yml")
    jobs = found["jobs"]
    rows = jobs["record"]["strategy"]["matrix"]["include"]
    for backend, job in [*((row["backend"], jobs["record"]) for row in rows), ("", jobs["compare"])]:
        for step in job["steps"]:
            if "run" in step and step["name"] != "Install":
                yield backend, found["env"], step["run"].replace("${{ matrix.backend }}", backend)


def gitlab() -> Iterator[Script]:
    jobs = read("gitlab-ci.yml")
    for job in (jobs["record-cuda"], jobs["record-ascend"], jobs["compare"]):
        script = job.get("script") or jobs[job["extends"]]["script"]
        variables = jobs["variables"] | job.get("variables", {})
        lines = [line for line in script if isinstance(line, str)]  # a list is the installation
        yield variables.get("BACKEND", ""), variables, "\n".join(lines)


def read(name: str) -> Any:
    return yaml.safe_load((TEMPLATES / name).read_text())


@pytest.fixture(params=[github, gitlab])
def scripts(request: pytest.FixtureRequest) -> list[Script]:
    return list(request.param())


def walk(machine: Machine, scripts: list[Script], fails: str = "") -> list[str]:
    """Run every script, each job in a folder of its own, and bring what was recorded to where it is compared; the jobs
    in which something failed."""
    failed = []
    for backend, variables, text in scripts:
        where = backend or "compare"
        (machine.folder / where).mkdir(exist_ok=True)
        done = machine.run("bash", "-eo", "pipefail", "-c", text, fails=fails, where=where, **variables)
        failed += [where] if done.returncode else []
        if (made := machine.folder / where / "bundles").is_dir() and backend:
            shutil.copytree(made, machine.folder / "compare" / "bundles", dirs_exist_ok=True)
    return failed


def test_the_real_tool_takes_every_command(machine: Machine, scripts: list[Script]) -> None:
    assert walk(machine, scripts, "compare --against bundles/cuda-model.bundle=1") == ["compare"]
    for call in machine.calls:
        parses(call)
    recorded = [call[call.index("--backend") + 1] for call in machine.calls if call[0] == "record"]
    assert sorted(recorded) == sorted([*BACKENDS, *BACKENDS])
    compared = {call[call.index("--against") + 1] for call in machine.calls if call[0] == "compare"}
    assert compared == {f"bundles/{name}{kind}.bundle" for name in BACKENDS for kind in ("", "-model")}
    assert [call[2] for call in machine.calls if call[0] == "bisect"] == ["bundles/cuda-model.bundle"]
    (page,) = (call for call in machine.calls if call[0] == "report")
    assert set(page[1:-2]) == {f"runs/{name}{kind}" for name in BACKENDS for kind in ("", "-model")}


def test_agreement_is_success(machine: Machine, scripts: list[Script]) -> None:
    assert walk(machine, scripts) == []
    assert "bisect" not in machine.verbs


@pytest.mark.parametrize(
    "first", ["compare --against bundles/ascend.bundle=1", "compare --against bundles/cuda.bund=4"]
)
def test_one_that_fails_stops_none(machine: Machine, scripts: list[Script], first: str) -> None:
    assert walk(machine, scripts, first) == ["compare"]
    assert machine.verbs.count("compare") == 4 and machine.verbs.count("report") == 1


def test_a_missing_accelerator_leaves_the_others(machine: Machine, scripts: list[Script]) -> None:
    assert set(walk(machine, scripts, "record --backend ascend=3")) == {"ascend"}
    assert machine.verbs.count("compare") == 2 and machine.verbs.count("report") == 1


def test_actions_are_pinned_by_their_major_version() -> None:
    used = [
        step["uses"] for job in read("github-actions.yml")["jobs"].values() for step in job["steps"] if "uses" in step
    ]
    assert used and all(re.fullmatch(r"actions/[\w-]+@v\d+", name) for name in used)


def test_what_was_made_is_kept_when_a_job_fails() -> None:
    for job in read("github-actions.yml")["jobs"].values():
        uploads = [step for step in job["steps"] if step.get("uses", "").startswith("actions/upload-artifact")]
        assert all("!cancelled()" in step["if"] for step in uploads)
    jobs = read("gitlab-ci.yml")
    assert jobs[".record"]["artifacts"]["when"] == jobs["compare"]["artifacts"]["when"] == "always"
    assert jobs["compare"]["when"] == "always"


COMPARE = str(TEMPLATES / "compare.sh")


def test_compare_sh_agrees(machine: Machine) -> None:
    done = machine.run("bash", COMPARE, "a folder", "reference", "xla", "--", "--size", "tiny", "-o", "linear")
    assert (done.returncode, done.stdout) == (0, "reference: agrees\nxla: agrees\n")
    for call in machine.calls:
        parses(call)
    assert machine.calls[0][-4:] == ["--size", "tiny", "-o", "linear"]
    assert machine.calls[-1] == ["report", "a folder/reference", "a folder/xla", "--out", "a folder/report.html"]


@pytest.mark.parametrize(
    ("fails", "code", "told", "verbs"),
    [
        ("against out/a.b=1", 1, "a: exit code 1\nb: agrees\n", "record compare record compare report"),
        ("against out/b.b=4", 4, "a: agrees\nb: exit code 4\n", "record compare record compare report"),
        ("against out/a.b=5", 5, "a: nothing was judged\nb: agrees\n", "record compare record compare report"),
        ("record --backend a=3", 3, "a: exit code 3\nb: agrees\n", "record record compare report"),
        ("record=2", 2, "a: exit code 2\nb: exit code 2\n", "record record"),
        ("report=2", 2, "a: agrees\nb: agrees\n", "record compare record compare report"),
    ],
)
def test_compare_sh_runs_all_and_fails(machine: Machine, fails: str, code: int, told: str, verbs: str) -> None:
    done = machine.run("bash", COMPARE, "out", "a", "b", fails=fails)
    assert (done.returncode, done.stdout) == (code, told)
    assert machine.verbs == verbs.split()


def test_compare_sh_does_not_judge_an_earlier_run(machine: Machine) -> None:
    assert machine.run("bash", COMPARE, "out", "a").returncode == 0
    again = machine.run("bash", COMPARE, "out", "a")
    assert again.returncode == 2 and "out exists" in again.stderr
    assert machine.verbs.count("record") == 1


def test_compare_sh_says_how_it_is_called(machine: Machine) -> None:
    done = machine.run("bash", COMPARE, "out")
    assert done.returncode == 2 and "compare.sh OUT BACKEND [BACKEND ...] [-- OPTION ...]" in done.stderr
