#!/usr/bin/env bash
# Build the wheel, install it in an environment of its own, away from the sources, and use it there.
set -euo pipefail
bin=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$bin/python" -m build --quiet --outdir "$work/dist" .
"$bin/python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --no-deps "$work"/dist/*.whl
# What it needs is taken from the environment that has it already; tests/test_dependencies.py sees that it is declared.
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
echo "import site; site.addsitedir('$("$bin/python" -c "$purelib")')" > "$("$work/venv/bin/python" -c "$purelib")/beneath.pth"
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys
import dsv4_hal

assert "site-packages" in dsv4_hal.__file__, dsv4_hal.__file__
vendors = [name for name in ("triton", "torch_npu", "deep_gemm", "flash_mla") if name in sys.modules]
assert not vendors, vendors
print([(b.name, b.available) for b in dsv4_hal.list_backends()])
PY
"$work/venv/bin/dsv4-hal" init --preset v4-tiny --out "$work/a folder/v4-tiny"
"$work/venv/bin/dsv4-hal" generate "$work/a folder/v4-tiny" --prompt "The sea is" --max-new-tokens 4
"$work/venv/bin/dsv4-hal" conform -o hadamard --size tiny --out "$work/report"
"$work/venv/bin/dsv4-hal" report "$work/report" --out "$work/page.html"
echo "wheel: built, installed elsewhere, used"
