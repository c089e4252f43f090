#!/usr/bin/env bash
# Make the virtual environment .venv with dsdlab in it. Arguments are extras ("dev").
set -euo pipefail
cd "$(dirname "$0")/.."
torch=2.13.0
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "dsdlab needs Python 3.11 or newer; $python is $("$python" --version 2>&1)" >&2
  exit 2
fi
# asked of pip, not of the file: Debian without python3-venv leaves a folder with python and no pip
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  "$python" -m venv --clear .venv || {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 || exit 2 # venv has said what to install
    echo "installing python3-venv (once)"
    apt-get update -qq || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
    "$python" -m venv --clear .venv
  }
fi
pip=(.venv/bin/python -m pip --disable-pip-version-check install --quiet)

if ! .venv/bin/python -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch')" 2>/dev/null; then
  echo "installing torch $torch (once)"
  if command -v nvidia-smi >/dev/null 2>&1; then
    "${pip[@]}" "torch==$torch"
  else
    # the CPU build, from wherever pip is configured to look, then from PyTorch's own index
    "${pip[@]}" "torch==$torch+cpu" 2>/dev/null ||
      "${pip[@]}" --retries 0 --timeout 30 --index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu" 2>/dev/null ||
      "${pip[@]}" "torch==$torch"
  fi
fi
echo "installing dsdlab${1:+ with $1} (once)"
"${pip[@]}" --editable ".${1:+[$1]}"
