#!/usr/bin/env bash
# Run scripts in lanes, the lanes side by side and each in its order: `bash ci/lanes.sh "a b" "c d"` runs ci/a.sh and
# then ci/b.sh beside ci/c.sh and ci/d.sh. `a@DIR:WORD` is `ci/a.sh DIR WORD`; DIR is .venv/bin where none is named.
# What a script prints is shown when it ends. A script that fails ends its lane.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p out/ci

run() {
  local what word name bin start=$SECONDS code=0
  IFS=: read -r what word <<< "$1"
  IFS=@ read -r name bin <<< "$what"
  bash "ci/$name.sh" "${bin:-.venv/bin}" ${word:+"$word"} > "out/ci/$name.log" 2>&1 || code=$?
  flock out/ci sh -c "echo '=== $name: exit code $code after $((SECONDS - start)) s'; cat 'out/ci/$name.log'"
  return $code
}

lane() {
  local script
  for script in $1; do
    run "$script" || return 1
  done
}

lanes=()
for scripts in "$@"; do
  lane "$scripts" &
  lanes+=($!)
done
code=0
for one in "${lanes[@]}"; do
  wait "$one" || code=1
done
exit $code
