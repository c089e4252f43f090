"""TCP's clockwork as Linux has it: the ticks of its timers, its estimate of the round trip, and when it
acknowledges without having anything to say.

Sources: kernel/time/timer.c; net/ipv4/tcp_input.c, tcp_output.c, tcp_timer.c (6.x); RFC 6298 for the
estimator. Constants are Linux's, none is fitted.
"""

from __future__ import annotations

import math

__all__ = ["RTO_MAX_S", "TICK_S", "AckPolicy", "RttEstimator", "expiry_s"]

TICK_S = 0.004
"""A jiffy of a kernel with CONFIG_HZ=250 (Debian's and most others')."""
RTO_MAX_S = 120.0
ATO_MIN_S = 0.040
DELACK_MAX_S = 0.200
QUICK_ACKS = 16
DEFAULT_MSS_BYTES = 536
_EPS = 1e-9


def ticks_of(delay_s: float) -> int:
    """A delay in whole ticks, rounded up, at least one."""
    return max(1, math.ceil(delay_s / TICK_S - _EPS))


def expiry_s(now_s: float, delay_s: float) -> float:
    """When a kernel timer set now for `delay_s` fires: never early, and late by up to one step of its wheel.

    The wheel has levels of 64 slots; steps are 1 tick below 63 ticks of delay, 8 below 504, 64 below 4032, …
    (timer.c, calc_index).
    """
    delay = ticks_of(delay_s)
    due = math.floor(now_s / TICK_S + _EPS) + delay
    shift, reach = 0, 63
    while delay >= reach and shift < 24:
        shift, reach = shift + 3, reach << 3
    return float(((due >> shift) + 1) << shift) * TICK_S


class RttEstimator:
    """Smoothed round trip and retransmission time-out (tcp_rtt_estimator).

    RTO = SRTT + RTTVAR, where RTTVAR is the largest four-fold mean deviation of a round trip, not below
    `rto_min_s`; it rises at once and falls by a quarter per round trip.
    """

    __slots__ = ("_mdev4_max_s", "_mdev4_s", "_rto_min_s", "_until", "_var4_s", "least_s", "rto_s", "srtt_s")

    def __init__(self, rto_min_s: float) -> None:
        self.srtt_s = 0.0
        self.least_s = math.inf  # the smallest round trip seen
        self.rto_s = 1.0
        self._mdev4_s = self._mdev4_max_s = self._var4_s = 0.0
        self._until = 0  # the stream position that ends this round trip
        self._rto_min_s = rto_min_s

    @property
    def rto_min_s(self) -> float:
        return self._rto_min_s

    def sample(self, rtt_s: float, acked: int, sent: int) -> None:
        """A round trip; `acked` and `sent` are the sender's stream positions now. Ends a back-off."""
        self.least_s = min(self.least_s, rtt_s)
        if self.srtt_s == 0.0:
            self.srtt_s = rtt_s
            self._mdev4_s = 2.0 * rtt_s
            self._var4_s = self._mdev4_max_s = max(self._mdev4_s, self._rto_min_s)
            self._until = sent
        else:
            error_s = rtt_s - self.srtt_s
            self.srtt_s += error_s / 8.0
            change_s = abs(error_s) - self._mdev4_s / 4.0
            if error_s < 0.0 and change_s > 0.0:  # a round trip that has become shorter is no alarm
                change_s /= 8.0
            self._mdev4_s += change_s
            if self._mdev4_s > self._mdev4_max_s:
                self._mdev4_max_s = self._mdev4_s
                self._var4_s = max(self._var4_s, self._mdev4_max_s)
            if acked > self._until:
                if self._mdev4_max_s < self._var4_s:
                    self._var4_s -= (self._var4_s - self._mdev4_max_s) / 4.0
                self._until = sent
                self._mdev4_max_s = self._rto_min_s
        self.rto_s = min(TICK_S * ticks_of(self.srtt_s + self._var4_s), RTO_MAX_S)


class AckPolicy:
    """When a receiver acknowledges with a bare packet: at once, or after `delay_s` if no data goes out.

    An interactive end (it answered within the ATO of what it had received) delays; any other acknowledges
    every pushed segment as soon as it is read (tcp_cleanup_rbuf). Two pushed segments, or more than one full
    one, are acknowledged at once by both.
    """

    __slots__ = (
        "_full",
        "_now",
        "_pushed",
        "_quick",
        "_received_s",
        "ato_s",
        "interactive",
        "pending",
        "unacked",
    )

    def __init__(self, now_s: float, interactive: bool) -> None:
        self.interactive = interactive
        self.ato_s = ATO_MIN_S
        self.pending = False
        self.unacked = 0  # bytes in order since the last acknowledgement
        self._quick = QUICK_ACKS - 1
        self._received_s = now_s
        self._pushed = 0  # small segments since then
        self._now = False
        self._full = DEFAULT_MSS_BYTES

    def received(self, now_s: float, n_bytes: int, rto_s: float) -> None:
        """Data came in order (tcp_event_data_recv, tcp_measure_rcv_mss)."""
        self.pending = True
        self.unacked += n_bytes
        if n_bytes >= self._full:
            self._full = n_bytes
        else:
            self._pushed += 1
        gap_s = now_s - self._received_s
        if gap_s <= ATO_MIN_S / 2.0:
            self.ato_s = self.ato_s / 2.0 + ATO_MIN_S / 2.0
        elif gap_s < self.ato_s:
            self.ato_s = min(self.ato_s / 2.0 + gap_s, rto_s)
        elif gap_s > rto_s:
            self._quick = max(self._quick, QUICK_ACKS)
        self._received_s = now_s

    def odd(self) -> None:
        """Data came out of order, or filled a gap: acknowledge now."""
        self.pending = self._now = True

    def duplicate(self) -> None:
        """Data came again: the peer misses our acknowledgements (tcp_enter_quickack_mode)."""
        self._quick, self.interactive, self.ato_s = QUICK_ACKS, False, ATO_MIN_S
        self.odd()

    @property
    def at_once(self) -> bool:
        """Whether a pending acknowledgement is due now."""
        if self._now or self.unacked > self._full or self._pushed > 1:
            return True
        return not self.interactive and (self._quick > 0 or self._pushed > 0)

    def delay_s(self, srtt_s: float) -> float:
        """How long a pending one may wait (tcp_send_delayed_ack)."""
        if self.ato_s <= ATO_MIN_S:
            return self.ato_s
        most_s = DELACK_MAX_S if self.interactive or self._pushed else 0.5
        if srtt_s:
            most_s = min(most_s, max(srtt_s, ATO_MIN_S))
        return min(self.ato_s, most_s, DELACK_MAX_S)

    def missed(self, rto_s: float) -> None:
        """The delay is over and nothing went out to carry it."""
        if self.interactive:
            self.interactive, self.ato_s = False, ATO_MIN_S
        else:
            self.ato_s = min(2.0 * self.ato_s, rto_s)

    def sent_data(self, now_s: float) -> None:
        """Data goes out (tcp_event_data_sent)."""
        if now_s - self._received_s < self.ato_s:
            self.interactive = True

    def sent(self) -> None:
        """An acknowledgement went out, bare or with data."""
        if self.pending and self._quick:
            self._quick -= 1
            if not self._quick:
                self.ato_s = ATO_MIN_S
        self.pending = self._now = False
        self.unacked = self._pushed = 0
