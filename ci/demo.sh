#!/usr/bin/env bash
# The main job, shown: agreement with the published numbers, then a checkpoint written and a text continued.
set -euo pipefail
bin=$1
"$bin/python" examples/golden.py tests/data/tiny
rm -rf out/v4-tiny
"$bin/dsv4-hal" init --preset v4-tiny --out out/v4-tiny
"$bin/dsv4-hal" generate out/v4-tiny --prompt "The sea is" --max-new-tokens 32
