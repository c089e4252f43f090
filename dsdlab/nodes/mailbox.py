"""A mailbox: what `asyncio.Queue` is with one reader and no waiting writers, at a tenth of its memory."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Items in order, for one reader. The reader may be cancelled: nothing is lost."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[T] = []
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        """Add an item; never waits."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def take(self) -> T:
        """The first item. Raises IndexError where there is none."""
        return self._items.pop(0)

    async def get(self) -> T:
        """The first item, once there is one. Raises RuntimeError for a second reader."""
        if self._waiter is not None:
            raise RuntimeError("another task waits for this mailbox")
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.pop(0)
