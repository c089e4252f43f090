"""WebSocket transport over real sockets on loopback, on both event loops."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import socket
import statistics
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import msgspec
import pytest
from event_loops import LOOPS

from dsdlab.protocol import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    AnyFrame,
    Channel,
    ChannelClosed,
    Close,
    ConnectFailed,
    Draft,
    Error,
    HandshakePolicy,
    Hello,
    ListenFailed,
    Open,
    Ping,
    Pong,
    ProtocolError,
    Refused,
    WebSocketChannel,
    Welcome,
    client_handshake,
    connect,
    decode,
    encode,
    pack_ids,
    serve,
    server_handshake,
    websocket,
)

Run = Callable[[Any], Any]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

POLICY = HandshakePolicy(
    "n", "tiny-target", "tok-1", 49152, 2048, (2,), ("cloud-ar",), token="secret", timeout_s=5.0
)
HELLO = Hello(PROTOCOL_VERSION, "c", "secret", "tiny-target", "tok-1", 0.0)
DRAFT_200 = Draft(7, 3, 700, pack_ids([5] * 63))  # 198 bytes: as near to 200 as ids allow


def url(port: int) -> str:
    return f"ws://127.0.0.1:{port}/"


async def echo(channel: Channel) -> None:
    """Shake hands, then send everything back."""
    await server_handshake(channel, POLICY)
    while True:
        await channel.send(await channel.recv())


async def mirror(channel: Channel) -> None:
    while True:
        await channel.send(await channel.recv())


async def assert_alive(port: int) -> None:
    """A newcomer is welcome and gets an answer."""
    channel = await connect(url(port))
    assert isinstance(await client_handshake(channel, HELLO), Welcome)
    await channel.send(Ping(5, 1.0))
    assert await channel.recv() == Ping(5, 1.0)
    await channel.close()


@asynccontextmanager
async def raw_client(port: int, **kwargs: Any) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with aiohttp.ClientSession() as session, session.ws_connect(url(port), **kwargs) as ws:
        yield ws


async def raw_frames(ws: aiohttp.ClientWebSocketResponse) -> list[AnyFrame]:
    """What the server says until it closes."""
    return [decode(m.data) async for m in ws if m.type is aiohttp.WSMsgType.BINARY]


@asynccontextmanager
async def tcp_server(on_connection: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]):  # type: ignore[no-untyped-def]
    writers = []

    async def wrapped(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await on_connection(reader, writer)

    server = await asyncio.start_server(wrapped, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        for writer in writers:
            writer.close()
        server.close()
        await server.wait_closed()


def frame_of(n_bytes: int) -> Open:
    empty = Open(1, "m", bytes(1 << 16), b"", 0, 1, True, 0.0, 0, 1.0, 0)
    return msgspec.structs.replace(empty, prompt=bytes((1 << 16) + n_bytes - len(encode(empty))))


def test_round_trips_and_byte_counts(run: Run) -> None:
    async def main() -> None:
        async with serve(mirror) as port:
            channel = await connect(url(port))
            frames: list[AnyFrame] = [
                Ping(1, 0.5),
                Draft(1, 0, 9, pack_ids(range(16))),
                Close(1),
                frame_of(1 << 17),
                Ping(2, 0.5),
            ]
            for frame in frames:
                await channel.send(frame)
            assert [await channel.recv() for _ in frames] == frames
            want = {
                "Ping": 2 * len(encode(Ping(1, 0.5))),
                "Draft": len(encode(frames[1])),
                "Close": 3,
                "Open": 1 << 17,
            }
            assert channel.bytes_sent == channel.bytes_received == want
            assert f"127.0.0.1:{port}" in channel.peer
            await channel.close()

    run(main())


@pytest.mark.parametrize("loop", sorted(LOOPS))
def test_rtt_of_a_200_byte_frame(loop: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the median; fails only on the 40 ms of a delayed acknowledgement, not on a busy machine."""

    async def main() -> list[float]:
        rtt_us = []
        async with serve(mirror) as port:
            channel = await connect(url(port))
            for _ in range(500):
                begin_s = time.perf_counter()
                await channel.send(DRAFT_200)
                await channel.recv()
                rtt_us.append((time.perf_counter() - begin_s) * 1e6)
            await channel.close()
        return rtt_us

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        median_us = statistics.median(runner.run(main()))
    with capsys.disabled():
        sys.stdout.write(
            f"\nRTT of {len(encode(DRAFT_200))} bytes over loopback, {loop}: {median_us:.0f} µs "
        )
    assert median_us < 10_000


def test_nodelay_on_both_ends(run: Run) -> None:
    async def main() -> None:
        seen = []

        async def handler(channel: Channel) -> None:
            assert isinstance(channel, WebSocketChannel)
            seen.append(nodelay(channel))

        def nodelay(channel: WebSocketChannel) -> int:
            sock = channel._ws.get_extra_info("socket")
            return int(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

        async with serve(handler) as port:
            channel = await connect(url(port))
            seen.append(nodelay(channel))
            with pytest.raises(ChannelClosed):
                await channel.recv()
            await channel.close()
        assert len(seen) == 2
        assert all(seen)

    run(main())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's TCP_INFO")
def test_one_segment_per_frame(run: Run) -> None:
    """The kernel's count of data segments grows by one per frame, in each direction."""

    def segments(channel: WebSocketChannel) -> tuple[int, int]:
        info = channel._ws.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, 11, 232)
        if len(info) < 160:
            pytest.skip("this kernel's TCP_INFO has no data segment counts")
        n_in, n_out = struct.unpack_from("<II", info, 152)  # tcpi_data_segs_in, tcpi_data_segs_out
        return n_in, n_out

    async def main() -> None:
        async with serve(mirror) as port:
            channel = await connect(url(port))
            n_in, n_out = segments(channel)
            if not n_out:
                pytest.skip("this kernel does not count data segments")
            for _ in range(50):
                await channel.send(DRAFT_200)
                await channel.recv()
            assert segments(channel) == (n_in + 50, n_out + 50)
            await channel.close()

    run(main())


def test_no_compression(run: Run) -> None:
    async def main() -> None:
        async with serve(mirror) as port:
            async with raw_client(port, compress=15) as ws:  # offers permessage-deflate
                assert ws.compress == 0
            channel = await connect(url(port))
            assert channel._ws.compress in (0, False)
            await channel.close()

    run(main())


def test_longest_frame_passes(run: Run) -> None:
    async def main() -> None:
        async with serve(mirror) as port:
            channel = await connect(url(port))
            await channel.send(frame_of(MAX_FRAME_BYTES))
            assert await channel.recv() == frame_of(MAX_FRAME_BYTES)
            with pytest.raises(ProtocolError) as caught:
                await channel.send(frame_of(MAX_FRAME_BYTES + 1))
            assert caught.value.code == "frame-too-large"
            await channel.send(Ping(1, 0.0))  # nothing of it left this side
            assert await channel.recv() == Ping(1, 0.0)
            await channel.close()

    run(main())


def test_oversized_message_closes_with_1009(run: Run) -> None:
    async def main() -> None:
        async with serve(echo) as port:
            async with raw_client(port) as ws:
                await ws.send_bytes(encode(HELLO))
                assert isinstance(decode((await ws.receive()).data), Welcome)
                await ws.send_bytes(bytes(MAX_FRAME_BYTES + 1))
                assert await raw_frames(ws) == []
                assert ws.close_code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
            await assert_alive(port)

    run(main())


def test_oversized_message_is_named_to_the_receiver(run: Run) -> None:
    async def main() -> None:
        caught: list[Exception] = []

        async def handler(channel: Channel) -> None:
            for _ in range(3):
                try:
                    await channel.recv()
                except (ProtocolError, ChannelClosed) as error:
                    caught.append(error)

        async with serve(handler) as port, raw_client(port) as ws:
            await ws.send_bytes(bytes(MAX_FRAME_BYTES + 1))
            await raw_frames(ws)
        assert [type(e) for e in caught] == [ProtocolError, ChannelClosed, ChannelClosed]
        assert isinstance(caught[0], ProtocolError)
        assert caught[0].code == "frame-too-large"

    run(main())


@pytest.mark.parametrize("greeted", [False, True], ids=["first", "later"])
@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        (b"\xc1garbage", "bad-frame", "not a frame"),
        (b"", "bad-frame", "not a frame"),
        (encode(Draft(1, 0, 0, b""))[:-2], "bad-frame", "not a frame"),
        ("hello", "bad-frame", "text message; allowed: binary"),
    ],
    ids=["garbage", "empty", "cut", "text"],
)
def test_bad_messages_are_refused(run: Run, message: Any, code: str, words: str, greeted: bool) -> None:
    async def main() -> None:
        async with serve(echo) as port:
            async with raw_client(port) as ws:
                if greeted:
                    await ws.send_bytes(encode(HELLO))
                    await ws.receive()
                await (ws.send_str if isinstance(message, str) else ws.send_bytes)(message)
                answers = await raw_frames(ws)
                assert len(answers) == 1
                assert isinstance(answers[0], Error)
                assert (answers[0].session, answers[0].code) == (0, code)
                assert words in answers[0].message
                assert ws.close_code == (1002 if greeted else 1000)
            await assert_alive(port)

    run(main())


@pytest.mark.parametrize(
    ("change", "code"),
    [({"token": "wrong"}, "token"), ({"version": 1}, "version"), ({"tokenizer": "tok-2"}, "tokenizer")],
    ids=["token", "version", "tokenizer"],
)
def test_wrong_hello_is_refused_with_the_reason(run: Run, change: dict[str, Any], code: str) -> None:
    async def main() -> None:
        async with serve(echo) as port:
            channel = await connect(url(port))
            with pytest.raises(Refused) as caught:
                await client_handshake(channel, msgspec.structs.replace(HELLO, **change))
            assert caught.value.code == code
            with pytest.raises(ChannelClosed):
                await channel.send(HELLO)
            await assert_alive(port)

    run(main())


def test_silent_client_holds_no_slot(run: Run) -> None:
    async def main() -> None:
        async def impatient(channel: Channel) -> None:
            await server_handshake(channel, replace(POLICY, timeout_s=0.3))
            await mirror(channel)

        async with serve(impatient, max_connections=1) as port:
            async with raw_client(port) as ws:
                with pytest.raises(ConnectFailed, match="HTTP status 503"):
                    await connect(url(port))
                [error] = await raw_frames(ws)
                assert isinstance(error, Error)
                assert error.code == "timeout"
            await assert_alive(port)

    run(main())


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS ClientHello
        b"\x00" * 5000,
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n",  # never finished
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
    ids=["tls", "zeros", "unfinished", "long header"],
)
def test_not_even_http(run: Run, request_bytes: bytes) -> None:
    async def main() -> None:
        async with serve(echo) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request_bytes)
            await writer.drain()
            await assert_alive(port)
            writer.close()

    run(main())


@pytest.mark.parametrize("broken", [b"\xc2\x80\0\0\0\0", b"\x82\x05hello", b"\x83\x80\0\0\0\0"])
def test_broken_websocket_framing(run: Run, broken: bytes) -> None:
    """Reserved bits, an unmasked client frame, an unknown opcode."""

    async def main() -> None:
        async with serve(echo) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(upgrade_request())
            await reader.readuntil(b"\r\n\r\n")
            writer.write(broken)
            await asyncio.wait_for(reader.read(), 5)
            writer.close()
            await assert_alive(port)

    run(main())


def test_plain_http_and_browsers_are_turned_away(run: Run) -> None:
    async def main() -> None:
        async with serve(echo) as port, aiohttp.ClientSession() as session:
            http = f"http://127.0.0.1:{port}/"
            async with session.get(http) as answer:
                assert answer.status == 426
                assert "WebSocket only" in await answer.text()
            async with session.get(http + "elsewhere") as answer:
                assert answer.status == 404
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await session.ws_connect(http, origin="http://evil.example")
            assert caught.value.status == 403
            await assert_alive(port)

    run(main())


def test_failing_handler(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async def handler(channel: Channel) -> None:
            await channel.recv()
            raise KeyError("a secret detail")

        async with serve(handler) as port:
            for _ in range(2):  # the server lives on
                channel = await connect(url(port))
                await channel.send(Ping(1, 0.0))
                assert await channel.recv() == Error(0, "internal", "the verifier failed; its log says why")
                with pytest.raises(ChannelClosed, match="code 1011"):
                    await channel.recv()
                await channel.close()

    run(main())
    assert "a secret detail" in caplog.text


def test_peer_closes(run: Run) -> None:
    """Frames sent before the close arrive, then ChannelClosed, every time."""

    async def main() -> None:
        async def handler(channel: Channel) -> None:
            await channel.send(Ping(1, 0.0))
            await channel.send(Ping(2, 0.0))

        async with serve(handler) as port:
            channel = await connect(url(port))
            await asyncio.sleep(0.05)
            assert [await channel.recv(), await channel.recv()] == [Ping(1, 0.0), Ping(2, 0.0)]
            for _ in range(5):
                with pytest.raises(ChannelClosed, match=r"closed by the peer \(code 1000"):
                    await channel.recv()
                with pytest.raises(ChannelClosed):
                    await channel.send(Close(1))
            await channel.close()
            await channel.close()

    run(main())


def test_close_here(run: Run) -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def handler(channel: Channel) -> None:
            try:
                await channel.recv()
            except ChannelClosed:
                ended.set()
                raise

        async with serve(handler) as port:
            channel = await connect(url(port))
            waiting = asyncio.ensure_future(channel.recv())
            await asyncio.sleep(0.01)
            await asyncio.gather(channel.close(), channel.close())
            with pytest.raises(ChannelClosed, match="closed here"):
                await waiting
            with pytest.raises(ChannelClosed):
                await channel.send(Close(1))
            await asyncio.wait_for(ended.wait(), 2)

    run(main())


def test_cut_connection(run: Run) -> None:
    """No closing handshake: a killed process, a reset."""

    async def main() -> None:
        ends: asyncio.Queue[ChannelClosed] = asyncio.Queue()

        async def handler(channel: Channel) -> None:
            await channel.send(Pong(1, 0.0))
            try:
                await channel.recv()
            except ChannelClosed as error:
                ends.put_nowait(error)

        async with serve(handler) as port:
            for reset in (False, True):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(upgrade_request())
                await reader.readuntil(b"\r\n\r\n")
                sock = writer.get_extra_info("socket")
                if reset:  # close() sends RST
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                await asyncio.wait_for(ends.get(), 2)

    run(main())


def test_cut_by_the_server(run: Run) -> None:
    async def main() -> None:
        async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(upgrade_response(await reader.readuntil(b"\r\n\r\n")))
            data = encode(Ping(1, 0.0))
            writer.write(bytes([0x82, len(data)]) + data)
            await reader.read(1)
            writer.transport.abort()

        async with tcp_server(cut) as port:
            channel = await connect(url(port))
            await channel.send(Ping(1, 0.0))
            assert await asyncio.wait_for(channel.recv(), 2) == Ping(1, 0.0)
            with pytest.raises(ChannelClosed, match="connection lost"):
                await asyncio.wait_for(channel.recv(), 2)
            with pytest.raises(ChannelClosed):
                await channel.send(Ping(2, 0.0))
            await channel.close()

    run(main())


def test_heartbeat_finds_a_dead_client(run: Run) -> None:
    async def main() -> None:
        ends: asyncio.Queue[ChannelClosed] = asyncio.Queue()

        async def handler(channel: Channel) -> None:
            try:
                await channel.recv()
            except ChannelClosed as error:
                ends.put_nowait(error)

        async with serve(handler, heartbeat_s=0.1) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(upgrade_request())
            await reader.readuntil(b"\r\n\r\n")
            begin_s = time.monotonic()
            error = await asyncio.wait_for(ends.get(), 5)
            assert 0.1 < time.monotonic() - begin_s < 3
            assert "PONG" in str(error)
            writer.close()

    run(main())


def test_heartbeat_finds_a_dead_server(run: Run) -> None:
    async def main() -> None:
        async def dead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(upgrade_response(await reader.readuntil(b"\r\n\r\n")))

        async with tcp_server(dead) as port:
            channel = await connect(url(port), heartbeat_s=0.1)
            with pytest.raises(ChannelClosed, match="PONG"):
                await asyncio.wait_for(channel.recv(), 5)
            begin_s = time.monotonic()
            await channel.close()
            assert time.monotonic() - begin_s < 1

    run(main())


def test_busy_nodes_outlive_the_heartbeat(run: Run) -> None:
    """Neither side calls recv for many heartbeats, as in a long computation: the connection holds."""

    async def main() -> None:
        async def handler(channel: Channel) -> None:
            await asyncio.sleep(0.6)
            await channel.send(await channel.recv())

        async with serve(handler, heartbeat_s=0.2) as port:
            channel = await connect(url(port), heartbeat_s=0.2)
            await channel.send(Ping(1, 0.0))
            await asyncio.sleep(0.6)
            assert await channel.recv() == Ping(1, 0.0)
            await channel.close()

    run(main())


def test_cancelled_recv_loses_nothing(run: Run) -> None:
    async def main() -> None:
        async with serve(mirror) as port:
            channel = await connect(url(port))
            for n in range(20):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.001):
                        await channel.recv()
                await channel.send(Ping(n, 0.0))
                assert await channel.recv() == Ping(n, 0.0)
            await channel.close()

    run(main())


def test_flood_is_held_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver that does not read bounds its queue; the sender waits; nothing is lost."""
    monkeypatch.setattr(websocket, "QUEUE_FRAMES", 4)
    n_frames = 64
    big = frame_of(1 << 19)

    async def main() -> None:
        go = asyncio.Event()
        got = []

        async def handler(channel: Channel) -> None:
            assert isinstance(channel, WebSocketChannel)
            await go.wait()
            assert len(channel._queue) == 4
            got.extend([await channel.recv() for _ in range(n_frames)])
            await channel.send(Close(1))

        async with serve(handler) as port:
            channel = await connect(url(port))

            async def flood() -> None:
                for _ in range(n_frames):
                    await channel.send(big)

            sending = asyncio.ensure_future(flood())
            await asyncio.sleep(0.15)
            assert not sending.done()
            go.set()
            await sending
            assert await channel.recv() == Close(1)
            await channel.close()
        assert got == [big] * n_frames

    run(main())


def test_flood_of_refused_messages_does_not_jam(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that reads on after errors gets what follows them, however many there were."""
    monkeypatch.setattr(websocket, "QUEUE_FRAMES", 4)

    async def main() -> None:
        n_errors = 0

        async def handler(channel: Channel) -> None:
            nonlocal n_errors
            await asyncio.sleep(0.05)
            while True:
                try:
                    await channel.send(await channel.recv())
                except ProtocolError:
                    n_errors += 1

        async with serve(handler) as port, raw_client(port) as ws:
            for _ in range(20):
                await ws.send_str("hello")
            await ws.send_bytes(encode(Close(1)))
            assert decode((await asyncio.wait_for(ws.receive(), 5)).data) == Close(1)
        assert n_errors == 20

    run(main())


def test_leaving_serve_closes_connections(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "GRACE_S", 0.1)

    async def main() -> None:
        cancelled = asyncio.Event()

        async def stubborn(_: Channel) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.set()

        begin_s = time.monotonic()
        async with serve(stubborn) as port:
            channel = await connect(url(port))
        with pytest.raises(ChannelClosed, match=r"code 1001"):
            await channel.recv()
        await channel.close()
        assert cancelled.is_set()
        assert time.monotonic() - begin_s < 5
        with pytest.raises(ConnectFailed):
            await connect(url(port))

    run(main())


def test_port_in_use(run: Run) -> None:
    async def main() -> None:
        async with serve(mirror) as port:
            with pytest.raises(
                ListenFailed, match=rf"^cannot listen on 127\.0\.0\.1:{port}: the port is in use$"
            ):
                async with serve(mirror, port=port):
                    pass
        async with serve(mirror, port=port) as again:  # free again
            assert again == port

    run(main())


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("192.0.2.1", 0)])
def test_cannot_listen(run: Run, host: str, port: int) -> None:
    async def main() -> None:
        with pytest.raises(ListenFailed, match=f"^cannot listen on {host}:{port}: .+") as caught:
            async with serve(mirror, host, port):
                pass
        assert "\n" not in str(caught.value)

    run(main())


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("ws://127.0.0.1:{closed}/", "connection refused"),
        ("ws://no-such-host.invalid:8000/", "host name 'no-such-host.invalid' not found"),
        ("http://127.0.0.1:{closed}/", "allowed: ws://"),
        ("127.0.0.1:8000", "allowed: ws://"),
        ("ws://", "not a URL"),
        ("ws://127.0.0.1:99999/", "not a URL|port|no WebSocket"),
    ],
)
def test_connect_fails_in_one_line(run: Run, target: str, reason: str) -> None:
    async def main() -> None:
        target_url = target.format(closed=closed_port())
        with pytest.raises(ConnectFailed, match=reason) as caught:
            await connect(target_url, timeout_s=5)
        assert str(caught.value).startswith(f"cannot connect to {target_url}: ")
        assert "\n" not in str(caught.value)

    run(main())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", r"no WebSocket there \(HTTP status 200\)"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "no WebSocket there"),
        (b"", "no WebSocket there"),
        (None, "no answer within 0.2 s"),
    ],
    ids=["http", "ssh", "closed at once", "silent"],
)
def test_not_a_websocket(run: Run, answer: bytes | None, reason: str) -> None:
    async def main() -> None:
        async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            if answer is not None:
                writer.write(answer)
                writer.close()

        async with tcp_server(other) as port:
            with pytest.raises(ConnectFailed, match=f"^cannot connect to {url(port)}: {reason}") as caught:
                await connect(url(port), timeout_s=5 if answer is not None else 0.2)
            assert "\n" not in str(caught.value)

    run(main())


def upgrade_request() -> bytes:
    return (
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )


def upgrade_response(request: bytes) -> bytes:
    [key] = [
        line.split(b": ")[1]
        for line in request.split(b"\r\n")
        if line.lower().startswith(b"sec-websocket-key")
    ]
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )
