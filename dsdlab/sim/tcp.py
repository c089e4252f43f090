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

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from dsdlab.sim.link import LinkDirection
from dsdlab.sim.profile import HEADER_BYTES, MSS_BYTES
from dsdlab.sim.tcp_timing import RTO_MAX_S, AckPolicy, RttEstimator, expiry_s

__all__ = ["INITIAL_WINDOW", "Clock", "EventQueue", "TcpEnd", "tcp_pair"]

INITIAL_WINDOW = 10
LEAST_WINDOW = 2
CUBIC_BETA = 717 / 1024
RENO_GROWTH = 3 * (1 - CUBIC_BETA) / (1 + CUBIC_BETA)  # segments per round trip (RFC 9438 section 4.3)
MAX_RETRANSMISSIONS = 15  # tcp_retries2
DUP_THRESHOLD = 3
LEAST_TIMEOUT_S = 0.002  # TCP_TIMEOUT_MIN_US
HANDSHAKE_SAMPLES = 2  # SYN, and the WebSocket upgrade
SETTLED_SAMPLES = 30

OPEN, RECOVERY, LOSS = range(3)
RETRANSMIT, PROBE, REORDER = range(3)


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    """What a connection needs of an event loop."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[..., object], /, *args: Any) -> Timer: ...


class _Event:
    __slots__ = ("args", "callback")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args = args

    def cancel(self) -> None:
        self.callback = None


class EventQueue:
    """A Clock for programs that have a loop of their own: they call `run_until`."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s
        self._heap: list[tuple[float, int, _Event]] = []
        self._order = itertools.count()

    def time(self) -> float:
        return self._now_s

    def call_at(self, when: float, callback: Callable[..., object], /, *args: Any) -> _Event:
        event = _Event(callback, args)
        heapq.heappush(self._heap, (when, next(self._order), event))
        return event

    @property
    def next_s(self) -> float:
        """When something happens next; infinity when nothing does."""
        while self._heap and self._heap[0][2].callback is None:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def run_until(self, now_s: float, early_s: float = 0.0) -> None:
        """Let everything happen that is due, or will be within `early_s`; then it is `now_s`, or later where
        something was early. Time never goes back."""
        while self.next_s <= now_s + early_s:
            when_s, _, event = heapq.heappop(self._heap)
            self._now_s = max(self._now_s, when_s)
            if event.callback is not None:
                event.callback(*event.args)
        self._now_s = max(self._now_s, now_s)


class _Segment:
    """Bytes `start` to `end` of the stream, on their way."""

    __slots__ = ("end", "lost", "resent", "sacked", "sent_s", "start")

    def __init__(self, start: int, end: int, sent_s: float) -> None:
        self.start, self.end, self.sent_s = start, end, sent_s
        self.resent = self.sacked = self.lost = False


class TcpEnd:
    """One end of a connection: what it sends through `out`, and what it receives from its peer.

    deliver: called with each item of the peer, in order, when its last byte has arrived.
    broken: called when the connection is given up.
    """

    __slots__ = (
        "_acks",
        "_clock",
        "_delack",
        "_delack_due_s",
        "_delack_s",
        "_due_s",
        "_gaps",
        "_high",
        "_items",
        "_kind",
        "_nodelay",
        "_out",
        "_peer",
        "_phase_s",
        "_prior_window",
        "_probe_end",
        "_prr_delivered",
        "_prr_out",
        "_rack_end",
        "_rack_rtt_s",
        "_rack_s",
        "_received",
        "_retransmissions",
        "_sent",
        "_small_end",
        "_ssthresh",
        "_state",
        "_timer",
        "_timer_s",
        "_ts_s",
        "_una",
        "_unfinished",
        "_waits",
        "_window",
        "_written",
        "broken",
        "closed",
        "deliver",
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
        self._clock, self._out, self.rtt, self._acks = clock, out, rtt, acks
        self._nodelay = nodelay
        self._phase_s = phase_s
        self.deliver: Callable[[Any], object] = _nowhere
        self.broken: Callable[[], object] = _nothing
        self.closed = False
        # sending: positions in the stream
        self._items: deque[tuple[int, Any]] = deque()  # (end, item), not yet delivered
        self._written = 0
        self._sent = 0
        self._una = 0  # acknowledged up to here
        self._unfinished: list[_Segment] = []  # sent and not acknowledged, in order
        self._small_end = 0  # end of the last segment that was not full
        self._waits = False  # for room at the bottleneck
        self._state = OPEN
        self._high = 0  # recovery ends here
        self._window = float(INITIAL_WINDOW)
        self._ssthresh = math.inf
        self._prior_window = 0  # at the beginning of recovery, and what was delivered and sent since then
        self._prr_delivered = self._prr_out = 0
        self._rack_s = -math.inf  # when the youngest segment known to have arrived was sent, and its end
        self._rack_end = 0
        self._rack_rtt_s = 0.0
        self._probe_end: int | None = None  # the stream's end when a probe was sent that is not answered
        self._retransmissions = 0  # of the timer, in a row
        # the sender's one timer, set lazily: the clock may call before it is due
        self._kind = RETRANSMIT
        self._due_s = math.inf
        self._timer: Timer | None = None
        self._timer_s = math.inf
        # receiving
        self._received = 0
        self._gaps: list[tuple[int, int]] = []  # received beyond a gap
        self._ts_s = 0.0  # the time stamp to echo
        self._delack: Timer | None = None  # set lazily, too
        self._delack_s = self._delack_due_s = math.inf

    # -- the application's side ----------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether everything written has been delivered and is known to be."""
        return not self._unfinished and not self._items and self._sent == self._written

    @property
    def delivered(self) -> bool:
        """Whether everything written has been delivered."""
        return not self._items

    @property
    def undelivered_bytes(self) -> int:
        """Written, and not yet delivered."""
        return self._written - self._peer._received

    def write(self, n_bytes: int, item: Any) -> None:
        """Send `n_bytes` in one go; `item` is what the peer's `deliver` is called with. No bytes stand for
        the end of the stream, which takes a number of its own."""
        if self.closed:
            return
        self._written += n_bytes or 1
        self._items.append((self._written, item))
        self._out.stats.n_bytes += n_bytes
        self._push()

    def join(self, sent_s: float, n_bytes: int, acknowledged_s: float) -> None:
        """Take over a segment that is under way and will arrive by itself; its acknowledgement comes then."""
        segment = _Segment(self._sent, self._sent + n_bytes, sent_s)
        self._sent = self._written = self._peer._received = segment.end
        self._unfinished.append(segment)
        self._clock.call_at(acknowledged_s, self._receive, 0, 0, sent_s, segment.end, (), sent_s, False)

    def close(self) -> None:
        """Forget everything and stop the timers; nothing is sent or received any more."""
        self.closed = True
        self._items.clear()
        for timer in (self._timer, self._delack):
            if timer is not None:
                timer.cancel()
        self._timer = self._delack = None

    # -- sending -------------------------------------------------------------------------------------------

    def _in_flight(self) -> int:
        return sum(not (s.sacked or s.lost) for s in self._unfinished)

    def _push(self) -> None:
        """Send what is written, as far as the windows go (tcp_write_xmit)."""
        now_s = self._clock.time()
        room = int(self._window) - self._in_flight()
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
            self._acks.sent_data(now_s)
            self._out.stats.segments += 1
            self._prr_out += 1
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
        out, clock = self._out, self._clock
        now_s = clock.time()
        if out.loses():
            out.stats.lost += 1
        else:
            arrival_s = out.cross(now_s, segment.end - segment.start + HEADER_BYTES)
            clock.call_at(
                arrival_s, self._peer._receive,
                segment.start, segment.end, now_s, self._received, tuple(self._gaps), self._ts_s, False,
            )  # fmt: skip
        self._acks.sent()
        self._delack_due_s = math.inf

    def _acknowledge(self, again: bool = False) -> None:
        """A bare acknowledgement; `again`: it says that data came twice (DSACK)."""
        out, clock = self._out, self._clock
        out.stats.acks += 1
        if out.loses():
            out.stats.acks_lost += 1
        else:
            now_s = clock.time()
            clock.call_at(
                out.cross(now_s, HEADER_BYTES), self._peer._receive,
                0, 0, now_s, self._received, tuple(self._gaps), self._ts_s, again,
            )  # fmt: skip
        self._acks.sent()
        self._delack_due_s = math.inf

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
        self._prr_out += 1
        self._transmit(segment)

    def _resend_lost(self) -> None:
        """Send again what is marked lost, as the window allows."""
        room = int(self._window) - self._in_flight()
        at = 0
        while room > 0 and at < len(self._unfinished):
            segment = self._unfinished[at]
            if segment.lost:
                self._resend(segment)
                self._out.stats.fast_retransmits += 1
                room -= 1
            at += 1

    # -- the sender's timer --------------------------------------------------------------------------------

    def _arm(self, kind: int, now_s: float, delay_s: float) -> None:
        self._kind = kind
        self._due_s = expiry_s(now_s + self._phase_s, delay_s) - self._phase_s
        if self._timer is None or self._timer_s > self._due_s:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_s = self._due_s
            self._timer = self._clock.call_at(self._due_s, self._fire)

    def _rearm(self, now_s: float) -> None:
        """Set the retransmission timer (tcp_rearm_rto)."""
        if not self._unfinished:
            self._due_s = math.inf
            self._kind = RETRANSMIT
            return
        delay_s = self.rtt.rto_s
        if self._kind != RETRANSMIT:
            delay_s = max(1e-6, self._unfinished[0].sent_s + delay_s - now_s)
        self._arm(RETRANSMIT, now_s, delay_s)

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
        self._arm(PROBE, now_s, delay_s)
        return True

    def _fire(self) -> None:
        self._timer = None
        self._timer_s = math.inf
        if self.closed or self._due_s == math.inf:
            return
        now_s = self._clock.time()
        if now_s < self._due_s - 1e-9:
            self._timer_s = self._due_s
            self._timer = self._clock.call_at(self._due_s, self._fire)
            return
        self._due_s = math.inf
        if not self._unfinished:
            return
        if self._kind == PROBE:
            self._probe(now_s)
        elif self._kind == REORDER:
            self._detect(now_s)
            self._recover()
            if self._kind != REORDER or self._due_s == math.inf:
                self._rearm(now_s)
        else:
            self._time_out(now_s)

    def _probe(self, now_s: float) -> None:
        """tcp_send_loss_probe."""
        if self._probe_end is None:
            if self._sent < self._written and not self._waits:
                before = self._sent
                self._window, window = self._window + 1, self._window
                self._push()
                self._window = window
                sent = self._sent > before
            else:
                self._resend(self._unfinished[-1])
                sent = True
            if sent:
                self._out.stats.probes += 1
                self._probe_end = self._sent
                self._kind = RETRANSMIT  # the timer starts anew
        self._rearm(now_s)

    def _time_out(self, now_s: float) -> None:
        """tcp_retransmit_timer, tcp_enter_loss."""
        self._retransmissions += 1
        if self._retransmissions > MAX_RETRANSMISSIONS:
            self.broken()
            return
        if self._state == OPEN or (self._state == LOSS and self._retransmissions == 1):
            self._reduce()
        self._state, self._high, self._probe_end = LOSS, self._sent, None
        self._window = 1.0
        for segment in self._unfinished:
            segment.lost = not segment.sacked
        head = self._unfinished[0]
        head.sacked = False
        self._resend(head)
        self._out.stats.timeouts += 1
        self.rtt.rto_s = min(2.0 * self.rtt.rto_s, RTO_MAX_S)
        self._arm(RETRANSMIT, now_s, self.rtt.rto_s)

    # -- acknowledgements ----------------------------------------------------------------------------------

    def _receive(
        self,
        start: int,
        end: int,
        sent_s: float,
        ack: int,
        sacks: tuple[tuple[int, int], ...],
        echo_s: float,
        again: bool,
    ) -> None:
        """A packet of the peer has arrived. `echo_s`: the time stamp that it returns."""
        if self.closed:
            return
        if self._unfinished:
            self._take_ack(ack, sacks, echo_s, again, bare=start == end)
        if start < end:
            self._take_data(start, end, sent_s)
            if self.closed:
                return
        if self._sent < self._written:
            self._push()
        if self._acks.pending:
            if self._acks.at_once:
                self._acknowledge()
            else:
                self._delay_ack()

    def _take_ack(
        self, ack: int, sacks: tuple[tuple[int, int], ...], echo_s: float, again: bool, bare: bool
    ) -> None:
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
        fresh = [s for s in acked if not s.sacked]
        newly_sacked = False
        if sacks:
            for segment in segments:
                if not segment.sacked and any(a <= segment.start and segment.end <= b for a, b in sacks):
                    segment.sacked, segment.lost, newly_sacked = True, False, True
                    fresh.append(segment)
        if acked:
            clear = [s for s in acked if not s.resent]
            rtt_s = now_s - (clear[0].sent_s if len(clear) == len(acked) else echo_s)
            self.rtt.sample(rtt_s, self._una, self._sent)
            self._retransmissions = 0
        for segment in fresh:  # tcp_rack_advance
            rtt_s = now_s - segment.sent_s
            if segment.resent and rtt_s < self.rtt.least_s:
                continue  # its first copy got through
            if (segment.sent_s, segment.end) > (self._rack_s, self._rack_end):
                self._rack_s, self._rack_end, self._rack_rtt_s = segment.sent_s, segment.end, rtt_s
        self._answer_probe(ack, again, bare and not advanced and not newly_sacked)
        if acked and self._state != RECOVERY:
            self._grow(len(acked), flying)
        if self._state != OPEN and self._una >= self._high:
            if self._state == RECOVERY:
                self._window = self._ssthresh
            self._state = OPEN
        waits = self._detect(now_s) if segments and fresh else False
        self._recover(len(fresh), advanced)
        if advanced and not waits and not self._schedule_probe(now_s, advancing=True):
            self._rearm(now_s)

    def _grow(self, acked: int, flying: int) -> None:
        """Slow start, and a segment per round trip beyond it, while the window is what limits the sender."""
        if self._window < self._ssthresh:
            if self._state == LOSS or 2 * flying > self._window:
                self._window = min(self._window + acked, max(self._ssthresh, self._window))
        elif flying >= int(self._window):
            self._window += RENO_GROWTH * acked / self._window

    def _answer_probe(self, ack: int, again: bool, duplicate: bool) -> None:
        """What an acknowledgement says of a probe under way (tcp_process_tlp_ack)."""
        if self._probe_end is None or ack < self._probe_end:
            return
        if again or duplicate:
            self._probe_end = None
        elif ack > self._probe_end:  # something was lost
            self._probe_end = None
            self._reduce()
            self._window = self._ssthresh

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
            if (segment.sent_s, segment.end) > (self._rack_s, self._rack_end):
                continue
            left_s = self._rack_rtt_s + patience_s - (now_s - segment.sent_s)
            if left_s <= 1e-9:
                segment.lost = True
            else:
                wait_s = max(wait_s, left_s)
        if wait_s:
            self._arm(REORDER, now_s, wait_s + LEAST_TIMEOUT_S)
        return wait_s > 0.0

    def _reduce(self) -> None:
        """Less is to be in flight from now on."""
        self._ssthresh = float(max(LEAST_WINDOW, int(int(self._window) * CUBIC_BETA)))

    def _recover(self, delivered: int = 0, advanced: bool = False) -> None:
        """Send again what is marked lost (tcp_fastretrans_alert, tcp_xmit_retransmit_queue).

        delivered: segments that the acknowledgement tells of; in recovery they are what lets others out, in
        proportion (PRR, RFC 6937; tcp_cwnd_reduction).
        """
        any_lost = any(s.lost for s in self._unfinished)
        if any_lost and self._state == OPEN:
            self._prior_window = int(self._window)
            self._reduce()
            self._state, self._high, self._probe_end = RECOVERY, self._sent, None
            self._prr_delivered = self._prr_out = 0
            delivered = max(delivered, 1)
        if self._state == RECOVERY and delivered:
            flying = self._in_flight()
            room = int(self._ssthresh) - flying
            self._prr_delivered += delivered
            if room < 0:
                share = -(-int(self._ssthresh) * self._prr_delivered // self._prior_window)
                allowed = share - self._prr_out
            else:
                allowed = min(room, max(self._prr_delivered - self._prr_out, delivered) + advanced)
            self._window = float(flying + max(allowed, 0 if self._prr_out else 1))
        if any_lost:
            self._resend_lost()

    # -- receiving -----------------------------------------------------------------------------------------

    def _take_data(self, start: int, end: int, sent_s: float) -> None:
        """tcp_data_queue."""
        acks = self._acks
        if end <= self._received:
            acks.duplicate()
            self._acknowledge(again=True)
            return
        if start <= self._received - acks.unacked:
            self._ts_s = sent_s
        if start > self._received:
            acks.odd()
            self._gaps = _with_range(self._gaps, start, end)
            return
        had_gaps = bool(self._gaps)
        before = self._received
        self._received = end
        while self._gaps and self._gaps[0][0] <= self._received:
            self._received = max(self._received, self._gaps.pop(0)[1])
        acks.received(self._clock.time(), self._received - before, self.rtt.rto_s)
        if had_gaps:
            acks.odd()
        items = self._peer._items
        while items and items[0][0] <= self._received:
            self.deliver(items.popleft()[1])

    def _delay_ack(self) -> None:
        now_s = self._clock.time()
        delay_s = self._acks.delay_s(self.rtt.srtt_s)
        due_s = expiry_s(now_s + self._phase_s, delay_s) - self._phase_s
        self._delack_due_s = due_s = min(due_s, self._delack_due_s)
        if self._delack is None or self._delack_s > due_s:
            if self._delack is not None:
                self._delack.cancel()
            self._delack_s = due_s
            self._delack = self._clock.call_at(due_s, self._ack_late)

    def _ack_late(self) -> None:
        self._delack = None
        due_s = self._delack_due_s
        if self.closed or due_s == math.inf:
            return
        if self._clock.time() < due_s - 1e-9:
            self._delack_s = due_s
            self._delack = self._clock.call_at(due_s, self._ack_late)
            return
        self._acks.missed(self.rtt.rto_s)
        self._acknowledge()


def _with_range(ranges: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """Disjoint ranges in order, with one more."""
    out: list[tuple[int, int]] = []
    for a, b in sorted([*ranges, (start, end)]):
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], b))
        else:
            out.append((a, b))
    return out


def _nowhere(_item: Any) -> None:
    """Where items go until somebody asks for them."""


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
