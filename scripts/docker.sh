#!/usr/bin/env bash
# A Docker engine for as long as it is needed.
#   scripts/docker.sh start           make sure that one answers: install it, start it (as root)
#   scripts/docker.sh stop            stop it, if `start` or `with` started it; images are kept
#   scripts/docker.sh with COMMAND…   start, run COMMAND, stop what was started; COMMAND's exit status
# An engine that runs already is used and left alone. Ours makes no bridge and no firewall rules: nodes get
# their network from the testbed, and builds use the host's. Exit status 3: no engine, and none can be had.
set -euo pipefail

state=/run/dsdlab-docker # pid, keep (started by hand), users/PID (one per `with`)
log=/var/log/dsdlab-docker.log
host=${DOCKER_HOST:-unix:///var/run/docker.sock}

say() { echo "docker.sh: $*" >&2; }

answers() { # 0: yes; 1: no; 2: it may, but not to us
  [ "${host#unix://}" != "$host" ] || return 0 # an engine elsewhere is its owner's business
  python3 -I -S - "${host#unix://}" <<'PY'
import socket, sys
try:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(sys.argv[1])
        sock.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
        sys.exit(not sock.recv(64).startswith((b"HTTP/1.0 200", b"HTTP/1.1 200")))
except PermissionError:
    sys.exit(2)
except OSError:
    sys.exit(1)
PY
}

start_time() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

is_ours() { # does the engine that we started still run?
  local pid when
  read -r pid when 2>/dev/null <"$state/pid" && [ -n "$when" ] && [ "$(start_time "$pid")" = "$when" ]
}

install_engine() {
  command -v dockerd >/dev/null 2>&1 && return
  command -v apt-get >/dev/null 2>&1 || { say "no engine, and no apt-get to install docker.io with"; return 3; }
  say "installing docker.io (once)"
  apt-get update -qq || true # a stale list may do
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends docker.io >/dev/null && return
  say "docker.io cannot be installed here"
  return 3
}

start() {
  local status=0 options=() pid
  answers || status=$?
  [ "$status" != 0 ] || return 0
  if [ "$status" = 2 ]; then
    say "not allowed to use ${host#unix://}: sudo usermod -aG docker $(id -un), then log in again"
    return 3
  fi
  if [ "$(id -u)" != 0 ]; then
    say "no Docker engine answers, and only root can start one: sudo scripts/docker.sh start"
    return 3
  fi
  install_engine || return 3
  if answers; then return 0; fi # the package may have started it
  mkdir -p "$state"
  # A configuration file may set the same options, which dockerd refuses; then the file holds.
  [ -e /etc/docker/daemon.json ] ||
    options=(--bridge=none --iptables=false --ip6tables=false --ip-forward=false)
  [ -e /run/docker ] || touch "$state/rundir"
  [ -e /sys/class/net/docker0 ] || touch "$state/docker0"
  setsid dockerd "${options[@]}" >"$log" 2>&1 </dev/null 9>&- &
  pid=$!
  echo "$pid $(start_time "$pid")" >"$state/pid"
  disown "$pid"
  for _ in $(seq 300); do
    if answers; then return 0; fi
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.1
  done
  say "dockerd does not answer: $(tail -n 1 "$log")"
  stop_engine
  return 3
}

stop_engine() {
  local pid when child
  if is_ours; then
    read -r pid when <"$state/pid"
    child=$(cat /run/docker/containerd/containerd.pid 2>/dev/null || true)
    kill -TERM "$pid" 2>/dev/null || true # it stops its containers and its containerd
    for _ in $(seq 300); do
      [ "$(start_time "$pid")" = "$when" ] || break
      sleep 0.1
    done
    if [ "$(start_time "$pid")" = "$when" ]; then
      kill -KILL "$pid" ${child:+"$child"} 2>/dev/null || true
      sleep 0.5
    fi
    [ ! -e "$state/docker0" ] || ip link delete docker0 2>/dev/null || true
    if [ -e "$state/rundir" ]; then
      umount /run/docker/netns/* 2>/dev/null || true
      rm -rf --one-file-system /run/docker /run/docker.sock /run/docker.pid
    fi
    rm -f "$log"
  fi
  rm -rf "$state"
}

locked() { # one start or stop at a time
  if [ "$(id -u)" != 0 ]; then "$@"; return; fi
  local status=0
  exec 9<"$0"
  flock 9
  "$@" || status=$?
  exec 9>&-
  return "$status"
}

enter() {
  start || return
  if is_ours; then mkdir -p "$state/users" && touch "$state/users/$$"; fi
}

leave() { # the last user of an engine that was not started by hand stops it
  local user
  is_ours || return 0
  rm -f "$state/users/$$"
  [ ! -e "$state/keep" ] || return 0
  for user in "$state"/users/*; do
    if [ -e "$user" ] && kill -0 "${user##*/}" 2>/dev/null; then return 0; fi
  done
  stop_engine
}

start_by_hand() {
  start || return
  if is_ours; then touch "$state/keep"; fi
}

with_engine() {
  local status=0 child
  locked enter || true # what needs an engine will say so
  trap 'locked leave' EXIT
  trap : INT # a terminal's Ctrl-C reaches the command as well: wait for its end
  # Not in the foreground, where a SIGTERM would wait for the command's end; so undo what bash does to
  # background jobs (no input, Ctrl-C ignored).
  (trap - INT QUIT; exec "$@") <&0 &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM HUP
  while true; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  return "$status"
}

case "${1:-}" in
  start) locked start_by_hand ;;
  stop) locked stop_engine ;;
  with)
    shift
    [ $# -gt 0 ] || { say "with: which command?"; exit 2; }
    with_engine "$@"
    ;;
  *)
    say "start, stop, or with COMMAND…"
    exit 2
    ;;
esac
