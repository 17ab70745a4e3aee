#!/usr/bin/env bash
# An accelerator in a package of its own: installed beside this one, run against the contract as its own tests, and
# compared with the reference on a whole model.
set -euo pipefail
bin=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$bin/python" -m pip install -q -c constraints.txt -e examples/xla_backend
(cd examples/xla_backend && "$bin/python" -m pytest -n "${WORKERS:-2}")
"$bin/dsv4-hal" init --preset v4-tiny --out "$work/v4-tiny"
for mode in exact deployed; do
  "$bin/dsv4-hal" compare --backends reference,xla --model "$work/v4-tiny" --mode $mode
done
