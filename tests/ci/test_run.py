"""What CI runs is there: it calls the README's test command, and every script that it names."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ci_runs_the_test_command_and_scripts_that_exist() -> None:
    run = ROOT / ".ci" / "run"
    text = run.read_text()
    assert os.access(run, os.X_OK) and text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
    assert re.search(r"^make test\b", text, re.MULTILINE) and "make test " in (ROOT / "README.md").read_text()
    lanes = re.search(r"^bash ci/lanes.sh (.+)$", text, re.MULTILINE)
    assert lanes is not None
    named = re.findall(r"[\w.]+(?=[@: \"])", re.sub(r"[@:][^\s\"]+", "", lanes[1]) + '"')
    assert {"readme", "docs", "kernels", "xla", "browser"} <= set(named)
    assert all((ROOT / "ci" / f"{name}.sh").is_file() for name in named)
