#!/usr/bin/env bash
# Backends beside the reference, on one page: copy this file into your CI.
#
#   compare.sh OUT BACKEND [BACKEND ...] [-- OPTION ...]
#   compare.sh out/compare cuda mychip -- --size full --limit 120
#
# What each backend makes of the contract's cases goes to OUT/BACKEND.bundle, its verdicts to OUT/BACKEND (results.jsonl,
# junit.xml, report.md, ...), and all of them to OUT/report.html. Options are those of `dsv4-hal record`.
# Every backend runs, whatever became of the one before. The exit code is the first that was not 0: 1 disagrees, 2 usage,
# 3 backend unavailable, 4 a waiver is stale, 5 nothing was judged: shapes only, or the backend refused every case.
set -uo pipefail
[ $# -ge 2 ] || { sed -n '4,5s/^# *//p' "$0" >&2; exit 2; }
out=$1
shift
[ ! -e "$out" ] || { echo "$out exists: an earlier run's verdicts must not pass for this one's" >&2; exit 2; }
backends=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  backends+=("$1")
  shift
done
[ $# -eq 0 ] || shift

code=0
runs=()
told=()
for backend in "${backends[@]}"; do
  mine=0
  dsv4-hal record --backend "$backend" --out "$out/$backend.bundle" "$@" &&
    dsv4-hal compare --against "$out/$backend.bundle" --out "$out/$backend" || mine=$?
  [ ! -f "$out/$backend/results.jsonl" ] || runs+=("$out/$backend")
  case $mine in
    0) told+=("$backend: agrees") ;;
    5) told+=("$backend: nothing was judged") ;;
    *) told+=("$backend: exit code $mine") ;;
  esac
  [ $code -ne 0 ] || code=$mine
done
if [ ${#runs[@]} -gt 0 ]; then
  dsv4-hal report "${runs[@]}" --out "$out/report.html"
  mine=$?
  [ $code -ne 0 ] || code=$mine
fi
printf '%s\n' "${told[@]}"
exit $code
