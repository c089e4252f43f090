"""A small node for tests of runtimes and controller: real sockets, the real control lines, no model.

A verifier counts: it answers "next K" with K + 1. A drafter's generation asks for `max_new_tokens` of them,
one after the other, and dials again when the connection breaks. Target names ask for misbehaviour.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def log(line: str) -> None:
    sys.stderr.write(line + "\n")


def facts() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "cpus": sorted(os.sched_getaffinity(0)),
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "gomp": os.environ.get("GOMP_CPU_AFFINITY"),
    }


def serve(connection: socket.socket, token: str) -> None:
    try:
        with connection, connection.makefile("rw") as lines:
            if lines.readline().strip() != token:
                return
            for line in lines:
                lines.write(f"{int(line) + 1}\n")
                lines.flush()
    except OSError:
        pass


def accept(listener: socket.socket, token: str) -> None:
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=serve, args=(connection, token), daemon=True).start()


class Drafter:
    def __init__(self, url: str, token: str) -> None:
        host, _, port = url.removeprefix("ws://").rstrip("/").rpartition(":")
        self.address = (host, int(port))
        self.token = token
        self.lines: Any = None

    def next(self, number: int) -> int:
        if self.lines is None:
            sock = socket.create_connection(self.address, 30)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.lines = sock.makefile("rw")
            sock.close()  # the file keeps it
            self.lines.write(self.token + "\n")
        self.lines.write(f"{number}\n")
        self.lines.flush()
        answer = self.lines.readline()
        if not answer:
            raise ConnectionResetError("hung up")
        return int(answer)

    def generate(self, job: dict[str, Any]) -> dict[str, Any]:
        ids, reconnects, end_s = [], 0, time.monotonic() + job["timeout_s"]
        while len(ids) < job["max_new_tokens"]:
            try:
                ids.append(self.next(len(ids)))
            except OSError:
                self.lines, reconnects = None, reconnects + 1
                if time.monotonic() > end_s:
                    return {"op": "error", "code": "timeout", "message": "not finished"}
                time.sleep(0.05)
        return {"op": "result", "record": {"ids": ids, "reconnects": reconnects}}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["op"] == "ping":
            rtts_ms = []
            for _ in range(message["n"]):
                t0_s = time.perf_counter()
                self.next(0)
                rtts_ms.append((time.perf_counter() - t0_s) * 1e3)
            return {"op": "pong", "rtt_ms": rtts_ms}
        if message["op"] == "generate":
            return self.generate(message)
        if message["op"] == "reconnect":
            self.lines = None
            return {"op": "reconnected"}
        return {"op": "error", "code": "op", "message": f"unknown op {message['op']!r}"}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("role")
    for name in (
        "target",
        "drafter",
        "precision",
        "host",
        "port",
        "control",
        "token-file",
        "connect",
        "threads",
    ):
        parser.add_argument(f"--{name}")
    args = parser.parse_args()
    token = Path(args.token_file).read_text().strip()
    log(f"{args.role} with {args.target}")
    if args.target == "missing":
        log("dsdlab: error: no such model: missing")
        return 2
    if args.target == "chatty":
        sys.stdout.write("a library says hello\n")
    if args.target == "mute" and args.role == "verifier":
        time.sleep(60)
    if args.target == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    drafter = None
    if args.role == "verifier":
        listener = socket.create_server((args.host, int(args.port)))
        threading.Thread(target=accept, args=(listener, token), daemon=True).start()
        if args.target == "slow":
            time.sleep(0.5)
        say({"op": "ready", "port": listener.getsockname()[1], "info": facts()})
    else:
        drafter = Drafter(args.connect, token)
        drafter.next(0)
        say({"op": "ready", "info": facts()})
    for line in sys.stdin:
        message = json.loads(line)
        if message["op"] == "stop" and args.target != "stubborn":
            break
        if args.target == "fragile" and message["op"] == "generate":
            log("out of memory, giving up")
            os._exit(9)
        if drafter is not None and message["op"] != "stop":
            say({**drafter.answer(message), "id": message.get("id")})
    while args.target == "stubborn":
        time.sleep(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
