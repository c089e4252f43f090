"""The link model: when do bytes that enter a link come out at the other end?

One model serves the `modelled` link of the testbed (real bytes, held in user space) and the simulator
(virtual time). It is pure arithmetic: no clock of its own, no I/O, and the same answers for the same seed.

A link has two directions, `up` (from the edge) and `down` (to the edge). In each direction a segment

1. waits behind the bytes already queued at the bottleneck and is serialised at its rate
   (`rate_*_mbit`; headers are counted, see `HEADER_BYTES`),
2. travels for the direction's share of the RTT, plus or minus jitter,
3. may be lost, and then arrives as late as TCP's recovery makes it,
4. is handed over in order: never before the bytes in front of it (head-of-line blocking).

Loss recovery, as a thin TCP flow shows it on Linux:

- *fast retransmit*: a later segment of the flow got through, and its acknowledgement tells the sender. The
  retransmission leaves at once when three have got through, a quarter of an RTT later otherwise
  (RFC 8985 section 6.2, RACK's reordering window). Later segments need not be part of the same write:
  a `Delivery` moves *earlier* when one follows in time;
- *tail-loss probe* after 2 RTT when nothing follows but something in front is still unacknowledged
  (RFC 8985 section 7.2);
- *retransmission timer* when the segment is alone in flight, because the probe then allows for a delayed
  acknowledgement and is no earlier: RTO = SRTT + max(rto_min, 4 RTTVAR), with Linux's rto_min of 200 ms
  (RFC 6298 section 2, whose floor is 1 s);
- a lost retransmission waits one RTO, then twice that, and so on up to 120 s (RFC 6298 section 5.5).

Simplifications, each harmless for flows that send little, and to be kept in mind for bulk data:

- no congestion or receive window: a sender's bytes go to the bottleneck at once. `buffer_bytes` bounds what
  may wait there; what does not fit waits at the sender (`LinkDirection.room_s`), as with a sender that has
  learnt the path, and no overflow loss is charged;
- acknowledgements are never lost, take no capacity and travel for the other direction's mean delay;
- SRTT is the profile's RTT plus the segment's own queueing and serialisation;
- a lost segment and its retransmission both take the bottleneck, one after the other, at the time of loss;
- the loss chain of bursts moves with every transmission, of whatever flow; the connection set-up loses
  nothing.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass

from dsdlab.sim.profile import HEADER_BYTES, MSS_BYTES, Direction, LinkProfile, segments_of, wire_bytes

__all__ = ["Delivery", "DirectionStats", "Flow", "LinkDirection"]

RTO_MAX_S = 120.0
MAX_RETRANSMISSIONS = 15
REORDER_SEGMENTS = 3


@dataclass(slots=True)
class DirectionStats:
    """Counters of one direction. Bytes are payload; `lost` counts transmissions that did not get through, and
    equals the sum of the three kinds of retransmission."""

    n_bytes: int = 0
    segments: int = 0
    lost: int = 0
    fast_retransmits: int = 0
    probes: int = 0
    timeouts: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class Delivery:
    """The fate of bytes in flight.

    `arrival_s` may move earlier (never later, never into the past) while a lost segment in front of them, or
    their own, can still be recovered sooner; `on_earlier` is then called.
    """

    __slots__ = ("_followers", "_late_s", "_own_s", "_recovery", "_retransmit_s", "arrival_s", "on_earlier")

    def __init__(self, own_s: float, arrival_s: float) -> None:
        self.arrival_s = arrival_s
        self.on_earlier: Callable[[Delivery], None] | None = None
        self._own_s = own_s  # when these bytes would arrive were nothing in front of them
        self._retransmit_s = -math.inf  # when a lost segment is sent again for the first time
        self._late_s = 0.0  # from then to its arrival
        self._followers = 0  # later segments that got through
        self._recovery = ""  # the counter of DirectionStats that its first retransmission is in


class LinkDirection:
    """One direction of a link: a bottleneck shared by flows, each in order and with its own loss recovery.

    `seed` fixes losses and jitter: flow k of a direction always sees the same sequence.
    """

    def __init__(self, profile: LinkProfile, direction: Direction, seed: int = 0) -> None:
        if direction not in ("up", "down"):
            raise ValueError(f"direction: {direction!r} is unknown (allowed: up, down)")
        self.direction: Direction = direction
        self.stats = DirectionStats()
        self.busy_until_s = -math.inf  # when the bottleneck has sent all that was given to it
        self._seed = seed
        self._flows = 0
        self._bad = False  # the state of the loss chain; all flows go through the same bottleneck
        self._default: Flow | None = None
        self.apply(profile)

    def apply(self, profile: LinkProfile) -> None:
        """Use `profile` for bytes sent from now on; bytes in flight keep their arrival, order is kept.

        Raises ValueError for what this model has no words for.
        """
        if profile.reorder_pct or profile.partitioned:
            what = "reorder_pct" if profile.reorder_pct else "partitioned"
            raise ValueError(f"{what}: the modelled link has none (allowed: a netem link)")
        self.profile = profile
        rate = profile.rate_mbit(self.direction)
        self.s_per_byte = 0.0 if rate is None else 8.0 / (rate * 1e6)
        self.delay_s = profile.delay_s(self.direction)
        self.back_s = profile.rtt_ms / 1e3 - self.delay_s  # an acknowledgement's way
        self.jitter_s = profile.jitter_ms / 1e3 * profile.fraction(self.direction)
        self.loss = profile.loss_pct / 100.0
        self._chain = profile.gilbert_elliott() if profile.loss_burst > 1.0 else None
        self.rtt_s = profile.rtt_ms / 1e3
        # A uniform jitter of half-width j has mean deviation j/2, and the timer adds four of them.
        self.rto_var_s = max(profile.rto_min_ms, 2.0 * profile.jitter_ms) / 1e3

    def loses(self, rng: random.Random) -> bool:
        """Whether the next transmission is lost; moves the loss chain on."""
        if self._chain is None:
            return rng.random() < self.loss
        lost = self._bad
        if rng.random() < self._chain[1 if self._bad else 0]:
            self._bad = not self._bad
        return lost

    @property
    def by_segment(self) -> bool:
        """Whether segments of one write may arrive at different times."""
        return self.s_per_byte > 0.0 or self.loss > 0.0 or self.jitter_s > 0.0

    def backlog_bytes(self, now_s: float) -> float:
        """Wire bytes waiting at the bottleneck."""
        if self.s_per_byte == 0.0:
            return 0.0
        return max(0.0, (self.busy_until_s - now_s) / self.s_per_byte)

    def room_s(self, now_s: float) -> float:
        """Seconds until a full segment fits into the bottleneck's buffer: 0 when it fits now."""
        if self.s_per_byte == 0.0 or self.profile.buffer_bytes is None:
            return 0.0
        room = self.profile.buffer_bytes - (MSS_BYTES + HEADER_BYTES)
        return max(0.0, self.busy_until_s - now_s - room * self.s_per_byte)

    def open_flow(self) -> Flow:
        """A new flow (one TCP connection) through this direction."""
        rng = random.Random(f"{self._seed}/{self.direction}/{self._flows}")
        self._flows += 1
        return Flow(self, rng)

    def send(self, now_s: float, n_bytes: int) -> float:
        """Send one frame on the default flow; the time (s) at which its last byte arrives if nothing follows.

        Raises ValueError for a negative size or a `now_s` that goes back.
        """
        if self._default is None:
            self._default = self.open_flow()
        return self._default.send(now_s, n_bytes)


class Flow:
    """One in-order byte stream (a TCP connection) through a `LinkDirection`. Open one with `open_flow`."""

    def __init__(self, link: LinkDirection, rng: random.Random) -> None:
        self._link = link
        self._rng = rng
        self._now_s = -math.inf
        self._last_arrival_s = -math.inf
        self._lost: list[Delivery] = []  # losses whose retransmission can still move, in order
        self._tail: deque[Delivery] = deque()  # everything from the first of them on
        self._tail_base_s = -math.inf  # arrival of what is in front of the tail

    def send(self, now_s: float, n_bytes: int) -> float:
        """As `transmit`, but only the arrival time known now."""
        return self.transmit(now_s, n_bytes).arrival_s

    def transmit(self, now_s: float, n_bytes: int) -> Delivery:
        """Send `n_bytes` in one go; the delivery of the last byte. Raises ValueError for a negative size or a
        time before the flow's last one."""
        if n_bytes < 0:
            raise ValueError(f"n_bytes: {n_bytes!r} is out of range (allowed: 0 or more)")
        link = self._link
        if link.loss == 0.0 and link.jitter_s == 0.0 and not self._tail:
            return self._loss_free(now_s, n_bytes)
        while n_bytes > MSS_BYTES:
            self.segment(now_s, MSS_BYTES)
            n_bytes -= MSS_BYTES
        return self.segment(now_s, n_bytes)

    def _loss_free(self, now_s: float, n_bytes: int) -> Delivery:
        """All segments of one write at once: the closed form."""
        self._advance(now_s)
        link = self._link
        link.stats.n_bytes += n_bytes
        link.stats.segments += segments_of(n_bytes)
        end_s = now_s
        if link.s_per_byte > 0.0:
            end_s = max(now_s, link.busy_until_s) + wire_bytes(n_bytes) * link.s_per_byte
            link.busy_until_s = end_s
        own_s = end_s + link.delay_s
        self._last_arrival_s = max(self._last_arrival_s, own_s)
        return Delivery(own_s, self._last_arrival_s)

    def segment(self, now_s: float, n_bytes: int) -> Delivery:
        """Send one segment of at most `MSS_BYTES`; its delivery."""
        if not 0 <= n_bytes <= MSS_BYTES:
            raise ValueError(f"n_bytes: {n_bytes!r} is out of range (allowed: 0 to {MSS_BYTES})")
        self._advance(now_s)
        link, rng = self._link, self._rng
        link.stats.n_bytes += n_bytes
        link.stats.segments += 1

        serialise_s = (n_bytes + HEADER_BYTES) * link.s_per_byte
        end_s = max(now_s, link.busy_until_s) + serialise_s if serialise_s else now_s
        delay_s = link.delay_s
        if link.jitter_s:
            delay_s += link.jitter_s * (2.0 * rng.random() - 1.0)
        losses = 0
        while link.loss and losses < MAX_RETRANSMISSIONS and link.loses(rng):
            losses += 1
        if serialise_s:
            link.busy_until_s = end_s + (serialise_s if losses else 0.0)

        delivery = Delivery(end_s + delay_s, 0.0)
        if losses:
            self._lose(delivery, now_s, end_s, losses, serialise_s + delay_s)
        elif self._tail:
            self._acknowledge_late(delivery._own_s + link.back_s)
        delivery.arrival_s = self._last_arrival_s = max(self._last_arrival_s, delivery._own_s)
        if losses:
            self._lost.append(delivery)
        if losses or self._tail:
            self._tail.append(delivery)
        return delivery

    def _advance(self, now_s: float) -> None:
        if now_s < self._now_s:
            raise ValueError(f"now_s: {now_s!r} is before {self._now_s!r} (a flow's time may not go back)")
        self._now_s = now_s
        tail = self._tail
        if self._lost:  # a retransmission that is under way, or that three have asked for, moves no more
            self._lost = [
                d for d in self._lost if d._retransmit_s > now_s and d._followers < REORDER_SEGMENTS
            ]
        first = self._lost[0] if self._lost else None
        while tail and tail[0] is not first:
            self._tail_base_s = tail.popleft().arrival_s
        if not tail:
            self._tail_base_s = self._last_arrival_s

    def _lose(self, delivery: Delivery, now_s: float, end_s: float, losses: int, again_s: float) -> None:
        """Give a lost segment the recovery it has if nothing follows it."""
        link = self._link
        srtt_s = link.rtt_s + (end_s - now_s)
        rto_s = min(srtt_s + link.rto_var_s, RTO_MAX_S)
        alone = now_s >= self._last_arrival_s + link.back_s
        wait_s = rto_s if alone else min(2.0 * srtt_s, rto_s)
        backoff_s = sum(min(rto_s * 2.0**k, RTO_MAX_S) for k in range(losses - 1))
        delivery._retransmit_s = now_s + wait_s
        delivery._late_s = backoff_s + again_s
        delivery._own_s = delivery._retransmit_s + delivery._late_s
        link.stats.lost += losses
        link.stats.timeouts += losses - 1
        self._recount(delivery, "probes" if wait_s < rto_s else "timeouts")

    def _recount(self, delivery: Delivery, recovery: str) -> None:
        """Move a first retransmission to the counter `recovery`."""
        stats = self._link.stats
        if delivery._recovery:
            setattr(stats, delivery._recovery, getattr(stats, delivery._recovery) - 1)
        setattr(stats, recovery, getattr(stats, recovery) + 1)
        delivery._recovery = recovery

    def _acknowledge_late(self, heard_s: float) -> None:
        """A segment behind the losses in the tail got through; the sender hears of it at `heard_s`."""
        link = self._link
        moved = False
        for lost in self._lost:
            if lost._retransmit_s <= heard_s:
                continue
            lost._followers += 1
            known_s = heard_s + (0.0 if lost._followers >= REORDER_SEGMENTS else link.rtt_s / 4.0)
            if known_s < lost._retransmit_s:
                self._recount(lost, "fast_retransmits")
                lost._retransmit_s = known_s
                lost._own_s = known_s + lost._late_s
                moved = True
        if not moved:
            return
        arrival_s = self._tail_base_s
        for delivery in self._tail:
            arrival_s = max(arrival_s, delivery._own_s)
            if arrival_s < delivery.arrival_s:
                delivery.arrival_s = arrival_s
                if delivery.on_earlier is not None:
                    delivery.on_earlier(delivery)
        self._last_arrival_s = arrival_s
