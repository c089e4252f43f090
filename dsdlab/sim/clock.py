"""What the model of a link needs of an event loop, and a clock for programs with a loop of their own."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any, Protocol

from dsdlab.sim.tcp_timing import expiry_s

__all__ = ["Clock", "EventQueue", "KernelTimer"]


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


class KernelTimer:
    """A timer that is set again and again, most often to a later time, with a kernel's ticks.

    It is set lazily: the clock may call before it is due, and nothing happens then. `phase_s`: where in its
    ticks the kernel stands when the clock says 0. action: called when it is due.
    """

    __slots__ = ("_action", "_called_s", "_clock", "_handle", "_phase_s", "due_s")

    def __init__(self, clock: Clock, phase_s: float, action: Callable[[], object]) -> None:
        self._clock, self._phase_s, self._action = clock, phase_s, action
        self.due_s = math.inf  # infinity: it is not set
        self._handle: Timer | None = None
        self._called_s = math.inf

    def expiry_s(self, delay_s: float) -> float:
        """When it would fire, set now."""
        return expiry_s(self._clock.time() + self._phase_s, delay_s) - self._phase_s

    def set(self, due_s: float) -> None:
        """Fire at `due_s`, and at no other time."""
        self.due_s = due_s
        if self._handle is None or self._called_s > due_s:
            if self._handle is not None:
                self._handle.cancel()
            self._call_at(due_s)

    def unset(self) -> None:
        """Do not fire."""
        self.due_s = math.inf

    def close(self) -> None:
        """Give back what the clock holds."""
        self.due_s = math.inf
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _call_at(self, when_s: float) -> None:
        self._called_s = when_s
        self._handle = self._clock.call_at(when_s, self._called)

    def _called(self) -> None:
        self._handle = None
        if self.due_s == math.inf:
            return
        if self._clock.time() < self.due_s - 1e-9:
            self._call_at(self.due_s)
            return
        self.due_s = math.inf
        self._action()
