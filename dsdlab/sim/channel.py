"""Channels over the link model, on a virtual clock (or on any event loop, at the precision of its timers).

Encoded bytes cross, so every frame passes the codec and byte counts are real. On the wire a frame also has
WebSocket's framing (RFC 6455 section 5.2) and the headers of its TCP segments.
"""

from __future__ import annotations

import asyncio

from dsdlab.protocol.channel import Channel
from dsdlab.protocol.codec import decode, encode
from dsdlab.protocol.errors import ChannelClosed
from dsdlab.protocol.frames import AnyFrame
from dsdlab.protocol.parking import Step, parking
from dsdlab.sim.connection import Connection, Stream
from dsdlab.sim.link import LinkDirection
from dsdlab.sim.profile import LinkProfile
from dsdlab.sim.tcp_timing import TICK_S

__all__ = ["SimChannel", "SimLink", "websocket_bytes"]

CLOCK_RESOLUTION_S = 1e-9  # event loops fire a timer up to this early
MASK_BYTES = 4


def websocket_bytes(n_bytes: int, masked: bool) -> int:
    """A message of `n_bytes` with its frame header; a client masks what it sends."""
    header = 2 if n_bytes < 126 else 4 if n_bytes < 65536 else 10
    return n_bytes + header + (MASK_BYTES if masked else 0)


class SimChannel(Channel):
    """One end of a `SimLink.pair`; a Channel by the rules of `dsdlab.protocol.channel`.

    A close is seen by the other end at once, but what is under way still arrives.
    """

    __slots__ = (
        "_closed",
        "_gone",
        "_inbox",
        "_loop",
        "_masked",
        "_other",
        "_receive_s",
        "_send_s",
        "_stream",
        "_timed",
        "parked",
    )

    _other: SimChannel
    _stream: Stream  # of what is sent here

    def __init__(self, peer: str, loop: asyncio.AbstractEventLoop, send_s: float, receive_s: float) -> None:
        super().__init__(peer)
        self._loop = loop
        self._send_s, self._receive_s = send_s, receive_s
        self._masked = False
        self._inbox: list[
            tuple[float, bytes]
        ] = []  # (when it is had in s, bytes), in order; seldom more than one
        self.parked: Step | None = None  # who waits in recv
        self._timed = False  # whether that is until a time
        self._closed = ""  # why
        self._gone = False  # closed at this end

    async def send(self, frame: AnyFrame) -> None:
        if self._closed:
            raise ChannelClosed(self._closed)
        data = encode(frame)
        n_bytes = len(data)
        self.bytes_sent[type(frame).__name__] += n_bytes
        now_s = self._loop.time() + self._send_s
        self._stream.send(now_s, websocket_bytes(n_bytes, self._masked), data)

    def _arrived(self, when_s: float, data: bytes) -> None:
        """The link says when a frame's last byte is here."""
        if self._gone:
            return
        had_s = when_s + self._receive_s
        self._inbox.append((had_s, data))
        if self.parked is not None and not self._timed:
            self._timed = True
            self.parked.resume_at(had_s)

    async def recv(self) -> AnyFrame:
        if self.parked is not None:
            raise RuntimeError("another task waits in recv of this channel")
        loop, inbox = self._loop, self._inbox
        while True:
            if inbox:
                had_s = inbox[0][0]
                if had_s <= loop.time() + CLOCK_RESOLUTION_S:
                    data = inbox.pop(0)[1]
                    frame = decode(data)
                    self.bytes_received[type(frame).__name__] += len(data)
                    return frame
                self._timed = True
                wait = parking(loop)(self, had_s)
            elif self._gone or (self._closed and self._other._stream.empty):
                raise ChannelClosed(self._closed)
            else:
                wait = parking(loop)(self)
            try:
                await wait
            finally:
                self.parked, self._timed = None, False

    def _wake(self) -> None:
        if self.parked is not None:
            self.parked.resume()

    async def close(self) -> None:
        self._gone = True
        self._inbox.clear()
        self._other._shut("closed by the peer")
        self._shut("closed here")
        if self._other._gone:
            self._stream.connection.close()

    def drop(self) -> None:
        """Break the connection both ways, as a cut cable would: what is still under way is lost."""
        now_s = self._loop.time()
        self._stream.connection.close()
        for end in (self, self._other):
            while end._inbox and end._inbox[-1][0] - end._receive_s > now_s:
                end._inbox.pop()
            end._shut("connection lost")

    def _shut(self, why: str) -> None:
        self._closed = self._closed or why
        self._wake()


class SimLink:
    """Both directions of a link, and the connections through it.

    seed: of losses and jitter; the same seed and the same sending give the same arrivals. nodelay: False
    leaves Nagle's algorithm on at both ends. Raises ValueError for what the model has no words for.
    """

    __slots__ = ("_nodelay", "_phase_s", "down", "up")

    def __init__(self, profile: LinkProfile, seed: int = 0, *, nodelay: bool = True) -> None:
        self.up = LinkDirection(profile, "up", seed)
        self.down = LinkDirection(profile, "down", seed)
        self._nodelay = nodelay
        # where its kernels' timers stand when it begins: anywhere
        self._phase_s = (seed * 2654435761 % 2**32) / 2**20 * TICK_S

    def apply(self, profile: LinkProfile) -> None:
        """Use `profile` from now on; what is under way keeps its arrival. Raises as the constructor."""
        self.up.apply(profile)
        self.down.apply(profile)

    def pair(
        self, *, edge: tuple[float, float] = (0.0, 0.0), cloud: tuple[float, float] = (0.0, 0.0)
    ) -> tuple[SimChannel, SimChannel]:
        """(edge end, cloud end) of a new connection, in the running event loop.

        edge, cloud: what sending and receiving a frame takes each node, in s: a frame leaves that much after
        it is sent, and is had that much after it has arrived.
        """
        loop = asyncio.get_running_loop()
        here = SimChannel("simulated verifier", loop, *edge)
        there = SimChannel("simulated edge", loop, *cloud)
        here._other, there._other = there, here
        here._masked = True
        connection = Connection(
            loop, self.up, self.down, there._arrived, here._arrived, here.drop,
            nodelay=self._nodelay, phase_s=self._phase_s,
        )  # fmt: skip
        here._stream, there._stream = connection.up, connection.down
        return here, there
