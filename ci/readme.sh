#!/usr/bin/env bash
# Run every command and every Python example of the README, as written, from the project's folder.
# `make` lines are left to .ci/run, which calls the same targets.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
awk '/^```/ { on = ($0 == "```sh"); next } on && !/^make /' README.md > "$work/commands.sh"
awk '/^```/ { on = ($0 == "```python"); next } on' README.md > "$work/example.py"
rm -rf out/mine
bash -euxo pipefail "$work/commands.sh"
.venv/bin/python "$work/example.py"
