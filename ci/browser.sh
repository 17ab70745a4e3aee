#!/usr/bin/env bash
# The report in a real browser: Debian's Chromium, installed where it is missing.
set -euo pipefail
bin=$1
if ! command -v chromium > /dev/null || ! command -v chromedriver > /dev/null; then
  if ! { apt-get update -q && apt-get install -qy chromium chromium-driver; }; then
    echo "browser: chromium and chromedriver are needed, and apt-get could not install them" >&2
    exit 1
  fi
fi
"$bin/python" -m pytest -m browser tests/browser
