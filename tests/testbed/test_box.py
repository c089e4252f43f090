"""The two-port box, with real TCP peers on both sides."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from bed_tools import run

from dsdlab.sim.profile import LinkProfile, wire_bytes
from testbed.links.base import EchoServer, Endpoint, LinkError, echo_rtts_ms, percentile
from testbed.links.modelled import ModelledLink


@contextlib.asynccontextmanager
async def linked(
    run_dir: Path, profile: LinkProfile | None = None
) -> AsyncIterator[tuple[ModelledLink, Endpoint]]:
    """A link in front of an echo peer."""
    echo = EchoServer()
    link = ModelledLink(profile, seed=1)
    try:
        edge = await link.start(run_dir)
        await link.set_target(echo.endpoint)
        yield link, edge
    finally:
        await link.stop()
        await asyncio.to_thread(echo.close)


def connect(edge: Endpoint) -> socket.socket:
    sock = socket.create_connection((edge.host, edge.port), 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def read_exactly(sock: socket.socket, n_bytes: int) -> bytes:
    parts = []
    while n_bytes:
        part = sock.recv(min(n_bytes, 1 << 16))
        assert part, "closed too early"
        parts.append(part)
        n_bytes -= len(part)
    return b"".join(parts)


def test_round_trips_are_what_was_asked(tmp_path: Path) -> None:
    """Medians as asked, never earlier; a busy host, which makes everything late, gets three attempts."""

    async def body() -> None:
        async with linked(tmp_path) as (link, edge):
            for rtt_ms, n in ((0.0, 200), (1.0, 100), (20.0, 20), (100.0, 5)):
                await link.apply(LinkProfile(rtt_ms=rtt_ms))
                off_ms = 1e9
                for _ in range(3):
                    rtts_ms = await asyncio.to_thread(echo_rtts_ms, edge, n, 200)
                    assert min(rtts_ms) >= rtt_ms - 0.13  # twice the lead
                    if (off_ms := percentile(rtts_ms, 0.5) - rtt_ms) <= 0.8:
                        break
                assert off_ms <= 0.8, rtt_ms
            await link.apply(LinkProfile(rtt_ms=10, up_fraction=1.0))
            probe = await link.probe(5)
            assert 9.8 <= probe.p50_ms <= 11.0
            assert len(probe.rtt_ms) == 5

    run(body())


@pytest.mark.parametrize("direction", ["up", "down"])
def test_rate_is_what_was_asked(tmp_path: Path, direction: str) -> None:
    """400 KB at 10 Mbit/s in one direction; the other one stays unlimited."""
    n_bytes = 400_000

    async def body() -> None:
        async with linked(tmp_path, LinkProfile(**{f"rate_{direction}_mbit": 10.0})) as (_, edge):
            t0_s = time.perf_counter()
            await asyncio.to_thread(echo_rtts_ms, edge, 0, n_bytes)
            took_s = time.perf_counter() - t0_s
            assert took_s == pytest.approx(wire_bytes(n_bytes) * 8 / 10e6, rel=0.05)

    run(body())


def test_bulk_data_survive_loss_jitter_and_profile_changes(tmp_path: Path) -> None:
    """2 MB both ways through a bad link whose profile changes in flight: the same bytes, in order, once."""
    data = random.Random(3).randbytes(2_000_000)

    def transfer(edge: Endpoint) -> str:
        with connect(edge) as sock:
            writer = threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR)))
            writer.start()
            digest = hashlib.sha256()
            while part := sock.recv(1 << 16):
                digest.update(part)
            writer.join()
        return digest.hexdigest()

    async def body() -> None:
        bad = LinkProfile(rtt_ms=10, jitter_ms=5, loss_pct=3, rate_up_mbit=40, buffer_bytes=30_000)
        async with linked(tmp_path, bad) as (link, edge):
            task = asyncio.create_task(asyncio.to_thread(transfer, edge))
            for profile in (LinkProfile(rtt_ms=2), bad, LinkProfile(rate_down_mbit=50), LinkProfile()):
                await asyncio.sleep(0.1)
                await link.apply(profile)
            assert await task == hashlib.sha256(data).hexdigest()
            stats = await link.stats()
            assert stats["up"]["n_bytes"] == stats["down"]["n_bytes"] == len(data)
            assert stats["up"]["lost"] > 0
            assert stats["connections"] == 0  # both ends closed, so did the box

    run(body())


def test_profile_change_keeps_order_of_bytes_in_flight(tmp_path: Path) -> None:
    async def body() -> None:
        async with linked(tmp_path, LinkProfile(rtt_ms=200)) as (link, edge):

            def first() -> tuple[socket.socket, float]:
                sock = connect(edge)
                sock.sendall(b"1")
                assert read_exactly(sock, 1) == b"1"  # the connection stands
                t0_s = time.perf_counter()
                sock.sendall(b"a" * 50)
                return sock, t0_s

            sock, t0_s = await asyncio.to_thread(first)
            with sock:
                await asyncio.sleep(0.02)
                await link.apply(LinkProfile())
                sock.sendall(b"b" * 50)
                assert await asyncio.to_thread(read_exactly, sock, 100) == b"a" * 50 + b"b" * 50
                # The first bytes took 100 ms up (nothing overtakes them), and nothing down.
                assert 0.099 <= time.perf_counter() - t0_s <= 0.15

    run(body())


def test_a_partition_stalls_and_loses_nothing(tmp_path: Path) -> None:
    """What is written during it arrives with the first retransmission after its end."""
    length_s = 0.6

    async def body() -> None:
        async with linked(tmp_path, LinkProfile(rtt_ms=20)) as (link, edge):
            sock = await asyncio.to_thread(connect, edge)
            with sock:
                sock.sendall(b"1")
                assert await asyncio.to_thread(read_exactly, sock, 1) == b"1"
                await link.apply(LinkProfile(rtt_ms=20, partitioned=True))
                t0_s = time.perf_counter()
                sock.sendall(b"a" * 50)
                await asyncio.sleep(length_s / 2)
                sock.sendall(b"b" * 50)
                await asyncio.sleep(length_s / 2)
                await link.apply(LinkProfile(rtt_ms=20))
                assert await asyncio.to_thread(read_exactly, sock, 100) == b"a" * 50 + b"b" * 50
                assert length_s <= time.perf_counter() - t0_s <= 2.1 * length_s + 0.5
                stats = await link.stats()
                assert stats["up"]["lost"] >= 2
                assert stats["up"]["probes"] + stats["up"]["timeouts"] >= 2

    run(body())


def test_connections_share_the_bottleneck(tmp_path: Path) -> None:
    """Four at once through 20 Mbit/s take as long as their sum, and none much less than the others."""
    n_bytes = 100_000
    all_there = threading.Barrier(4)

    def one(edge: Endpoint) -> float:
        with connect(edge) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            all_there.wait(10)
            t0_s = time.perf_counter()
            sock.sendall(bytes(n_bytes))
            left = n_bytes
            while left:
                left -= len(sock.recv(left))
            return time.perf_counter() - t0_s

    async def body() -> None:
        async with linked(tmp_path, LinkProfile(rate_up_mbit=20, buffer_bytes=20_000)) as (_, edge):
            took_s = await asyncio.gather(*(asyncio.to_thread(one, edge) for _ in range(4)))
            assert max(took_s) == pytest.approx(4 * wire_bytes(n_bytes) * 8 / 20e6, rel=0.06)
            assert min(took_s) > 0.4 * max(took_s)

    run(body())


def test_drop_refusal_and_late_target(tmp_path: Path) -> None:
    async def body() -> None:
        link = ModelledLink(LinkProfile(rtt_ms=30))
        edge = await link.start(tmp_path)
        echo = EchoServer()
        try:
            waiting = asyncio.create_task(asyncio.to_thread(echo_rtts_ms, edge, 1, 10))
            await asyncio.sleep(0.1)
            assert not waiting.done()  # no target yet: the call is held
            await link.set_target(echo.endpoint)
            assert len(await waiting) == 1

            sock = await asyncio.to_thread(connect, edge)
            with sock:
                sock.sendall(b"x")
                await asyncio.to_thread(read_exactly, sock, 1)
                assert await link.drop() == 1
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)

            await asyncio.to_thread(echo.close)
            t0_s = time.perf_counter()
            with await asyncio.to_thread(connect, edge) as sock, pytest.raises(ConnectionResetError):
                await asyncio.to_thread(sock.recv, 1)
            assert 0.029 <= time.perf_counter() - t0_s < 0.2  # refused, a round trip later
            assert (await link.stats())["refused"] == 1
        finally:
            await link.stop()
            await asyncio.to_thread(echo.close)

    run(body())


def test_death_of_the_far_peer_is_heard_one_way_later(tmp_path: Path) -> None:
    async def body() -> None:
        async with linked(tmp_path, LinkProfile(rtt_ms=100)) as (link, edge):
            far = socket.create_server(("127.0.0.1", 0))
            port = await link.open_port(Endpoint("127.0.0.1", far.getsockname()[1]))
            with connect(port) as near, far:
                accepted = await asyncio.to_thread(lambda: far.accept()[0])
                t0_s = time.perf_counter()
                accepted.close()
                assert await asyncio.to_thread(near.recv, 1) == b""
                assert 0.049 <= time.perf_counter() - t0_s <= 0.1
            assert edge != port

    run(body())


def test_back_pressure_bounds_what_the_box_holds(tmp_path: Path) -> None:
    """A sender cannot stuff more into the box than its queue and the sockets hold."""

    def stuff(edge: Endpoint) -> int:
        with connect(edge) as sock:
            sock.settimeout(0.4)
            sent = 0
            with contextlib.suppress(TimeoutError):
                while sent < 200_000_000:
                    sent += sock.send(b"\0" * (1 << 20))
            return sent

    async def body() -> None:
        async with linked(tmp_path, LinkProfile(rtt_ms=60_000)) as (link, edge):
            await link.apply(LinkProfile(rtt_ms=0))
            await asyncio.to_thread(echo_rtts_ms, edge, 1, 10)
            listener = socket.create_server(("127.0.0.1", 0))
            with listener:
                port = await link.open_port(Endpoint("127.0.0.1", listener.getsockname()[1]))
                await link.apply(LinkProfile(rate_up_mbit=0.1, buffer_bytes=100_000))
                assert await asyncio.to_thread(stuff, port) < 20_000_000

    run(body())


def box(*args: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "testbed.links.modelled", *args],
        input=lines,
        capture_output=True,
        text=True,
        timeout=10,
        cwd=Path(__file__).parents[2],
        check=False,
    )


def test_control_lines_by_hand() -> None:
    done = box(
        "--target",
        "127.0.0.1:9",
        lines='{"op":"profile","rtt_ms":20,"id":1}\n{"op":"profile","rtt_ms":-1,"id":2}\nnonsense\n[1]\n'
        '{"op":"fly","id":3}\n{"op":"profile","profile":7,"id":4}\n{"op":"target","target":"x","id":5}\n'
        '{"op":"stats","id":6}\n{"op":"stop","id":7}\n',
    )
    ready, *answers = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0
    assert ready["op"] == "ready"
    assert ready["port"] > 0
    assert [a["op"] for a in answers] == ["ok", *["error"] * 6, "ok", "ok"]
    assert answers[0]["profile"]["rtt_ms"] == 20
    assert "rtt_ms" in answers[1]["message"]
    assert "'fly'" in answers[4]["message"]
    assert "HOST:PORT" in answers[6]["message"]
    assert answers[7]["stats"]["profile"]["rtt_ms"] == 20  # the bad ones changed nothing
    assert [a.get("id") for a in answers] == [1, 2, None, None, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--target", "nowhere"], "HOST:PORT"),
        (["--target", "h:0"], "HOST:PORT"),
        (["--port", "70000"], "--port"),
        (["--host", "203.0.113.7"], "203.0.113.7"),
        (["--profile", '{"loss_pct": 99}'], "loss_pct"),
        (["--profile", "[]"], "--profile"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(args: list[str], word: str) -> None:
    done = box(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert word in done.stderr


def test_link_errors(tmp_path: Path) -> None:
    async def body() -> None:
        link = ModelledLink()
        with pytest.raises(LinkError, match="not started"):
            await link.apply(LinkProfile())
        await link.start(tmp_path)
        pid = link.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(LinkError, match=r"link was killed by SIGKILL"):
            for _ in range(100):
                await link.apply(LinkProfile())
                await asyncio.sleep(0.02)
        assert not link.alive
        await link.stop()
        with pytest.raises(LinkError, match=r"exit status 2.*cannot listen on 203\.0\.113\.7"):
            await ModelledLink(host="203.0.113.7").start(tmp_path)

    run(body())
