#!/usr/bin/env bash
# Every kernel compiled for GPUs that are not here: it must fit them, and take what docs/kernels.md says.
#   bash ci/kernels.sh .venv/bin       in mode deployed, for sm_90 and sm_100
#   bash ci/kernels.sh .venv/bin all   in both modes, for all six targets
set -euo pipefail
bin=$1
if [ "${2:-}" = all ]; then
  chosen=(--targets all --modes deployed,exact)
else
  chosen=(--targets sm_90,sm_100 --modes deployed)
fi
"$bin/python" benchmarks/kernels.py "${chosen[@]}" --workers "${WORKERS:-2}" --check docs/kernels.md
