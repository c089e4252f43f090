"""MemoryChannel: order, byte counts, faults, closing; on both loops and on a virtual clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from dsdlab.protocol import (
    AnyFrame,
    Channel,
    ChannelClosed,
    Close,
    Draft,
    Faults,
    Ping,
    encode,
    memory_pair,
    pack_ids,
)
from dsdlab.sim import loop as virtual

Run = Callable[[Any], Any]


async def drain(channel: Channel) -> list[AnyFrame]:
    frames = []
    while True:
        try:
            frames.append(await channel.recv())
        except ChannelClosed:
            return frames


def nonces(frames: list[AnyFrame]) -> list[int]:
    return [f.nonce for f in frames if isinstance(f, Ping)]


def test_frames_cross_in_order_and_bytes_are_counted(run: Run) -> None:
    async def main() -> None:
        client, server = memory_pair()
        draft = Draft(1, 0, 9, pack_ids([5, 6]))
        await client.send(draft)
        await client.send(Close(1))
        await client.send(draft)
        assert [await server.recv() for _ in range(3)] == [draft, Close(1), draft]
        await server.send(Ping(1, 0.0))
        assert await client.recv() == Ping(1, 0.0)
        want = {"Draft": 2 * len(encode(draft)), "Close": len(encode(Close(1)))}
        assert client.bytes_sent == server.bytes_received == want
        assert server.bytes_sent == client.bytes_received == {"Ping": len(encode(Ping(1, 0.0)))}

    run(main())


def test_recv_waits_and_survives_cancellation(run: Run) -> None:
    async def main() -> None:
        client, server = memory_pair(up=Faults(delay_s=0.02))
        for before in (False, True):  # cancel while nothing is sent, and while a frame is in flight
            if before:
                await client.send(Ping(7, 0.0))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.005):
                    await server.recv()
        assert await server.recv() == Ping(7, 0.0)

    run(main())


def test_two_receivers_are_a_mistake(run: Run) -> None:
    async def main() -> None:
        client, _server = memory_pair()
        first = asyncio.ensure_future(client.recv())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task"):
            await client.recv()
        first.cancel()

    run(main())


def test_close_by_the_peer(run: Run) -> None:
    async def main() -> None:
        client, server = memory_pair()
        await client.send(Ping(1, 0.0))
        await client.send(Ping(2, 0.0))
        await client.close()
        await client.close()
        assert nonces(await drain(server)) == [1, 2]
        for _ in range(2):
            with pytest.raises(ChannelClosed, match="closed by the peer"):
                await server.recv()
            with pytest.raises(ChannelClosed):
                await server.send(Close(1))
        await server.close()

    run(main())


def test_close_here_wakes_recv_and_forgets(run: Run) -> None:
    async def main() -> None:
        client, server = memory_pair()
        waiting = asyncio.ensure_future(server.recv())
        await asyncio.sleep(0)
        await server.close()
        with pytest.raises(ChannelClosed, match="closed here"):
            await waiting
        client, server = memory_pair()
        await client.send(Ping(1, 0.0))
        await server.close()
        with pytest.raises(ChannelClosed):
            await server.recv()
        with pytest.raises(ChannelClosed):
            await client.send(Ping(2, 0.0))

    run(main())


def test_drop_after_loses_the_next_frame_and_what_is_in_flight(run: Run) -> None:
    async def main() -> None:
        client, server = memory_pair(up=Faults(drop_after=2), down=Faults(delay_s=60))
        await server.send(Ping(9, 0.0))
        for n in (1, 2, 3):
            await client.send(Ping(n, 0.0))
        with pytest.raises(ChannelClosed, match="connection lost"):
            await client.send(Ping(4, 0.0))
        assert nonces(await drain(server)) == [1, 2]
        assert await drain(client) == []

    run(main())


@pytest.mark.parametrize("lag", [0, 3])
def test_duplicates_keep_order_and_are_seeded(run: Run, lag: int) -> None:
    async def once(seed: int) -> list[int]:
        client, server = memory_pair(up=Faults(duplicate=0.5, duplicate_lag=lag, seed=seed))
        for n in range(200):
            await client.send(Ping(n, 0.0))
        await client.close()
        return nonces(await drain(server))

    async def main() -> None:
        got = await once(1)
        assert got == await once(1)
        assert got != await once(2)
        first = [n for i, n in enumerate(got) if n not in got[:i]]
        assert first == list(range(200))
        assert 250 < len(got) < 350
        assert max(got.count(n) for n in range(200)) == 2
        late = [n - m for m, n in zip(got[1:], got, strict=False) if m < n]
        assert bool(late) == (lag > 0)
        assert max(late, default=0) <= lag

    run(main())


def test_delay_on_a_virtual_clock() -> None:
    """Hours of delay and jitter pass in no time; arrivals are exact and in order."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        client, server = memory_pair(
            up=Faults(delay_s=100.0, jitter_s=50.0, seed=3), down=Faults(delay_s=0.1)
        )
        for n in range(100):
            await client.send(Ping(n, loop.time()))
            await asyncio.sleep(1.0)
        for n in range(100):
            frame = await server.recv()
            assert isinstance(frame, Ping)
            assert frame.nonce == n
        assert 199 < loop.time() <= 250
        begin_s = loop.time()
        for n in range(1000):
            await server.send(Ping(n, 0.0))
            await client.recv()
        assert loop.time() - begin_s == pytest.approx(100.0)

    begin_s = time.monotonic()
    virtual.run(main())
    assert time.monotonic() - begin_s < 5


def test_arrival_schedule_is_kept_in_order() -> None:
    """A schedule gets time and payload bytes; a frame never overtakes the one before."""
    calls = []

    def slow_start(now_s: float, n: int) -> float:
        calls.append((now_s, n))
        return now_s + (5.0 if len(calls) == 1 else 1.0)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        client, server = memory_pair(up_arrival=slow_start)
        await client.send(Ping(1, 0.0))
        await client.send(Close(1))
        assert await server.recv() == Ping(1, 0.0)
        assert loop.time() == pytest.approx(5.0)
        assert await server.recv() == Close(1)
        assert loop.time() == pytest.approx(5.0)

    virtual.run(main())
    assert [n for _, n in calls] == [len(encode(Ping(1, 0.0))), len(encode(Close(1)))]


@pytest.mark.parametrize(
    "bad",
    [
        {"delay_s": -1},
        {"delay_s": float("nan")},
        {"jitter_s": -0.1},
        {"duplicate": 1.5},
        {"duplicate_lag": -1},
        {"drop_after": -1},
    ],
    ids=str,
)
def test_bad_faults_name_the_field(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*; allowed: "):
        Faults(**bad)
