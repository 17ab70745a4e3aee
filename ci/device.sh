#!/usr/bin/env bash
# What only a GPU shows, for a machine that is lent for minutes and where nothing can be downloaded: the cases, a model,
# the tests that need a GPU, and how long every op takes. Without a GPU it says so, and ends with 0.
#   bash ci/device.sh [PYTHON]     a Python that has torch, default python3
# OUT     where results go, as they come: device.log, conform.jsonl, compare.jsonl, tests.xml, gpu.jsonl (out/device)
# BUDGET  seconds in all (480): each part may take its share of those that are left
# SIZE    of cases (quick)
# WHEELS  a folder of wheels with what that Python lacks (.whl)
# The exit code is the first of a part that was not 0; 124: it ran out of time, and what it had found is kept.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
python=${1:-python3}
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || {
  echo "device: torch cannot be imported by $python" >&2
  exit 2
}
if [ -z "$gpu" ]; then
  echo "device: skipped, torch finds no NVIDIA GPU on this machine"
  exit 0
fi
out=${OUT:-out/device} budget=${BUDGET:-480} shares=100 code=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" || exit 2
export PYTHONPATH="$PWD:$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRITON_INTERPRET=0

# part NAME SHARE FILE COMMAND...: FILE is what the command leaves in the working folder, and OUT keeps as NAME.*
part() {
  local name=$1 share=$2 file=$3 start=$SECONDS mine=0 grace=$((budget / 48 > 0 ? budget / 48 : 1))
  local limit=$(((budget - SECONDS) * share / shares - grace))
  shift 3 && shares=$((shares - share))
  echo "=== $name: at most $limit s"
  if [ "$limit" -gt 0 ]; then
    # Interrupted, it writes what it has; also where this script was started with interrupts ignored.
    timeout -s INT -k "$grace" "$limit" env --default-signal=INT "$@" || mine=$?
  else
    mine=124
  fi
  [ ! -f "$work/$file" ] || cp "$work/$file" "$out/$name.${file##*.}"
  echo "=== $name: exit code $mine after $((SECONDS - start)) s"
  [ $code -ne 0 ] || code=$mine
}

run() {
  echo "device: $gpu, $budget s"
  if compgen -G "${WHEELS:-.whl}/*.whl" > /dev/null; then
    "$python" -m pip install -q --no-index --no-deps --target "$work/site" "${WHEELS:-.whl}"/*.whl || return 2
  fi
  "$python" ci/registered.py "$work/site" || return 2
  part conform 45 conform/results.jsonl \
    "$python" -m dsv4_hal conform --backend cuda --size "${SIZE:-quick}" --out "$work/conform"
  part compare 15 compare/model.jsonl \
    "$python" -m dsv4_hal compare --backends reference,cuda --model tests/data/tiny --out "$work/compare"
  part tests 15 tests.xml \
    "$python" -m pytest -p no:cacheprovider --junitxml "$work/tests.xml" tests/backends/cuda/test_gpu.py
  part gpu 25 gpu.jsonl \
    "$python" benchmarks/gpu.py --out "$work/gpu.jsonl"
  return $code
}

run 2>&1 | tee "$out/device.log"
exit "${PIPESTATUS[0]}"
