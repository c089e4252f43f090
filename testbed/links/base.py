"""What every link is to the controller: a two-port box between an edge node and the verifier."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dsdlab.sim.profile import LinkProfile

__all__ = [
    "EchoServer",
    "Endpoint",
    "Link",
    "LinkError",
    "LinkProbe",
    "echo_rtts_ms",
    "percentile",
    "probe_echo",
]


class LinkError(Exception):
    """A link cannot start, went away or refused a request. The message is one line."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A TCP address that a node can dial or bind."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """From HOST:PORT or [HOST]:PORT. Raises ValueError."""
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"address: {text!r} is not HOST:PORT (port 1 to 65535)")
        return cls(host, int(port))


def percentile(values: list[float], q: float) -> float:
    """The q-quantile (0 to 1) of `values` by nearest rank; NaN when there are none."""
    if not values:
        return math.nan
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, max(0, math.ceil(q * len(ranked)) - 1))]


@dataclass(frozen=True, slots=True)
class LinkProbe:
    """Round trips of small frames through a link, measured at the edge's side."""

    rtt_ms: tuple[float, ...]
    n_bytes: int

    @property
    def p50_ms(self) -> float:
        return percentile(list(self.rtt_ms), 0.5)

    @property
    def p99_ms(self) -> float:
        return percentile(list(self.rtt_ms), 0.99)


class Link(ABC):
    """A two-port box: the edge dials the address that `start` returns, and its bytes reach the target.

    A link outlives the profiles put on it (`apply` changes a live link) and the connections through it. Its
    `name` is the word of scenario files and result rows, its `label` the one printed beside numbers.
    """

    name: ClassVar[str]
    label: ClassVar[str]

    @abstractmethod
    async def start(self, run_dir: Path) -> Endpoint:
        """Start the box; the address for the edge to dial. Connections wait for a target.

        Raises LinkError.
        """

    @abstractmethod
    async def set_target(self, target: Endpoint) -> None:
        """Where connections go from now on."""

    @abstractmethod
    async def apply(self, profile: LinkProfile) -> None:
        """Shape what is sent from now on by `profile`; connections stay, bytes keep their order."""

    @abstractmethod
    async def drop(self) -> int:
        """Fault injection: reset every connection now; how many there were."""

    @abstractmethod
    async def stats(self) -> dict[str, Any]:
        """Counters of the box, for provenance."""

    @abstractmethod
    async def stop(self) -> None:
        """Take the box away; idempotent."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether the box runs."""


class EchoServer:
    """A TCP echo peer, a blocking thread per connection: what links are measured with."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._listener = socket.create_server((host, 0))
        self.endpoint = Endpoint(host, self._listener.getsockname()[1])
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.append(connection)
            thread = threading.Thread(target=self._echo, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    @staticmethod
    def _echo(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while data := connection.recv(65536):
                connection.sendall(data)

    def close(self) -> None:
        """Close everything and wait for the threads."""
        for sock in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(2.0)


def echo_rtts_ms(endpoint: Endpoint, n: int, n_bytes: int, timeout_s: float = 30.0) -> list[float]:
    """`n` round trips of `n_bytes` to an echo peer, one after the other, in ms. Blocking; raises OSError."""
    payload = b"\x5a" * n_bytes
    rtts_ms = []
    with socket.create_connection((endpoint.host, endpoint.port), timeout_s) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for k in range(n + 1):
            t0_s = time.perf_counter()
            sock.sendall(payload)
            left = n_bytes
            while left:
                data = sock.recv(left)
                if not data:
                    raise ConnectionResetError("the link closed the connection")
                left -= len(data)
            if k:  # the first one paid for the connection
                rtts_ms.append((time.perf_counter() - t0_s) * 1e3)
    return rtts_ms


async def probe_echo(endpoint: Endpoint, n: int, n_bytes: int) -> LinkProbe:
    """`echo_rtts_ms` off the event loop."""
    rtts_ms = await asyncio.to_thread(echo_rtts_ms, endpoint, n, n_bytes)
    return LinkProbe(tuple(rtts_ms), n_bytes)
