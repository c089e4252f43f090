"""The two-port box of the `modelled` link: a relay that holds bytes until the link model lets them arrive.

One thread waits in `select` for sockets, control lines and the next arrival. Unlike the timers of event loops
(whole milliseconds) its time-out is exact to some tens of microseconds once the kernel's timer slack is
lowered, so nothing has to spin. A box is one link: several connections, and several listening ports, share
its bottlenecks; each connection keeps its own order and loses its own segments.

`python -m testbed.links.modelled` is its command line; see there for the control lines.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import socket
import statistics
import struct
import sys
import time
from collections import deque
from typing import Any

from dsdlab.sim.clock import EventQueue
from dsdlab.sim.connection import Connection, Stream
from dsdlab.sim.link import LinkDirection
from dsdlab.sim.profile import HEADER_BYTES, MSS_BYTES, LinkProfile
from testbed.links.base import Endpoint, percentile

READ_BYTES = 256 * 1024
QUEUE_BYTES = 16 * 1024 * 1024  # held per connection and direction before the box stops reading
MAX_CONNECTIONS = 200  # select() cannot watch descriptors from 1024 on
TIMER_SLACK_NS = 1_000
IDLE_S = 2e-3  # a wait longer than this lets the processor go to sleep …
SPIN_S = 200e-6  # … so the box wakes this much before an arrival, and polls
WAKE_UP_MAX_S = 300e-6  # at most this is taken off the time at which bytes came that woke the box
LEAD_S = 60e-6  # bytes are written this early: a send and the wake-up of its receiver take as long
NICE = -10
PR_SET_TIMERSLACK = 29

FIN = b"fin"  # queue items are (time, bytes); these two are compared by identity
RST = b"rst"


def tune_process() -> dict[str, Any]:
    """Ask for precise timers and quick wake-ups; what was granted.

    On a host whose cores are all busy an ordinary process hands over some 3 to 5 ms late in one case of a
    hundred; with real-time priority (root, CAP_SYS_NICE) it stays below 0.1 ms.
    """
    granted: dict[str, Any] = {"timer_slack": False, "scheduling": "normal"}
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        granted["timer_slack"] = libc.prctl(PR_SET_TIMERSLACK, TIMER_SLACK_NS, 0, 0, 0) == 0
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
        granted["scheduling"] = "realtime"
        return granted
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
        granted["scheduling"] = "nice"
    return granted


def _reset(sock: socket.socket) -> None:
    """Close with a reset instead of a FIN."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class _Pipe:
    """One direction of one connection."""

    def __init__(self, link: LinkDirection, src: socket.socket, dst: socket.socket) -> None:
        self.link = link
        self.stream: Stream
        self.src = src
        self.dst = dst
        self.queue: deque[tuple[float, bytes]] = deque()  # (when it is to be handed over in s, bytes)
        self.queued_bytes = 0
        self.blocked = False  # the destination's socket buffer is full
        self.eof = False  # nothing more will be read
        self.done = False  # FIN handed over, or the destination is gone

    def enqueue(self, now_s: float, data: bytes) -> None:
        """Give bytes to the model."""
        self.queued_bytes += len(data)
        step = MSS_BYTES if self.link.by_segment else READ_BYTES
        for at in range(0, len(data), step):
            piece = data[at : at + step]
            self.stream.send(now_s, len(piece), piece)

    def arrived(self, when_s: float, piece: bytes) -> None:
        """The model says when bytes come out of the link."""
        self.queue.append((when_s, piece))

    def finish(self, now_s: float, marker: bytes) -> None:
        """FIN or RST travels like a bare segment behind the data."""
        self.eof = True
        self.stream.send(now_s, 0, marker)

    def read_limit(self, now_s: float) -> int:
        """Bytes that may be read now: 0 when the source has to wait."""
        if self.eof or self.queued_bytes >= QUEUE_BYTES or self.stream.unsent_bytes:
            return 0
        buffer_bytes = self.link.profile.buffer_bytes
        if buffer_bytes is None or self.link.s_per_byte == 0.0:
            return READ_BYTES
        room = buffer_bytes - self.link.backlog_bytes(now_s)
        # Half a microsecond of slack, so that waking up at room_s() finds room whatever the rounding.
        full = int((room + 5e-7 / self.link.s_per_byte) // (MSS_BYTES + HEADER_BYTES))
        return max(0, min(READ_BYTES, full * MSS_BYTES))


class _Connection:
    """A client, and the dial to the target that follows once the modelled handshake is over."""

    def __init__(self, client: socket.socket, port: _Port, dial_s: float) -> None:
        self.client = client
        self.port = port
        self.dial_s = dial_s
        self.server: socket.socket | None = None
        self.pipes: tuple[_Pipe, _Pipe] | None = None  # up, down
        self.model: Connection | None = None
        self.broken = False  # the model's TCP has given up

    def open(self, clock: EventQueue, up: LinkDirection, down: LinkDirection) -> None:
        """Both sockets stand: bytes may flow."""
        assert self.server is not None
        there, back = _Pipe(up, self.client, self.server), _Pipe(down, self.server, self.client)
        self.model = Connection(clock, up, down, there.arrived, back.arrived, self._break)
        there.stream, back.stream = self.model.up, self.model.down
        self.pipes = there, back

    def _break(self) -> None:
        self.broken = True

    def end(self) -> None:
        """Stop the model."""
        if self.model is not None:
            self.model.close()

    def reset(self) -> None:
        self.end()
        for sock in (self.client, self.server):
            if sock is not None:
                _reset(sock)


class _Port:
    """A listening socket and where its connections go."""

    def __init__(self, listener: socket.socket, target: Endpoint | None) -> None:
        self.listener = listener
        self.target = target


class Box:
    """The relay. `run` serves until it is told to stop or its standard input ends."""

    def __init__(self, profile: LinkProfile, seed: int = 0) -> None:
        self.up = LinkDirection(profile, "up", seed)
        self.down = LinkDirection(profile, "down", seed)
        self._events = EventQueue(time.monotonic())  # of the connections' TCP
        self._ports: list[_Port] = []
        self._connections: list[_Connection] = []
        self._late_ms: deque[float] = deque(maxlen=4096)
        self._accepted = self._refused = self._dropped = 0
        self._control = b""
        self._running = True
        self._overshoots_s: deque[float] = deque(maxlen=15)
        self._wake_up_s = 0.0
        self.granted = tune_process()

    # -- control -------------------------------------------------------------------------------------------

    def listen(self, host: str, port: int, target: Endpoint | None) -> int:
        """Open a port for the edge; its number. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=64)
        listener.setblocking(False)
        self._ports.append(_Port(listener, target))
        return int(listener.getsockname()[1])

    def stats(self) -> dict[str, Any]:
        """Counters since the start; lateness (ms) is how long after the due time bytes were written."""
        late = list(self._late_ms)
        return {
            "up": self.up.stats.to_dict(),
            "down": self.down.stats.to_dict(),
            "profile": self.up.profile.to_dict(),
            "connections": len(self._connections),
            "accepted": self._accepted,
            "refused": self._refused,
            "dropped": self._dropped,
            "late_p50_ms": percentile(late, 0.5) if late else None,
            "late_p99_ms": percentile(late, 0.99) if late else None,
            "wake_up_ms": self._wake_up_s * 1e3,
            "cpu_s": time.process_time(),
            **self.granted,
        }

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one control line. Raises ValueError, TypeError or OSError for a bad one."""
        op = request.get("op")
        if op == "profile":
            values = {k: v for k, v in request.items() if k not in ("op", "id", "profile")}
            values.update(request.get("profile") or {})
            profile = LinkProfile.from_dict(values)
            self.up.apply(profile)  # raises for what the model has no words for, and then changes nothing
            self.down.apply(profile)
            return {"op": "ok", "profile": profile.to_dict()}
        if op == "target":
            self._ports[0].target = Endpoint.parse(str(request.get("target")))
            return {"op": "ok"}
        if op == "open":
            host = self._ports[0].listener.getsockname()[0]
            return {"op": "ok", "port": self.listen(host, 0, Endpoint.parse(str(request.get("target"))))}
        if op == "drop":
            dropped = len(self._connections)
            for connection in self._connections:
                connection.reset()
            self._connections.clear()
            self._dropped += dropped
            return {"op": "ok", "dropped": dropped}
        if op == "stats":
            return {"op": "ok", "stats": self.stats()}
        if op == "stop":
            self._running = False
            return {"op": "ok"}
        raise ValueError(f"op: {op!r} is unknown (allowed: profile, target, open, drop, stats, stop)")

    def _read_control(self, fd: int) -> None:
        data = os.read(fd, 65536)
        if not data:
            self._running = False
            return
        *lines, self._control = (self._control + data).split(b"\n")
        for line in filter(None, (one.strip() for one in lines)):
            request: Any = None
            try:
                request = json.loads(line)
                if not isinstance(request, dict):
                    raise ValueError("a control line is one JSON object")
                answer = self.handle(request)
            except (ValueError, TypeError, OSError) as error:
                answer = {"op": "error", "message": " ".join(str(error).split())}
            if isinstance(request, dict) and "id" in request:
                answer["id"] = request["id"]
            emit(answer)

    # -- relay ---------------------------------------------------------------------------------------------

    def run(self, control_fd: int | None) -> None:
        """Serve until `stop`, or until `control_fd` ends."""
        try:
            while self._running:
                self._turn(control_fd)
        finally:
            for connection in self._connections:
                connection.reset()
            for port in self._ports:
                port.listener.close()

    def _turn(self, control_fd: int | None) -> None:
        now_s = time.monotonic()
        reads: list[Any] = [] if control_fd is None else [control_fd]
        writes: list[Any] = []
        readers: dict[socket.socket, _Pipe] = {}
        wake_s = min(now_s + 3600.0, self._events.next_s - LEAD_S)
        reads.extend(port.listener for port in self._ports)
        for connection in self._connections:
            if connection.pipes is None:
                if connection.server is not None:
                    writes.append(connection.server)
                elif connection.port.target is not None:
                    wake_s = min(wake_s, connection.dial_s)
                continue
            for pipe in connection.pipes:
                if pipe.read_limit(now_s):
                    readers[pipe.src] = pipe
                    reads.append(pipe.src)
                elif not (pipe.eof or pipe.queued_bytes >= QUEUE_BYTES or pipe.stream.unsent_bytes):
                    wake_s = min(wake_s, now_s + max(1e-6, pipe.link.room_s(now_s)))
                if pipe.blocked:
                    writes.append(pipe.dst)
                elif pipe.queue:
                    wake_s = min(wake_s, pipe.queue[0][0] - LEAD_S)
        ready, writable, now_s = self._wait(reads, writes, wake_s)
        self._events.run_until(now_s, LEAD_S)
        listeners = {port.listener: port for port in self._ports}
        served: set[socket.socket] = set()
        for item in ready:
            if item in readers:
                if self._read(readers[item], now_s):
                    served.add(item)
            elif item in listeners:
                self._accept(listeners[item], now_s)
            elif item == control_fd:
                self._read_control(item)
        # Room at the bottleneck goes round: who has had some is asked last next time.
        self._connections.sort(key=lambda c: c.client in served or c.server in served)
        self._deliver(set(writable))

    def _wait(self, reads: list[Any], writes: list[Any], wake_s: float) -> tuple[list[Any], list[Any], float]:
        """Wait for sockets or until `wake_s`: what is readable, what is writable, and since when (s).

        Out of a long sleep a processor comes back slowly and with cold caches. So the box wakes `SPIN_S`
        early from one and polls until the arrival; and it takes the lateness of its own timers off the time
        at which it believes bytes to have come that woke it.
        """
        t0_s = time.monotonic()
        left_s = wake_s - t0_s
        if left_s <= IDLE_S:
            ready, writable, _ = select.select(reads, writes, (), max(0.0, left_s))
            return ready, writable, time.monotonic()
        early_s = wake_s - SPIN_S
        ready, writable, _ = select.select(reads, writes, (), early_s - t0_s)
        now_s = time.monotonic()
        if ready or writable:
            return ready, writable, max(t0_s, now_s - self._wake_up_s) if now_s - t0_s > IDLE_S else now_s
        self._overshoots_s.append(now_s - early_s)
        self._wake_up_s = min(WAKE_UP_MAX_S, statistics.median(self._overshoots_s))
        while not (ready or writable) and now_s < wake_s:
            ready, writable, _ = select.select(reads, writes, (), 0.0)
            now_s = time.monotonic()
        return ready, writable, now_s

    def _accept(self, port: _Port, now_s: float) -> None:
        try:
            client, _ = port.listener.accept()
        except OSError:
            return
        self._accepted += 1
        if len(self._connections) >= MAX_CONNECTIONS or client.fileno() >= 1000:
            self._refused += 1
            _reset(client)
            return
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A TCP handshake takes a round trip before the client's first byte leaves.
        self._connections.append(_Connection(client, port, now_s + self.up.profile.rtt_ms / 1e3))

    def _read(self, pipe: _Pipe, now_s: float) -> bool:
        """Whether there was room for it to read."""
        limit = pipe.read_limit(now_s)
        if not limit or pipe.src.fileno() < 0:  # another took the room, or dropped in this very turn
            return False
        try:
            data = pipe.src.recv(limit)
        except BlockingIOError:
            return False
        except OSError:
            pipe.finish(now_s, RST)
            return True
        if data:
            pipe.enqueue(now_s, data)
        else:
            pipe.finish(now_s, FIN)
        return True

    def _deliver(self, writable: set[Any]) -> None:
        for connection in list(self._connections):
            if connection.pipes is None:
                self._dial(connection, writable)
                continue
            if connection.broken:
                self._remove(connection)
                continue
            for pipe, back in (connection.pipes, connection.pipes[::-1]):
                if pipe.blocked and pipe.dst in writable:
                    pipe.blocked = False
                if pipe.queue and not pipe.blocked and not self._write(pipe, back):
                    self._remove(connection)
                    break
            else:
                if all(pipe.done for pipe in connection.pipes):
                    self._remove(connection, reset=False)

    def _remove(self, connection: _Connection, reset: bool = True) -> None:
        self._connections.remove(connection)
        if reset:
            connection.reset()
            return
        connection.end()
        connection.client.close()
        if connection.server is not None:
            connection.server.close()

    def _dial(self, connection: _Connection, writable: set[Any]) -> None:
        target = connection.port.target
        if connection.server is None:
            if target is None or time.monotonic() < connection.dial_s:
                return
            try:
                family, kind, proto, _, address = socket.getaddrinfo(
                    target.host, target.port, type=socket.SOCK_STREAM
                )[0]
                connection.server = socket.socket(family, kind, proto)
                connection.server.setblocking(False)
                error = connection.server.connect_ex(address)
            except OSError:
                error = -1
            if error not in (0, 115, 36):  # EINPROGRESS on Linux, on macOS
                self._refused += 1
                self._remove(connection)
            return
        if connection.server not in writable:
            return
        if connection.server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._refused += 1
            self._remove(connection)
            return
        connection.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.open(self._events, self.up, self.down)

    def _write(self, pipe: _Pipe, back: _Pipe) -> bool:
        """Hand over what has arrived; False when the connection is to be reset."""
        due_s = time.monotonic() + LEAD_S
        queue = pipe.queue
        while queue and queue[0][0] <= due_s:
            arrival_s = queue[0][0]
            if queue[0][1] is RST:
                return False
            if queue[0][1] is FIN:
                queue.popleft()
                pipe.done = True
                with contextlib.suppress(OSError):
                    pipe.dst.shutdown(socket.SHUT_WR)
                continue
            pieces, total = [], 0
            while queue and queue[0][0] <= due_s:
                arrived_s, data = queue[0]
                if data is RST or data is FIN:
                    break
                if total and total + len(data) > READ_BYTES:
                    break
                pieces.append(data)
                total += len(data)
                queue.popleft()
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            if pipe.done:  # the destination is gone
                pipe.queued_bytes -= total
                continue
            try:
                sent = pipe.dst.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                pipe.done = True
                pipe.queued_bytes -= total
                back.finish(time.monotonic(), RST)  # the source hears of it a way later
                continue
            self._late_ms.append((due_s - arrival_s) * 1e3)
            pipe.queued_bytes -= sent
            if sent < total:
                queue.appendleft((arrived_s, data[sent:]))
                pipe.blocked = True
                return True
            due_s = time.monotonic() + LEAD_S
        return True


def emit(message: dict[str, Any]) -> None:
    """One JSON line to standard output, at once."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
