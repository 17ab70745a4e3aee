#!/usr/bin/env bash
# Follow docs/extending.md, in an environment on top of this one: the package that it builds leaves nothing behind.
set -euo pipefail
bin=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$bin/python" -m venv --without-pip "$work/venv"
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
echo "import site; site.addsitedir('$("$bin/python" -c "$purelib")')" > "$("$work/venv/bin/python" -c "$purelib")/beneath.pth"
sed "1s|.*|#!$work/venv/bin/python|" "$bin/dsv4-hal" > "$work/venv/bin/dsv4-hal"
chmod +x "$work/venv/bin/dsv4-hal"
PATH="$work/venv/bin:$PATH" "$work/venv/bin/python" ci/docs.py docs/extending.md
