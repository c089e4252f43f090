"""Measure the path between two nodes with UDP packets: round trip, one-way delays, losses, bursts, rate.

A `Reflector` stands beside the verifier's socket, on the same port number; `measure` runs at the edge. Both
blocking, each in a thread of its own while the nodes are idle. Times of arrival are the kernel's
(SO_TIMESTAMPNS), and the reflector's own holding time is taken off as NTP does (RFC 5905 section 8), so that
what remains is the path. On one machine both ends share a clock, and the one-way delays mean something.

Packets, big-endian: 8 bytes of tag (a keyed hash of the nodes' token: others get no answer), kind, then

    probe      seq u32, run u32; padding to PROBE_BYTES
    echo       seq u32, run u32, t2 u64, t3 u64 (ns); padding to PROBE_BYTES
    report?    run u32, number of the question u32
    report     the same, bytes of the train u32, its duration u64 (ns), bitmap of the seqs that came
    train      run u32; full size
    train?     run u32, packets u16: "send me a train"
"""

from __future__ import annotations

import hashlib
import math
import select
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PROBE_BYTES", "TRAIN_BYTES", "ProbeError", "Reflector", "measure"]

PROBE_BYTES = 64
TRAIN_BYTES = 1472  # fills an Ethernet frame: 1514 bytes on the wire
FRAME_BYTES = 42  # Ethernet, IPv4 and UDP headers
MAX_PROBES = 10_000  # a report's bitmap has to fit into one packet
MAX_TRAIN = 400
RUNS_KEPT = 8
ASK_AGAIN_S = 0.2
ASK_FOR_S = 5.0

_KIND = struct.Struct(">8sB")
_PROBE = struct.Struct(">II")
_ECHO = struct.Struct(">IIQQ")
_REPORT = struct.Struct(">IIIQ")
_TRAIN_ASK = struct.Struct(">IH")
PROBE, ECHO, REPORT_ASK, REPORT, TRAIN, TRAIN_ASK = range(6)
SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("@ll")


class ProbeError(Exception):
    """The path could not be measured. One line."""


def _tag(token: str) -> bytes:
    return hashlib.blake2s(token.encode(), digest_size=8, person=b"dsdprobe").digest()


def _stamped_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with suppress(OSError):  # elsewhere than Linux: the time of recv has to do
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    return sock


def _receive(sock: socket.socket) -> tuple[bytes, Any, int]:
    """(data, sender, arrival in ns of the wall clock)."""
    data, ancillary, _, sender = sock.recvmsg(2048, 64)
    for level, kind, value in ancillary:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS and len(value) >= _TIMESPEC.size:
            s, ns = _TIMESPEC.unpack_from(value)
            return data, sender, s * 1_000_000_000 + ns
    return data, sender, time.time_ns()


@dataclass(slots=True)
class _Run:
    """What the reflector knows of one measurement."""

    seen: set[int] = field(default_factory=set)
    train_bytes: int = 0  # after the first packet
    train_ns: tuple[int, int] | None = None  # arrival of the first and the last


class Reflector:
    """Answers probes on (host, port) until closed. Raises ProbeError when the port is taken."""

    def __init__(self, host: str, port: int, token: str = "") -> None:
        self._tag = _tag(token)
        self._runs: dict[int, _Run] = {}
        self._socket = _stamped_socket()
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise ProbeError(f"cannot bind UDP {host}:{port}: {error.strerror}") from None
        self.port = int(self._socket.getsockname()[1])
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True, name="probe reflector")
        self._thread.start()

    def close(self) -> None:
        """Stop answering; idempotent."""
        with suppress(OSError):
            self._wake.close()
        self._thread.join(2.0)
        self._woken.close()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._socket, self._woken], (), ())
            if self._woken in ready:
                return
            with suppress(OSError, struct.error):
                self._answer(*_receive(self._socket))

    def _answer(self, data: bytes, sender: Any, arrival_ns: int) -> None:
        tag, kind = _KIND.unpack_from(data)
        if tag != self._tag:
            return
        body = data[_KIND.size :]
        if kind == PROBE:
            seq, ident = _PROBE.unpack_from(body)
            run = self._run(ident)
            if seq < MAX_PROBES:
                run.seen.add(seq)
            echo = _KIND.pack(tag, ECHO) + _ECHO.pack(seq, ident, arrival_ns, time.time_ns())
            self._socket.sendto(echo.ljust(PROBE_BYTES, b"\0"), sender)
        elif kind == TRAIN:
            run = self._run(_PROBE.unpack_from(body)[0])
            if run.train_ns is None:
                run.train_ns = (arrival_ns, arrival_ns)
            else:
                run.train_ns = (run.train_ns[0], arrival_ns)
                run.train_bytes += len(data) + FRAME_BYTES
        elif kind == REPORT_ASK:
            ident, question = _PROBE.unpack_from(body)
            run = self._run(ident)
            first_ns, last_ns = run.train_ns or (0, 0)
            head = _REPORT.pack(ident, question, run.train_bytes, last_ns - first_ns)
            bits = sum(1 << seq for seq in run.seen)
            bitmap = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
            self._socket.sendto(_KIND.pack(tag, REPORT) + head + bitmap, sender)
        elif kind == TRAIN_ASK:
            ident, packets = _TRAIN_ASK.unpack_from(body)
            train = _KIND.pack(tag, TRAIN) + _PROBE.pack(ident, 0)
            for _ in range(min(packets, MAX_TRAIN)):
                self._socket.sendto(train.ljust(TRAIN_BYTES, b"\0"), sender)

    def _run(self, ident: int) -> _Run:
        if ident not in self._runs:
            while len(self._runs) >= RUNS_KEPT:
                del self._runs[next(iter(self._runs))]
            self._runs[ident] = _Run()
        return self._runs[ident]


class _Prober:
    """One measurement at the edge."""

    def __init__(self, host: str, port: int, token: str) -> None:
        self._tag = _tag(token)
        self._ident = time.time_ns() & 0xFFFFFFFF
        self._socket = _stamped_socket()
        try:
            self._socket.connect((host, port))
        except OSError as error:
            self._socket.close()
            raise ProbeError(f"cannot reach UDP {host}:{port}: {error.strerror}") from None
        self.rtts_ns: dict[int, int] = {}
        self.sent_ns: dict[int, int] = {}
        self.turned_ns: dict[int, tuple[int, int]] = {}  # when the reflector got a probe, and let it go
        self.back_ns: dict[int, int] = {}  # in order of arrival
        self.report: tuple[int, int, set[int]] | None = None  # bytes and ns of the train, seqs that came
        self.train: list[tuple[int, int]] = []  # (arrival in ns, bytes)
        self._question = 0  # of the report that is wanted: older answers may still be under way

    def close(self) -> None:
        self._socket.close()

    def _send(self, kind: int, body: bytes, size: int = 0) -> None:
        with suppress(OSError):  # refused: nobody listens (yet); as good as lost
            self._socket.send((_KIND.pack(self._tag, kind) + body).ljust(size, b"\0"))

    def _take(self) -> None:
        with suppress(OSError, struct.error):
            data, _, arrival_ns = _receive(self._socket)
            tag, kind = _KIND.unpack_from(data)
            body = data[_KIND.size :]
            if tag != self._tag:
                return
            if kind == ECHO:
                seq, ident, t2_ns, t3_ns = _ECHO.unpack_from(body)
                if ident != self._ident or seq in self.rtts_ns:
                    return
                self.rtts_ns[seq] = (arrival_ns - self.sent_ns[seq]) - (t3_ns - t2_ns)
                self.turned_ns[seq], self.back_ns[seq] = (t2_ns, t3_ns), arrival_ns
            elif kind == REPORT:
                ident, question, n_bytes, ns = _REPORT.unpack_from(body)
                bits = int.from_bytes(body[_REPORT.size :], "little")
                if ident == self._ident and question == self._question:
                    seen = {seq for seq in range(bits.bit_length()) if bits >> seq & 1}
                    self.report = n_bytes, ns, seen
            elif kind == TRAIN and _PROBE.unpack_from(body)[0] == self._ident:
                self.train.append((arrival_ns, len(data) + FRAME_BYTES))

    def _listen(self, until_s: float, enough: Callable[[], bool] = lambda: False) -> None:
        while not enough() and (left_s := until_s - time.monotonic()) > 0:
            if select.select([self._socket], (), (), left_s)[0]:
                self._take()

    def probes(self, n: int, gap_s: float, rtt_s: float, late_s: float) -> None:
        """Send `n` probes `gap_s` apart, and wait for the report behind them, which comes last."""
        start_s = time.monotonic()
        for seq in range(n):
            self._listen(start_s + seq * gap_s)
            self.sent_ns[seq] = time.time_ns()
            self._send(PROBE, _PROBE.pack(seq, self._ident), PROBE_BYTES)
        self.ask_report(rtt_s, lambda: len(self.rtts_ns) == n)
        self._listen(time.monotonic() + late_s, lambda: len(self.rtts_ns) == n)

    def train_up(self, packets: int) -> None:
        for _ in range(packets):
            self._send(TRAIN, _PROBE.pack(self._ident, 0), TRAIN_BYTES)

    def train_down(self, packets: int, patience_s: float) -> None:
        """Ask for a train; the whole of it may be lost, so ask once more."""
        for _ in range(2):
            self.train.clear()
            self._send(TRAIN_ASK, _TRAIN_ASK.pack(self._ident, packets))
            self._listen(time.monotonic() + patience_s, lambda: len(self.train) >= packets)
            if len(self.train) > 1:
                return

    def ask_report(self, rtt_s: float, enough: Callable[[], bool] = lambda: False) -> None:
        """The reflector's view; asked again until it comes, since packets get lost, or there is enough."""
        self.report = None
        self._question += 1
        end_s = time.monotonic() + ASK_FOR_S + rtt_s
        while self.report is None and not enough() and time.monotonic() < end_s:
            self._send(REPORT_ASK, _PROBE.pack(self._ident, self._question))
            self._listen(
                time.monotonic() + ASK_AGAIN_S + 1.5 * rtt_s, lambda: self.report is not None or enough()
            )


def measure(
    host: str,
    port: int,
    token: str = "",
    *,
    n: int = 40,
    gap_s: float = 0.004,
    rtt_s: float = 0.0,
    train_up: int = 0,
    train_down: int = 0,
    train_s: float = 0.0,
    late_s: float = 0.0,
) -> dict[str, Any]:
    """Measure the path to a `Reflector`; a `dsdlab.sweep.calibration.LinkMeasure` as a plain dict.

    n: probes, 1 to 10,000; gap_s: between two of them.
    rtt_s: round trip to be expected, for how long to wait for what may be lost.
    train_up, train_down: full packets back to back, 0 (no rate is measured) or 2 to 400.
    train_s: how long a train may take at the expected rate.
    late_s: how long to wait, where packets overtake each other, for the last ones behind the report.

    Blocking. Raises ProbeError when nothing came back at all, not even the report, within some seconds.
    """
    if not 0 < n <= MAX_PROBES or not all(t == 0 or 2 <= t <= MAX_TRAIN for t in (train_up, train_down)):
        raise ProbeError(
            f"n {n}, trains {train_up} and {train_down} (allowed: 1 to {MAX_PROBES}; 0, 2 to {MAX_TRAIN})"
        )
    start_s = time.monotonic()
    prober = _Prober(host, port, token)
    try:
        prober.probes(n, gap_s, rtt_s, late_s)
        if train_up:
            prober.train_up(train_up)
            if not train_down:
                time.sleep(train_s + rtt_s)
        if train_down:  # the request queues behind the train up
            prober.train_down(train_down, 2.0 * train_s + 1.5 * rtt_s + 0.1)
        if train_up:
            prober.ask_report(rtt_s)
    finally:
        prober.close()
    if prober.report is None and not prober.rtts_ns:
        raise ProbeError(f"no probe to UDP {host}:{port} came back in {time.monotonic() - start_s:.1f} s")
    return _summary(prober, n, time.monotonic() - start_s)


def _summary(prober: _Prober, n: int, wall_s: float) -> dict[str, Any]:
    train_bytes, train_ns, seen = prober.report or (0, 0, set())
    seen |= prober.rtts_ns.keys()  # what the question overtook is not in the answer
    turned = sorted(prober.turned_ns.items())
    up_ns = [t2_ns - prober.sent_ns[seq] for seq, (t2_ns, _) in turned]
    down_ns = [prober.back_ns[seq] - t3_ns for seq, (_, t3_ns) in turned]
    came_up = [seq in seen for seq in range(n)]
    came_down = [seq in prober.rtts_ns for seq in sorted(seen)]
    reordered_up = _overtaken([t2_ns for _, (t2_ns, _) in turned])
    reordered_down = _overtaken([prober.back_ns[seq] for seq, _ in sorted(turned, key=lambda item: item[1])])
    rtts = sorted(prober.rtts_ns.values())
    train = prober.train
    bytes_down, ns_down = (sum(b for _, b in train[1:]), train[-1][0] - train[0][0]) if train else (0, 0)
    return {
        "instrument": "packets",
        "rtt_p50_ms": statistics.median(rtts) / 1e6 if rtts else 0.0,
        "rtt_p99_ms": rtts[min(len(rtts) - 1, math.ceil(0.99 * len(rtts)) - 1)] / 1e6 if rtts else 0.0,
        "n": len(rtts),
        "up": _way(came_up, up_ns, reordered_up, train_bytes, train_ns),
        "down": _way(came_down, down_ns, reordered_down, bytes_down, ns_down),
        "wall_s": wall_s,
    }


def _overtaken(times_ns: list[int]) -> int:
    """How many of these times are before an earlier one in the list."""
    latest_ns, n = 0, 0
    for t_ns in times_ns:
        n += t_ns < latest_ns
        latest_ns = max(latest_ns, t_ns)
    return n


def _way(came: list[bool], delays_ns: list[int], reordered: int, n_bytes: int, ns: int) -> dict[str, Any]:
    bursts: list[int] = []
    run = 0
    for one in [*came, True]:
        if one and run:
            bursts.append(run)
        run = 0 if one else run + 1
    return {
        "sent": len(came),
        "lost": came.count(False),
        "bursts": bursts,
        "reordered": reordered,
        "delay_p50_ms": statistics.median(delays_ns) / 1e6 if delays_ns else None,
        "rate_mbit": n_bytes * 8e3 / ns if ns > 0 else None,
    }
