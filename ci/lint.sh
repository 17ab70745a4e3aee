#!/usr/bin/env bash
# Style, types, and who may import whom.
set -euo pipefail
bin=$1
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy" -p dsv4_hal
"$bin/lint-imports"
