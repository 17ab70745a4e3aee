#!/usr/bin/env bash
# Two machines that never meet: the CUDA backend records the golden checkpoint in the numeric profile of Ascend's 950, the
# Ascend backend compares itself with the record. Their packages cannot share an environment, as they could not share a
# machine. Without the devices: the one interpreted, the other emulated.
#   bash ci/apart.sh .venv/bin .venv-ascend/bin
set -euo pipefail
cuda=$(cd "$1" && pwd) ascend=$(cd "$2" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1
TRITON_INTERPRET=1 "$cuda/dsv4-hal" record --backend cuda --mode a5 --model tests/data/tiny --tokens 40,9 --decode 1 \
  --out "$work/cuda.bundle"
export TORCH_DEVICE_BACKEND_AUTOLOAD=0 DSV4_HAL_EMULATE=true
"$ascend/python" -m dsv4_hal.backends.ascend.emulator.build
"$ascend/dsv4-hal" compare --against "$work/cuda.bundle" --model tests/data/tiny --backend ascend
