"""The receiving half of a modelled TCP end: order, and what acknowledgements say."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from dsdlab.sim.clock import Clock, KernelTimer
from dsdlab.sim.tcp_timing import AckPolicy, RttEstimator

__all__ = ["Range", "Receiver"]

Range = tuple[int, int]


class Receiver:
    """What has arrived of the peer's stream.

    items: the peer's (end, item), taken off as they become complete. acknowledge: sends a bare
    acknowledgement; True: it says that data came twice (DSACK).
    """

    __slots__ = (
        "_acknowledge",
        "_clock",
        "_rtt",
        "_timer",
        "acks",
        "deliver",
        "gaps",
        "items",
        "position",
        "stamp_s",
    )

    def __init__(
        self,
        clock: Clock,
        acks: AckPolicy,
        rtt: RttEstimator,
        phase_s: float,
        acknowledge: Callable[[bool], object],
    ) -> None:
        self._clock, self.acks, self._rtt, self._acknowledge = clock, acks, rtt, acknowledge
        self.deliver: Callable[[Any], object] = _nowhere
        self.items: deque[tuple[int, Any]] = deque()
        self.position = 0  # received in order up to here
        self.gaps: tuple[Range, ...] = ()  # received beyond a gap
        self.stamp_s = 0.0  # the time stamp to echo
        self._timer = KernelTimer(clock, phase_s, self._late)

    def take(self, start: int, end: int, sent_s: float) -> None:
        """A segment has arrived (tcp_data_queue). Raises what `deliver` raises."""
        acks = self.acks
        if end <= self.position:
            acks.duplicate()
            self._acknowledge(True)
            return
        if start <= self.position - acks.unacked:
            self.stamp_s = sent_s
        if start > self.position:
            acks.odd()
            self.gaps = _with_range(self.gaps, start, end)
            return
        before, self.position = self.position, end
        if self.gaps:
            acks.odd()
            while self.gaps and self.gaps[0][0] <= self.position:
                self.position = max(self.position, self.gaps[0][1])
                self.gaps = self.gaps[1:]
        acks.received(self._clock.time(), self.position - before, self._rtt.rto_s)
        items = self.items
        while items and items[0][0] <= self.position:
            self.deliver(items.popleft()[1])

    def settle(self) -> None:
        """Acknowledge what is to be acknowledged, now or later (tcp_ack_snd_check)."""
        acks, timer = self.acks, self._timer
        if not acks.pending:
            return
        if acks.at_once:
            self._acknowledge(False)
        else:
            due_s = timer.expiry_s(acks.delay_s(self._rtt.srtt_s))
            if due_s < timer.due_s:
                timer.set(due_s)

    def acknowledged(self) -> None:
        """A packet with an acknowledgement goes out."""
        self.acks.sent()
        self._timer.unset()

    def _late(self) -> None:
        self.acks.missed(self._rtt.rto_s)
        self._acknowledge(False)

    def close(self) -> None:
        self._timer.close()


def _with_range(ranges: tuple[Range, ...], start: int, end: int) -> tuple[Range, ...]:
    """Disjoint ranges in order, with one more."""
    out: list[Range] = []
    for a, b in sorted([*ranges, (start, end)]):
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], b))
        else:
            out.append((a, b))
    return tuple(out)


def _nowhere(_item: Any) -> None:
    """Where items go until somebody asks for them."""
