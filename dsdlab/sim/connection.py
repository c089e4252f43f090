"""A connection through a modelled link: when does what is written at one end arrive at the other?

Where nothing can be lost and nothing jitters, TCP shows in little but its headers, and an arrival is
arithmetic (bare acknowledgements then come at once and take no capacity). Elsewhere, and when more is under
way than half of TCP's first window, from where on it may count, the two ends are run event by event
(`dsdlab.sim.tcp`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsdlab.sim.clock import Clock
from dsdlab.sim.congestion import INITIAL_WINDOW
from dsdlab.sim.link import LinkDirection
from dsdlab.sim.profile import HEADER_BYTES, MSS_BYTES, segments_of
from dsdlab.sim.tcp import TcpEnd, tcp_pair

__all__ = ["Connection", "Stream"]

FREE_SEGMENTS = INITIAL_WINDOW // 2


class Stream:
    """One direction of a `Connection`.

    arrived: called with (when it arrives in s, item), in order. On a loss-free link it is called while
        sending, with a time to come; else at the time itself.
    """

    __slots__ = ("_flights", "_link", "arrived", "connection", "end")

    def __init__(self, connection: Connection, link: LinkDirection, arrived: Callable[[float, Any], object]):
        self.connection, self._link, self.arrived = connection, link, arrived
        self.end: TcpEnd | None = None
        # what is under way by arithmetic: (when it is acknowledged, when it was sent, bytes)
        self._flights: list[tuple[float, float, int]] = []

    def send(self, now_s: float, n_bytes: int, item: Any) -> None:
        """Write `n_bytes` in one go, at `now_s`: now, or for a slow sender, soon. No bytes: a bare FIN."""
        link, connection = self._link, self.connection
        flights = self._flights
        while flights and flights[0][0] <= now_s:
            del flights[0]
        segments = 1 if n_bytes <= MSS_BYTES else segments_of(n_bytes)
        if len(flights) + segments <= FREE_SEGMENTS and connection.quiet:
            stats = link.stats
            stats.n_bytes += n_bytes
            stats.segments += segments
            connection.rtt_s = rtt_s = link.rtt_s
            connection.used = True
            arrival_s = link.cross(now_s, n_bytes + HEADER_BYTES * segments)
            flights.append((arrival_s + rtt_s - link.delay_s, now_s, n_bytes))
            self.arrived(arrival_s, item)
            return
        clock = connection.clock
        end = connection.end_of(self)
        if now_s > clock.time():
            connection.to_come += 1
            clock.call_at(now_s, connection.write, end, n_bytes, item)
        else:
            end.write(n_bytes, item)

    @property
    def unsent_bytes(self) -> int:
        """What TCP keeps back for now."""
        return 0 if self.end is None else self.end.unsent_bytes

    @property
    def empty(self) -> bool:
        """Whether nothing is under way that `arrived` has not been called with."""
        return self.end is None or (self.end.delivered and not self.connection.to_come)


class Connection:
    """Two streams, `up` from the client and `down` to it, over the two directions of a link.

    up_arrived, down_arrived: see `Stream`. broken: called when TCP gives up.
    nodelay: False leaves Nagle's algorithm on.
    """

    __slots__ = ("_broken", "_nodelay", "_phase_s", "clock", "down", "rtt_s", "to_come", "up", "used")

    def __init__(
        self,
        clock: Clock,
        up: LinkDirection,
        down: LinkDirection,
        up_arrived: Callable[[float, Any], object],
        down_arrived: Callable[[float, Any], object],
        broken: Callable[[], object],
        *,
        nodelay: bool = True,
        phase_s: float = 0.0,
    ) -> None:
        self.clock = clock
        self.up = Stream(self, up, up_arrived)
        self.down = Stream(self, down, down_arrived)
        self.rtt_s = up.rtt_s  # of the link when it was last used
        self.to_come = 0  # writes that are due later
        self._broken, self._nodelay, self._phase_s = broken, nodelay, phase_s
        self.used = False

    @property
    def quiet(self) -> bool:
        """Whether an arrival is arithmetic: a plain link both ways, and nothing that is being repaired."""
        up, down = self.up, self.down
        if not (up._link.plain and down._link.plain and self._nodelay):
            return False
        one, two = up.end, down.end
        return one is None or two is None or (not self.to_come and one.idle and two.idle)

    def end_of(self, stream: Stream) -> TcpEnd:
        """The TCP of a stream's sender, made when first asked for."""
        if stream.end is None:
            up, down = self.up, self.down
            ends = tcp_pair(
                self.clock, up._link, down._link,
                rtt_s=self.rtt_s, settled=self.used, nodelay=self._nodelay, phase_s=self._phase_s,
            )  # fmt: skip
            up.end, down.end = ends
            for end, other in ((ends[0], down), (ends[1], up)):
                end.receiver.deliver = _Deliver(self.clock, other)
                end.broken = self._broken
        for one in (self.up, self.down):
            assert one.end is not None
            for acknowledged_s, sent_s, n_bytes in one._flights:
                if acknowledged_s > self.clock.time():
                    one.end.join(sent_s, n_bytes or 1, acknowledged_s)
            one._flights.clear()
        assert stream.end is not None
        return stream.end

    def write(self, end: TcpEnd, n_bytes: int, item: Any) -> None:
        """What was due later."""
        self.to_come -= 1
        end.write(n_bytes, item)

    def close(self) -> None:
        """Forget what is under way."""
        for end in (self.up.end, self.down.end):
            if end is not None:
                end.close()


class _Deliver:
    __slots__ = ("_clock", "_stream")

    def __init__(self, clock: Clock, stream: Stream) -> None:
        self._clock, self._stream = clock, stream

    def __call__(self, item: Any) -> None:
        self._stream.arrived(self._clock.time(), item)
