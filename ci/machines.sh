#!/usr/bin/env bash
# The same verdict on every machine: the reference, and what may be off by how much, as other processors compute and with
# other numbers of threads. Only the instructions that this one has are forced on it.
#   bash ci/machines.sh .venv/bin          some ops
#   bash ci/machines.sh .venv/bin full     all of them
set -euo pipefail
bin=$(cd "$1" && pwd)
ops=(-o linear -o hc_pre -o swiglu -o sparse_attention) rows="linear or hc_pre or swiglu or rms_norm" size=tiny
if [ "${2:-}" = full ]; then
  ops=() rows="" size=quick
fi
settings=("ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1")
for level in avx2 avx512; do
  flag=$([ $level = avx512 ] && echo avx512f || echo $level)
  if grep -qw "$flag" /proc/cpuinfo; then
    settings+=("ATEN_CPU_CAPABILITY=$level MKL_CBWR=${level^^} OMP_NUM_THREADS=2")
  else
    echo "machines: skipped $level, which this processor does not have"
  fi
done
for setting in "${settings[@]}"; do
  echo "machines: $setting"
  env $setting "$bin/dsv4-hal" conform --backend reference --size "$size" "${ops[@]}"
  env $setting "$bin/python" -m pytest tests/conformance/judging/test_tolerances.py ${rows:+-k "$rows"}
done
