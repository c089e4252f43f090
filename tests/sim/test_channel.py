"""SimLink's channels: the rules of every Channel, and when frames arrive."""

from __future__ import annotations

import asyncio
import itertools
import tracemalloc

import pytest

from dsdlab.protocol import (
    AnyFrame,
    Channel,
    ChannelClosed,
    Close,
    Draft,
    Open,
    Ping,
    Verdict,
    encode,
    pack_ids,
)
from dsdlab.sim import loop
from dsdlab.sim.channel import SimLink, websocket_bytes
from dsdlab.sim.profile import LinkProfile, LinkStep, wire_bytes

CLEAN = LinkProfile(rtt_ms=20)
LOSSY = LinkProfile(rtt_ms=20, loss_pct=5)
both = pytest.mark.parametrize("profile", [CLEAN, LOSSY], ids=["clean", "lossy"])


async def drain(channel: Channel) -> list[AnyFrame]:
    frames = []
    while True:
        try:
            frames.append(await channel.recv())
        except ChannelClosed:
            return frames


def nonces(frames: list[AnyFrame]) -> list[int]:
    return [f.nonce for f in frames if isinstance(f, Ping)]


def now_s() -> float:
    return asyncio.get_running_loop().time()


# the rules of a Channel -----------------------------------------------------------------------------


@both
def test_frames_cross_in_order_and_bytes_are_counted(profile: LinkProfile) -> None:
    async def main() -> None:
        edge, cloud = SimLink(profile).pair()
        draft = Draft(1, 0, 9, pack_ids([5, 6]))
        await edge.send(draft)
        await edge.send(Close(1))
        await edge.send(draft)
        assert [await cloud.recv() for _ in range(3)] == [draft, Close(1), draft]
        await cloud.send(Ping(1, 0.0))
        assert await edge.recv() == Ping(1, 0.0)
        want = {"Draft": 2 * len(encode(draft)), "Close": len(encode(Close(1)))}
        assert edge.bytes_sent == cloud.bytes_received == want
        assert cloud.bytes_sent == edge.bytes_received == {"Ping": len(encode(Ping(1, 0.0)))}

    loop.run(main())


@both
def test_recv_waits_and_survives_cancellation(profile: LinkProfile) -> None:
    async def main() -> None:
        edge, cloud = SimLink(profile).pair()
        for before in (False, True):  # cancel while nothing is sent, and while a frame is under way
            if before:
                await edge.send(Ping(7, 0.0))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.005):
                    await cloud.recv()
        assert await cloud.recv() == Ping(7, 0.0)

    loop.run(main())


def test_two_receivers_are_a_mistake() -> None:
    async def main() -> None:
        edge, _ = SimLink(CLEAN).pair()
        first = asyncio.ensure_future(edge.recv())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task"):
            await edge.recv()
        first.cancel()

    loop.run(main())


@both
def test_close_by_the_peer(profile: LinkProfile) -> None:
    """What is under way still arrives; then, and for sending at once, the channel is closed."""

    async def main() -> None:
        edge, cloud = SimLink(profile).pair()
        for n in range(50):
            await edge.send(Ping(n, 0.0))
        await edge.close()
        await edge.close()
        with pytest.raises(ChannelClosed):
            await cloud.send(Close(1))
        assert nonces(await drain(cloud)) == list(range(50))
        for _ in range(2):
            with pytest.raises(ChannelClosed, match="closed by the peer"):
                await cloud.recv()
        await cloud.close()

    loop.run(main())


@both
def test_close_here_wakes_recv_and_forgets(profile: LinkProfile) -> None:
    async def main() -> None:
        edge, cloud = SimLink(profile).pair()
        waiting = asyncio.ensure_future(cloud.recv())
        await asyncio.sleep(0)
        await cloud.close()
        with pytest.raises(ChannelClosed, match="closed here"):
            await waiting
        edge, cloud = SimLink(profile).pair()
        await edge.send(Ping(1, 0.0))
        await cloud.close()
        await asyncio.sleep(1.0)
        with pytest.raises(ChannelClosed):
            await cloud.recv()
        with pytest.raises(ChannelClosed):
            await edge.send(Ping(2, 0.0))

    loop.run(main())


@both
def test_drop_loses_what_is_under_way(profile: LinkProfile) -> None:
    async def main() -> None:
        edge, cloud = SimLink(profile, seed=2).pair()
        for n in (1, 2):
            await edge.send(Ping(n, 0.0))
        await asyncio.sleep(1.0)
        await edge.send(Ping(3, 0.0))
        await asyncio.sleep(0.005)
        edge.drop()
        with pytest.raises(ChannelClosed, match="connection lost"):
            await edge.send(Ping(4, 0.0))
        assert nonces(await drain(cloud)) == [1, 2]
        assert await drain(edge) == []

    loop.run(main())


def test_a_connection_through_an_endless_partition_is_lost_in_the_end() -> None:
    async def main() -> None:
        edge, cloud = SimLink(LinkProfile(rtt_ms=20, partitioned=True)).pair()
        await edge.send(Ping(1, 0.0))
        with pytest.raises(ChannelClosed, match="connection lost"):
            await cloud.recv()
        assert 900 < now_s() < 1100

    loop.run(main())


# when frames arrive ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "masked", "want"),
    [(0, False, 2), (125, True, 131), (126, False, 130), (65_535, True, 65_543), (65_536, False, 65_546)],
)
def test_websocket_framing(n: int, masked: bool, want: int) -> None:
    assert websocket_bytes(n, masked) == want


@pytest.mark.parametrize("rate_mbit", [None, 5.0])
def test_loss_free_round_trips_are_the_closed_form(rate_mbit: float | None) -> None:
    """RTT, both serialisations with all headers, and what both nodes take to send and to receive."""
    profile = LinkProfile(rtt_ms=30, rate_up_mbit=rate_mbit, rate_down_mbit=rate_mbit, up_fraction=0.3)
    draft, verdict = Draft(1, 0, 9, pack_ids(range(8))), Verdict(1, 0, 9, 3, 7, 100, 60_000)

    async def main() -> None:
        edge, cloud = SimLink(profile).pair(edge=(0.0001, 0.0002), cloud=(0.0003, 0.0004))
        up = wire_bytes(len(encode(draft)) + 2 + 4)
        down = wire_bytes(len(encode(verdict)) + 2)
        serialise_s = 0.0 if rate_mbit is None else (up + down) * 8 / (rate_mbit * 1e6)
        for _ in range(100):
            sent_s = now_s()
            await edge.send(draft)
            assert await cloud.recv() == draft
            await asyncio.sleep(0.060)
            await cloud.send(verdict)
            assert await edge.recv() == verdict
            assert now_s() - sent_s == pytest.approx(0.030 + 0.060 + 0.001 + serialise_s, abs=1e-9)
            await asyncio.sleep(0.010)

    loop.run(main())


def test_a_long_prompt_takes_another_round_trip() -> None:
    prompt = Open(1, "cloud-ar", pack_ids(range(6000)), b"", 0, 10, True, 0.0, 0, 1.0, 0)  # 18 KB

    async def main() -> None:
        edge, cloud = SimLink(LinkProfile(rtt_ms=100)).pair()
        await edge.send(prompt)
        await cloud.recv()
        assert now_s() == pytest.approx(0.150)
        await asyncio.sleep(10.0)
        await edge.send(Ping(1, 0.0))  # arithmetic again
        await cloud.recv()
        assert now_s() == pytest.approx(10.200)

    loop.run(main())


def steps(*changes: tuple[float, float | None, dict[str, object]]) -> list[tuple[float, LinkProfile, str]]:
    return LinkStep.timeline(
        CLEAN, tuple(LinkStep(at_s=at, for_s=length, changes=what) for at, length, what in changes)
    )


async def stream(
    link: SimLink, timeline: list[tuple[float, LinkProfile, str]], n: int, gap_s: float
) -> list[tuple[float, float]]:
    """(sent, arrived) of frames that leave every `gap_s` while the link changes."""
    edge, cloud = link.pair()
    sent: list[float] = []

    async def send() -> None:
        for k in range(n):
            sent.append(now_s())
            await edge.send(Ping(k, 0.0))
            await asyncio.sleep(gap_s)

    async def play() -> None:
        for at_s, profile, _ in timeline:
            await asyncio.sleep(at_s - now_s())
            link.apply(profile)

    tasks = [asyncio.create_task(send()), asyncio.create_task(play())]
    arrived = []
    for k in range(n):
        assert await cloud.recv() == Ping(k, 0.0)  # each once, in order
        arrived.append(now_s())
    await asyncio.gather(*tasks)
    return list(zip(sent, arrived, strict=True))


def test_a_jump_of_the_round_trip() -> None:
    timeline = steps((0.95, 1.0, {"rtt_ms": 200.0}))
    times = loop.run(stream(SimLink(CLEAN), timeline, 30, 0.1))
    for sent_s, arrived_s in times:
        assert arrived_s - sent_s == pytest.approx(0.100 if 0.95 < sent_s < 1.95 else 0.010, abs=1e-6)


def test_a_drop_of_the_rate() -> None:
    timeline = steps((1.0, None, {"rate_up_mbit": 0.01}))
    times = loop.run(stream(SimLink(CLEAN), timeline, 15, 0.1))
    size = wire_bytes(len(encode(Ping(0, 0.0))) + 6)
    narrow = [b - a for (_, a), (_, b) in itertools.pairwise(times[11:])]
    assert narrow == pytest.approx([max(0.1, size * 8 / 1e4)] * len(narrow), rel=0.02)


def test_a_burst_of_loss_in_mid_stream() -> None:
    timeline = steps((1.0, 1.0, {"loss_pct": 30.0}))
    link = SimLink(CLEAN, seed=4)
    times = loop.run(stream(link, timeline, 40, 0.1))
    late = [sent_s for sent_s, arrived_s in times if arrived_s - sent_s > 0.011]
    assert late
    assert all(1.0 - 1e-9 <= sent_s < 3.0 for sent_s in late)
    assert link.up.stats.lost > 0


@pytest.mark.parametrize("length_s", [0.05, 0.5, 3.0])
def test_a_partition_stalls_the_stream_and_then_all_of_it_comes(length_s: float) -> None:
    """In the end the stream is as before; back-off makes the stall at most twice as long as the partition."""
    timeline = steps((1.0, length_s, {"partitioned": True}))
    times = loop.run(stream(SimLink(CLEAN), timeline, 120, 0.1))
    assert [a - s for s, a in times[:10]] == pytest.approx([0.010] * 10)
    assert [a - s for s, a in times[-10:]] == pytest.approx([0.010] * 10)
    stall_s = max(b - a for (_, a), (_, b) in itertools.pairwise(times))
    assert stall_s >= max(0.1, length_s)
    assert stall_s <= 2 * length_s + 0.5


def test_same_seed_same_times_another_seed_others() -> None:
    async def times(seed: int) -> list[tuple[float, float]]:
        return await stream(SimLink(LOSSY, seed), [], 200, 0.03)

    first = loop.run(times(1))
    assert loop.run(times(1)) == first
    assert loop.run(times(2)) != first


def test_connections_share_a_bottleneck() -> None:
    async def main() -> None:
        link = SimLink(LinkProfile(rtt_ms=10, rate_up_mbit=0.1))
        pairs = [link.pair() for _ in range(4)]
        for edge, _ in pairs:
            await edge.send(Ping(1, 0.0))
        took_s = wire_bytes(len(encode(Ping(1, 0.0))) + 6) * 8 / 1e5
        for k, (_, cloud) in enumerate(pairs):
            await cloud.recv()
            assert now_s() == pytest.approx(0.005 + (k + 1) * took_s)

    loop.run(main())


# cost -----------------------------------------------------------------------------------------------


def test_a_frame_on_a_loss_free_link_is_one_timer() -> None:
    async def main() -> None:
        edge, cloud = SimLink(CLEAN).pair()
        clock = asyncio.get_running_loop()
        assert isinstance(clock, loop.VirtualLoop)
        before = clock._n_timers
        for k in range(100):
            await edge.send(Ping(k, 0.0))
            await cloud.recv()
            await cloud.send(Ping(k, 0.0))
            await edge.recv()
        assert clock._n_timers - before == 200

    loop.run(main())


def test_a_pair_weighs_a_few_kilobytes() -> None:
    async def main() -> int:
        pairs = []
        tracemalloc.start()
        try:
            for seed in range(200):
                pairs.append(SimLink(CLEAN, seed).pair())
                await pairs[-1][0].send(Ping(1, 0.0))
            return tracemalloc.get_traced_memory()[0] // 200
        finally:
            tracemalloc.stop()

    assert loop.run(main()) < 6000
