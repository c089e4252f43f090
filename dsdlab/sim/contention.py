"""Two nodes on one machine: while both compute, each is slower, for they share its memory.

On two machines there is nothing of this. On one, a drafter that drafts while the target decodes takes memory
bandwidth and cache from it; how much is measured as deployed (`testbed.contention`) and kept in the profile.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from dsdlab.models.compute import Timing
from dsdlab.sim.compute import SimCompute

__all__ = ["SharedCompute", "share"]

T = TypeVar("T")


class _Job:
    """A piece of work: seconds of it that are left at full speed, and when it began and ended."""

    __slots__ = ("begun_s", "done", "ended_s", "left_s")

    def __init__(self, left_s: float, done: asyncio.Future[None]) -> None:
        self.left_s = left_s
        self.done = done
        self.begun_s = self.ended_s = 0.0


class SharedCompute(SimCompute):
    """A node's compute beside another node's; `share` makes them a pair.

    slowdown: how many times longer a work takes while the other node computes. A work's cost is fixed when it
    is asked for; how far it has come is reckoned anew whenever the other node begins or ends one.
    """

    __slots__ = ("_jobs", "_other", "_since_s", "_slowdown", "_speed", "_timer", "_wait_s")

    def __init__(self, slowdown: float, *, hop_s: float = 0.0) -> None:
        super().__init__()
        if not 1.0 <= slowdown < 100.0:
            raise ValueError(f"slowdown is {slowdown}; allowed: 1 to 100")
        self._slowdown, self._wait_s = slowdown, hop_s
        self._jobs: deque[_Job] = deque()  # the first one is under way
        self._other: SharedCompute | None = None
        self._speed = 1.0  # of the first job
        self._since_s = 0.0  # up to when its `left_s` is reckoned
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, work: Callable[[], T]) -> tuple[T, Timing]:
        """As `SimCompute.run`."""
        loop = asyncio.get_running_loop()
        asked_s = self._begin_s = loop.time()
        if self._jobs:
            self._busy_until_s = asked_s  # it begins when those before it are over: no rest
        self._spent_s = 0.0
        result = work()
        if self._spent_s == 0.0 and not self._jobs:
            if self._wait_s:
                await asyncio.sleep(self._wait_s)
            return result, Timing(0.0, 0.0)
        job = _Job(self._spent_s, loop.create_future())
        self._jobs.append(job)
        if len(self._jobs) == 1:
            self._begin(loop)
        await job.done
        if self._wait_s:
            await asyncio.sleep(self._wait_s)
        return result, Timing(job.begun_s - asked_s, job.ended_s - job.begun_s)

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """The first job begins."""
        self._jobs[0].begun_s = self._since_s = loop.time()
        self._speeds(loop)

    def _done(self, loop: asyncio.AbstractEventLoop) -> None:
        """The first job is over."""
        self._timer = None
        job = self._jobs.popleft()
        job.ended_s = self._busy_until_s = loop.time()
        if not job.done.done():
            job.done.set_result(None)
        if self._jobs:
            self._begin(loop)
        else:
            self._speeds(loop)

    def _speeds(self, loop: asyncio.AbstractEventLoop) -> None:
        """Reckon anew how fast both nodes are, and when they will be done."""
        for node in (self, self._other):
            if node is not None:
                node._reckon(loop)

    def _reckon(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._jobs:
            return
        now_s, job = loop.time(), self._jobs[0]
        job.left_s = max(job.left_s - (now_s - self._since_s) * self._speed, 0.0)
        beside = self._other is not None and bool(self._other._jobs)
        self._since_s, self._speed = now_s, 1.0 / self._slowdown if beside else 1.0
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(now_s + job.left_s / self._speed, self._done, loop)


def share(one: SharedCompute, other: SharedCompute) -> None:
    """Put two nodes on one machine."""
    one._other, other._other = other, one
