#!/usr/bin/env bash
# The Ascend backend, emulated: the real torch_npu on stub libraries in CANN's place, in an environment of its own, since
# an installed torch_npu without CANN breaks a plain `import torch`. One process emulates one SoC.
#   bash ci/ascend.sh .venv-ascend/bin       SIZE=tiny runs the smallest cases only
set -euo pipefail
bin=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! command -v gcc > /dev/null || ! command -v nm > /dev/null; then
  if ! { apt-get update -q && apt-get install -qy gcc libc6-dev binutils; }; then
    echo "ascend: gcc and nm are needed to make stub libraries, and apt-get could not install them" >&2
    exit 1
  fi
fi
export TORCH_DEVICE_BACKEND_AUTOLOAD=0 DSV4_HAL_EMULATE=true OMP_NUM_THREADS=1
"$bin/python" -m dsv4_hal.backends.ascend.emulator.build
for soc in ascend910_93 ascend950; do
  DSV4_HAL_ASSUME=$soc "$bin/python" -m pytest tests/backends/ascend
done
for mode in a3 a5; do
  "$bin/dsv4-hal" conform --backend ascend --mode "$mode" --size "${SIZE:-quick}"
done
"$bin/dsv4-hal" convert tests/data/tiny --to ascend-a3-w4a8 --out "$work/w4a8"
"$bin/dsv4-hal" compare --backends reference,ascend --model "$work/w4a8" --mode a3
"$bin/dsv4-hal" compare --backends reference,ascend --model tests/data/tiny --mode a5
