"""Compute: how a node awaits its engine. One thread in the product, the virtual clock in a simulation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import msgspec

T = TypeVar("T")


class Timing(msgspec.Struct, frozen=True, gc=False):
    """What one piece of work cost: seconds waiting for the engine, seconds in it."""

    queue_s: float
    compute_s: float

    def then(self, other: Timing) -> Timing:
        """Of two pieces of work that are one to whoever asked."""
        return Timing(self.queue_s + other.queue_s, self.compute_s + other.compute_s)


class Compute(Protocol):
    """Runs work that touches an engine: one piece at a time, first come first served."""

    async def run(self, work: Callable[[], T]) -> tuple[T, Timing]:
        """The work's result and its cost; exceptions pass through."""


class ThreadCompute:
    """One worker thread, so that the event loop never blocks. Close it when done."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")

    async def run(self, work: Callable[[], T]) -> tuple[T, Timing]:
        asked = time.perf_counter()

        def timed() -> tuple[T, Timing]:
            begun = time.perf_counter()
            result = work()
            return result, Timing(begun - asked, time.perf_counter() - begun)

        return await asyncio.get_running_loop().run_in_executor(self._pool, timed)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
