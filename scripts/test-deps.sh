#!/usr/bin/env bash
# What the tests need from the system: a browser for the report, and real networks: tools, a User-Mode Linux
# router, independent instruments, a Docker engine and what makes its image. Where something cannot be had
# the tests say what they skip; on CI they fail instead.
set -euo pipefail

packages=()
want() { # want PACKAGE PROGRAM…: the package, unless one of the programs is there
  local package=$1 program
  shift
  for program in "$@"; do
    if PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null 2>&1; then return; fi
  done
  packages+=("$package")
}
want chromium chromium chromium-browser google-chrome
want iproute2 tc
want ethtool ethtool
want util-linux nsenter
want kmod modprobe
want iputils-ping ping
want iperf3 iperf3
want user-mode-linux linux.uml
want docker.io dockerd
want debootstrap debootstrap

[ ${#packages[@]} -gt 0 ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "installing ${packages[*]} (once)"
  apt-get update -qq || true # a stale list may do
  for package in "${packages[@]}"; do # one by one: what cannot be had must not keep the others away
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
      echo "$package cannot be installed here" >&2
  done
else
  echo "not root: tests that need ${packages[*]} will be skipped" >&2
fi
