#!/usr/bin/env bash
# The CUDA backend. With an NVIDIA GPU: its compiled kernels on all cases, on a model, and in the tests that need a GPU
# (others interpret kernels, and are in `make test`, with a GPU or without). Without one, as `interpreted`
# says: the same kernels in Triton's interpreter, on the cases that it affords.
#   bash ci/cuda.sh .venv/bin               skips, with the reason, where there is no GPU
#   bash ci/cuda.sh .venv/bin interpreted
set -euo pipefail
bin=$(cd "$1" && pwd)
if [ "${2:-}" = interpreted ]; then
  export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
  "$bin/dsv4-hal" conform --backend cuda --size interpreted
elif "$bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  unset TRITON_INTERPRET
  "$bin/dsv4-hal" conform --backend cuda --size full
  "$bin/dsv4-hal" conform --backend cuda --grad
  "$bin/dsv4-hal" compare --backends reference,cuda --model tests/data/tiny
  TRITON_INTERPRET=0 "$bin/python" -m pytest tests/backends/cuda/test_gpu.py
else
  echo "test-cuda: skipped, torch finds no NVIDIA GPU on this machine"
fi
