"""A pair of channels inside one event loop, with an arrival schedule and seeded faults.

Encoded bytes cross, so byte counts are real and every frame passes the codec. Only asyncio futures and
`loop.time` are used: it runs on any event loop, one with a virtual clock included. On a real clock the
loop's timers set the precision (1 ms under uvloop). A close is seen by the other end at once.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dsdlab.protocol.channel import Channel
from dsdlab.protocol.codec import decode, encode
from dsdlab.protocol.errors import ChannelClosed
from dsdlab.protocol.frames import AnyFrame

CLOCK_RESOLUTION_S = 1e-9  # event loops fire a timer up to this early
Arrival = Callable[[float, int], float]
"""(time of sending in s, payload bytes) → time of arrival in s. Order is kept whatever it returns."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What one direction does to its frames. Nothing is ever reordered, as on TCP.

    delay_s, jitter_s: each frame takes delay_s plus a uniform share of jitter_s; later frames queue behind.
    duplicate: probability that a frame is sent twice, the copy up to `duplicate_lag` frames later.
    drop_after: after so many frames the connection breaks, both ways: the next frame is lost, and so is
        what is still in flight. None: never.
    seed: of this direction's random stream.

    Raises ValueError, naming the field, for a value out of range.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    duplicate: float = 0.0
    duplicate_lag: int = 0
    drop_after: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.delay_s >= 0:
            raise ValueError(f"delay_s is {self.delay_s}; allowed: 0 or more")
        if not self.jitter_s >= 0:
            raise ValueError(f"jitter_s is {self.jitter_s}; allowed: 0 or more")
        if not 0 <= self.duplicate <= 1:
            raise ValueError(f"duplicate is {self.duplicate}; allowed: 0 to 1")
        if self.duplicate_lag < 0:
            raise ValueError(f"duplicate_lag is {self.duplicate_lag}; allowed: 0 or more")
        if self.drop_after is not None and self.drop_after < 0:
            raise ValueError(f"drop_after is {self.drop_after}; allowed: 0 or more")


class MemoryChannel(Channel):
    """One end of a `memory_pair`."""

    def __init__(self, peer: str, faults: Faults, arrival: Arrival | None) -> None:
        super().__init__(peer)
        self._other: MemoryChannel
        self._faults = faults
        self._arrival = arrival
        self._random = random.Random(faults.seed)
        self._n_sent = 0
        self._last_arrival_s = float("-inf")
        self._copies: list[tuple[int, bytes]] = []  # duplicates still to send: (when _n_sent reaches, bytes)
        self._inbox: deque[tuple[float, bytes]] = deque()  # (arrival s, bytes), in order
        self._waiter: asyncio.Future[None] | None = None
        self._closed = ""  # why

    async def send(self, frame: AnyFrame) -> None:
        if self._closed:
            raise ChannelClosed(self._closed)
        data = encode(frame)
        if self._faults.drop_after is not None and self._n_sent >= self._faults.drop_after:
            self.drop()
            return
        self._n_sent += 1
        self.bytes_sent[type(frame).__name__] += len(data)
        self._deliver(data)
        if self._random.random() < self._faults.duplicate:
            self._copies.append((self._n_sent + self._random.randint(0, self._faults.duplicate_lag), data))
        for copy in [c for c in self._copies if c[0] <= self._n_sent]:
            self._copies.remove(copy)
            self._deliver(copy[1])

    def _deliver(self, data: bytes) -> None:
        now_s = asyncio.get_running_loop().time()
        at_s = self._arrival(now_s, len(data)) if self._arrival else now_s
        at_s += self._faults.delay_s + self._faults.jitter_s * self._random.random()
        self._last_arrival_s = max(self._last_arrival_s, at_s)
        self._other._inbox.append((self._last_arrival_s, data))
        self._other._wake()

    async def recv(self) -> AnyFrame:
        if self._waiter is not None:
            raise RuntimeError("another task waits in recv of this channel")
        loop = asyncio.get_running_loop()
        while True:
            if self._inbox and self._inbox[0][0] <= loop.time() + CLOCK_RESOLUTION_S:
                data = self._inbox.popleft()[1]
                frame = decode(data)
                self.bytes_received[type(frame).__name__] += len(data)
                return frame
            if not self._inbox and self._closed:
                raise ChannelClosed(self._closed)
            self._waiter = loop.create_future()
            timer = loop.call_at(self._inbox[0][0], self._wake) if self._inbox else None
            try:
                await self._waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def close(self) -> None:
        self._inbox.clear()
        self._other._shut("closed by the peer")
        self._shut("closed here")

    def drop(self) -> None:
        """Break the connection both ways, as a cut cable would: what is still in flight is lost."""
        now_s = asyncio.get_running_loop().time()
        for end in (self, self._other):
            end._inbox = deque(item for item in end._inbox if item[0] <= now_s)
            end._shut("connection lost")

    def _shut(self, why: str) -> None:
        self._closed = self._closed or why
        self._wake()


def memory_pair(
    up: Faults | None = None,
    down: Faults | None = None,
    *,
    up_arrival: Arrival | None = None,
    down_arrival: Arrival | None = None,
) -> tuple[MemoryChannel, MemoryChannel]:
    """(client end, server end) of a connection; `up` is client → server.

    `up_arrival`, `down_arrival`: a link model's schedule for each direction; faults come on top.
    """
    client = MemoryChannel("memory server", up or Faults(), up_arrival)
    server = MemoryChannel("memory client", down or Faults(), down_arrival)
    client._other, server._other = server, client
    return client, server
