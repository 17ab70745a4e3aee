#!/usr/bin/env bash
# An accelerator in a package of its own: installed beside this one, run against the contract as its own tests, compared
# with the reference case by case as a user's CI would, and on a whole model.
# SIZE=quick bash ci/xla.sh .venv/bin runs the cases of all ops, longer ones too, in both modes; most of the time goes to
# compiling. Without SIZE: small cases of some of its ops, and the model, which has all of them, in mode deployed only.
set -euo pipefail
bin=$(cd "$1" && pwd)
size=${SIZE:-tiny}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH="$bin:$PATH"
export OMP_NUM_THREADS=1 # who produces and who judges are two processes, and their threads would fight over the cores
export JAX_COMPILATION_CACHE_DIR=$work/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 # compiled once for all of them
python -m pip install -q -c constraints.txt -e examples/xla_backend
plugin=() ops=()
if [ -z "${SIZE:-}" ]; then
  plugin=(--dsv4-op rope -k "not logits") # the comparison below shows more of a model
  ops=(-o rms_norm -o hc_post)
fi
(cd examples/xla_backend && python -m pytest -n "${WORKERS:-2}" --dsv4-size "$size" "${plugin[@]}")
bash ci/templates/compare.sh "$work/cases" reference xla -- --size "$size" --mode deployed "${ops[@]}"
dsv4-hal init --preset v4-tiny --out "$work/v4-tiny"
dsv4-hal compare --backends reference,xla --model "$work/v4-tiny" --mode deployed --tokens 40,9 --decode 1
