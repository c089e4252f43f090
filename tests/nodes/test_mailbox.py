"""Mailboxes: in order, one reader, nothing lost to a cancelled one."""

from __future__ import annotations

import asyncio

import pytest

from dsdlab.nodes.mailbox import Mailbox
from dsdlab.sim.loop import run


def test_items_come_in_order_whoever_is_first() -> None:
    async def main() -> list[int]:
        box: Mailbox[int] = Mailbox()
        box.put(1)
        box.put(2)
        asyncio.get_running_loop().call_later(1.0, box.put, 3)
        assert len(box) == 2
        return [await box.get() for _ in range(3)]

    assert run(main()) == [1, 2, 3]


def test_a_cancelled_reader_loses_nothing() -> None:
    async def main() -> int:
        box: Mailbox[int] = Mailbox()
        reader = asyncio.create_task(box.get())
        await asyncio.sleep(0)
        box.put(7)  # wakes the reader, which is cancelled before it runs
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        return await box.get()

    assert run(main()) == 7


def test_one_reader_and_nothing_to_take() -> None:
    async def main() -> None:
        box: Mailbox[int] = Mailbox()
        with pytest.raises(IndexError):
            box.take()
        reader = asyncio.create_task(box.get())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task waits"):
            await box.get()
        box.put(1)
        assert await reader == 1
        assert not box

    run(main())
