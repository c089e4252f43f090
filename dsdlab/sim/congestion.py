"""How much a sender may have in flight: slow start, CUBIC's Reno-friendly region, proportional recovery.

Windows are in segments. Sources: RFC 9438 (CUBIC), RFC 6937 (PRR) and net/ipv4/tcp_cong.c, tcp_cubic.c,
tcp_input.c of Linux 6.x.
"""

from __future__ import annotations

import math

__all__ = ["INITIAL_WINDOW", "CongestionWindow"]

INITIAL_WINDOW = 10
LEAST_WINDOW = 2
CUBIC_BETA = 717 / 1024
RENO_GROWTH = 3 * (1 - CUBIC_BETA) / (1 + CUBIC_BETA)  # segments per round trip (RFC 9438 section 4.3)


class CongestionWindow:
    """The window of one sender."""

    __slots__ = ("_delivered", "_out", "_prior", "_size", "_ssthresh")

    def __init__(self) -> None:
        self._size = float(INITIAL_WINDOW)
        self._ssthresh = math.inf
        self._prior = 0  # the window before recovery, and what was delivered and sent since it began
        self._delivered = self._out = 0

    @property
    def segments(self) -> int:
        """How many may be in flight."""
        return int(self._size)

    def widen(self, by: float) -> None:
        self._size += by

    def sent(self) -> None:
        """A segment goes out, for the first time or again."""
        self._out += 1

    def grow(self, acked: int, flying: int, after_timeout: bool) -> None:
        """Segments were acknowledged, `flying` were in flight. Only a window that limits its sender grows."""
        if self._size < self._ssthresh:  # slow start
            if after_timeout or 2 * flying > self._size:
                self._size = min(self._size + acked, self._ssthresh)
        elif flying >= int(self._size):
            self._size += RENO_GROWTH * acked / self._size

    def _reduce(self) -> None:
        self._ssthresh = float(max(LEAST_WINDOW, int(int(self._size) * CUBIC_BETA)))

    def reduce(self) -> None:
        """A loss that is already repaired."""
        self._reduce()
        self._size = self._ssthresh

    def time_out(self, first: bool) -> None:
        """The retransmission timer fired; `first`: not in the course of an earlier time-out."""
        if first:
            self._reduce()
        self._size = 1.0

    def begin_recovery(self) -> None:
        self._prior = int(self._size)
        self._delivered = self._out = 0
        self._reduce()

    def recover(self, delivered: int, flying: int, advanced: bool) -> None:
        """In recovery what is delivered lets others out, in proportion (tcp_cwnd_reduction)."""
        room = int(self._ssthresh) - flying
        self._delivered += delivered
        if room < 0:
            allowed = -(-int(self._ssthresh) * self._delivered // self._prior) - self._out
        else:
            allowed = min(room, max(self._delivered - self._out, delivered) + advanced)
        self._size = float(flying + max(allowed, 0 if self._out else 1))

    def end_recovery(self) -> None:
        self._size = self._ssthresh
