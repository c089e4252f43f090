"""One TCP connection over a modelled link, event by event, as Linux runs it for flows that send little.

A `TcpEnd` cuts what is written into segments, sends them through its direction of the link, acknowledges what
it receives, and repairs losses: by RACK (RFC 8985: a segment sent later got through), by a tail-loss probe,
and by the retransmission timer, whose back-off runs on through a partition until a segment gets through.
Lost acknowledgements, spurious retransmissions and the delays of acknowledgements come out of that by
themselves. Only `call_at` and `time` of a clock are used: an event loop, virtual or not, or `EventQueue`.

Sources: net/ipv4/tcp_input.c, tcp_output.c, tcp_timer.c, tcp_recovery.c of Linux 6.x; names of its functions
are given where they are followed closely. Left out, because small frames do not show it: the receive window,
F-RTO and other undoing of congestion control, HyStart, CUBIC's growth beyond its Reno-friendly region,
pacing, SACK compression, reordering. A connection begins after its handshake and the WebSocket upgrade, which
lose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from dsdlab.sim.clock import Clock, KernelTimer
from dsdlab.sim.congestion import CongestionWindow
from dsdlab.sim.link import LinkDirection
from dsdlab.sim.profile import HEADER_BYTES, MSS_BYTES
from dsdlab.sim.tcp_receiver import Range, Receiver
from dsdlab.sim.tcp_timing import RTO_MAX_S, AckPolicy, RttEstimator

__all__ = ["TcpEnd", "tcp_pair"]

MAX_RETRANSMISSIONS = 15  # tcp_retries2
DUP_THRESHOLD = 3
LEAST_TIMEOUT_S = 0.002  # TCP_TIMEOUT_MIN_US
HANDSHAKE_SAMPLES = 2  # SYN, and the WebSocket upgrade
SETTLED_SAMPLES = 30

OPEN, RECOVERY, LOSS = range(3)
RETRANSMIT, PROBE, REORDER = range(3)


class _Segment:
    """Bytes `start` to `end` of the stream, on their way."""

    __slots__ = ("end", "lost", "resent", "sacked", "sent_s", "start")

    def __init__(self, start: int, end: int, sent_s: float) -> None:
        self.start, self.end, self.sent_s = start, end, sent_s
        self.resent = self.sacked = self.lost = False


class TcpEnd:
    """One end of a connection: what it sends through `out`, and what it receives from its peer.

    `broken` is called when the connection is given up.
    """

    __slots__ = (
        "_clock",
        "_high",
        "_kind",
        "_nodelay",
        "_out",
        "_peer",
        "_probe_end",
        "_rack",
        "_rack_rtt_s",
        "_retransmissions",
        "_sent",
        "_small_end",
        "_state",
        "_timer",
        "_una",
        "_unfinished",
        "_waits",
        "_window",
        "_written",
        "broken",
        "closed",
        "receiver",
        "rtt",
    )

    _peer: TcpEnd

    def __init__(
        self,
        clock: Clock,
        out: LinkDirection,
        rtt: RttEstimator,
        acks: AckPolicy,
        *,
        nodelay: bool = True,
        phase_s: float = 0.0,
    ) -> None:
        self._clock, self._out, self.rtt, self._nodelay = clock, out, rtt, nodelay
        self.receiver = Receiver(clock, acks, rtt, phase_s, self._acknowledge)
        self.broken: Callable[[], object] = _nothing
        self.closed = False
        # positions in the stream
        self._written = 0
        self._sent = 0
        self._una = 0  # acknowledged up to here
        self._small_end = 0  # end of the last segment that was not full
        self._unfinished: list[_Segment] = []  # sent and not acknowledged, in order
        self._waits = False  # for room at the bottleneck
        self._window = CongestionWindow()
        self._state = OPEN
        self._high = 0  # recovery ends here
        self._rack = (-math.inf, 0)  # when the youngest segment known to have arrived was sent, and its end
        self._rack_rtt_s = 0.0
        self._probe_end: int | None = None  # the stream's end when a probe was sent that is not answered
        self._retransmissions = 0  # of the timer, in a row
        self._kind = RETRANSMIT  # what the timer was set for last
        self._timer = KernelTimer(clock, phase_s, self._fire)

    # -- the application's side ----------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether everything written has been delivered and is known to be."""
        return not self._unfinished and self.delivered and self._sent == self._written

    @property
    def delivered(self) -> bool:
        """Whether everything written has been delivered."""
        return not self._peer.receiver.items

    @property
    def unsent_bytes(self) -> int:
        """Written, and kept back by a window or for want of room at the bottleneck."""
        return self._written - self._sent

    def write(self, n_bytes: int, item: Any) -> None:
        """Send `n_bytes` in one go; `item` is what the peer's `deliver` is called with. No bytes stand for
        the end of the stream, which takes a number of its own."""
        if self.closed:
            return
        self._written += n_bytes or 1
        self._peer.receiver.items.append((self._written, item))
        self._out.stats.n_bytes += n_bytes
        self._push()

    def join(self, sent_s: float, n_bytes: int, acknowledged_s: float) -> None:
        """Take over a segment that is under way and will arrive by itself; its acknowledgement comes then."""
        segment = _Segment(self._sent, self._sent + n_bytes, sent_s)
        self._sent = self._written = self._peer.receiver.position = segment.end
        self._unfinished.append(segment)
        self._clock.call_at(acknowledged_s, self._receive, 0, 0, sent_s, segment.end, (), sent_s, False)

    def close(self) -> None:
        """Forget everything and stop the timers; nothing is sent or received any more."""
        self.closed = True
        self.receiver.items.clear()
        self.receiver.close()
        self._timer.close()

    # -- sending -------------------------------------------------------------------------------------------

    def _in_flight(self) -> int:
        return sum(not (s.sacked or s.lost) for s in self._unfinished)

    def _push(self) -> None:
        """Send what is written, as far as the windows go (tcp_write_xmit)."""
        now_s = self._clock.time()
        room = self._window.segments - self._in_flight()
        before = len(self._unfinished)
        first = not before
        while self._sent < self._written and room > 0 and not self._waits:
            n_bytes = min(MSS_BYTES, self._written - self._sent)
            if n_bytes < MSS_BYTES:
                if not self._nodelay and self._small_end > self._una:  # tcp_nagle_check
                    break
                self._small_end = self._sent + n_bytes
            wait_s = self._out.room_s(now_s)
            if wait_s > 0.0:
                self._waits = True
                self._clock.call_at(now_s + max(wait_s, 1e-6), self._go_on)
                break
            segment = _Segment(self._sent, self._sent + n_bytes, now_s)
            self._sent = segment.end
            self._unfinished.append(segment)
            self.receiver.acks.sent_data(now_s)
            self._out.stats.segments += 1
            self._transmit(segment)
            room -= 1
        if len(self._unfinished) > before:
            if first or self._kind == PROBE:  # tcp_event_new_data_sent
                self._rearm(now_s)
            self._schedule_probe(now_s, advancing=False)

    def _go_on(self) -> None:
        self._waits = False
        if not self.closed:
            self._push()

    def _transmit(self, segment: _Segment) -> None:
        self._window.sent()
        if self._out.loses():
            self._out.stats.lost += 1
            self.receiver.acknowledged()
        else:
            self._packet(segment.start, segment.end)

    def _acknowledge(self, again: bool) -> None:
        """A bare acknowledgement; `again`: it says that data came twice (DSACK)."""
        self._out.stats.acks += 1
        if self._out.loses():
            self._out.stats.acks_lost += 1
            self.receiver.acknowledged()
        else:
            self._packet(0, 0, again)

    def _packet(self, start: int, end: int, again: bool = False) -> None:
        """A packet that gets through, with what has arrived here."""
        clock, receiver = self._clock, self.receiver
        now_s = clock.time()
        clock.call_at(
            self._out.cross(now_s, end - start + HEADER_BYTES), self._peer._receive,
            start, end, now_s, receiver.position, receiver.gaps, receiver.stamp_s, again,
        )  # fmt: skip
        receiver.acknowledged()

    def _resend(self, segment: _Segment) -> None:
        """Send a segment again, with as many of those behind it as fit into it (tcp_retrans_try_collapse)."""
        now_s = self._clock.time()
        at = self._unfinished.index(segment)
        behind = at + 1
        while behind < len(self._unfinished):
            other = self._unfinished[behind]
            if other.sacked or other.end - segment.start > MSS_BYTES:
                break
            segment.end = other.end
            behind += 1
        del self._unfinished[at + 1 : behind]
        segment.sent_s, segment.resent, segment.lost = now_s, True, False
        self._transmit(segment)

    def _resend_lost(self) -> None:
        """Send again what is marked lost, as the window allows."""
        room = self._window.segments - self._in_flight()
        at = 0
        while room > 0 and at < len(self._unfinished):
            segment = self._unfinished[at]
            if segment.lost:
                self._resend(segment)
                self._out.stats.fast_retransmits += 1
                room -= 1
            at += 1

    # -- the sender's timer --------------------------------------------------------------------------------

    def _arm(self, kind: int, delay_s: float) -> None:
        self._kind = kind
        self._timer.set(self._timer.expiry_s(delay_s))

    def _rearm(self, now_s: float) -> None:
        """Set the retransmission timer (tcp_rearm_rto)."""
        if not self._unfinished:
            self._timer.unset()
            self._kind = RETRANSMIT
            return
        delay_s = self.rtt.rto_s
        if self._kind != RETRANSMIT:
            delay_s = max(1e-6, self._unfinished[0].sent_s + delay_s - now_s)
        self._arm(RETRANSMIT, delay_s)

    def _schedule_probe(self, now_s: float, advancing: bool) -> bool:
        """Set the timer for a tail-loss probe, where there may be one (tcp_schedule_loss_probe)."""
        segments = self._unfinished
        if not segments or self._state != OPEN or any(s.sacked for s in segments):
            return False
        rtt = self.rtt
        alone = len(segments) == 1  # then a delayed acknowledgement is allowed for
        delay_s = 2.0 * rtt.srtt_s + (rtt.rto_min_s if alone else LEAST_TIMEOUT_S)
        rto_s = rtt.rto_s if advancing else segments[0].sent_s + rtt.rto_s - now_s
        if rto_s > 0.0:
            delay_s = min(delay_s, rto_s)
        self._arm(PROBE, delay_s)
        return True

    def _fire(self) -> None:
        if not self._unfinished:
            return
        now_s = self._clock.time()
        if self._kind == PROBE:
            self._probe(now_s)
        elif self._kind == REORDER:
            self._detect(now_s)
            self._recover()
            if self._timer.due_s == math.inf:
                self._rearm(now_s)
        else:
            self._time_out()

    def _probe(self, now_s: float) -> None:
        """tcp_send_loss_probe."""
        if self._probe_end is None:
            if self._sent < self._written and not self._waits:
                before = self._sent
                self._window.widen(1)
                self._push()
                self._window.widen(-1)
                sent = self._sent > before
            else:
                self._resend(self._unfinished[-1])
                sent = True
            if sent:
                self._out.stats.probes += 1
                self._probe_end = self._sent
                self._kind = RETRANSMIT  # the timer starts anew
        self._rearm(now_s)

    def _time_out(self) -> None:
        """tcp_retransmit_timer, tcp_enter_loss."""
        self._retransmissions += 1
        if self._retransmissions > MAX_RETRANSMISSIONS:
            self.broken()
            return
        self._window.time_out(self._state == OPEN or (self._state == LOSS and self._retransmissions == 1))
        self._state, self._high, self._probe_end = LOSS, self._sent, None
        for segment in self._unfinished:
            segment.lost = not segment.sacked
        head = self._unfinished[0]
        head.sacked = False
        self._resend(head)
        self._out.stats.timeouts += 1
        self.rtt.rto_s = min(2.0 * self.rtt.rto_s, RTO_MAX_S)
        self._arm(RETRANSMIT, self.rtt.rto_s)

    # -- acknowledgements ----------------------------------------------------------------------------------

    def _receive(
        self,
        start: int,
        end: int,
        sent_s: float,
        ack: int,
        sacks: tuple[Range, ...],
        echo_s: float,
        again: bool,
    ) -> None:
        """A packet of the peer has arrived. `echo_s`: the time stamp that it returns."""
        if self.closed:
            return
        if self._unfinished:
            self._take_ack(ack, sacks, echo_s, again, bare=start == end)
        if start < end:
            self.receiver.take(start, end, sent_s)
            if self.closed:
                return
        if self._sent < self._written:
            self._push()
        self.receiver.settle()

    def _take_ack(self, ack: int, sacks: tuple[Range, ...], echo_s: float, again: bool, bare: bool) -> None:
        """tcp_ack."""
        now_s = self._clock.time()
        segments = self._unfinished
        flying = self._in_flight()
        acked: list[_Segment] = []
        while segments and segments[0].end <= ack:
            acked.append(segments.pop(0))
        if segments and segments[0].start < ack:
            segments[0].start = ack
        advanced = ack > self._una
        self._una = max(self._una, ack)
        fresh: list[_Segment] = []
        newly_sacked = False
        if sacks:
            for segment in segments:
                if not segment.sacked and any(a <= segment.start and segment.end <= b for a, b in sacks):
                    segment.sacked, segment.lost, newly_sacked = True, False, True
                    fresh.append(segment)
        fresh += [s for s in acked if not s.sacked]
        if acked:
            clear = [s for s in acked if not s.resent]
            rtt_s = now_s - (clear[0].sent_s if len(clear) == len(acked) else echo_s)
            self.rtt.sample(rtt_s, self._una, self._sent)
            self._retransmissions = 0
        for segment in fresh:  # tcp_rack_advance
            rtt_s = now_s - segment.sent_s
            if segment.resent and rtt_s < self.rtt.least_s:
                continue  # its first copy got through
            # Linux takes the round trip of what it looks at last: the selectively acknowledged come first, so
            # a delayed cumulative acknowledgement in the same packet makes it more patient
            self._rack_rtt_s = rtt_s
            self._rack = max(self._rack, (segment.sent_s, segment.end))
        self._answer_probe(ack, again, bare and not advanced and not newly_sacked)
        if acked and self._state != RECOVERY:
            self._window.grow(len(acked), flying, after_timeout=self._state == LOSS)
        if self._state != OPEN and self._una >= self._high:
            if self._state == RECOVERY:
                self._window.end_recovery()
            self._state = OPEN
        waits = self._detect(now_s) if segments and fresh else False
        self._recover(len(fresh), advanced)
        if advanced and not waits and not self._schedule_probe(now_s, advancing=True):
            self._rearm(now_s)

    def _answer_probe(self, ack: int, again: bool, duplicate: bool) -> None:
        """What an acknowledgement says of a probe under way (tcp_process_tlp_ack)."""
        if self._probe_end is None or ack < self._probe_end:
            return
        if again or duplicate:
            self._probe_end = None
        elif ack > self._probe_end:  # something was lost
            self._probe_end = None
            self._window.reduce()

    def _detect(self, now_s: float) -> bool:
        """Mark lost what was sent well before something that has arrived (tcp_rack_detect_loss); whether the
        timer now waits for more to become so."""
        segments, rtt = self._unfinished, self.rtt
        patience_s = 0.0
        if self._state == OPEN and sum(s.sacked for s in segments) < DUP_THRESHOLD:
            patience_s = min(rtt.least_s / 4.0, rtt.srtt_s)
        wait_s = 0.0
        for segment in segments:
            if segment.sacked or segment.lost:
                continue
            if (segment.sent_s, segment.end) > self._rack:
                continue
            left_s = self._rack_rtt_s + patience_s - (now_s - segment.sent_s)
            if left_s <= 1e-9:
                segment.lost = True
            else:
                wait_s = max(wait_s, left_s)
        if wait_s:
            self._arm(REORDER, wait_s + LEAST_TIMEOUT_S)
        return wait_s > 0.0

    def _recover(self, delivered: int = 0, advanced: bool = False) -> None:
        """Send again what is marked lost (tcp_fastretrans_alert, tcp_xmit_retransmit_queue).

        delivered: segments that the acknowledgement tells of; advanced: whether it moves on.
        """
        any_lost = any(s.lost for s in self._unfinished)
        if any_lost and self._state == OPEN:
            self._window.begin_recovery()
            self._state, self._high, self._probe_end = RECOVERY, self._sent, None
            delivered = max(delivered, 1)
        if self._state == RECOVERY and delivered:
            self._window.recover(delivered, self._in_flight(), advanced)
        if any_lost:
            self._resend_lost()


def _nothing() -> None:
    """Nobody minds."""


def tcp_pair(
    clock: Clock,
    up: LinkDirection,
    down: LinkDirection,
    *,
    rtt_s: float,
    settled: bool = False,
    nodelay: bool = True,
    phase_s: float = 0.0,
) -> tuple[TcpEnd, TcpEnd]:
    """(client, server) of a connection just upgraded to WebSocket, which its round trips of `rtt_s` tell it.

    settled: it has been in use over such a link for a while.
    """
    now_s = clock.time()
    ends = []
    for out, interactive in ((up, False), (down, True)):
        rtt = RttEstimator(out.profile.rto_min_ms / 1e3)
        for position in range(SETTLED_SAMPLES if settled else HANDSHAKE_SAMPLES):
            rtt.sample(max(rtt_s, 1e-5), position, position)
        ends.append(TcpEnd(clock, out, rtt, AckPolicy(now_s, interactive), nodelay=nodelay, phase_s=phase_s))
    ends[0]._peer, ends[1]._peer = ends[1], ends[0]
    return ends[0], ends[1]
