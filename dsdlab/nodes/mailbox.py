"""A mailbox: what `asyncio.Queue` is with one reader and no waiting writers, at a tenth of its memory."""

from __future__ import annotations

from asyncio import get_running_loop
from typing import Generic, TypeVar

from dsdlab.protocol.parking import Step, parking

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Items in order, for one reader. The reader may be cancelled: nothing is lost."""

    __slots__ = ("_items", "parked")

    def __init__(self) -> None:
        self._items: list[T] = []
        self.parked: Step | None = None  # the reader, while it waits

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        """Add an item; never waits."""
        self._items.append(item)
        if self.parked is not None:
            self.parked.resume()

    def take(self) -> T:
        """The first item. Raises IndexError where there is none."""
        return self._items.pop(0)

    async def get(self) -> T:
        """The first item, once there is one. Raises RuntimeError for a second reader."""
        if self.parked is not None:
            raise RuntimeError("another task waits for this mailbox")
        while not self._items:
            try:
                await parking(get_running_loop())(self)
            finally:
                self.parked = None
        return self._items.pop(0)
