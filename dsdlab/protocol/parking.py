"""Waiting in a place until somebody says to go on, on any event loop, one task a place.

The simulator's loop parks a task's next step in the place itself, which costs half of what a future does. It
says so by having `park`; every other loop gets the future.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from functools import partial
from typing import Any, Protocol

__all__ = ["Place", "Step", "parking"]


class Step(Protocol):
    """How a waiting task goes on."""

    def resume(self) -> None:
        """In the loop's next round. Nothing happens to a task that is going on already."""

    def resume_at(self, when_s: float) -> None:
        """At a time of the loop's clock, unless `resume` comes first. To be called once at most."""


class Place(Protocol):
    """Where a task may wait; `parked` holds its step meanwhile, and whatever it likes at other times."""

    parked: Any


class Park(Protocol):
    """To be awaited at once, in a task: wait in a place until told to go on, or until a time in s."""

    def __call__(self, place: Place, until_s: float = math.inf, /) -> Awaitable[None]: ...


def parking(loop: asyncio.AbstractEventLoop) -> Park:
    """How a task of this loop waits."""
    return getattr(loop, "park", None) or partial(_wait, loop)


class _Waiter:
    """A step of a task that waits for a future."""

    __slots__ = ("_future", "_loop", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._future: asyncio.Future[None] = loop.create_future()
        self._timer: asyncio.TimerHandle | None = None

    def resume(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def resume_at(self, when_s: float) -> None:
        self._timer = self._loop.call_at(when_s, self.resume)

    async def wait(self) -> None:
        try:
            await self._future
        finally:
            if self._timer is not None:
                self._timer.cancel()


async def _wait(loop: asyncio.AbstractEventLoop, place: Place, until_s: float = math.inf, /) -> None:
    place.parked = waiter = _Waiter(loop)
    if until_s < math.inf:
        waiter.resume_at(until_s)
    await waiter.wait()
