"""Compute on the virtual clock: work is done at once, and its time passes afterwards."""

from __future__ import annotations

import math
import random
from asyncio import AbstractEventLoop, Future, get_running_loop
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from dsdlab.models.compute import Timing
from dsdlab.sim.costs import ForwardCost, Warmth

__all__ = ["Charge", "SimCompute"]

T = TypeVar("T")

Charge = Callable[[int, int, int, int], None]
"""Called once a forward with (rows of all sessions, sessions, positions that they hold before, drawn
rows: those whose token is not chosen greedily)."""


class SimCompute:
    """One node's compute: a piece of work at a time, first come first served, on the running loop's clock.

    Works take the time that they `spend`, by themselves or through a `meter`. No locks and one timer a work:
    when a work begins follows from when the ones before it end.

    hop_s: from asking for a work to its answer, beyond queue and compute.
    stages, stage_hop_s: with K stages a work takes duration/K in each, and begins in stage k when it has left
    stage k - 1 (stage_hop_s ago) and the work before it has left stage k: several works are under way.

    Raises ValueError, naming the field.
    """

    __slots__ = (
        "_begin_s", "_busy_until_s", "_free_s", "_hop_s", "_last", "_spent_s", "_stage_hop_s", "_stages",
    )  # fmt: skip

    def __init__(self, *, hop_s: float = 0.0, stages: int = 1, stage_hop_s: float = 0.0) -> None:
        for name, value in (("hop_s", hop_s), ("stage_hop_s", stage_hop_s)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; allowed: 0 or more, finite")
        if stages < 1:
            raise ValueError(f"stages is {stages}; allowed: 1 or more")
        self._hop_s, self._stages, self._stage_hop_s = hop_s, stages, stage_hop_s
        self._free_s = [-math.inf] * stages  # when each stage is free
        self._spent_s = 0.0  # by the work that now runs
        self._begin_s = 0.0  # of the work that now runs
        self._last: object = None  # whose forward ran last
        self._busy_until_s = -math.inf  # when the latest work that took time was over

    def spend(self, duration_s: float) -> None:
        """Note time that the work now running takes. Raises ValueError for a time that is none."""
        if not 0.0 <= duration_s < math.inf:
            raise ValueError(f"a work spends {duration_s} s; allowed: 0 or more, finite")
        self._spent_s += duration_s

    def meter(self, cost: ForwardCost, rng: random.Random | None = None) -> Charge:
        """What one model is to call for each of its forwards: spends what it costs.

        rng: draws from the cost's residuals; None: every forward takes the fitted time.
        """
        me = object()
        warmth = Warmth(cost) if cost.first_s > 0.0 or cost.after_idle else None
        residuals = cost.residuals if rng is not None else ()

        def charge(tokens: int, batch: int, context: int, drawn: int) -> None:
            duration_s = cost.cost_s(tokens, batch, context, drawn)
            if residuals:
                duration_s *= residuals[int(rng.random() * len(residuals))]  # type: ignore[union-attr]
            if warmth is not None:
                idle_s = self._begin_s - self._busy_until_s if self._spent_s == 0.0 else 0.0
                other_ran = self._last is not me and self._last is not None
                duration_s += warmth.extra_s(idle_s, other_ran)
            self._last = me
            self._spent_s += duration_s

        return charge

    async def run(self, work: Callable[[], T]) -> tuple[T, Timing]:
        """The work's result and its cost, once its time is over. What it raises passes at once, at no time.

        Cancelled, it stays where it is in the order: its time is spent.
        """
        loop = get_running_loop()
        now_s = loop.time()
        free_s = self._free_s
        begin_s = free_s[0]
        if begin_s < now_s:
            begin_s = now_s
        self._begin_s = begin_s
        self._spent_s = 0.0
        result = work()
        spent_s = self._spent_s
        if self._stages == 1:
            free_s[0] = end_s = begin_s + spent_s
        else:
            end_s = self._through(begin_s, spent_s)
        if spent_s > 0.0:
            self._busy_until_s = end_s
        done_s = end_s + self._hop_s
        if done_s > now_s:
            await (getattr(loop, "sleep_until", None) or partial(_sleep_until, loop))(done_s)
        return result, Timing(begin_s - now_s, spent_s)

    def _through(self, begin_s: float, spent_s: float) -> float:
        """When a work that begins at `begin_s` has left the last stage."""
        free_s, each_s = self._free_s, spent_s / self._stages
        at_s = begin_s - self._stage_hop_s
        for stage, when_s in enumerate(free_s):
            at_s = max(at_s + self._stage_hop_s, when_s) + each_s
            free_s[stage] = at_s
        return at_s


async def _sleep_until(loop: AbstractEventLoop, when_s: float) -> None:
    """`VirtualLoop.sleep_until` on any other loop."""
    over = loop.create_future()
    timer = loop.call_at(when_s, _over, over)
    try:
        await over
    finally:
        timer.cancel()


def _over(over: Future[Any]) -> None:
    if not over.done():
        over.set_result(None)
