#!/usr/bin/env bash
# Every kernel compiled for GPUs that are not here: it must fit them, and take what docs/kernels.md says.
#   bash ci/kernels.sh .venv/bin        for two of them, in minutes
#   bash ci/kernels.sh .venv/bin full   for all six, in every dtype and sort of step
set -euo pipefail
"$1/python" benchmarks/kernels.py --part "${2:-quick}" --workers "${WORKERS:-2}" --check docs/kernels.md
