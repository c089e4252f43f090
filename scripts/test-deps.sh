#!/usr/bin/env bash
# What the tests need from the system: Chromium, for the report. Where it cannot be had the tests say what they skip.
set -euo pipefail
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "installing chromium (once)"
  apt-get update -qq || true # a stale list may do
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null ||
    echo "chromium cannot be installed here: the report's browser test will be skipped" >&2
fi
